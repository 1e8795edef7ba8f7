"""Whole runs: a guarded folder, learning; an end by a signal, a closed terminal or the clock."""

import contextlib
import dataclasses
import json
import os
import pty
import shutil
import signal
import sys
import time

import eval as evaluation
import finetune
import train
from config import InputError
from run import checkpoint
from run.guard import Clock, Signals
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
from test.test_robust import before_updates
from text import demo
from text.binarized import EOS, write_dataset

import pytest


def test_a_finished_run_can_be_continued_and_a_used_folder_is_guarded(tmp_path, corpus_dir):
    argv = few(corpus_dir, tmp_path)
    log = tmp_path / "train.jsonl"
    for text in ('{"text": "someone\'s"}\n', '["someone\'s", 1]\n'):
        log.write_text(text)
        for more in ([], ["--no_resume", "--overwrite"]):
            with pytest.raises(InputError, match="train.jsonl is no log of a run"):
                train.main([*argv, *more])
        assert log.read_text() == text
    log.write_text('{"loss": 1')  # a crash cut the first row
    call(train.main, *argv, "--max_update", 3)
    printed = call(train.main, *argv, "--max_update", 5, "--init_from", "x.pt")
    assert "note: --init_from is not read, since " in printed
    assert [row["num_updates"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    for more, fact in (
        (["--no_resume"], "--overwrite"),
        # nothing is removed before every check has passed
        (["--no_resume", "--overwrite", "--data_path", "none"], "no such folder"),
    ):
        with pytest.raises(InputError, match=fact):
            train.main([*argv, "--max_update", "6", *more])
    assert progress_of(tmp_path)["num_updates"] == 5
    call(train.main, *argv, "--max_update", 2, "--no_resume", "--overwrite")
    assert [row["num_updates"] for row in rows_of(tmp_path)] == [1, 2]


def test_a_resume_with_another_valid_split_says_so_and_begins_its_best_anew(tmp_path, corpus_dir):
    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(corpus_dir, other)
    write_dataset(other / "valid", [[*range(4, 14), EOS]] * 20, 60)
    for folder, updates, is_told in ((corpus_dir, 2, False), (other, 4, True), (other, 6, False)):
        before = progress_of(run)["first_target_var"] if updates > 2 else None
        printed = call(train.main, *few(folder, run, "--max_update", updates))
        assert ("the valid split, so" in printed) == is_told
        now = progress_of(run)["first_target_var"]
        assert (now == before) == (updates == 6)
        assert (now == rows_of(run, "valid_loss")[-1]["valid_target_var"]) == (updates < 6)


def test_the_small_model_learns_more_than_to_predict_the_mean(tmp_path):
    demo_dir, folder = tmp_path / "demo", tmp_path / "run"
    demo.make_demo(demo_dir)
    argv = "--config_name tiny --device cpu --max_update 100 --tokens_per_sample 64".split()
    argv += "--max_tokens 1024 --embed_dim 64 --ffn_embed_dim 256".split()
    call(train.main, *argv, "--data_path", demo_dir, "--save_dir", folder)
    ckpt = folder / "checkpoint_best.pt"
    result = json.loads(call(evaluation.main, "--ckpt", ckpt, "--untrained", "--json"))
    before = result["untrained"]
    assert result["loss"] < 0.8 * before["loss"]
    assert result["cosine"] > max(result["cosine_constant"] + 0.1, before["cosine"] + 0.3)
    assert result["pred_var"] > 0.05 and result["target_var"] > 0.05


# ------------------------------------------------------------------------------------------ signals


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
def test_a_signal_ends_a_fine_tuning_with_its_best_model(monkeypatch, place, tmp_path, number):
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
def test_the_echo_of_a_signal_is_ignored_and_one_workers_counts(monkeypatch, workers, number):
    device = dataclasses.replace(CPU, world_size=workers)
    with Signals(device) as signals:
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


# ------------------------------------------------------------------------------------- --max_hours


@pytest.fixture
def eighths(monkeypatch):
    """Each update takes an eighth of an hour."""
    monkeypatch.setattr(Clock, "look", lambda clock: setattr(clock, "hours", clock.hours + 0.125))
    monkeypatch.setattr(Clock, "now", lambda clock: clock.hours)


def test_hours_or_updates_end_a_run_and_change_no_number(eighths, corpus_dir, tmp_path):
    rows = {}
    for name, hours, updates in (("plain", 0, 12), ("updates", 100, 12), ("hours", 1, 8)):
        argv = ["--max_update", 12, "--max_hours", hours]
        call(train.main, *few(corpus_dir, tmp_path / name, *argv))
        assert len(rows_of(tmp_path / name, "valid_loss")) == 1  # at the end, as ever
        rows[name] = speed_aside(rows_of(tmp_path / name))
        if hours:
            assert [row.pop("hours") for row in rows[name]] == [(i + 1) / 8 for i in range(updates)]
        assert rows[name] == rows["plain"][:updates]
    compare_checkpoints(*(tmp_path / name / "checkpoint_last.pt" for name in ("plain", "updates")))


def test_an_interrupted_run_continues_with_the_hours_that_it_had_used(
    eighths, corpus_dir, tmp_path, monkeypatch
):
    argv = "--max_hours 1 --save_interval_updates 2 --dropout 0.1".split()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(train.main, *few(corpus_dir, whole, *argv))

    def interrupt(number):
        if number == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_updates(patch, interrupt)
        call(train.main, *few(corpus_dir, parts, *argv))
    text = call(train.main, *few(corpus_dir, parts, *argv))
    assert "at update 4, epoch 1, after 30 minutes" in text
    compare_checkpoints(whole / "checkpoint_last.pt", parts / "checkpoint_last.pt")
    assert speed_aside(rows_of(whole)) == speed_aside(rows_of(parts))
