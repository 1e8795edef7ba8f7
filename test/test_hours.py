"""--max_hours: a run that ends by the clock, and its resume."""

import train
from run.guard import Clock
from test.helpers import call, compare_checkpoints, few, make_run, rows_of, speed_aside

import pytest
import torch


@pytest.fixture
def eighths(monkeypatch):
    """Each update takes an eighth of an hour."""
    monkeypatch.setattr(Clock, "look", lambda clock: setattr(clock, "hours", clock.hours + 0.125))
    monkeypatch.setattr(Clock, "now", lambda clock: clock.hours)


def test_the_first_of_hours_and_updates_ends_the_run_and_no_number_changes(
    eighths, corpus_dir, tmp_path
):
    rows = {}
    for name, hours in (("plain", 0), ("updates", 100), ("hours", 1)):
        argv = ["--max_update", 12, "--max_hours", hours]
        call(train.main, *few(corpus_dir, tmp_path / name, *argv))
        rows[name] = speed_aside(rows_of(tmp_path / name))
    assert len(rows_of(tmp_path / "hours", "valid_loss")) == 1  # at the end, as ever
    assert [row.pop("hours") for row in rows["updates"]] == [i / 8 for i in range(1, 13)]
    assert [row.pop("hours") for row in rows["hours"]] == [i / 8 for i in range(1, 9)]
    assert rows["updates"] == rows["plain"] and rows["hours"] == rows["plain"][:8]
    last = [tmp_path / name / "checkpoint_last.pt" for name in ("plain", "updates")]
    compare_checkpoints(*last)


def test_an_interrupted_run_continues_with_the_hours_that_it_had_used(
    eighths, corpus_dir, tmp_path, monkeypatch
):
    argv = "--max_hours 1 --save_interval_updates 2 --dropout 0.1".split()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(train.main, *few(corpus_dir, whole, *argv))
    real = train.update

    def failing(run, batches):
        if run.num_updates == 5:
            raise KeyboardInterrupt
        return real(run, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "update", failing)
        call(train.main, *few(corpus_dir, parts, *argv))
    text = call(train.main, *few(corpus_dir, parts, *argv))
    assert "at update 4, epoch 1, after 30 minutes" in text
    compare_checkpoints(whole / "checkpoint_last.pt", parts / "checkpoint_last.pt")
    assert speed_aside(rows_of(whole)) == speed_aside(rows_of(parts))


def test_a_worker_that_is_lost_while_the_clocks_are_compared_leaves_the_weights_as_they_were(
    corpus_dir, monkeypatch
):
    run, dataset = make_run(corpus_dir, max_hours=1)
    before = [p.clone() for p in run.weights.parameters]

    def lost(clock):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Clock, "look", lost)
    with pytest.raises(RuntimeError):
        train.update(run, [dataset.batch(dataset.epoch_batches(1)[0], 1)])
    assert run.num_updates == 0 and all(map(torch.equal, run.weights.parameters, before))
