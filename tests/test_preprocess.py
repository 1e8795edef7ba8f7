"""From raw text to the dataset: fairseq's bytes, any form of file, any number of workers, killed anywhere."""

import errno
import gzip
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import preprocess
from config import InputError, RunError
from dataset.binarized import EOS, UNK, Dictionary, TokenFile, TokenStream
from tests.helpers import GOLDEN, call, copy_of_the_project, golden

RAW, GPT2 = GOLDEN / "corpora" / "raw", GOLDEN / "corpora" / "gpt2_bpe"
GPT2_FLAGS = ["--bpe", "gpt2", "--encoder-json", GPT2 / "encoder.json", "--vocab_bpe", GPT2 / "vocab.bpe"]
CHINESE = [
    "自监督学习 不需要 人工标注的数据。",
    "学生网络读取被遮盖的文本，预测教师网络的表示。",
    "2022年，data2vec 统一了语音、图像和文本。",
    "",
]


@pytest.fixture
def tokenizers():
    return pytest.importorskip("tokenizers", reason="BPE needs the tokenizers package")


def run(dest, *argv, **texts) -> str:
    named = [part for split, names in texts.items() for part in (f"--{split}", *names)]
    return call(preprocess.main, "--dest", dest, *named, *argv)


def words(dest, *argv, **texts) -> str:
    return run(dest, "--bpe", "none", "--workers", 1, *argv, **texts)


def raw(splits=("train", "valid", "test")) -> dict:
    return {split: [RAW / f"wiki.{split}.raw"] for split in splits}


def contents(folder) -> dict:
    """The bytes of a dataset, without the log, whose times differ."""
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name not in ("preprocess.log", ".lock")}


def sentences(folder, split) -> list:
    stream = TokenStream(folder, split)
    return [stream.read(a, b).tolist() for a, b in zip(stream.starts.tolist(), stream.starts[1:].tolist())]


def texts_of(folder, split="train") -> list:
    dictionary = Dictionary(Path(folder) / "dict.txt")
    return [dictionary.decode(sentence[:-1]) for sentence in sentences(folder, split)]


def small_corpus(folder, splits=("train", "valid", "test")) -> dict:
    """Some hundred lines of words a split, with empty lines."""
    rng, texts = random.Random(0), {}
    for split in splits:
        lines = [" ".join(f"w{rng.randrange(40)}" for _ in range(rng.choice([0, 3, 9]))) for _ in range(200)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
        texts[split] = [folder / f"{split}.txt"]
    return texts


# ---------------------------------------------------------------------------------------------- fairseq's bytes


@golden
@pytest.mark.parametrize("workers", [1, 2])
def test_gpt2_bpe_equals_fairseq_s_two_steps_whatever_the_workers(tokenizers, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(preprocess, "CHUNK", 50_000)
    run(tmp_path, *GPT2_FLAGS, "--dict", GPT2 / "dict.txt", "--workers", workers, **raw())
    made = contents(tmp_path)
    assert {made.pop(name) for name in ("encoder.json", "vocab.bpe")} == {
        (GPT2 / name).read_bytes() for name in ("encoder.json", "vocab.bpe")
    }
    recorded = contents(GOLDEN / "corpora" / "bpe-bin")
    assert made.keys() == recorded.keys()
    assert all(made[name] == recorded[name] for name in made)


@golden
@pytest.mark.parametrize("workers", [1, 2])
def test_words_equal_fairseq_preprocess_s_whatever_the_workers(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(preprocess, "CHUNK", 50_000)
    run(tmp_path, "--bpe", "none", "--nwords", 1000, "--workers", workers, **raw())
    recorded = contents(GOLDEN / "corpora" / "words-bin")
    made = contents(tmp_path)
    assert made.keys() == recorded.keys()
    assert all(made[name] == recorded[name] for name in made)


@golden
def test_text_that_fairseq_s_encoder_printed_binarizes_to_the_same(tmp_path):
    words(tmp_path, "--dict", GPT2 / "dict.txt", test=[RAW / "wiki.test.bpe"])
    recorded = GOLDEN / "corpora" / "bpe-bin"
    assert all((tmp_path / name).read_bytes() == (recorded / name).read_bytes() for name in ("test.bin", "test.idx"))


@golden
def test_without_a_dictionary_the_ids_of_a_bpe_are_counted_and_the_unused_stand_behind(tokenizers, tmp_path):
    run(tmp_path, *GPT2_FLAGS, "--workers", 1, train=[RAW / "wiki.test.raw"])
    counts = Counter((RAW / "wiki.test.bpe").read_text().split())
    rows = [row.rsplit(" ", 1) for row in (tmp_path / "dict.txt").read_text().splitlines()]
    # fairseq's order: by count, ties by the symbol as text
    assert rows[: len(counts)] == [[s, str(n)] for s, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    assert {s for s, n in rows if n == "0" and s.isdigit()} == {str(i) for i in range(50257)} - counts.keys()
    assert (len(rows) + 4) % 8 == 0


@golden
def test_words_encoded_one_by_one_give_what_the_whole_line_gives(tokenizers):
    dictionary = Dictionary(GPT2 / "dict.txt")
    tokenizer = preprocess.load_tokenizer(GPT2, dictionary)
    rng = random.Random(0)
    parts = (
        ["a", "The", "word", "é", "中文", "٣", "12", "'s", "'LL", "n't", "...", "!", "<s>", "<|endoftext|>", "\u0301"]
        + [" "] * 8
        + ["  ", "\t", "\v", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000", "\u200b", "\ufeff", "\0", "👩‍👩"]
    )
    for _ in range(5000):
        line = "".join(rng.choice(parts) for _ in range(rng.randrange(12)))
        whole = tokenizer.bpe.encode(line.strip(), add_special_tokens=False).ids
        expected = [dictionary.ids[str(i)] for i in whole] + [EOS]
        assert tokenizer([line])[0].tolist() == expected, repr(line)


@golden
def test_the_tokenizer_of_a_folder_gives_its_sentences(tokenizers, tmp_path):
    lines = (RAW / "wiki.test.raw").read_text(encoding="utf-8").split("\n")[:-1]
    for folder, files in (("bpe-bin", (GPT2 / "encoder.json", GPT2 / "vocab.bpe")), ("words-bin", ())):
        folder = GOLDEN / "corpora" / folder
        rows = preprocess.load_tokenizer(folder, Dictionary(folder / "dict.txt"), *files)(lines)
        assert all(row.dtype == np.int64 for row in rows)
        assert [row.tolist() for row in rows] == sentences(folder, "test")
    dictionary = Dictionary(GPT2 / "dict.txt")
    with pytest.raises(InputError, match="ids of a BPE, but encoder.json and vocab.bpe are not beside it"):
        preprocess.load_tokenizer(tmp_path, dictionary)
    (tmp_path / "encoder.json").write_bytes((GPT2 / "encoder.json").read_bytes())
    with pytest.raises(InputError, match="no vocab.bpe in"):
        preprocess.load_tokenizer(tmp_path, dictionary)


@golden
def test_cut_or_foreign_bpe_files_are_refused(tokenizers, tmp_path):
    encoder, vocab = (GPT2 / "encoder.json").read_text(), (GPT2 / "vocab.bpe").read_text()
    for texts, message in (
        ((encoder[:1000], vocab), "encoder.json: not JSON"),
        (("[1, 2]", vocab), "expected GPT-2's encoder.json"),
        ((encoder, vocab[: len(vocab) // 2]), "merges no two tokens|by no merge"),
        ((encoder, "#version: 0.2\n" + "\n".join(vocab.split("\n")[1:900])), "one of the files is cut"),
        ((json.dumps({"a": 0}), "#version: 0.2\n"), "255 of the 256 single bytes"),
    ):
        for name, text in zip(preprocess.BPE_FILES, texts):
            (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            preprocess.read_bpe(tmp_path / "encoder.json", tmp_path / "vocab.bpe")


# ---------------------------------------------------------------------------------------------- a BPE of one's own


def test_a_bpe_is_trained_on_chinese_and_gives_every_text_back(tokenizers, tmp_path):
    (tmp_path / "zh.txt").write_text("\n".join(CHINESE * 30) + "\n", encoding="utf-8")
    (tmp_path / "other.txt").write_text("生僻字𪚥、表情🙂 and Ünïcode\n", encoding="utf-8")
    texts = dict(train=[tmp_path / "zh.txt"], valid=[tmp_path / "other.txt"])
    for name, workers in (("one", 1), ("two", 2)):
        run(tmp_path / name, "--bpe", "train", "--vocab_size", 400, "--workers", workers, **texts)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    assert one.keys() >= {"encoder.json", "vocab.bpe", "dict.txt", "train.idx", "valid.idx"}

    dictionary = Dictionary(tmp_path / "one" / "dict.txt")
    tokenizer = preprocess.load_tokenizer(tmp_path / "one", dictionary)
    vocab = json.loads(one["encoder.json"])
    assert len(vocab) <= 400 and sorted(vocab.values()) == list(range(len(vocab)))
    assert dictionary.rows % 8 == 0 and {str(i) for i in vocab.values()} <= dictionary.ids.keys()
    for split, names in texts.items():
        lines = names[0].read_text(encoding="utf-8").split("\n")[:-1]
        rows = sentences(tmp_path / "one", split)
        assert rows == [row.tolist() for row in tokenizer(lines)]
        assert UNK not in sum(rows, [])
        ids = [[int(dictionary.symbols[t]) for t in row[:-1]] for row in rows]
        decoder = __import__("tokenizers").decoders.ByteLevel()
        names_of = {i: token for token, i in vocab.items()}
        assert [decoder.decode([names_of[i] for i in row]) for row in ids] == lines
    # it has learned something: fewer tokens than bytes
    assert len(sum(sentences(tmp_path / "one", "train"), [])) < (tmp_path / "zh.txt").stat().st_size / 4


def test_a_bpe_is_trained_on_a_sample_that_is_spread_over_the_text(tokenizers, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "CHUNK", 10_000)
    text = "".join(f"word{i // 1000} " * 10 + "\n" for i in range(20_000))
    (tmp_path / "t.txt").write_text(text)
    seen = []
    monkeypatch.setattr(preprocess, "lines_of", lambda chunk: seen.append(chunk) or chunk.split("\n"))
    args = preprocess.parse(
        ["--train", str(tmp_path / "t.txt"), "--dest", "x", "--bpe", "train", "--bpe_sample_mb", "1"]
    )
    preprocess.train_bpe(args)
    assert 0.8e6 < sum(map(len, seen)) < 1.2e6
    assert len({re.match("word[0-9]+", chunk)[0] for chunk in seen}) == 20


def test_text_that_is_no_utf_8_ends_the_training_of_a_bpe_with_its_line(tokenizers, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"good\ncaf\xe9\n")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(InputError, match="t.txt, line 2: not UTF-8"):
        run(tmp_path / "out", "--bpe", "train", train=[tmp_path / "t.txt"])
    assert signal.getsignal(signal.SIGINT) is handler
    assert not contents(tmp_path / "out")


def test_without_the_tokenizers_package_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "t.txt").write_text("a b\n")
    with pytest.raises(InputError, match="pip install tokenizers"):
        run(tmp_path / "out", "--bpe", "train", train=[tmp_path / "t.txt"])


# ---------------------------------------------------------------------------------------------- text


def test_lines_end_as_in_python_s_text_files_wherever_a_chunk_ends(tmp_path, monkeypatch):
    rng = random.Random(0)
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(preprocess, "CHUNK", size)
        text = "".join(
            rng.choice(["\n", "\r", "\r\n", "a", "b ", "é", "中", "\x85", "\u2028", "\x0b"]) for _ in range(300)
        )
        (tmp_path / "t.txt").write_text(text, encoding="utf-8", newline="")
        with open(tmp_path / "t.txt", encoding="utf-8") as f:
            expected = [line.rstrip("\n") for line in f]
        chunks = list(preprocess.read_chunks(str(tmp_path / "t.txt")))
        assert [line for chunk in chunks for line in preprocess.lines_of(chunk)] == expected


def test_plain_gz_and_zip_files_of_a_split_follow_each_other(tmp_path):
    parts = ["a b\n\nc", "d\n", "e f\r\n"]  # the first without a line end
    (tmp_path / "one.txt").write_text(parts[0])
    with gzip.open(tmp_path / "two.gz", "wt") as f:
        f.write(parts[1])
    with zipfile.ZipFile(tmp_path / "three.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("folder/other", "x")
        z.writestr("folder/wiki: raw", parts[2])
    names = [tmp_path / "one.txt", tmp_path / "two.gz", f"{tmp_path / 'three.zip'}:folder/wiki: raw"]
    words(tmp_path / "out", train=names)
    assert texts_of(tmp_path / "out") == ["a b", "", "c", "d", "e f"]
    row = json.loads((tmp_path / "out" / "preprocess.log").read_text().splitlines()[-1])
    assert {k: row[k] for k in ("step", "sentences", "empty", "tokens", "unk")} == dict(
        step="train", sentences=5, empty=1, tokens=11, unk=0
    )


def test_unreadable_text_is_one_line_that_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "CHUNK", 16)
    good = b"one\r\ntwo\rthree three three\n"
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        z.writestr("inside", good)
    files = {
        "latin.txt": good + b"caf\xe9\n",
        "cut.txt": good + b"\n\xe4\xb8",
        "surrogate.txt": b"\xed\xa0\x80",
        "cut.gz": gzip.compress(good * 50)[:-9],
        "plain.gz": good,
        "broken.zip": (tmp_path / "z.zip").read_bytes()[:-30],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, message in (
        ("latin.txt", "latin.txt, line 4: not UTF-8"),
        ("cut.txt", "cut.txt, line 5: not UTF-8 .unexpected end"),
        ("surrogate.txt", "line 1: not UTF-8"),
        ("cut.gz", "cut.gz: cannot be read: Compressed file ended"),
        ("plain.gz", "plain.gz: cannot be read: Not a gzipped file"),
        ("z.zip", "z.zip: an archive; name one of its members, as ARCHIVE.zip:MEMBER; it holds inside"),
        ("z.zip:nothing", "has no member 'nothing'"),
        ("broken.zip:inside", "not a readable zip"),
        ("none.txt", "none.txt: no such file"),
        (".", "not a file"),
    ):
        with pytest.raises(InputError, match=message):
            words(tmp_path / "out", train=[tmp_path / name])
    assert not list((tmp_path / "out").glob("*.idx"))


def test_special_words_of_a_text_are_what_fairseq_makes_of_them_and_mask_is_unknown(tmp_path):
    (tmp_path / "t.txt").write_text("<mask> a <pad> </s> <unk> <mask>\n")
    words(tmp_path / "out", train=[tmp_path / "t.txt"])
    assert sentences(tmp_path / "out", "train") == [[3, 4, 1, 2, 3, 3, 2]]
    (tmp_path / "listed.txt").write_text("<mask> 1\na 1\n")
    words(tmp_path / "listed", "--dict", tmp_path / "listed.txt", train=[tmp_path / "t.txt"])
    assert sentences(tmp_path / "listed", "train") == [[3, 5, 1, 2, 3, 3, 2]]


def test_a_built_dictionary_obeys_nwords_and_threshold_and_is_padded(tmp_path):
    (tmp_path / "t.txt").write_text("c c c b b a a madeupword0001 madeupword0001 d\n")
    words(tmp_path / "out", "--threshold", 2, train=[tmp_path / "t.txt"])
    assert (tmp_path / "out" / "dict.txt").read_text() == "c 3\na 2\nb 2\nmadeupword0001 2\n"
    words(tmp_path / "few", "--nwords", 6, train=[tmp_path / "t.txt"])
    assert (tmp_path / "few" / "dict.txt").read_text() == "c 3\na 2\nmadeupword0000 0\nmadeupword0001 0\n"


@pytest.mark.parametrize("rows, width", [(65495, 2), (65496, 4)])
def test_the_type_follows_the_dictionary(tmp_path, rows, width):
    (tmp_path / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(rows)))
    (tmp_path / "t.txt").write_text(f"w0 w{rows - 1} x\n")
    words(tmp_path / "out", "--dict", tmp_path / "dict.txt", valid=[tmp_path / "t.txt"])
    assert TokenStream(tmp_path / "out", "valid").take(np.arange(4)).dtype.itemsize == width
    assert sentences(tmp_path / "out", "valid") == [[4, rows + 3, 3, 2]]


# ---------------------------------------------------------------------------------------------- steps


def test_what_is_done_is_not_done_again_and_anything_else_is_refused_by_name(tmp_path):
    texts, out = small_corpus(tmp_path), tmp_path / "out"
    train_only = dict(train=texts["train"])
    words(out, **train_only)
    first = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert words(out, **texts).count("done before") == 1
    assert words(out, **texts).count("done before") == 3
    assert all(p.stat().st_mtime_ns == t for p, t in first.items() if p.suffix in (".bin", ".idx", ".txt"))
    whole = contents(out)
    for argv, message in (
        ([["--nwords", 20], texts], "made with nwords 0, not 20; --overwrite"),
        ([[], dict(texts, valid=texts["test"])], "valid.idx was made with text .*valid.txt.*test.txt"),
        ([[], dict(train=texts["valid"])], "made with train"),
        ([["--dict", out / "dict.txt"], dict(test=texts["test"])], "test.idx was made with dict_sha256 null"),
    ):
        with pytest.raises(InputError, match=message):
            words(out, *argv[0], **argv[1])
    assert contents(out) == whole
    words(out, "--nwords", 20, "--overwrite", **train_only)
    assert contents(out).keys() == {"dict.txt", "train.bin", "train.idx"}

    os.truncate(out / "train.bin", 10)
    assert "made again" in words(out, "--nwords", 20, **train_only)
    (out / "valid.idx").write_bytes(b"someone else's")
    with pytest.raises(InputError, match="not made by preprocess.py"):
        words(out, "--nwords", 20, **train_only)


@pytest.mark.parametrize("old", [False, True])
def test_killed_at_any_moment_nothing_half_looks_whole_and_the_next_run_completes_it(tmp_path, monkeypatch, old):
    """SIGKILL at each step that changes the disk, one after the other, in a new folder and over an older dataset."""
    monkeypatch.setattr(preprocess, "CHUNK", 2000)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a kill loses nothing that the kernel has; this saves seconds
    texts = small_corpus(tmp_path, splits=("train", "valid"))
    argv = ["--nwords", 30, *(["--overwrite"] if old else [])]
    words(tmp_path / "whole", *argv, **texts)
    whole = contents(tmp_path / "whole")
    before = {}

    def killed_at(step: int, out) -> bool:
        """Run in a child that dies at its step-th change; whether it died."""
        pid = os.fork()
        if pid == 0:
            left = iter(range(step))

            def dying(function):
                def call_or_die(*args, **kwargs):
                    if next(left, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return call_or_die

            os.replace, os.fsync, Path.unlink = dying(os.replace), dying(os.fsync), dying(Path.unlink)
            preprocess.Tokenizer.encode = dying(preprocess.Tokenizer.encode)
            try:
                words(out, *argv, **texts)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)

    step = 0
    while True:
        out = tmp_path / f"out{step}"
        if old:
            words(out, **texts)
            before = contents(out)
        died = killed_at(step, out)
        there = contents(out)
        if "train.idx" in there:
            assert {k: v for k, v in there.items() if not k.endswith(".tmp")} in (before, whole)
        for name in there:
            if name.endswith(".idx"):
                assert there[name] in (whole[name], before.get(name))
                assert there[f"{name[:-4]}.bin"] in (whole[f"{name[:-4]}.bin"], before.get(f"{name[:-4]}.bin"))
                TokenFile(out / name[:-4])
        words(out, *argv, **texts)
        assert contents(out) == whole
        if not died:
            break
        step += 1
    assert step > 20


def test_a_full_disk_is_one_line_and_goes_on_later(tmp_path, monkeypatch):
    texts = small_corpus(tmp_path)

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="--dest .*out: No space left on device; the same command continues"):
            words(tmp_path / "out", **texts)
    words(tmp_path / "out", **texts)
    words(tmp_path / "whole", **texts)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "CHUNK", 16)
    (tmp_path / "t.txt").write_text("a b c\n" * 20)
    with preprocess.Pool(2, preprocess.Tokenizer({"a": 4}, "<u2"), [str(tmp_path / "t.txt")]) as pool:
        chunks = list(preprocess.read_chunks(str(tmp_path / "t.txt")))
        assert sum(unk for *_, unk in pool.map("encode", chunks)) == 40
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(RunError, match="a worker was killed"):
            list(pool.map("encode", chunks * 100))


def test_ctrl_c_ends_with_one_line_and_goes_on_later(tmp_path, monkeypatch, capsys):
    texts, plain = small_corpus(tmp_path), preprocess.Tokenizer.encode

    def interrupted(self, chunk):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(self, chunk)

    monkeypatch.setattr(preprocess.Tokenizer, "encode", interrupted)
    argv = [str(a) for s, n in texts.items() for a in (f"--{s}", *n)]
    argv += ["--dest", str(tmp_path / "out"), "--bpe", "none", "--workers", "1"]
    assert preprocess.main(argv) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err
    monkeypatch.undo()
    assert preprocess.main(argv) == 0
    words(tmp_path / "whole", **texts)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_second_run_is_kept_out_of_the_folder(tmp_path):
    from runtime.guard import Lock

    texts = small_corpus(tmp_path)
    (tmp_path / "out").mkdir()
    lock = Lock(tmp_path / "out")
    with pytest.raises(InputError, match="--dest .*out is in use by process"):
        words(tmp_path / "out", **texts)
    lock.release()
    words(tmp_path / "out", **texts)
    assert (tmp_path / "out" / "train.idx").exists()


def test_settings_that_do_not_fit_are_refused_by_name(tmp_path):
    (tmp_path / "t.txt").write_text("a\n")
    (tmp_path / "dict.txt").write_text("a 1\n")
    train = dict(train=[tmp_path / "t.txt"])
    for argv, texts, message in (
        ("--bpe gpt2 --dict D", train, "--encoder_json is missing"),
        ("--bpe none --encoder_json x", train, "--encoder_json has no meaning with --bpe none"),
        ("--bpe train --dict D", train, "--dict has no meaning with --bpe train"),
        ("--bpe none --nwords 9 --dict D", train, "--nwords has no meaning with --bpe none and --dict"),
        ("--bpe none --nwords 4", train, "at least 5"),
        ("--bpe none --workers 0", train, "--workers 0: must be at least 1"),
        ("--bpe train --vocab_size 99", train, "--vocab_size 99: must be at least 256"),
        ("--bpe none", dict(valid=train["train"]), "--train is missing"),
        ("--bpe none", {}, "no text"),
        ("--bpe sentencepiece", train, "invalid choice"),
        ("--bpe none --source-lang en", train, "--source_lang"),
    ):
        argv = [tmp_path / "dict.txt" if a == "D" else a for a in argv.split()]
        with pytest.raises(InputError, match=message):
            run(tmp_path / "out", *argv, **texts)
    assert not (tmp_path / "out").exists()


def test_run_1p_binarizes_a_raw_folder_once_then_trains_on_it(tokenizers, tmp_path):
    env = copy_of_the_project(tmp_path)
    raw_dir, python = tmp_path / "text", tmp_path / "bin" / "python3"
    for folder in (raw_dir, python.parent):
        folder.mkdir()
    for split, names in small_corpus(tmp_path).items():
        names[0].rename(raw_dir / f"wiki.{split}.raw")
    # a python3 that has every package, and tells of the training instead of doing it
    python.write_text(
        f'#!/bin/sh\ncase $1 in preprocess.py) exec {sys.executable} "$@";; -c) exit 0;; esac\n'
        'echo "called: $*"; exit 3\n'
    )
    python.chmod(0o755)
    env["PATH"] = f"{python.parent}:{env['PATH']}"

    def full(*argv):
        command = ["bash", tmp_path / "run_1p.sh", "full", *argv]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)

    for expected in ("train: 200 sentences", "train: done before"):
        result = full("--raw_dir", "text")
        assert result.returncode == 3 and expected in result.stdout, result.stdout + result.stderr
        assert re.search(r"called: train.py --config_name npu_1p --data_path output/0/text-bin ", result.stdout)
    folder = tmp_path / "output" / "0" / "text-bin"
    assert json.loads((folder / "preprocess.log").read_text().splitlines()[0])["made_from"]["bpe"] == "train"
    assert len(TokenFile(folder / "test").sizes) == 200

    (raw_dir / "dict.txt").write_text((folder / "dict.txt").read_text())
    result = full("--raw_dir=text")
    assert result.returncode == 2 and "text holds only a part of encoder.json, vocab.bpe" in result.stderr
    for name in preprocess.BPE_FILES:
        (raw_dir / name).write_bytes((folder / name).read_bytes())
    (raw_dir / "wiki.test.raw").unlink()
    result = full("--raw_dir=text", "--data_path=other")
    assert result.returncode == 3 and f"--data_path {tmp_path / 'other'} " in result.stdout, (
        result.stdout + result.stderr
    )
    assert (tmp_path / "other" / "train.bin").read_bytes() == (folder / "train.bin").read_bytes()
    assert not (tmp_path / "other" / "test.idx").exists()
    (raw_dir / "wiki.train.raw").unlink()
    result = full("--raw_dir=text")
    assert result.returncode == 2 and "wiki.train.raw: no such file" in result.stderr
