"""Checkpoints: names, fairseq's files, what a save leaves, what is kept, what is refused."""

import errno
import gc
import io
import json
import os
import re
import shutil
from pathlib import Path

import convert
import eval as evaluation
import train
from config import InputError, RunError
from formats.load import load
from run import checkpoint
from test.helpers import GOLDEN, call, few, golden, make_dataset, rows_of, small_content

import pytest
import torch

FAIRSEQ = GOLDEN / "checkpoint" / "fairseq_doc128.pt"
SHAPE = """--embed_dim 64 --ffn_embed_dim 256 --layers 4 --attention_heads 4
--average_top_k_layers 3 --dropout 0 --attention_dropout 0 --tokens_per_sample 128
--max_tokens 1024 --max_update 2 --log_interval 1 --device cpu --disable_validation""".split()


def updates_in(path) -> int:
    return checkpoint.load(path).content["progress"]["num_updates"]


@golden
def test_a_fairseq_checkpoint_evaluates_to_its_own_validation_loss(tmp_path):
    recorded = json.loads((GOLDEN / "train" / "doc128" / "config.json").read_text())["final_valid"]
    words = GOLDEN / "corpora" / "words-bin"
    for flag in ("--ckpt", "--init_from"):
        argv = [flag, FAIRSEQ, "--data_path", words, "--device", "cpu", "--json"]
        result = json.loads(call(evaluation.main, *argv))
        assert result["loss"] == pytest.approx(recorded["loss"], rel=5e-6)
        assert all(result[name] == recorded[name] for name in ("sample_size", "batches"))
    argv = ["--init_from", FAIRSEQ, "--data_path", words, "--save_dir", tmp_path]
    call(train.main, *argv, "--fairseq_exact", *SHAPE)
    assert rows_of(tmp_path)[0]["loss"] < 2.2  # an untrained model starts at 2.6 here


def test_foreign_and_misfitting_checkpoints_are_refused(saved, tmp_path, corpus_dir):
    file = saved / "checkpoint_last.pt"
    cut, other, many = (tmp_path / f"{name}.pt" for name in ("cut", "other", "list"))
    cut.write_bytes(file.read_bytes()[:5000])
    torch.save({"weight": torch.zeros(2)}, other)
    torch.save([1], many)
    bigger = make_dataset(tmp_path / "bigger", words=80)[0]
    start = few(corpus_dir, tmp_path / "new", "--max_update", 5, "--init_from", file)
    resume = few(corpus_dir, saved, "--max_update", 5)
    heads = "last.pt: its --attention_heads is 2, and here 4"
    for read, argument, message in (
        (load, cut, "cut.pt.* damaged"),
        (load, other, "other.pt.* neither"),
        (load, many, "list.pt.* holds a list"),
        (checkpoint.load, other, "other.pt: not a checkpoint of this .*--init_from"),
        (train.main, [*start, f"--data_path={bigger}"], "another dictionary"),
        (train.main, [*start, "--embed_dim=32"], r"is \(.*this model's is"),
        (train.main, [*start, "--attention_heads=4"], heads),
        (convert.main, [f"--ckpt={file}", "--attention_heads=4", "--to", "native", "x"], heads),
        (train.main, [*start, "--layers=3"], "has no encoder.layers.2"),
        (train.main, [*resume, "--layers=3"], "layers was 2, is 3"),
        (evaluation.main, [f"--ckpt={file}", f"--data_path={bigger}"], "another dictionary"),
    ):
        with pytest.raises(InputError, match=message):
            read(argument)


class FullDisk(io.RawIOBase):
    """A file on a disk without room."""

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing_saves(monkeypatch, numbers):
    """The saves of these updates run out of space."""
    save = torch.save

    def torch_save(content, file):
        is_full = content["progress"]["num_updates"] in numbers
        save(content, FullDisk() if is_full else file)

    monkeypatch.setattr(torch, "save", torch_save)


def test_a_save_that_fails_loses_nothing_and_is_tried_again(monkeypatch, corpus_dir, tmp_path):
    failing_saves(monkeypatch, (2, 3))
    argv = "--max_update 6 --save_interval_updates 1 --keep_interval_updates 2".split()
    printed = call(train.main, *few(corpus_dir, tmp_path, *argv))
    assert len(re.findall(r"warning: update [23] could not be saved .*No space left", printed)) == 2
    # the newest are kept, each a whole file of its own update
    updates = {path.stem[11:]: updates_in(path) for path in tmp_path.glob("*.pt*")}
    assert updates == {"1_5": 5, "1_6": 6, "best": updates["best"], "last": 6}


def test_kept_checkpoints_go_only_where_another_is_kept(corpus_dir, tmp_path):
    keep = ["--save_interval_updates", 1, "--keep_interval_updates"]
    for updates, argv, left in ((2, [*keep, -1], "12"), (3, [], "12"), (4, [*keep, 2], "24")):
        printed = call(train.main, *few(corpus_dir, tmp_path, "--max_update", updates, *argv))
        assert sorted(path.stem[-1] for path in tmp_path.glob("checkpoint_1_*")) == [*left]
        assert ("keep_interval_updates" in printed.partition("changed since")[2]) == (updates > 2)


def test_a_checkpoint_that_may_not_be_read_ends_a_resume(corpus_dir, saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "run")
    shutil.copy(saved / "checkpoint_last.pt", tmp_path / "run" / "checkpoint_1_1.pt")

    def denied(path, mode="r", *args, **named):
        if path.name == "checkpoint_last.pt":
            raise PermissionError(errno.EACCES, "Permission denied")
        return io.open(path, mode, *args, **named)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InputError, match="checkpoint_last.pt: Permission denied"):
        train.main(few(corpus_dir, tmp_path / "run", "--max_update", "9"))


def test_a_final_save_that_fails_is_an_error_and_leaves_the_older_file(
    monkeypatch, corpus_dir, tmp_path
):
    call(train.main, *few(corpus_dir, tmp_path, "--max_update", 2))
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.pt")}
    failing_saves(monkeypatch, (3,))
    with pytest.raises(RunError, match="update 3 could not be saved.*No space left"):
        call(train.main, *few(corpus_dir, tmp_path, "--max_update", 3))
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.[pt][tm]*")} == before


def test_the_last_checkpoint_is_published_before_any_copy_is_begun(monkeypatch, tmp_path):
    names = [tmp_path / f"checkpoint_{name}.pt" for name in ("last", "best", "1_7")]
    seen = []

    def full(source, copy):
        seen.append(updates_in(names[0]))
        Path(copy).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint.save(small_content(3), *names)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(small_content(7), *names)
    assert seen == [7] and sorted(tmp_path.iterdir()) == sorted(names)
    assert [updates_in(name) for name in names] == [7, 3, 3]


def test_a_resume_tries_checkpoints_from_the_most_updates_and_waits_for_no_pipe(tmp_path):
    names = {"best": 15, "3_20": 20, "1_5": 5, "2_10": 10, "last": 1}
    # their times say the opposite
    for later, (name, updates) in enumerate(names.items()):
        checkpoint.save(small_content(updates), tmp_path / f"checkpoint_{name}.pt")
        os.utime(tmp_path / f"checkpoint_{name}.pt", (10**9 - updates + later, 10**9 - updates))
    (tmp_path / "checkpoint_odd.pt").write_text("not a checkpoint")
    os.mkfifo(tmp_path / "checkpoint_pipe.pt")
    found = [path.stem.removeprefix("checkpoint_") for path in checkpoint.candidates(tmp_path)]
    assert found == ["last", "3_20", "best", "2_10", "1_5", "odd", "pipe"]


def test_a_resumed_run_does_not_hold_its_old_file(saved, corpus_dir, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "run")
    loop = train.loop

    def held() -> int:
        return sum(type(thing) is checkpoint.Loaded for thing in gc.get_objects())

    before = held()  # by other tests

    def looping(*args):
        assert held() == before
        return loop(*args)

    monkeypatch.setattr(train, "loop", looping)
    call(train.main, *few(corpus_dir, tmp_path / "run", "--max_update", 5))
