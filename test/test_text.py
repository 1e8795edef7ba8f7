"""Text files and tokens: line ends, archives, damaged files; GPT-2's BPE and one trained here."""

import bz2
import gzip
import json
import lzma
import math
import os
import random
import re
import signal
import sys
import tarfile
import threading
import zipfile

from config import InputError
from test.converting import write_bpe
from test.helpers import GPT2, dataset_files, golden, preprocess_words, run_preprocess, sentences_of
from text import files, tokens
from text.binarized import BOS, EOS, UNK, Dictionary
from text.tokens import BPE_FILES, find_text_files, load_tokenizer

import pytest


def test_json_has_null_for_what_is_no_number():
    rows = {"a": [math.inf, {"b": math.nan}], "c": (1.5, "inf", None)}
    assert files.with_nulls(rows) == {"a": [None, {"b": None}], "c": [1.5, "inf", None]}


CHINESE = ["自监督学习 不需要 人工标注的数据。", "2022年，data2vec 统一了语音、图像和文本。", ""]

# ---------------------------------------------------------------------------------------- tokens


@golden
def test_words_encoded_one_by_one_give_the_tokens_of_the_whole_line(tokenizers):
    dictionary = Dictionary(GPT2 / "dict.txt")
    tokenizer = load_tokenizer(GPT2, dictionary)
    rng = random.Random(0)
    parts = "a The word é 中文 ٣ 12 's 'LL n't ... ! <s> <|endoftext|> \u0301".split()
    parts += [" "] * 8 + ["  ", *"\t\v\x1c\x85\xa0\u2003\u2028\u3000\u200b\ufeff\0", "👩‍👩"]
    for _ in range(5000):
        line = "".join(rng.choice(parts) for _ in range(rng.randrange(12)))
        text = files.visible(line).strip()
        ids = tokenizer.bpe.encode(text, add_special_tokens=False).ids
        expected = [dictionary.ids[str(i)] for i in ids] + [EOS]
        assert tokenizer([line])[0].tolist() == expected, repr(line)


def test_text_files_are_those_named_else_those_of_the_folder(tmp_path):
    for name in ("dict.txt", "other.txt"):
        (tmp_path / name).write_text("12 1\n13 1\n")
    dictionary = Dictionary(tmp_path / "dict.txt")
    other = dict.fromkeys(["dict.txt"], tmp_path / "other.txt")
    assert find_text_files(tmp_path, {}) == {"dict.txt": tmp_path / "dict.txt"}
    assert find_text_files(tmp_path, other) == find_text_files(None, other) == other
    with pytest.raises(InputError, match="nothing: no such file, for vocab.bpe"):
        find_text_files(tmp_path, {"vocab.bpe": "nothing"})
    with pytest.raises(InputError, match="holds the ids of a BPE"):
        load_tokenizer(tmp_path, dictionary)
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(InputError, match="no vocab.bpe,"):
        load_tokenizer(tmp_path, dictionary)


@golden
def test_cut_or_foreign_bpe_files_are_refused_and_special_tokens_not(tokenizers, tmp_path):
    encoder, vocab = ((GPT2 / name).read_text() for name in BPE_FILES)
    few = "#version: 0.2\n" + "\n".join(vocab.split("\n")[1:900])
    special = json.dumps(json.loads(encoder) | {"@@PADDING@@": 50257, "[CLS]": 50258})
    for texts, message in (
        ((encoder[:1000], vocab), "not GPT-2's encoder.json"),
        (("[" * 100_000, vocab), "not GPT-2's encoder.json"),
        (('{"a": 1e999}', vocab), "not GPT-2's encoder.json"),
        ((r'{"\ud800": 1}', vocab), "not GPT-2's encoder.json"),
        (("[1, 2]", vocab), "not GPT-2's encoder.json"),
        ((encoder, vocab[: len(vocab) // 2]), "does not merge two tokens|has no merge"),
        ((encoder, few), "one of the files is cut"),
        ((json.dumps({"a": 0}), "#version: 0.2\n"), "255 of the 256 single bytes"),
    ):
        paths = [tmp_path / name for name in BPE_FILES]
        for path, content in zip(paths, texts):
            path.write_text(content)
        with pytest.raises(InputError, match=message):
            tokens.read_bpe(*paths)
    paths[0].write_text(special)
    paths[1].write_text(vocab)
    assert 50257 not in tokens.read_bpe(*paths).encode("@@PADDING@@").ids


def test_a_vocab_json_is_refused_beside_a_dictionary_of_other_ids(tokenizers, tmp_path):
    write_bpe(tmp_path)
    vocab = json.loads((tmp_path / "encoder.json").read_text())
    vocab = {"<s>": 0} | {token: i + 4 for token, i in vocab.items()}
    (tmp_path / "encoder.json").write_text(json.dumps(vocab))
    with pytest.raises(InputError, match="dict.txt: not of this BPE, which holds <s>"):
        load_tokenizer(tmp_path, Dictionary(tmp_path / "dict.txt"))
    # of its own ids it is one
    (tmp_path / "dict.txt").write_text("".join(f"{i} 1\n" for i in vocab.values()))
    assert len(load_tokenizer(tmp_path, Dictionary(tmp_path / "dict.txt"))(["the"])[0]) == 2


# --------------------------------------------------------------------------------------- own BPE


def test_a_bpe_trained_on_chinese_restores_every_text(tokenizers, tmp_path):
    (tmp_path / "zh.txt").write_text("\n".join(CHINESE * 30) + "\n", encoding="utf-8")
    (tmp_path / "other.txt").write_text("生僻字𪚥、表情🙂 and Ünïcode\n", encoding="utf-8")
    texts = dict(train=[tmp_path / "zh.txt"], valid=[tmp_path / "other.txt"])
    folder = tmp_path / "out"
    run_preprocess(folder, "--bpe", "train", "--vocab_size", 400, **texts)
    dictionary = Dictionary(folder / "dict.txt")
    tokenizer = load_tokenizer(folder, dictionary)
    vocab = json.loads((folder / "encoder.json").read_text())
    assert len(vocab) <= 400 and sorted(vocab.values()) == list(range(len(vocab)))
    assert dictionary.rows % 8 == 0 and {str(i) for i in vocab.values()} <= dictionary.ids.keys()
    for split, names in texts.items():
        lines = names[0].read_text(encoding="utf-8").split("\n")[:-1]
        rows = sentences_of(folder, split)
        assert rows == [row.tolist() for row in tokenizer(lines)] and UNK not in sum(rows, [])
        texts_again = [tokenizer.decode(row, dictionary) for row in rows]
        assert texts_again == [f"{line}</s>" for line in lines]
    odd = [BOS, *rows[0][:-1], UNK, UNK, dictionary.mask_id, *rows[0]]
    assert tokenizer.decode(odd, dictionary) == f"<s>{lines[0]}<unk><unk><mask>{lines[0]}</s>"
    # it has learned merges: far fewer tokens than bytes
    count = len(sum(sentences_of(folder, "train"), []))
    assert count < (tmp_path / "zh.txt").stat().st_size / 4


def test_a_bpe_is_trained_on_a_sample_spread_over_the_text(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 10_000)
    lines = [f"word{i // 1000} " * 10 + "\n" for i in range(20_000)]
    (tmp_path / "t.txt").write_text("".join(lines))
    (tmp_path / "t.gz").write_bytes(gzip.compress("".join(lines).encode()))
    sample = []
    monkeypatch.setattr(tokens, "lines_of", lambda chunk: sample.append(chunk) or [chunk])
    for name in ("t.txt", "t.gz"):
        sample.clear()
        tokens.train_bpe([str(tmp_path / name)], vocab_size=400, sample_mb=1)
        assert 0.8e6 < sum(map(len, sample)) < 1.2e6
        assert len({re.match("word[0-9]+", chunk)[0] for chunk in sample}) == 20


def test_a_bpe_is_trained_on_pieces_of_a_long_run_and_on_ordinary_text_as_it_is(
    tokenizers, tmp_path, monkeypatch, capsys
):
    bpes, byte_level = [], tokens.byte_level
    monkeypatch.setattr(tokens, "byte_level", lambda: bpes.append(byte_level()) or bpes[-1])
    lines = ["The first, don't  you 12345 ?!...", *CHINESE, "word" * 700, "a" + " " * 2000]
    (tmp_path / "t.txt").write_text("\n".join(lines * 3), encoding="utf-8")
    trained = tokens.train_bpe([str(tmp_path / "t.txt")], vocab_size=300, sample_mb=1)
    assert "300 tokens on" in capsys.readouterr().out
    cut = bpes[0].pre_tokenizer
    for text in lines:
        assert cut.pre_tokenize_str(text) == byte_level().pre_tokenizer.pre_tokenize_str(text)
    for text in ("ACGT" * 50_000, "文" * 9999, "a" + " " * 9999, "?" * 9999):
        lengths = [len(piece) for piece, _ in cut.pre_tokenize_str(text)]
        assert max(lengths) == 3000 and sum(lengths) >= len(text)
    # the same files as without the cut
    monkeypatch.setattr(tokenizers.pre_tokenizers, "Sequence", lambda parts: parts[0])
    assert trained == tokens.train_bpe([str(tmp_path / "t.txt")], vocab_size=300, sample_mb=1)
    # one line that is longer than the sample
    (tmp_path / "t.txt").write_text("one and all " * 100_000)
    tokens.train_bpe([str(tmp_path / "t.txt")], vocab_size=260, sample_mb=1)
    assert "260 tokens on 1,000,000 characters" in capsys.readouterr().out


def test_ctrl_c_and_a_trainers_error_end_the_training_of_a_bpe(tokenizers, tmp_path, monkeypatch):
    at_work, released = threading.Event(), threading.Event()

    class Trainer:
        pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()

        def train_from_iterator(self, *_):
            at_work.set()
            # the real one answers none; and one that comes while nobody waits is answered later
            is_main = threading.current_thread() is threading.main_thread()
            while not is_main and not released.wait(0.1):
                os.kill(os.getpid(), signal.SIGINT)
            at_work.clear()

    def once(*_):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    (tmp_path / "t.txt").write_text("a b\n")
    signal.signal(signal.SIGINT, once)
    monkeypatch.setattr(tokens, "byte_level", Trainer)
    with pytest.raises(KeyboardInterrupt):
        tokens.train_bpe([str(tmp_path / "t.txt")], 300, 1)
    assert at_work.is_set()  # nobody waited for the trainer
    released.set()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(Trainer, "train_from_iterator", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokens.train_bpe([str(tmp_path / "t.txt")], 300, 1)


def test_without_the_tokenizers_package_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "t.txt").write_text("a b\n")
    with pytest.raises(InputError, match="pip install tokenizers"):
        run_preprocess(tmp_path / "out", "--bpe", "train", train=[tmp_path / "t.txt"])


# ----------------------------------------------------------------------------------------- files


def test_lines_end_as_in_pythons_text_files_wherever_a_chunk_ends(tmp_path, monkeypatch):
    rng = random.Random(0)
    parts = ["\n", "\r", "\r\n", "a", "b ", "é", "中", "\x85", "\u2028", "\x0b"]
    path = tmp_path / "t.txt"
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(files, "CHUNK", size)
        path.write_text("".join(rng.choices(parts, k=300)), encoding="utf-8", newline="")
        with open(path, encoding="utf-8") as f:
            expected = [line.rstrip("\n") for line in f]
        chunks = files.read_chunks(str(path))
        assert [line for chunk in chunks for line in tokens.lines_of(chunk)] == expected


def test_marks_that_begin_lines_and_lines_without_width_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "CHUNK", 8)
    path = tmp_path / "t.txt"
    for content, lines in (
        (
            "\ufeffEvery word\nis \ufeffkept\n\ufeff\ufeffbut\r\ufeffmarks\n",
            "Every word|is \ufeffkept|but|marks",
        ),
        ("\ufeff", ""),
        (
            "\ufeff\nlast\0 line\n \u200b\u2060\t\n\u200bword \u200b\n\u2060",
            "|last\0 line||\u200bword \u200b",
        ),
        ("a\u200b\n \nb", "a\u200b| |b"),
    ):
        path.write_text(content, encoding="utf-8")
        text = "".join(files.read_chunks(str(path)))
        assert text.removesuffix("\n").split("\n") == lines.split("|")
    notes = capsys.readouterr().err
    assert notes.count("byte order mark") == 1 and notes.count("t.txt: holds NUL") == 1
    # text is read in the same way where a dataset's tokens are met again
    tokenizer = tokens.Tokenizer({"but": 4}, "<u2")
    assert [row.tolist() for row in tokenizer(["\ufeffbut", "\u200b"])] == [[4, 2], [2]]


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ("text,label\na b,1\n", "plain text"),
        ('{"text": "a b"}\n' * 30 + "\n", "t.txt: read as plain text"),
        ('{"text": "a b"}\n' * 3 + "a { b }\n[1]\n3\n", ""),
        ("a </s>\nb\n", "</s>"),
        ("a b\n<pad>", "<pad>"),
        ("<s>a</s> <mask> <unk>\n", ""),
    ],
)
def test_what_may_not_be_meant_as_text_is_noted_once(tmp_path, content, note, capsys):
    path = tmp_path / ("t.csv" if "label" in content else "t.txt")
    path.write_text(content)
    preprocess_words(tmp_path / "out", train=[path])
    said = capsys.readouterr().err
    assert note in said and said.count("note: ") == bool(note)


def test_an_endless_line_takes_little_memory(tmp_path):
    (tmp_path / "zeros.gz").write_bytes(gzip.compress(bytes(80 << 20), 1))
    with pytest.raises(InputError, match="zeros.gz: a line of over 64 MiB"):
        preprocess_words(tmp_path / "zeros", train=[tmp_path / "zeros.gz"])


def test_unreadable_text_is_one_line_that_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 512)
    good = b"one\r\ntwo\rthree three three\n"
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        z.writestr("inside", good)
        z.writestr("packed", gzip.compress(good))
    archive = (tmp_path / "z.zip").read_bytes()
    (tmp_path / "broken.zip").write_bytes(archive[:-30])
    (tmp_path / "t").write_bytes(good)
    for kind in ("", ":gz", ":xz"):
        with tarfile.open(tmp_path / f"tar{kind[1:]}", f"w{kind}") as tar:
            tar.add(tmp_path / "t")
    locked = bytearray(archive)
    for at in (6, archive.index(b"PK\x01\x02") + 8):
        locked[at] |= 1  # says that it is encrypted
    for name, content, message in (
        ("locked.zip", bytes(locked), "locked.zip: an archive"),
        ("locked.zip:inside", None, "locked.zip:inside: cannot be read: .*encrypted"),
        ("latin.txt", good + b"caf\xe9\n", "latin.txt, line 4: not UTF-8"),
        ("cut.txt", good + b"\n\xe4\xb8", "cut.txt, line 5: not UTF-8"),
        ("surrogate.txt", b"\xed\xa0\x80", "line 1: not UTF-8"),
        ("cut.gz", gzip.compress(good * 50)[:-9], "cut.gz: cannot be read"),
        ("plain.gz", good, "plain.gz: cannot be read"),
        ("cut.bz2", bz2.compress(good * 50)[:-9], "cut.bz2: cannot be read"),
        ("cut", lzma.compress(good * 50)[:-9], "cut: cannot be read"),
        ("damaged.xz", b"x" + lzma.compress(good * 50), "damaged.xz: cannot be read"),
        ("tar", None, "tar: a .tar file"),
        ("targz", None, "targz: a .tar file"),
        ("tarxz", None, "tarxz: a .tar file"),
        ("t.txt", b"\x28\xb5\x2f\xfd\0\0", "t.txt: a .zst file"),
        ("twice", gzip.compress(bz2.compress(good)), "twice: a .bz2 file"),
        ("t.parquet", b"PAR1\x15\x04\x15 PAR1", "t.parquet: a .parquet file"),
        ("cut.zip", archive[:40], "cut.zip: a .zip file"),
        ("z.zip:packed", None, "z.zip:packed: a .gz file"),
        ("z.zip", archive, "z.zip: an archive; .*it holds inside"),
        ("z.zip:nothing", None, "has no member 'nothing'"),
        ("broken.zip:inside", None, "not a readable zip"),
        ("none.txt", None, "none.txt: no such file"),
        (".", None, "not a file"),
    ):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            preprocess_words(tmp_path / "out", train=[tmp_path / name])
    assert not dataset_files(tmp_path / "out")
