"""Raw text to a dataset: fairseq's bytes with any number of workers; steps that are killed, repeated or refused."""

import errno
import gzip
import json
import multiprocessing
import os
import re
import signal
import zipfile
from collections import Counter
from datetime import datetime
from pathlib import Path

import preprocess
from config import InputError, RunError
from test.helpers import (
    GOLDEN,
    GPT2,
    RAW,
    dataset_files,
    golden,
    preprocess_words,
    run_preprocess,
    sentences_of,
    small_corpus,
)
from text import files
from text.binarized import Dictionary, TokenFile, TokenStream
from text.tokens import Tokenizer

import numpy as np
import pytest

GPT2_FLAGS = [
    "--bpe",
    "gpt2",
    "--encoder-json",
    GPT2 / "encoder.json",
    "--vocab_bpe",
    GPT2 / "vocab.bpe",
]


def raw(splits=("train", "valid", "test")) -> dict:
    return {split: [RAW / f"wiki.{split}.raw"] for split in splits}


def texts_of(folder, split="train") -> list:
    dictionary = Dictionary(Path(folder) / "dict.txt")
    return [dictionary.decode(sentence[:-1]) for sentence in sentences_of(folder, split)]


# ---------------------------------------------------------------------------------------------- output


@golden
@pytest.mark.parametrize("workers", [1, 2])
def test_gpt2_bpe_output_is_that_of_fairseqs_two_steps_for_any_number_of_workers(
    tokenizers, tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(files, "CHUNK", 50_000)
    run_preprocess(
        tmp_path, *GPT2_FLAGS, "--dict", GPT2 / "dict.txt", "--workers", workers, **raw()
    )
    made = dataset_files(tmp_path)
    assert {made.pop(name) for name in ("encoder.json", "vocab.bpe")} == {
        (GPT2 / name).read_bytes() for name in ("encoder.json", "vocab.bpe")
    }
    recorded = dataset_files(GOLDEN / "corpora" / "bpe-bin")
    assert made.keys() == recorded.keys()
    assert all(made[name] == recorded[name] for name in made)


@golden
@pytest.mark.parametrize("workers", [1, 2])
def test_word_output_is_that_of_fairseq_preprocess_for_any_number_of_workers(
    tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(files, "CHUNK", 50_000)
    run_preprocess(tmp_path, "--bpe", "none", "--nwords", 1000, "--workers", workers, **raw())
    recorded = dataset_files(GOLDEN / "corpora" / "words-bin")
    made = dataset_files(tmp_path)
    assert made.keys() == recorded.keys()
    assert all(made[name] == recorded[name] for name in made)


@golden
def test_the_output_of_fairseqs_encoder_gives_the_same_dataset(tmp_path):
    preprocess_words(tmp_path, "--dict", GPT2 / "dict.txt", test=[RAW / "wiki.test.bpe"])
    recorded = GOLDEN / "corpora" / "bpe-bin"
    assert all(
        (tmp_path / name).read_bytes() == (recorded / name).read_bytes()
        for name in ("test.bin", "test.idx")
    )


@golden
def test_without_a_dictionary_the_ids_of_a_bpe_are_counted_and_the_unused_come_last(
    tokenizers, tmp_path
):
    run_preprocess(tmp_path, *GPT2_FLAGS, "--workers", 1, train=[RAW / "wiki.test.raw"])
    counts = Counter((RAW / "wiki.test.bpe").read_text().split())
    rows = [row.rsplit(" ", 1) for row in (tmp_path / "dict.txt").read_text().splitlines()]
    # fairseq's order: by count, ties by the symbol as text
    assert rows[: len(counts)] == [
        [s, str(n)] for s, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    assert {s for s, n in rows if n == "0" and s.isdigit()} == {
        str(i) for i in range(50257)
    } - counts.keys()
    assert (len(rows) + 4) % 8 == 0


def test_plain_gz_and_zip_files_of_a_split_are_concatenated_each_a_document_of_its_own(tmp_path):
    parts = ["a b\n\nc", "d\n", "e f\r\n"]  # the first without a line end
    (tmp_path / "one.txt").write_text(parts[0])
    with gzip.open(tmp_path / "two.gz", "wt") as f:
        f.write(parts[1])
    with zipfile.ZipFile(tmp_path / "three.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("folder/other", "x")
        z.writestr("folder/wiki: raw", parts[2])
    names = [
        tmp_path / "one.txt",
        tmp_path / "two.gz",
        f"{tmp_path / 'three.zip'}:folder/wiki: raw",
    ]
    preprocess_words(tmp_path / "out", train=names)
    assert texts_of(tmp_path / "out") == ["a b", "", "c", "", "d", "", "e f"]
    row = json.loads((tmp_path / "out" / "preprocess.log").read_text().splitlines()[-1])
    assert {k: row[k] for k in ("step", "sentences", "empty", "tokens", "unk")} == dict(
        step="train", sentences=7, empty=3, tokens=13, unk=0
    )
    (tmp_path / "ended.txt").write_text("a\n \n")  # it ends in an empty line
    preprocess_words(tmp_path / "two", train=[tmp_path / "ended.txt", tmp_path / "two.gz"])
    assert texts_of(tmp_path / "two") == ["a", "", "d"]


def test_special_words_in_text_become_what_fairseq_makes_of_them_and_mask_is_unknown(tmp_path):
    (tmp_path / "t.txt").write_text("<mask> a <pad> </s> <unk> <mask>\n")
    preprocess_words(tmp_path / "out", train=[tmp_path / "t.txt"])
    assert sentences_of(tmp_path / "out", "train") == [[3, 4, 1, 2, 3, 3, 2]]
    (tmp_path / "listed.txt").write_text("<mask> 1\na 1\n")
    preprocess_words(
        tmp_path / "listed", "--dict", tmp_path / "listed.txt", train=[tmp_path / "t.txt"]
    )
    assert sentences_of(tmp_path / "listed", "train") == [[3, 5, 1, 2, 3, 3, 2]]


def test_a_built_dictionary_obeys_nwords_and_threshold_and_is_padded(tmp_path):
    (tmp_path / "t.txt").write_text("c c c b b a a madeupword0001 madeupword0001 d\n")
    preprocess_words(tmp_path / "out", "--threshold", 2, train=[tmp_path / "t.txt"])
    assert (tmp_path / "out" / "dict.txt").read_text() == "c 3\na 2\nb 2\nmadeupword0001 2\n"
    preprocess_words(tmp_path / "few", "--nwords", 6, train=[tmp_path / "t.txt"])
    assert (
        tmp_path / "few" / "dict.txt"
    ).read_text() == "c 3\na 2\nmadeupword0000 0\nmadeupword0001 0\n"


@pytest.mark.parametrize("rows, width", [(65495, 2), (65496, 4)])
def test_the_type_follows_the_dictionary(tmp_path, rows, width):
    (tmp_path / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(rows)))
    (tmp_path / "t.txt").write_text(f"w0 w{rows - 1} x\n")
    preprocess_words(tmp_path / "out", "--dict", tmp_path / "dict.txt", valid=[tmp_path / "t.txt"])
    assert TokenStream(tmp_path / "out", "valid").take(np.arange(4)).dtype.itemsize == width
    assert sentences_of(tmp_path / "out", "valid") == [[4, rows + 3, 3, 2]]


# ---------------------------------------------------------------------------------------------- steps


def test_finished_steps_are_not_repeated_and_changed_settings_are_refused_by_name(tmp_path):
    texts, out = small_corpus(tmp_path), tmp_path / "out"
    train_only = dict(train=texts["train"])
    preprocess_words(out, **train_only)
    first = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert preprocess_words(out, **texts).count("already done") == 1
    assert preprocess_words(out, **texts).count("already done") == 3
    assert all(
        p.stat().st_mtime_ns == t for p, t in first.items() if p.suffix in (".bin", ".idx", ".txt")
    )
    whole = dataset_files(out)
    for argv, message in (
        ([["--nwords", 20], texts], "made with nwords 0, not 20; --overwrite"),
        (
            [[], dict(texts, valid=texts["test"])],
            "valid.idx was made from valid.txt, not test.txt; --overwrite",
        ),
        (
            [[], dict(train=texts["valid"])],
            "made from train.txt, not valid.txt; --overwrite makes it anew",
        ),
        (
            [["--dict", out / "dict.txt"], dict(test=texts["test"])],
            "test.idx was made with another dictionary",
        ),
    ):
        with pytest.raises(InputError, match=message):
            preprocess_words(out, *argv[0], **argv[1])
    os.utime(texts["train"][0], (10**9, 10**9))
    message = rf"from train.txt as it was on 20.*; now it is of {datetime.fromtimestamp(10**9)} \(the same size\); --"
    with pytest.raises(InputError, match=message):
        preprocess_words(out, **texts)
    assert dataset_files(out) == whole
    preprocess_words(out, "--nwords", 20, "--overwrite", **train_only)
    assert dataset_files(out).keys() == {"dict.txt", "train.bin", "train.idx"}

    os.truncate(out / "train.bin", 10)
    assert "making it again" in preprocess_words(out, "--nwords", 20, **train_only)
    (out / "valid.idx").write_bytes(b"someone else's")
    with pytest.raises(InputError, match="not made by preprocess.py"):
        preprocess_words(out, "--nwords", 20, **train_only)


def test_many_unknown_words_and_shared_files_are_warned_of_and_a_split_without_text_is_refused(
    tmp_path, capsys
):
    texts = small_corpus(tmp_path)
    preprocess_words(tmp_path / "good", **texts)
    assert "warning" not in capsys.readouterr().err
    argv = dict(train=texts["train"] + texts["valid"], valid=texts["valid"])
    preprocess_words(tmp_path / "bad", "--nwords", 20, **argv)
    said = capsys.readouterr().err
    assert re.search(
        r"warning: dict.txt lacks \d\d% of the tokens of valid; --bpe train knows every text", said
    )
    assert "warning: valid.txt is in valid and train" in said
    (tmp_path / "blank.txt").write_text("\n \n\t\n")
    for split in ("train", "valid"):
        with pytest.raises(InputError, match=f"--{split} .*blank.txt: no text in it"):
            preprocess_words(tmp_path / split, **{**texts, split: [tmp_path / "blank.txt"]})
        assert not list((tmp_path / split).glob(f"{split}.*"))
    with pytest.raises(InputError, match="blank.txt: a file, not a folder"):
        preprocess_words(tmp_path / "blank.txt", **texts)


@pytest.mark.parametrize("old", [False, True])
def test_a_kill_at_any_moment_leaves_nothing_that_looks_whole_and_the_next_run_completes_it(
    tmp_path, monkeypatch, old
):
    """SIGKILL at each change of the disk in turn, in a new folder and over an older dataset."""
    monkeypatch.setattr(files, "CHUNK", 2000)
    monkeypatch.setattr(
        os, "fsync", lambda fd: None
    )  # saves seconds; what a process has written survives its kill
    texts = small_corpus(tmp_path, splits=("train", "valid"))
    argv = ["--nwords", 30, *(["--overwrite"] if old else [])]
    preprocess_words(tmp_path / "whole", *argv, **texts)
    whole = dataset_files(tmp_path / "whole")
    before = {}

    def killed_at(step: int, out) -> bool:
        """Run in a child that dies at its step-th change; returns whether it died."""
        pid = os.fork()
        if pid == 0:
            left = iter(range(step))

            def dying(function):
                def call_or_die(*args, **kwargs):
                    if next(left, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return call_or_die

            os.replace, os.fsync, Path.unlink = (
                dying(os.replace),
                dying(os.fsync),
                dying(Path.unlink),
            )
            Tokenizer.encode = dying(Tokenizer.encode)
            try:
                preprocess_words(out, *argv, **texts)
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
            preprocess_words(out, **texts)
            before = dataset_files(out)
        died = killed_at(step, out)
        there = dataset_files(out)
        if "train.idx" in there:
            assert {k: v for k, v in there.items() if not k.endswith(".tmp")} in (before, whole)
        for name in there:
            if name.endswith(".idx"):
                assert there[name] in (whole[name], before.get(name))
                assert there[f"{name[:-4]}.bin"] in (
                    whole[f"{name[:-4]}.bin"],
                    before.get(f"{name[:-4]}.bin"),
                )
                TokenFile(out / name[:-4])
        preprocess_words(out, *argv, **texts)
        assert dataset_files(out) == whole
        if not died:
            break
        step += 1
    assert step > 20


def test_a_full_disk_is_one_line_and_the_next_run_continues(tmp_path, monkeypatch):
    texts = small_corpus(tmp_path)

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            RunError, match="--dest .*out: No space left on device; the same command continues"
        ):
            preprocess_words(tmp_path / "out", **texts)
    preprocess_words(tmp_path / "out", **texts)
    preprocess_words(tmp_path / "whole", **texts)
    assert dataset_files(tmp_path / "out") == dataset_files(tmp_path / "whole")


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 16)
    (tmp_path / "t.txt").write_text("a b c\n" * 20)
    with preprocess.Pool(2, Tokenizer({"a": 4}, "<u2"), [str(tmp_path / "t.txt")]) as pool:
        chunks = list(files.read_chunks(str(tmp_path / "t.txt")))
        assert sum(unk for _, _, unk, _ in pool.map("encode", chunks)) == 40
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(RunError, match="a worker was killed"):
            list(pool.map("encode", chunks * 100))


def test_ctrl_c_ends_with_one_line_and_the_next_run_continues(tmp_path, monkeypatch, capsys):
    texts, plain = small_corpus(tmp_path), Tokenizer.encode

    def interrupted(self, chunk):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(self, chunk)

    monkeypatch.setattr(Tokenizer, "encode", interrupted)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job begins with it ignored
    argv = [str(a) for s, n in texts.items() for a in (f"--{s}", *n)]
    argv += ["--dest", str(tmp_path / "out"), "--bpe", "none", "--workers", "1"]
    assert preprocess.main(argv) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err
    monkeypatch.undo()
    assert preprocess.main(argv) == 0
    preprocess_words(tmp_path / "whole", **texts)
    assert dataset_files(tmp_path / "out") == dataset_files(tmp_path / "whole")


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    from run.lock import Lock

    texts = small_corpus(tmp_path)
    (tmp_path / "out").mkdir()
    lock = Lock(tmp_path / "out")
    with pytest.raises(InputError, match="--dest .*out is in use by process"):
        preprocess_words(tmp_path / "out", **texts)
    lock.release()
    preprocess_words(tmp_path / "out", **texts)
    assert (tmp_path / "out" / "train.idx").exists()


def test_settings_that_do_not_go_together_are_refused_by_name(tmp_path):
    (tmp_path / "t.txt").write_text("a\n")
    (tmp_path / "dict.txt").write_text("a 1\n")
    train = dict(train=[tmp_path / "t.txt"])
    for argv, texts, message in (
        ("--bpe gpt2 --dict D", train, "--encoder_json is missing"),
        ("--bpe none --encoder_json x", train, "--encoder_json has no meaning with --bpe none"),
        ("--bpe train --dict D", train, "--dict has no meaning with --bpe train"),
        (
            "--bpe none --nwords 9 --dict D",
            train,
            "--nwords has no meaning with --bpe none and --dict",
        ),
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
            run_preprocess(tmp_path / "out", *argv, **texts)
    assert not (tmp_path / "out").exists()
