"""Nothing is lost: kills, full disks, signals, numbers that are not finite.

The long versions are in test/soak.py.
"""

import dataclasses
import errno
import os
import shutil
import signal
import threading
import types

import train
from config import InputError, RunError
from data import Corpus, prefetch
from run import checkpoint, guard, saves
from test import soak
from test.helpers import (
    CPU,
    call,
    compare_checkpoints,
    few,
    make_run,
    rows_of,
    speed_aside,
    start_training,
    wait_for,
)

import numpy as np
import pytest
import torch

# ---------------------------------------------------------------------------------------------- files


def test_a_bad_block_in_the_middle_of_a_run_costs_no_update(corpus_dir, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(corpus_dir, folder)
    dataset = make_run(folder)[1]
    block = int(dataset.epoch_batches(1)[5][0])  # of the sixth batch
    items = np.fromfile(folder / "train.bin", np.uint16)
    items[dataset.starts[block]] = 999
    items.tofile(folder / "train.bin")
    with pytest.raises(InputError, match="holds token id 999"):
        call(train.main, *few(folder, tmp_path / "run", "--max_update", 100))
    assert (
        checkpoint.load(tmp_path / "run" / "checkpoint_last.pt").content["progress"]["num_updates"]
        == 5
    )


def test_a_killed_run_always_leaves_a_checkpoint_that_loads(corpus_dir, tmp_path):
    figures = soak.kills(3, tmp_path, corpus_dir)
    # at most two updates: the last one, and the one whose save was under way meanwhile
    assert figures["kills"] == 3 and figures["lost"] == 0 and figures["most_updates_repeated"] <= 2


# ---------------------------------------------------------------------------------------------- signals


def signal_at(monkeypatch, moments: dict):
    """Send this process signals while it computes some updates: {update number: [signals]}."""
    update = train.update

    def wrapped(run, *rest):
        for number in moments.pop(run.num_updates + 1, []):
            os.kill(os.getpid(), number)
        return update(run, *rest)

    monkeypatch.setattr(train, "update", wrapped)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_update_and_saves_and_the_run_continues_bit_for_bit(
    monkeypatch, corpus_dir, tmp_path, number
):
    call(train.main, *few(corpus_dir, tmp_path / "whole", "--max_update", 30, "--dropout", 0.1))
    signal_at(monkeypatch, {3: [number], 21: [number]})
    before = signal.getsignal(number)
    for expected in (3, 21):
        assert (
            train.main(few(corpus_dir, tmp_path / "parts", "--max_update", 30, "--dropout", 0.1))
            == 128 + number
        )
        progress = checkpoint.load(tmp_path / "parts" / "checkpoint_last.pt").content["progress"]
        assert progress["num_updates"] == expected and signal.getsignal(number) is before
    assert (
        train.main(few(corpus_dir, tmp_path / "parts", "--max_update", 30, "--dropout", 0.1)) == 0
    )
    compare_checkpoints(
        tmp_path / "whole" / "checkpoint_last.pt", tmp_path / "parts" / "checkpoint_last.pt"
    )
    assert speed_aside(rows_of(tmp_path / "whole")) == speed_aside(rows_of(tmp_path / "parts"))


def test_sigusr1_saves_and_the_run_continues(monkeypatch, corpus_dir, tmp_path, capsys):
    signal_at(monkeypatch, {2: [signal.SIGUSR1]})
    seen = []
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint,
        "save",
        lambda content, *paths, **named: (
            seen.append(content["progress"]["num_updates"]),
            save(content, *paths, **named),
        )[1],
    )
    assert train.main(few(corpus_dir, tmp_path, "--max_update", 4)) == 0
    assert seen == [2, 4]


def test_the_echo_of_a_signal_under_torchrun_is_ignored():
    with guard.Signals(dataclasses.replace(CPU, world_size=2)) as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop == signal.SIGTERM


def test_a_run_continues_when_nobody_reads_its_output(corpus_dir, tmp_path):
    process = start_training(*few(corpus_dir, tmp_path, "--max_update", 60))
    wait_for(process, "update 2 ")
    process.stdout.close()
    assert process.wait(60) == 0
    assert checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"] == 60


def test_a_second_signal_ends_at_once_and_a_second_run_is_refused(corpus_dir, tmp_path):
    process = start_training(
        *few(corpus_dir, tmp_path, "--max_update", 100000, "--log_interval", 1)
    )
    try:
        wait_for(process, "update 2 ")
        with pytest.raises(InputError, match=rf"in use by process {process.pid} on"):
            call(train.main, *few(corpus_dir, tmp_path, "--max_update", 1))
        os.kill(process.pid, signal.SIGSTOP)  # both signals arrive while it cannot act on the first
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(20) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    finally:
        process.kill()
        process.stdout.close()
    # the lock ended with its process
    call(train.main, *few(corpus_dir, tmp_path, "--max_update", 1, "--no_resume", "--overwrite"))


# ---------------------------------------------------------------------------------------------- numbers


def poison(monkeypatch, numbers):
    """Make the loss and the gradients of these updates NaN."""
    plain, current = train.data2vec_loss, []
    update = train.update
    monkeypatch.setattr(
        train,
        "update",
        lambda run, *rest: (current.append(run.num_updates + 1), update(run, *rest))[1],
    )
    monkeypatch.setattr(
        train,
        "data2vec_loss",
        lambda *a: plain(*a) * (float("nan") if current and current[-1] in numbers else 1.0),
    )


@pytest.mark.parametrize("fused", [True, False])
def test_a_non_finite_update_leaves_the_weights_alone_and_is_logged(
    monkeypatch, corpus_dir, tmp_path, fused
):
    make = train.Optimizer
    monkeypatch.setattr(
        train, "Optimizer", lambda *args: (made := make(*args), setattr(made, "is_fused", fused))[0]
    )
    poison(monkeypatch, {1, 3})
    argv = "--max_update 5 --disable_validation --warmup_updates 0 --save_interval_updates 1 --keep_interval_updates -1"
    call(train.main, *few(corpus_dir, tmp_path, *argv.split()))
    assert [row["num_updates"] for row in rows_of(tmp_path, "skipped")] == [1, 3]
    assert all(len(row["blocks"]) > 0 for row in rows_of(tmp_path, "skipped"))
    assert [row["loss"] is None for row in rows_of(tmp_path)] == [True, False, True, False, False]
    states = [checkpoint.load(tmp_path / f"checkpoint_1_{u}.pt").content for u in (2, 3, 4)]
    same = [
        all(torch.equal(a["student"][k], b["student"][k]) for k in a["student"])
        for a, b in zip(states, states[1:])
    ]
    assert same == [
        fused,
        False,
    ]  # an optimizer that cannot skip still moves the weights by its momentum
    assert all(t.isfinite().all() for t in states[-1]["student"].values())
    assert states[-1]["progress"]["skipped"] == 2


def test_an_overflow_on_another_worker_skips_the_update_here_too(monkeypatch, corpus_dir):
    device = dataclasses.replace(CPU, amp=torch.float16, world_size=2)

    def all_reduce(self, tensor):  # the other worker's sums: an infinite gradient
        return (
            tensor.index_fill_(0, torch.tensor([5]), float("inf"))
            if tensor.is_floating_point()
            else tensor
        )

    monkeypatch.setattr(type(device), "all_reduce", all_reduce)
    run, dataset = make_run(corpus_dir, device=device)
    before = [p.detach().clone() for p in run.weights.parameters]
    assert train.update(run, [dataset.batch(dataset.epoch_batches(1)[0], 1)]) is None
    assert run.num_updates == 0 and all(
        torch.equal(a, b) for a, b in zip(before, run.weights.parameters)
    )


def test_a_log_interval_keeps_only_the_last_predictions(corpus_dir, tmp_path):
    run, dataset = make_run(corpus_dir)
    log = train.Log(CPU, tmp_path / "train.jsonl")
    for ids in dataset.epoch_batches(1)[:3]:
        log.add(train.update(run, [dataset.batch(ids, 1)]))
    assert all(done.last_batch is None for done in log.done) and len(log.last_batch[0]) > 0
    assert log.write()["num_updates"] == 3


def test_too_many_skipped_updates_in_a_row_save_and_stop_with_advice(
    monkeypatch, corpus_dir, tmp_path
):
    poison(monkeypatch, set(range(3, 100)))
    with pytest.raises(
        RunError, match=r"6 updates in a row.*--max_skipped 5.*lower --lr.*saved update 8"
    ):
        call(
            train.main,
            *few(
                corpus_dir, tmp_path, "--max_update", 50, "--max_skipped", 5, "--log_interval", 20
            ),
        )
    assert checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"] == 8


def test_an_exploding_run_stops_and_keeps_the_last_good_checkpoint(corpus_dir, tmp_path):
    argv = "--max_update 300 --lr 1e36 --warmup_updates 0 --max_skipped 3 --save_interval_updates 1 --clip_norm 0"
    with pytest.raises(RunError, match="the last checkpoint stays|saved update"):
        call(train.main, *few(corpus_dir, tmp_path, *argv.split()))
    good = checkpoint.load(tmp_path / "checkpoint_last.pt")
    assert all(t.isfinite().all() for t in good.student.values())


def test_a_collapse_warns_and_after_ten_intervals_stops_with_a_checkpoint(
    corpus_dir, tmp_path, capsys
):
    argv = few(
        corpus_dir, tmp_path, "--max_update", 40, "--min_target_var", 1e6, "--warmup_updates", 5
    )
    with pytest.raises(
        RunError,
        match="collapse: target_var .* under --min_target_var .* for 10 log intervals.*saved update 15",
    ):
        train.main(argv)
    assert capsys.readouterr().out.count("may be collapsing") == 9
    assert checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"] == 15
    health = guard.Health(guard.GuardConfig(min_target_var=0, min_pred_var=0), 0, say=pytest.fail)
    health.check_variance(
        dict(num_updates=9, target_var=0.0, pred_var=0.0, cosine_constant=0.1), None
    )


def test_out_of_memory_says_what_was_tried_and_what_helps(monkeypatch, corpus_dir, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(train, "teacher_targets", full)
    with pytest.raises(
        RunError,
        match=r"out of memory at update 1: batch of \d+ x \d+ tokens, peak [\d.]+ GiB; lower --max_tokens",
    ):
        call(train.main, *few(corpus_dir, tmp_path, "--max_update", 2))


def test_a_teacher_that_is_not_finite_is_not_saved_over_the_good_file(
    monkeypatch, corpus_dir, tmp_path
):
    move = train.Run.move_teacher

    def spoil(run):
        move(run)
        if run.num_updates == 3:
            next(run.teacher.parameters()).data[0, 0] = float("nan")

    monkeypatch.setattr(train.Run, "move_teacher", spoil)
    with pytest.raises(
        RunError, match="update 3: the weights are not finite, so the last checkpoint stays"
    ):
        call(
            train.main, *few(corpus_dir, tmp_path, "--max_update", 9, "--save_interval_updates", 1)
        )
    assert checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"] == 2


def test_a_run_whose_updates_were_skipped_ends_with_an_error(monkeypatch, corpus_dir, tmp_path):
    poison(monkeypatch, {1, 2, 3})
    with pytest.raises(RunError, match="3 of 4 updates were skipped.*lower --lr"):
        call(train.main, *few(corpus_dir, tmp_path, "--max_update", 4, "--disable_validation"))
    assert checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"] == 4


def test_the_clock_saves_the_last_checkpoint_alone(monkeypatch, corpus_dir, tmp_path):
    clock, seen, save, late = [0.0], [], checkpoint.save, saves.Saves.is_late
    argv = few(
        corpus_dir,
        tmp_path,
        "--max_update",
        7,
        "--disable_validation",
        "--save_interval_updates",
        4,
    )

    def saving(content, *paths, **named):
        seen.append((content["progress"]["num_updates"], [path.name for path in paths]))
        save(content, *paths, **named)

    def is_late(self):  # an update takes 11 minutes
        clock[0] += 660
        return late(self)

    monkeypatch.setattr(checkpoint, "save", saving)
    monkeypatch.setattr(saves, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(saves.Saves, "is_late", is_late)
    call(train.main, *argv)
    last, kept = ["checkpoint_last.pt"], (4, ["checkpoint_last.pt", "checkpoint_1_4.pt"])
    assert seen == [(3, last), kept, (6, last), (7, last)]
    seen.clear()
    call(train.main, *argv, "--no_resume", "--overwrite", "--save_interval_minutes", 0)
    assert seen == [kept, (7, last)]


def test_a_signal_or_a_clock_of_one_worker_counts_for_all(monkeypatch):
    with guard.Signals(CPU) as signals:
        monkeypatch.setattr(
            type(CPU), "agree", lambda self, values: [max(pair) for pair in zip(values, (0, 0, 1))]
        )
        assert signals.agreed() == (0, 0, 1)


def test_the_batches_made_ahead_are_few_however_many_make_an_update(monkeypatch, corpus_dir):
    run, _ = make_run(corpus_dir, update_freq=10**9)
    depths = []
    monkeypatch.setattr(
        train, "prefetch", lambda items, depth, _: depths.append(depth) or prefetch(items, 2)
    )
    next(train.turns(run, Corpus(run.cfg.data)))
    assert depths == [32]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_the_curves_in_one_line_and_not_the_run(monkeypatch, corpus_dir, tmp_path):
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter
    write, room = writer.write, [9]

    def full(self, data):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(writer, "write", full)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    printed = call(
        train.main,
        *few(corpus_dir, tmp_path, "--max_update", 3, "--tensorboard_logdir", tmp_path / "tb"),
    )
    assert printed.count("No space left on device; no more curves until the next start") == 1
