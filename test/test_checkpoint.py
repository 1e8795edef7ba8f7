"""Checkpoints: names, fairseq's files, what a save leaves, what is kept, what is refused."""

import errno
import json
import os
import re
import shutil
import weakref
from pathlib import Path

import ema
import eval as evaluation
import train
from config import InputError, RunError
from formats import fairseq_names
from formats.load import load
from run import checkpoint
from test.helpers import (
    GOLDEN,
    call,
    few,
    golden,
    make_dataset,
    random_encoder,
    rows_of,
    small_content,
)

import pytest
import torch

FAIRSEQ = GOLDEN / "checkpoint" / "fairseq_doc128.pt"
SHAPE = """--embed_dim 64 --ffn_embed_dim 256 --layers 4 --attention_heads 4
--average_top_k_layers 3 --dropout 0 --attention_dropout 0 --tokens_per_sample 128
--max_tokens 1024 --max_update 2 --log_interval 1 --device cpu --disable_validation""".split()


def updates_in(path) -> int:
    return checkpoint.load(path).content["progress"]["num_updates"]


def test_our_names_and_fairseqs_map_one_to_one():
    student, _ = random_encoder(1, normalize_before=True)
    teacher = ema.make_teacher(random_encoder(2, normalize_before=True)[0].encoder)
    theirs = fairseq_names.to_reference(student.state_dict(), teacher.state_dict())
    assert "encoder.sentence_encoder.layers.1.self_attn.k_proj.bias" in theirs
    assert "encoder.regression_head.2.weight" in theirs
    back_student, back_teacher = fairseq_names.from_reference(theirs)
    for back, module in ((back_student, student), (back_teacher, teacher)):
        assert set(back) == set(module.state_dict())
        assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())


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
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:5000])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    for name, message in dict(
        text="cannot be read", cut="damaged", other="neither", list="holds a list"
    ).items():
        with pytest.raises(InputError, match=f"{name}.pt.* {message}"):
            load(tmp_path / f"{name}.pt")
    with pytest.raises(InputError, match="other.pt: not a checkpoint of this project.*--init_from"):
        checkpoint.load(tmp_path / "other.pt")

    bigger = make_dataset(tmp_path / "bigger", words=80)[0]
    start = ["--max_update", 5, "--init_from", file]
    for data, argv, message in (
        (bigger, [], "another dictionary"),
        (corpus_dir, ["--embed_dim", 32], r"is \(.*this model's is"),
        (corpus_dir, ["--layers", 3], "has no encoder.layers.2"),
    ):
        with pytest.raises(InputError, match=message):
            call(train.main, *few(data, tmp_path / "new", *start, *argv))
    with pytest.raises(InputError, match="layers was 2, is 3"):
        call(train.main, *few(corpus_dir, saved, "--max_update", 5, "--layers", 3))
    with pytest.raises(InputError, match="another dictionary"):
        call(evaluation.main, "--ckpt", file, "--data_path", bigger)


def test_the_newest_kept_checkpoints_are_whole_files_of_their_own_update(tmp_path, corpus_dir):
    argv = "--max_update 6 --save_interval_updates 2 --keep_interval_updates 2".split()
    call(train.main, *few(corpus_dir, tmp_path, *argv))
    names = sorted(p.stem.removeprefix("checkpoint_") for p in tmp_path.glob("*.pt*"))
    assert names == ["1_4", "1_6", "best", "last"]
    assert updates_in(tmp_path / "checkpoint_1_4.pt") == 4


class FullDisk:
    """A file on a disk with room for `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def failing_writes(monkeypatch, fails):
    """The save of an update runs out of space half-way if fails(its number)."""
    save = torch.save

    def torch_save(content, file):
        save(content, FullDisk(file, 20_000) if fails(content["progress"]["num_updates"]) else file)

    monkeypatch.setattr(torch, "save", torch_save)


def test_a_save_that_fails_loses_nothing_and_is_tried_again(monkeypatch, corpus_dir, tmp_path):
    failing_writes(monkeypatch, lambda number: number in (2, 3))
    argv = ["--max_update", 4, "--save_interval_updates", 1]
    printed = call(train.main, *few(corpus_dir, tmp_path, *argv))
    assert len(re.findall(r"warning: update [23] could not be saved .*No space left", printed)) == 2
    assert updates_in(tmp_path / "checkpoint_last.pt") == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_a_final_save_that_fails_is_an_error_and_leaves_the_older_file(
    monkeypatch, corpus_dir, tmp_path
):
    call(train.main, *few(corpus_dir, tmp_path, "--max_update", 2))
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.pt")}
    failing_writes(monkeypatch, lambda number: True)
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


def test_a_users_own_tmp_file_is_neither_removed_nor_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / "file.pt.tmp").symlink_to(victim)
    before = set(tmp_path.iterdir())
    checkpoint.save(small_content(), tmp_path / "file.pt")
    assert victim.read_text() == "kept"
    assert set(tmp_path.iterdir()) - before == {tmp_path / "file.pt"}


def test_a_resume_tries_checkpoints_from_the_most_updates_whatever_their_times(tmp_path):
    names = {"best": 15, "3_20": 20, "1_5": 5, "2_10": 10, "last": 1}
    for later, (name, updates) in enumerate(names.items()):
        checkpoint.save(small_content(updates), tmp_path / f"checkpoint_{name}.pt")
        os.utime(tmp_path / f"checkpoint_{name}.pt", (10**9 - updates + later, 10**9 - updates))
    (tmp_path / "checkpoint_odd.pt").write_text("not a checkpoint")
    found = [path.stem.removeprefix("checkpoint_") for path in checkpoint.candidates(tmp_path)]
    assert found == ["last", "3_20", "best", "2_10", "1_5", "odd"]


def test_a_resumed_run_does_not_hold_the_file_that_it_came_from(
    saved, corpus_dir, tmp_path, monkeypatch
):
    shutil.copytree(saved, tmp_path / "run")
    seen, load, loop = [], checkpoint.load, train.loop

    def loading(path):
        loaded = load(path)
        seen.append(weakref.ref(loaded))
        return loaded

    def looping(*args):
        assert len(seen) == 1 and seen[0]() is None
        return loop(*args)

    monkeypatch.setattr(checkpoint, "load", loading)
    monkeypatch.setattr(train, "loop", looping)
    call(train.main, *few(corpus_dir, tmp_path / "run", "--max_update", 5))
