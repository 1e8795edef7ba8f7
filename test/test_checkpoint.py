"""Checkpoints: names, fairseq's files, what a save leaves, what is kept, what is refused."""

import copy
import errno
import json
import os
import re
import shutil
import threading
import time
import weakref
from pathlib import Path

import ema
import eval as evaluation
import train
from config import InputError, RunError
from formats import fairseq_names
from run import checkpoint, saves
from test.helpers import (
    FEW,
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


def test_our_names_and_fairseqs_map_one_to_one():
    student, cfg = random_encoder(1, normalize_before=True)
    teacher = ema.make_teacher(random_encoder(2, normalize_before=True)[0].encoder)
    theirs = fairseq_names.to_reference(student.state_dict(), teacher.state_dict())
    assert (
        "encoder.sentence_encoder.layers.1.self_attn.k_proj.bias" in theirs
        and "encoder.regression_head.2.weight" in theirs
    )
    back_student, back_teacher = fairseq_names.from_reference(theirs)
    for back, module in ((back_student, student), (back_teacher, teacher)):
        assert set(back) == set(module.state_dict())
        assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())


@golden
def test_every_name_in_fairseqs_file_is_known_and_none_is_made_up():
    theirs = torch.load(GOLDEN / "checkpoint" / "fairseq_doc128.pt", weights_only=True)["model"]
    made = fairseq_names.to_reference(*fairseq_names.from_reference(theirs))
    assert set(made) == set(theirs) and set(made["encoder._ema"]) == set(theirs["encoder._ema"])
    assert all(torch.equal(made[k], v) for k, v in theirs.items() if k != "encoder._ema")
    assert all(torch.equal(made["encoder._ema"][k], v) for k, v in theirs["encoder._ema"].items())


@golden
def test_a_fairseq_checkpoint_evaluates_to_its_own_validation_loss(tmp_path):
    recorded = json.loads((GOLDEN / "train" / "doc128" / "config.json").read_text())["final_valid"]
    file, words = GOLDEN / "checkpoint" / "fairseq_doc128.pt", GOLDEN / "corpora" / "words-bin"
    for flag in ("--ckpt", "--init_from"):
        result = json.loads(
            call(evaluation.main, flag, file, "--data_path", words, "--device", "cpu", "--json")
        )
        assert result["loss"] == pytest.approx(recorded["loss"], rel=5e-6)
        assert (result["sample_size"], result["batches"]) == (
            recorded["sample_size"],
            recorded["batches"],
        )
    argv = ["--init_from", file, "--data_path", words, "--save_dir", tmp_path, "--fairseq_exact"]
    argv += (
        "--embed_dim 64 --ffn_embed_dim 256 --layers 4 --attention_heads 4 --average_top_k_layers 3 --dropout 0"
        " --attention_dropout 0 --tokens_per_sample 128 --max_tokens 1024 --max_update 2 --log_interval 1 --device cpu"
        " --disable_validation"
    ).split()
    call(train.main, *argv)
    assert rows_of(tmp_path)[0]["loss"] < 2.2  # an untrained model starts at 2.6 here


def test_foreign_and_misfitting_checkpoints_are_refused(tmp_path, corpus_dir):
    good = tmp_path / "run"
    call(train.main, *FEW, "--max_update", 2, "--data_path", corpus_dir, "--save_dir", good)
    file = good / "checkpoint_last.pt"
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:5000])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    for name, message in (
        ("text", "cannot be read"),
        ("cut", "damaged: "),
        ("other", "not a checkpoint of this project.*--init_from"),
        ("list", "holds a list"),
    ):
        with pytest.raises(InputError, match=message):
            checkpoint.load(tmp_path / f"{name}.pt")
    bigger = make_dataset(tmp_path / "bigger", words=80)[0]
    start = [
        *FEW,
        "--max_update",
        "2",
        "--save_dir",
        str(tmp_path / "new"),
        "--init_from",
        str(file),
    ]
    with pytest.raises(InputError, match="another dictionary"):
        call(train.main, *start, "--data_path", bigger)
    with pytest.raises(InputError, match=r"is \(.*this model's is"):
        call(train.main, *start, "--data_path", corpus_dir, "--embed_dim", "32")
    with pytest.raises(InputError, match="has no encoder.layers.2"):
        call(train.main, *start, "--data_path", corpus_dir, "--layers", "3")
    with pytest.raises(InputError, match="layers was 2, is 3"):
        call(
            train.main,
            *FEW,
            "--max_update",
            "4",
            "--save_dir",
            good,
            "--data_path",
            corpus_dir,
            "--layers",
            "3",
        )
    with pytest.raises(InputError, match="another dictionary"):
        call(evaluation.main, "--ckpt", file, "--data_path", bigger)


def test_the_newest_kept_checkpoints_are_whole_files_of_their_own_update(tmp_path, corpus_dir):
    argv = [*FEW, "--max_update", 6, "--data_path", corpus_dir, "--save_dir", tmp_path]
    call(train.main, *argv, "--save_interval_updates", 2, "--keep_interval_updates", 2)
    names = sorted(p.name for p in tmp_path.glob("*.pt*"))
    assert names == [
        "checkpoint_1_4.pt",
        "checkpoint_1_6.pt",
        "checkpoint_best.pt",
        "checkpoint_last.pt",
    ]
    assert checkpoint.load(tmp_path / "checkpoint_1_4.pt").content["progress"]["num_updates"] == 4


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
    argv = [*FEW, "--data_path", corpus_dir, "--save_dir", tmp_path, "--max_update", 4]
    printed = call(train.main, *argv, "--save_interval_updates", 1)
    assert len(re.findall(r"warning: update [23] could not be saved .*No space left", printed)) == 2
    assert checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"] == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_a_final_save_that_fails_is_an_error_and_leaves_the_older_file(
    monkeypatch, corpus_dir, tmp_path
):
    argv = [*FEW, "--data_path", corpus_dir, "--save_dir", tmp_path, "--max_update"]
    call(train.main, *argv, 2)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.pt")}
    failing_writes(monkeypatch, lambda number: True)
    with pytest.raises(RunError, match="update 3 could not be saved.*No space left"):
        call(train.main, *argv, 3)
    assert {
        p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix in (".pt", ".tmp")
    } == before


def test_the_last_checkpoint_is_published_before_any_copy_is_begun(monkeypatch, tmp_path):
    seen = []

    def full(source, copy):
        seen.append(
            checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"]
        )
        Path(copy).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    names = [
        tmp_path / name
        for name in ("checkpoint_last.pt", "checkpoint_best.pt", "checkpoint_1_7.pt")
    ]
    checkpoint.save(small_content(3), *names)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(small_content(7), *names)
    assert seen == [7] and sorted(tmp_path.iterdir()) == sorted(names)
    assert [checkpoint.load(n).content["progress"]["num_updates"] for n in names] == [7, 3, 3]


def test_a_users_own_tmp_file_is_neither_removed_nor_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    for name in ("file.pt.tmp", "text.json.tmp", "folder.tmp"):
        (tmp_path / name).symlink_to(victim)
    before = set(tmp_path.iterdir())
    checkpoint.save(small_content(), tmp_path / "file.pt")
    checkpoint.write_text(tmp_path / "text.json", "{}")
    with checkpoint.whole(tmp_path / "folder") as folder:
        folder.mkdir()
    assert victim.read_text() == "kept"
    assert set(tmp_path.iterdir()) - before == {
        tmp_path / name for name in ("file.pt", "text.json", "folder")
    }


def test_a_resume_tries_checkpoints_from_the_most_updates_whatever_their_times(tmp_path):
    names = {"best": 15, "3_20": 20, "1_5": 5, "2_10": 10, "last": 1}
    for later, (name, updates) in enumerate(names.items()):
        checkpoint.save(small_content(updates), tmp_path / f"checkpoint_{name}.pt")
        os.utime(tmp_path / f"checkpoint_{name}.pt", (10**9 - updates + later, 10**9 - updates))
    (tmp_path / "checkpoint_odd.pt").write_text("not a checkpoint")
    found = [path.stem.removeprefix("checkpoint_") for path in checkpoint.candidates(tmp_path)]
    assert found == ["last", "3_20", "best", "2_10", "1_5", "odd"]


@pytest.mark.parametrize("mode", ["", "--fairseq_exact"])
def test_a_slow_save_writes_the_weights_of_its_update(corpus_dir, tmp_path, monkeypatch, mode):
    expected, contents, save, loss = [], saves.contents, torch.save, train.data2vec_loss
    in_next_update = threading.Event()

    def seen(*args):
        in_next_update.clear()
        expected.append(copy.deepcopy(contents(*args)))
        return contents(*args)

    def saving_late(*args):
        in_next_update.wait(1)
        time.sleep(0.2)
        save(*args)

    monkeypatch.setattr(saves, "contents", seen)
    monkeypatch.setattr(torch, "save", saving_late)
    monkeypatch.setattr(
        train, "data2vec_loss", lambda *args: (in_next_update.set(), loss(*args))[1]
    )
    argv = (
        *mode.split(),
        "--save_interval_updates",
        1,
        "--keep_interval_updates",
        -1,
        "--disable_validation",
    )
    call(train.main, *few(corpus_dir, tmp_path, *argv, "--max_update", 4))
    assert len(expected) == 4
    for number, state in enumerate(expected, 1):
        found = checkpoint.load(tmp_path / f"checkpoint_1_{number}.pt").content
        for part in ("student", "teacher"):
            assert all(torch.equal(found[part][k], tensor) for k, tensor in state[part].items())
        moments, others = found["optimizer"]["state"], state["optimizer"]["state"]
        assert all(torch.equal(moments[i][k], others[i][k]) for i in others for k in others[i])


def test_older_checkpoints_than_those_to_keep_are_removed(tmp_path):
    for number in (1, 2, 10):
        names = ("checkpoint_last.pt", f"checkpoint_1_{number}.pt")
        checkpoint.save(small_content(number), *(tmp_path / name for name in names))
        checkpoint.prune(tmp_path, 1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint_1_10.pt", "checkpoint_last.pt"]


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
