"""Raw text to a dataset: fairseq's bytes with any number of workers; runs that are killed."""

import bz2
import gzip
import json
import lzma
import multiprocessing
import os
import signal
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, resource_tracker
from pathlib import Path

import preprocess
from config import InputError, RunError
from run.lock import lock
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
from text import files, workers
from text.binarized import Dictionary, TokenStream
from text.tokens import Tokenizer

import numpy as np
import pytest

GPT2_FLAGS = ["--bpe", "gpt2", "--encoder-json", GPT2 / "encoder.json"]
GPT2_FLAGS += ["--vocab_bpe", GPT2 / "vocab.bpe"]
WIKI = {split: [RAW / f"wiki.{split}.raw"] for split in ("train", "valid", "test")}


# ---------------------------------------------------------------------------------------- output


@golden
@pytest.mark.parametrize("workers", [1, 2])
def test_gpt2_bpe_output_is_that_of_fairseqs_two_steps_for_any_number_of_workers(
    tokenizers, tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(files, "CHUNK", 50_000)
    how = [*GPT2_FLAGS, "--dict", GPT2 / "dict.txt", "--workers", workers]
    run_preprocess(tmp_path, *how, **WIKI)
    written = dataset_files(tmp_path)
    for name in ("encoder.json", "vocab.bpe"):
        assert written.pop(name) == (GPT2 / name).read_bytes()
    assert written == dataset_files(GOLDEN / "corpora" / "bpe-bin")


@golden
@pytest.mark.parametrize("workers", [1, 2])
def test_word_output_is_that_of_fairseq_preprocess_for_any_number_of_workers(
    tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(files, "CHUNK", 50_000)
    run_preprocess(tmp_path, "--bpe", "none", "--nwords", 1000, "--workers", workers, **WIKI)
    assert dataset_files(tmp_path) == dataset_files(GOLDEN / "corpora" / "words-bin")


@golden
def test_without_a_dictionary_the_ids_of_a_bpe_are_counted_unused_last(tokenizers, tmp_path):
    run_preprocess(tmp_path, *GPT2_FLAGS, "--workers", 1, train=WIKI["test"])
    counts = Counter((RAW / "wiki.test.bpe").read_text().split())
    rows = [row.rsplit(" ", 1) for row in (tmp_path / "dict.txt").read_text().splitlines()]
    # fairseq's order: by count, ties by the symbol as text
    expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    assert rows[: len(counts)] == [[symbol, str(count)] for symbol, count in expected]
    unused = {symbol for symbol, count in rows if count == "0" and symbol.isdigit()}
    assert unused == {str(i) for i in range(50257)} - counts.keys()
    assert (len(rows) + 4) % 8 == 0


def test_plain_and_packed_files_of_a_split_are_concatenated_each_a_document_of_its_own(tmp_path):
    for name, content in {
        "one.txt": b"a b\n\nc",  # without a line end
        "ended.txt": b"a\n \n",  # ends in an empty line
        "two.gz": gzip.compress(b"d\n"),
        "bz2": bz2.compress(b"g\n") + bz2.compress(b"h\n"),
        "xz": lzma.compress(b"i\n"),
    }.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "three.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("folder/other", "x")
        z.writestr("folder/wiki: raw", "e f\r\n")
    names = "one.txt,two.gz,three.zip:folder/wiki: raw,ended.txt,bz2,xz".split(",")
    preprocess_words(tmp_path / "out", train=[f"{tmp_path}/{name}" for name in names])
    dictionary = Dictionary(tmp_path / "out" / "dict.txt")
    rows = [dictionary.decode(row[:-1]) for row in sentences_of(tmp_path / "out", "train")]
    assert rows == ["a b", "", "c", "", "d", "", "e f", "", "a", "", "g", "h", "", "i"]
    row = json.loads((tmp_path / "out" / "preprocess.log").read_text())
    expected = dict(step="train", sentences=14, empty=6, tokens=24, unk=0)
    assert {key: row[key] for key in expected} == expected


def test_special_words_in_text_become_what_fairseq_makes_of_them_and_mask_is_unknown(tmp_path):
    (tmp_path / "t.txt").write_text("<mask> a <pad> </s> <unk> <mask>\n")
    (tmp_path / "listed.txt").write_text("<mask> 1\na 1\n")
    train = dict(train=[tmp_path / "t.txt"])
    preprocess_words(tmp_path / "out", **train)
    assert sentences_of(tmp_path / "out", "train") == [[3, 4, 1, 2, 3, 3, 2]]
    preprocess_words(tmp_path / "listed", "--dict", tmp_path / "listed.txt", **train)
    assert sentences_of(tmp_path / "listed", "train") == [[3, 5, 1, 2, 3, 3, 2]]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--threshold", 2], "c 3\na 2\nb 2\nmadeupword0001 2\n"),
        (["--nwords", 6], "c 3\na 2\nmadeupword0000 0\nmadeupword0001 0\n"),
    ],
)
def test_a_built_dictionary_obeys_nwords_and_threshold_and_is_padded(tmp_path, flags, expected):
    (tmp_path / "t.txt").write_text("c c c b b a a madeupword0001 madeupword0001 d\n")
    preprocess_words(tmp_path / "out", *flags, train=[tmp_path / "t.txt"])
    assert (tmp_path / "out" / "dict.txt").read_text() == expected


@pytest.mark.parametrize("rows, width", [(65495, 2), (65496, 4)])
def test_the_type_follows_the_dictionary(tmp_path, rows, width):
    (tmp_path / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(rows)))
    (tmp_path / "t.txt").write_text(f"w0 w{rows - 1} x\n")
    preprocess_words(tmp_path / "out", "--dict", tmp_path / "dict.txt", valid=[tmp_path / "t.txt"])
    assert TokenStream(tmp_path / "out", "valid").take(np.arange(4)).dtype.itemsize == width
    assert sentences_of(tmp_path / "out", "valid") == [[4, rows + 3, 3, 2]]


# ----------------------------------------------------------------------------------------- steps


def test_finished_splits_are_not_repeated_and_changed_settings_are_refused_by_name(tmp_path):
    texts, out = small_corpus(tmp_path), tmp_path / "out"
    preprocess_words(out, train=texts["train"])
    times = {path: path.stat().st_mtime_ns for path in out.glob("[dt]*")}
    assert preprocess_words(out, **texts).count("already done") == 1
    assert preprocess_words(out, **texts).count("already done") == 3
    assert {path: path.stat().st_mtime_ns for path in times} == times and len(times) == 3
    whole = dataset_files(out)
    for flags, changed, message in (
        (["--nwords", 20], texts, "made with nwords 0, not 20; --overwrite"),
        ([], dict(texts, valid=texts["test"]), "valid.idx was made with text .*valid.*test.txt"),
        ([], dict(train=texts["valid"]), "made with train .*train.txt.* not .*valid.txt"),
        (["--dict", out / "dict.txt"], dict(test=texts["test"]), "made with dict_sha256 null"),
    ):
        with pytest.raises(InputError, match=message):
            preprocess_words(out, *flags, **changed)
    os.utime(texts["train"][0], (10**9, 10**9))
    with pytest.raises(InputError, match=f"train .*{10**18}"):
        preprocess_words(out, **texts)
    assert dataset_files(out) == whole
    preprocess_words(out, "--nwords", 20, "--overwrite", train=texts["train"])
    assert dataset_files(out).keys() == {"dict.txt", "train.bin", "train.idx"}


def test_someones_files_are_not_replaced_and_a_second_run_in_the_folder_is_refused(tmp_path):
    texts, out = small_corpus(tmp_path), tmp_path / "out"
    out.mkdir()
    for name, log, flags, message in (
        ("valid.idx", None, [], "valid.idx was not made by preprocess.py"),
        ("dict.txt", None, [], "dict.txt was not made by preprocess.py"),
        ("train1.idx", "", ["--overwrite"], "train1.idx: training would read it after train"),
        # fairseq-preprocess writes a log of the same name
        ("dict.txt", "Namespace(dict_only=True)\n", [], "dict.txt was not made by preprocess.py"),
    ):
        (out / name).write_text("w1 1\n")
        if log is not None:
            (out / "preprocess.log").write_text(log)
        with pytest.raises(InputError, match=message):
            preprocess_words(out, *flags, **texts)
        assert (out / name).read_text() == "w1 1\n"
        (out / name).unlink()
    (out / "preprocess.log").unlink()
    with lock(out), pytest.raises(InputError, match="--dest .*out is in use by process"):
        preprocess_words(out, **texts)
    # a killed run's are: words are not taken for those of its BPE
    (out / "preprocess.log").touch()
    (out / "vocab.bpe").write_text("a b\n")
    preprocess_words(out, **texts)
    assert not (out / "vocab.bpe").exists() and (out / "train.idx").exists()


def test_many_unknown_words_are_warned_of_and_a_split_without_text_is_refused(tmp_path, capsys):
    texts = small_corpus(tmp_path)
    preprocess_words(tmp_path / "good", **texts)
    assert "warning" not in capsys.readouterr().err
    preprocess_words(tmp_path / "bad", "--nwords", 20, **texts)
    assert "of the tokens of valid; --bpe train" in capsys.readouterr().err
    (tmp_path / "blank.txt").write_text("\n \n\t\n")
    for split in ("train", "valid"):
        with pytest.raises(InputError, match=f"--{split} .*blank.txt: no text in it"):
            preprocess_words(tmp_path / split, **{**texts, split: [tmp_path / "blank.txt"]})
        assert not (tmp_path / split / f"{split}.idx").exists()


def test_a_flag_given_twice_takes_both_and_tokens_are_told_from_text(tmp_path, capsys, tokenizers):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("12 7 3001\n15\n")
    two.write_text("th@@ e cat\n\u2581the \u2581cat\n")
    both = "--train", one, "--train", two, "--bpe"
    for how, is_told in (("none", False), ("train", True)):
        run_preprocess(tmp_path / how, *both, how)
        assert len(sentences_of(tmp_path / how, "train")) == 5  # an empty line between them
        told = capsys.readouterr().err
        for path in (one, two):
            assert (f"{path}: seems to be tokenized already" in told) == is_told


def dies_at(step: int, start) -> bool:
    """Call start() in a child that gets SIGKILL at its step-th change of the disk, if it comes."""
    pid = os.fork()
    if pid == 0:
        left = iter(range(step))

        def dying(function):
            def call_or_die(*args, **kwargs):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call_or_die

        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            setattr(owner, name, dying(getattr(owner, name)))
        Tokenizer.encode = dying(Tokenizer.encode)
        try:
            start()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_kill_at_any_moment_leaves_nothing_that_looks_whole_and_the_next_run_completes_it(
    tmp_path, monkeypatch, flags
):
    """In a new folder, and over an older dataset."""
    monkeypatch.setattr(files, "CHUNK", 2000)
    # saves seconds; what a process has written survives its kill
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    texts = small_corpus(tmp_path, splits=("train", "valid"))
    argv = ["--nwords", 30, *flags]
    preprocess_words(tmp_path / "whole", *argv, **texts)
    whole = dataset_files(tmp_path / "whole")
    before, step, died = {}, 0, True
    while died:
        out = tmp_path / f"out{step}"
        if flags:
            preprocess_words(out, **texts)
            before = dataset_files(out)
        died = dies_at(step, lambda: preprocess_words(out, *argv, **texts))
        left = {k: v for k, v in dataset_files(out).items() if not k.endswith(".tmp")}
        if "train.idx" in left:
            assert left in (before, whole)
        for name in [name for name in left if name.endswith(".idx")]:
            pair = [left[name], left[f"{name[:-4]}.bin"]]
            sets = [[files.get(name), files.get(f"{name[:-4]}.bin")] for files in (whole, before)]
            assert pair in sets
        preprocess_words(out, *argv, **texts)
        assert dataset_files(out) == whole
        step += 1
    assert step > 15


def test_a_worker_never_hears_the_ctrl_c_that_the_parent_answers():
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        workers._submit(pool, "encode", "").exception()  # it has no tokenizer
        blocked = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result()
    assert signal.SIGINT in blocked and signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 16)
    (tmp_path / "t.txt").write_text("a b c\n" * 400)
    tokenizer = Tokenizer({"a": 4}, "<u2")
    rows = preprocess.tokenize("encode", tokenizer, [str(tmp_path / "t.txt")], "", workers=2)
    assert next(rows)[2] > 0  # <unk>
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(RunError, match="a worker was killed"):
        list(rows)


@pytest.mark.parametrize(
    ("flags", "splits", "message"),
    [
        ("--bpe gpt2 --dict D", "train", "needs --encoder_json"),
        ("--bpe none --encoder_json x", "train", "--encoder_json has no meaning"),
        ("--bpe train --dict D", "train", "--dict has no meaning"),
        ("--bpe none --nwords 9 --dict D", "train", "--nwords .*no meaning with --dict"),
        ("--bpe none --nwords 4", "train", "--nwords 4: must be from 5"),
        ("--bpe none --workers 0", "train", "--workers 0: must be from 1"),
        ("--bpe train --vocab_size 99", "train", "--vocab_size 99: must be from 256"),
        ("--bpe train --vocab_size 1e7", "train", "--vocab_size 10000000: must be from"),
        ("--bpe none", "valid", "--train is missing"),
        ("--bpe none", "", "no text"),
        ("--bpe sentencepiece", "train", "invalid choice"),
        ("--bpe none --source-lang en", "train", "--source-lang"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(tmp_path, flags, splits, message):
    texts = {split: [tmp_path / "t.txt"] for split in splits.split()}
    with pytest.raises(InputError, match=message):
        run_preprocess(tmp_path / "out", *flags.split(), **texts)
    assert not (tmp_path / "out").exists()
