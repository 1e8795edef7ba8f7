"""Signals: SIGTERM, Ctrl-C and a closed terminal lose nothing."""

import contextlib
import dataclasses
import os
import pty
import signal
import sys
import time

import finetune
import train
from config import InputError
from run import checkpoint, guard
from test.helpers import (
    CPU,
    HERE,
    call,
    compare_checkpoints,
    few,
    progress_of,
    rows_of,
    speed_aside,
    start_training,
    wait_for,
)
from test.test_finetune import flags as finetune_flags
from test.test_finetune import place  # noqa: F401
from test.test_robust import before_updates

import pytest


def sending(number, *updates):
    """Sends a signal to this process before these updates."""
    return lambda n: n in updates and os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_update_and_saves_and_the_run_continues_bit_for_bit(
    monkeypatch, corpus_dir, tmp_path, number
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = ["--max_update", 30, "--dropout", 0.1]
    call(train.main, *few(corpus_dir, whole, *argv))
    before_updates(monkeypatch, sending(number, 3, 21))
    before = signal.getsignal(number)
    for update in (3, 21):
        assert train.main(few(corpus_dir, parts, *argv)) == 128 + number
        assert progress_of(parts)["num_updates"] == update
        assert signal.getsignal(number) is before
    assert train.main(few(corpus_dir, parts, *argv)) == 0
    compare_checkpoints(whole / "checkpoint_last.pt", parts / "checkpoint_last.pt")
    assert speed_aside(rows_of(whole)) == speed_aside(rows_of(parts))


def test_a_hangup_that_nohup_ignores_does_not_end_a_run(monkeypatch, corpus_dir, tmp_path):
    before_updates(monkeypatch, sending(signal.SIGHUP, 2))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train.main(few(corpus_dir, tmp_path, "--max_update", 4)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_fine_tuning_with_its_best_model(
    monkeypatch,
    place,  # noqa: F811
    tmp_path,
    number,
):
    step = finetune.tuning_step

    def signalled(tuning, groups):
        sending(number, 1)(tuning.num_updates)
        return step(tuning, groups)

    monkeypatch.setattr(finetune, "tuning_step", signalled)
    assert finetune.main(finetune_flags(place, tmp_path, seeds=2)) == 128 + number
    found = list(tmp_path.rglob("checkpoint_best.pt"))
    assert len(found) == 1 and checkpoint.load(found[0]).content["classifier"]
    assert not (tmp_path / "results.json").exists()  # it would look complete


def test_a_closed_terminal_costs_no_update(corpus_dir, tmp_path):
    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, HERE / "train.py", *few(corpus_dir, tmp_path)]
        os.execv(sys.executable, [str(word) for word in (*command, "--max_update", 10**6)])
    os.set_blocking(terminal, False)
    while not (tmp_path / "train.jsonl").exists() or not rows_of(tmp_path):
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)  # else it may wait for a reader
        time.sleep(0.1)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    assert progress_of(tmp_path)["num_updates"] == rows_of(tmp_path)[-1]["num_updates"]


@pytest.mark.parametrize(
    "workers, number",
    [(2, signal.SIGTERM), (2, signal.SIGINT), (1, signal.SIGTERM), (1, signal.SIGHUP)],
)
def test_the_echo_of_a_signal_is_ignored_and_one_workers_counts_for_all(
    monkeypatch, workers, number
):
    device = dataclasses.replace(CPU, world_size=workers)
    with guard.Signals(device) as signals:
        for _ in range(2):
            os.kill(os.getpid(), number)
        other = [0, 0, 1]  # another worker's clock asks for a save
        most = lambda self, values: [max(pair) for pair in zip(values, other)]  # noqa: E731
        monkeypatch.setattr(type(device), "agree", most)
        assert signals.agreed() == (number, 0, 1)


def test_a_run_continues_when_nobody_reads_its_output(corpus_dir, tmp_path):
    process = start_training(*few(corpus_dir, tmp_path, "--max_update", 60))
    wait_for(process, "update 2 ")
    process.stdout.close()
    assert process.wait(60) == 0 and progress_of(tmp_path)["num_updates"] == 60


def test_a_second_signal_ends_at_once_and_a_second_run_is_refused(corpus_dir, tmp_path):
    process = start_training(*few(corpus_dir, tmp_path, "--max_update", 100000))
    try:
        wait_for(process, "update 2 ")
        with pytest.raises(InputError, match=rf"in use by process {process.pid} on"):
            train.main(few(corpus_dir, tmp_path, "--max_update", 1))
        # both signals arrive while it cannot act on the first
        for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            os.kill(process.pid, number)
        assert process.wait(20) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    finally:
        process.kill()
        process.stdout.close()
    # the lock ended with its process
    call(train.main, *few(corpus_dir, tmp_path, "--max_update", 1, "--no_resume", "--overwrite"))
