"""Nothing is lost: kills, full disks, numbers that are not finite.

The long versions are in test/soak.py.
"""

import dataclasses
import errno
import itertools
import os
import shutil
import signal
import threading
import types

import train
from config import GuardConfig, InputError, RunError
from hardware.device import Device
from run import checkpoint, guard, saves
from test import soak
from test.helpers import CPU, call, few, make_run, progress_of, rows_of

import numpy as np
import pytest
import torch


@pytest.fixture
def saves_seen(monkeypatch):
    """(update, names of the files) of each save."""
    seen, save = [], checkpoint.save

    def saving(content, *paths):
        seen.append((content["progress"]["num_updates"], [path.name for path in paths]))
        save(content, *paths)

    monkeypatch.setattr(checkpoint, "save", saving)
    return seen


def before_updates(monkeypatch, act):
    """act(n) is called before update n, from 1."""
    update = train.update

    def wrapped(run, batches):
        act(run.num_updates + 1)
        return update(run, batches)

    monkeypatch.setattr(train, "update", wrapped)


# ------------------------------------------------------------------------------------ interruptions


def test_a_bad_block_in_the_middle_of_a_run_costs_no_update(corpus_dir, tmp_path):
    folder = shutil.copytree(corpus_dir, tmp_path / "set")
    dataset = make_run(folder)[1]
    block = int(dataset.epoch_batches(1)[5][0])  # of the sixth batch
    np.memmap(folder / "train.bin", np.uint16, "r+")[dataset.starts[block]] = 999
    with pytest.raises(InputError, match="token id 999"):
        train.main(few(folder, tmp_path / "run", "--max_update", 100))
    assert progress_of(tmp_path / "run")["num_updates"] == 5


def test_a_killed_run_always_leaves_a_checkpoint_that_loads(corpus_dir, tmp_path):
    figures = soak.kills(3, tmp_path, corpus_dir)
    assert figures["kills"] == 3 and figures["lost"] == 0
    assert figures["most_updates_repeated"] <= 1  # the one that was being saved


def test_sigusr1_saves_and_the_run_continues(monkeypatch, corpus_dir, tmp_path, saves_seen):
    before_updates(monkeypatch, lambda n: n == 2 and os.kill(os.getpid(), signal.SIGUSR1))
    assert train.main(few(corpus_dir, tmp_path, "--max_update", 4)) == 0
    assert [update for update, _ in saves_seen] == [2, 4]


def test_the_clock_saves_the_last_checkpoint_alone(monkeypatch, corpus_dir, tmp_path, saves_seen):
    argv = few(corpus_dir, tmp_path, *"--max_update 7 --save_interval_updates 4".split())
    now = [0.0]  # an update takes 15 minutes
    before_updates(monkeypatch, lambda n: now.append(900.0 * n))
    monkeypatch.setattr(saves, "time", types.SimpleNamespace(monotonic=lambda: now[-1]))
    call(train.main, *argv, "--disable_validation")
    last, kept = ["checkpoint_last.pt"], (4, ["checkpoint_last.pt", "checkpoint_1_4.pt"])
    assert saves_seen == [(2, last), kept, (6, last), (7, last)]
    saves_seen.clear()
    now[:] = [0.0]
    again = "--disable_validation --no_resume --overwrite --save_interval_minutes 0"
    call(train.main, *argv, *again.split())
    assert saves_seen == [kept, (7, last)]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_the_curves_in_one_line_and_not_the_run(monkeypatch, corpus_dir, tmp_path):
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter
    write, calls = writer.write, itertools.count()

    def full(self, data):
        if next(calls) >= 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(writer, "write", full)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    argv = ["--max_update", 3, "--tensorboard_logdir", tmp_path / "tb"]
    printed = call(train.main, *few(corpus_dir, tmp_path, *argv))
    assert printed.count("No space left on device") == 1
    assert [row["num_updates"] for row in rows_of(tmp_path)] == [1, 2, 3]


# ------------------------------------------------------------------------------------------ numbers


def poison(monkeypatch, numbers):
    """Make the loss and the gradients of these updates NaN."""
    plain, current = train.data2vec_loss, []
    before_updates(monkeypatch, current.append)

    def loss(*args):
        return plain(*args) * (float("nan") if current and current[-1] in numbers else 1.0)

    monkeypatch.setattr(train, "data2vec_loss", loss)


@pytest.mark.parametrize("fused", [True, False])
def test_a_non_finite_update_leaves_the_weights_alone_and_is_logged(
    monkeypatch, corpus_dir, tmp_path, fused
):
    monkeypatch.setattr(Device, "has_fused_adam", fused)
    poison(monkeypatch, {1, 3})
    argv = "--max_update 5 --disable_validation --warmup_updates 0 --save_interval_updates 1"
    call(train.main, *few(corpus_dir, tmp_path, *argv.split(), "--keep_interval_updates", -1))
    skipped = rows_of(tmp_path, "skipped")
    assert [row["num_updates"] for row in skipped] == [1, 3] and all(r["blocks"] for r in skipped)
    assert [row["loss"] is None for row in rows_of(tmp_path)] == [True, False, True, False, False]
    states = [checkpoint.load(tmp_path / f"checkpoint_1_{u}.pt").student for u in (2, 3, 4)]
    same = [all(map(torch.equal, a.values(), b.values())) for a, b in zip(states, states[1:])]
    # an optimizer that cannot skip still moves the weights by its momentum
    assert same == [fused, False]
    assert all(t.isfinite().all() for t in states[-1].values())
    assert progress_of(tmp_path)["skipped"] == 2


def test_an_overflow_on_another_worker_skips_the_update_here_too(monkeypatch, corpus_dir):
    device = dataclasses.replace(CPU, amp=torch.float16, world_size=2)

    def all_reduce(self, tensor):  # the other worker's sums: an infinite gradient
        if tensor.is_floating_point():
            tensor[5] = float("inf")
        return tensor

    monkeypatch.setattr(type(device), "all_reduce", all_reduce)
    run, dataset = make_run(corpus_dir, device=device)
    before = [p.detach().clone() for p in run.weights.parameters]
    assert train.update(run, [dataset.batch(dataset.epoch_batches(1)[0], 1)]) is None
    assert run.num_updates == 0 and all(map(torch.equal, before, run.weights.parameters))


def test_a_collapse_warns_and_after_ten_intervals_stops_with_a_checkpoint(
    corpus_dir, tmp_path, capsys
):
    argv = "--max_update 40 --min_target_var 1e6 --warmup_updates 5".split()
    with pytest.raises(RunError, match="--min_target_var .* 10 log intervals.*saved update 15"):
        train.main(few(corpus_dir, tmp_path, *argv))
    assert capsys.readouterr().out.count("may be collapsing") == 9
    assert progress_of(tmp_path)["num_updates"] == 15
    # with 0 the guard is off
    health = guard.Health(GuardConfig(min_target_var=0, min_pred_var=0), 0, say=pytest.fail)
    row = dict(num_updates=9, target_var=0.0, pred_var=0.0, cosine_constant=0.1)
    health.check_variance(row, None)


def test_out_of_memory_says_what_was_tried(monkeypatch, corpus_dir, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(train, "teacher_targets", full)
    with pytest.raises(RunError, match=r"at update 1: batch of \d+ x \d+ .* lower --max_tokens"):
        train.main(few(corpus_dir, tmp_path, "--max_update", 2))


def test_a_teacher_that_is_not_finite_is_not_saved_over_the_good_file(
    monkeypatch, corpus_dir, tmp_path
):
    move = train.Run.move_teacher

    def spoil(run):
        move(run)
        if run.num_updates == 3:
            next(run.teacher.parameters()).data[0, 0] = float("nan")

    monkeypatch.setattr(train.Run, "move_teacher", spoil)
    with pytest.raises(RunError, match="update 3: the weights are not finite"):
        train.main(few(corpus_dir, tmp_path, *"--max_update 9 --save_interval_updates 1".split()))
    assert progress_of(tmp_path)["num_updates"] == 2


@pytest.mark.parametrize(
    "numbers, argv, fact, saved",
    [
        ({1, 2, 3}, "--max_update 4", "3 of 4 updates were skipped", 4),
        (range(3, 100), "--max_skipped 5 --log_interval 20", "--max_skipped 5.*saved update 8", 8),
    ],
)
def test_a_run_whose_updates_were_skipped_ends_with_an_error(
    monkeypatch, corpus_dir, tmp_path, numbers, argv, fact, saved
):
    poison(monkeypatch, numbers)
    with pytest.raises(RunError, match=fact):
        train.main(few(corpus_dir, tmp_path, "--disable_validation", *argv.split()))
    assert progress_of(tmp_path)["num_updates"] == saved
