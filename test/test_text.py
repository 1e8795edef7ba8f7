"""Text files and tokens: line ends, archives, damaged files; GPT-2's BPE and one trained on own text."""

import gzip
import json
import os
import random
import re
import signal
import sys
import time
import tracemalloc
import zipfile

import preprocess
from config import InputError
from test.helpers import (
    GOLDEN,
    GPT2,
    RAW,
    dataset_files,
    golden,
    preprocess_words,
    run_preprocess,
    sentences_of,
)
from text import files
from text import tokens as text
from text.binarized import BOS, EOS, UNK, Dictionary
from text.tokens import BPE_FILES, load_tokenizer

import numpy as np
import pytest

CHINESE = [
    "自监督学习 不需要 人工标注的数据。",
    "学生网络读取被遮盖的文本，预测教师网络的表示。",
    "2022年，data2vec 统一了语音、图像和文本。",
    "",
]


# ---------------------------------------------------------------------------------------------- tokens


@golden
def test_words_encoded_one_by_one_give_the_tokens_of_the_whole_line(tokenizers):
    dictionary = Dictionary(GPT2 / "dict.txt")
    tokenizer = load_tokenizer(GPT2, dictionary)
    rng = random.Random(0)
    parts = (
        [
            "a",
            "The",
            "word",
            "é",
            "中文",
            "٣",
            "12",
            "'s",
            "'LL",
            "n't",
            "...",
            "!",
            "<s>",
            "<|endoftext|>",
            "\u0301",
        ]
        + [" "] * 8
        + [
            "  ",
            "\t",
            "\v",
            "\x1c",
            "\x85",
            "\xa0",
            "\u2003",
            "\u2028",
            "\u3000",
            "\u200b",
            "\ufeff",
            "\0",
            "👩‍👩",
        ]
    )
    for _ in range(5000):
        line = "".join(rng.choice(parts) for _ in range(rng.randrange(12)))
        whole = tokenizer.bpe.encode(line.strip(), add_special_tokens=False).ids
        expected = [dictionary.ids[str(i)] for i in whole] + [EOS]
        assert tokenizer([line])[0].tolist() == expected, repr(line)


@golden
def test_the_tokenizer_of_a_folder_gives_its_sentences(tokenizers, tmp_path):
    lines = (RAW / "wiki.test.raw").read_text(encoding="utf-8").split("\n")[:-1]
    for folder, bpe_files in (
        ("bpe-bin", (GPT2 / "encoder.json", GPT2 / "vocab.bpe")),
        ("words-bin", ()),
    ):
        folder = GOLDEN / "corpora" / folder
        rows = load_tokenizer(folder, Dictionary(folder / "dict.txt"), *bpe_files)(lines)
        assert all(row.dtype == np.int64 for row in rows)
        assert [row.tolist() for row in rows] == sentences_of(folder, "test")
    dictionary = Dictionary(GPT2 / "dict.txt")
    with pytest.raises(
        InputError, match="ids of a BPE, but encoder.json and vocab.bpe are not beside it"
    ):
        load_tokenizer(tmp_path, dictionary)
    (tmp_path / "encoder.json").write_bytes((GPT2 / "encoder.json").read_bytes())
    with pytest.raises(InputError, match="no vocab.bpe in"):
        load_tokenizer(tmp_path, dictionary)


@golden
def test_cut_or_foreign_bpe_files_are_refused(tokenizers, tmp_path):
    encoder, vocab = (GPT2 / "encoder.json").read_text(), (GPT2 / "vocab.bpe").read_text()
    for texts, message in (
        ((encoder[:1000], vocab), "encoder.json: not JSON"),
        (("[" * 100_000, vocab), "encoder.json: not JSON"),
        (('{"a": 1e999}', vocab), "expected GPT-2's encoder.json"),
        ((r'{"\ud800": 1}', vocab), "encoder.json: not JSON"),
        (("[1, 2]", vocab), "expected GPT-2's encoder.json"),
        ((encoder, vocab[: len(vocab) // 2]), "does not merge two tokens|has no merge"),
        (
            (encoder, "#version: 0.2\n" + "\n".join(vocab.split("\n")[1:900])),
            "one of the files is cut",
        ),
        ((json.dumps({"a": 0}), "#version: 0.2\n"), "255 of the 256 single bytes"),
    ):
        for name, content in zip(BPE_FILES, texts):
            (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            text.read_bpe(tmp_path / "encoder.json", tmp_path / "vocab.bpe")


# ---------------------------------------------------------------------------------------------- own BPE


def test_a_bpe_trained_on_chinese_restores_every_text(tokenizers, tmp_path):
    (tmp_path / "zh.txt").write_text("\n".join(CHINESE * 30) + "\n", encoding="utf-8")
    (tmp_path / "other.txt").write_text("生僻字𪚥、表情🙂 and Ünïcode\n", encoding="utf-8")
    texts = dict(train=[tmp_path / "zh.txt"], valid=[tmp_path / "other.txt"])
    for name, workers in (("one", 1), ("two", 2)):
        run_preprocess(
            tmp_path / name, "--bpe", "train", "--vocab_size", 400, "--workers", workers, **texts
        )
    one = dataset_files(tmp_path / "one")
    assert one == dataset_files(tmp_path / "two")
    assert one.keys() >= {"encoder.json", "vocab.bpe", "dict.txt", "train.idx", "valid.idx"}

    dictionary = Dictionary(tmp_path / "one" / "dict.txt")
    tokenizer = load_tokenizer(tmp_path / "one", dictionary)
    vocab = json.loads(one["encoder.json"])
    assert len(vocab) <= 400 and sorted(vocab.values()) == list(range(len(vocab)))
    assert dictionary.rows % 8 == 0 and {str(i) for i in vocab.values()} <= dictionary.ids.keys()
    for split, names in texts.items():
        lines = names[0].read_text(encoding="utf-8").split("\n")[:-1]
        rows = sentences_of(tmp_path / "one", split)
        assert rows == [row.tolist() for row in tokenizer(lines)]
        assert UNK not in sum(rows, [])
        assert [tokenizer.decode(row, dictionary) for row in rows] == [
            f"{line}</s>" for line in lines
        ]
    odd = [BOS, *rows[0][:-1], UNK, UNK, dictionary.mask_id, *rows[0]]
    assert tokenizer.decode(odd, dictionary) == f"<s>{lines[0]}<unk><unk><mask>{lines[0]}</s>"
    # it has learned merges: far fewer tokens than bytes
    assert (
        len(sum(sentences_of(tmp_path / "one", "train"), []))
        < (tmp_path / "zh.txt").stat().st_size / 4
    )


def test_a_bpe_is_trained_on_a_sample_spread_over_the_text(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 10_000)
    content = "".join(f"word{i // 1000} " * 10 + "\n" for i in range(20_000))
    (tmp_path / "t.txt").write_text(content)
    seen = []
    monkeypatch.setattr(text, "lines_of", lambda chunk: seen.append(chunk) or chunk.split("\n"))
    text.train_bpe([str(tmp_path / "t.txt")], vocab_size=400, sample_mb=1)
    assert 0.8e6 < sum(map(len, seen)) < 1.2e6
    assert len({re.match("word[0-9]+", chunk)[0] for chunk in seen}) == 20


def test_ctrl_c_is_answered_while_a_bpe_is_trained_and_an_error_of_the_trainer_is_raised(
    tokenizers, tmp_path, monkeypatch, capsys
):
    class Trainer:
        def train_from_iterator(self, *_):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    (tmp_path / "t.txt").write_text("a b\n")
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job begins with it ignored
    monkeypatch.setattr(text, "byte_level", Trainer)
    argv = ["--train", str(tmp_path / "t.txt"), "--dest", str(tmp_path / "out"), "--bpe", "train"]
    began = time.monotonic()
    assert preprocess.main(argv) == 130 and time.monotonic() < began + 0.9
    assert "interrupted; the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "train_from_iterator", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preprocess.main(argv)


def test_bpe_training_on_text_that_is_not_utf_8_names_the_line(tokenizers, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"good\ncaf\xe9\n")
    with pytest.raises(InputError, match="t.txt, line 2: not UTF-8"):
        run_preprocess(tmp_path / "out", "--bpe", "train", train=[tmp_path / "t.txt"])
    assert not dataset_files(tmp_path / "out")


def test_without_the_tokenizers_package_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "t.txt").write_text("a b\n")
    with pytest.raises(InputError, match="pip install tokenizers"):
        run_preprocess(tmp_path / "out", "--bpe", "train", train=[tmp_path / "t.txt"])


# ---------------------------------------------------------------------------------------------- files


def test_lines_end_as_in_pythons_text_files_wherever_a_chunk_ends(tmp_path, monkeypatch):
    rng = random.Random(0)
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(files, "CHUNK", size)
        content = "".join(
            rng.choice(["\n", "\r", "\r\n", "a", "b ", "é", "中", "\x85", "\u2028", "\x0b"])
            for _ in range(300)
        )
        (tmp_path / "t.txt").write_text(content, encoding="utf-8", newline="")
        with open(tmp_path / "t.txt", encoding="utf-8") as f:
            expected = [line.rstrip("\n") for line in f]
        chunks = list(files.read_chunks(str(tmp_path / "t.txt")))
        assert [line for chunk in chunks for line in text.lines_of(chunk)] == expected


def test_a_byte_order_mark_is_left_out_and_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "CHUNK", 8)
    parts = dict(one="\ufeffEvery word\nis \ufeffkept\n", two="\ufeff", three="\ufeff\nlast\0 line")
    for name, content in parts.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    preprocess_words(tmp_path / "out", train=[tmp_path / name for name in parts])
    words = Dictionary(tmp_path / "out" / "dict.txt")
    rows = [words.decode(row[:-1]) for row in sentences_of(tmp_path / "out", "train")]
    assert rows == ["Every word", "is \ufeffkept", "", "", "last\0 line"]
    said = capsys.readouterr().err
    assert (
        said.count("begins with a byte order mark") == 3
        and said.count("three: holds NUL characters") == 1
    )


@pytest.mark.parametrize("how", ["words", "bpe"])
def test_a_very_long_line_is_read_in_pieces_and_gives_the_same_dataset(
    tmp_path, monkeypatch, how, request
):
    rng = random.Random(0)
    words = ["a", "b,", "don't", "é", "中文", "...", "  x", "\u3000", "\t", "\x85", "12"]
    lines = [" ".join(rng.choice(words) for _ in range(n)) for n in (3, 4000, 1, 0, 2500)]
    (tmp_path / "t.txt").write_text("\n".join(lines), encoding="utf-8", newline="")
    (tmp_path / "u.txt").write_text(lines[1], encoding="utf-8", newline="")
    argv = ["--bpe", "none", "--workers", 1]
    if how == "bpe":
        request.getfixturevalue("tokenizers")
        run_preprocess(
            tmp_path / "bpe", "--bpe", "train", "--vocab_size", 300, train=[tmp_path / "t.txt"]
        )
        named = [f"--{name.replace('.', '_')}" for name in BPE_FILES]
        argv = ["--bpe", "gpt2", "--workers", 1]
        argv += sum(([flag, tmp_path / "bpe" / name] for flag, name in zip(named, BPE_FILES)), [])
    made = []
    for folder, chunk, long in (("whole", 1 << 20, 1 << 20), ("cut", 50, 300)):
        monkeypatch.setattr(files, "CHUNK", chunk)
        monkeypatch.setattr(files, "LONG", long)
        run_preprocess(
            tmp_path / folder,
            *argv,
            train=[tmp_path / "t.txt", tmp_path / "u.txt"],
            valid=[tmp_path / "u.txt"],
        )
        made.append(dataset_files(tmp_path / folder))
    assert made[0] == made[1] and len(sentences_of(tmp_path / "cut", "train")) == 7
    assert (
        sum(is_cut for _, is_cut in files.whole_lines(str(tmp_path / "t.txt"), lambda n: None)) > 50
    )


def test_an_endless_line_takes_little_memory(tmp_path):
    with open(tmp_path / "t.txt", "w") as file:
        for _ in range(15):
            file.write("word other " * 100_000)
    with gzip.open(tmp_path / "zeros.gz", "wb") as file:
        for _ in range(80):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    preprocess_words(tmp_path / "out", train=[tmp_path / "t.txt"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(row) for row in sentences_of(tmp_path / "out", "train")] == [
        3_000_001
    ] and peak < 100e6
    with pytest.raises(InputError, match="zeros.gz: 6. MiB without a line end or a space"):
        preprocess_words(tmp_path / "zeros", train=[tmp_path / "zeros.gz"])


def test_unreadable_text_is_one_line_that_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 16)
    good = b"one\r\ntwo\rthree three three\n"
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        z.writestr("inside", good)
    contents = {
        "latin.txt": good + b"caf\xe9\n",
        "cut.txt": good + b"\n\xe4\xb8",
        "surrogate.txt": b"\xed\xa0\x80",
        "cut.gz": gzip.compress(good * 50)[:-9],
        "plain.gz": good,
        "broken.zip": (tmp_path / "z.zip").read_bytes()[:-30],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, message in (
        ("latin.txt", "latin.txt, line 4: not UTF-8"),
        ("cut.txt", "cut.txt, line 5: not UTF-8 .unexpected end"),
        ("surrogate.txt", "line 1: not UTF-8"),
        ("cut.gz", "cut.gz: cannot be read: Compressed file ended"),
        ("plain.gz", "plain.gz: cannot be read: Not a gzipped file"),
        (
            "z.zip",
            "z.zip: an archive; name one of its members, as ARCHIVE.zip:MEMBER; it holds inside",
        ),
        ("z.zip:nothing", "has no member 'nothing'"),
        ("broken.zip:inside", "not a readable zip"),
        ("none.txt", "none.txt: no such file"),
        (".", "not a file"),
    ):
        with pytest.raises(InputError, match=message):
            preprocess_words(tmp_path / "out", train=[tmp_path / name])
    assert not list((tmp_path / "out").glob("*.idx"))


def test_a_damaged_encrypted_or_oddly_packed_zip_is_one_line(tmp_path):
    rng = random.Random(0)
    content = "".join(f"line {i} of the text\n" for i in range(400))
    refused = 0
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "good.zip", "w", method) as z:
            z.writestr("t.txt", content)
        good = (tmp_path / "good.zip").read_bytes()
        assert "".join(files.read_chunks(f"{tmp_path / 'good.zip'}:t.txt")) == content
        central, changes = good.rindex(b"PK\x01\x02"), []
        for at in (6, central + 8):  # encrypted
            changes.append([(at, good[at] | 1)])
        for packed in (9, 14, 99):  # Deflate64, LZMA, one that does not exist
            changes.append([(8, packed), (central + 10, packed)])
        ends = [*range(60), *range(central, len(good))]
        changes += [[(at, rng.randrange(256))] for at in ends + rng.sample(range(len(good)), 200)]
        for change in changes:
            raw = bytearray(good)
            for at, value in change:
                raw[at] = value
            (tmp_path / "bad.zip").write_bytes(raw)
            name = f"{tmp_path / 'bad.zip'}:t.txt"
            try:
                files.disk_size([name])
                assert "".join(files.read_chunks(name)) == content
            except InputError as e:
                assert "bad.zip" in str(e)
                refused += 1
    assert refused > 400

    with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_LZMA) as z:
        z.writestr("t.txt", content)
    raw = bytearray((tmp_path / "bad.zip").read_bytes())
    raw[60:120] = bytes(60)
    (tmp_path / "bad.zip").write_bytes(raw)
    with pytest.raises(InputError, match="bad.zip:t.txt: cannot be read: "):
        preprocess_words(tmp_path / "out", train=[f"{tmp_path / 'bad.zip'}:t.txt"])
