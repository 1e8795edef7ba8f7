"""Whole runs: a resume, a guarded folder, workers, learning, an end by the clock."""

import json

import eval as evaluation
import train
from config import InputError
from run.guard import Clock
from test.helpers import call, compare_checkpoints, few, progress_of, rows_of, speed_aside
from text import demo

import pytest


def test_a_finished_run_continues_when_max_update_is_raised_and_a_used_folder_is_guarded(
    tmp_path, corpus_dir
):
    argv = few(corpus_dir, tmp_path)
    call(train.main, *argv, "--max_update", 3)
    printed = call(train.main, *argv, "--max_update", 5, "--init_from", "x.pt")
    assert "note: --init_from is not read, since " in printed
    assert [row["num_updates"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    none = str(tmp_path / "none")
    for more, fact in (
        (["--seed", "2"], "seed was 1, is 2"),
        (["--no_resume"], "--overwrite"),
        # nothing is removed before every check has passed
        (["--no_resume", "--overwrite", "--data_path", none], "no such folder"),
    ):
        with pytest.raises(InputError, match=fact):
            train.main([*argv, "--max_update", "6", *more])
    assert progress_of(tmp_path)["num_updates"] == 5
    call(train.main, *argv, "--max_update", 2, "--no_resume", "--overwrite")
    assert [row["num_updates"] for row in rows_of(tmp_path)] == [1, 2]


def test_the_small_model_learns_more_than_to_predict_the_mean(tmp_path):
    demo_dir, folder = tmp_path / "demo", tmp_path / "run"
    demo.make_demo(demo_dir)
    argv = (
        "--config_name tiny --max_update 100 --tokens_per_sample 64 --max_tokens 1024"
        " --embed_dim 64 --ffn_embed_dim 256 --device cpu"
    ).split()
    call(train.main, *argv, "--data_path", demo_dir, "--save_dir", folder)
    ckpt = folder / "checkpoint_best.pt"
    result = json.loads(call(evaluation.main, "--ckpt", ckpt, "--untrained", "--json"))
    before = result["untrained"]
    assert result["loss"] < 0.8 * before["loss"]
    assert result["cosine"] > max(result["cosine_constant"] + 0.1, before["cosine"] + 0.3)
    assert result["pred_var"] > 0.05 and result["target_var"] > 0.05


# ------------------------------------------------------------------------------------- --max_hours


@pytest.fixture
def eighths(monkeypatch):
    """Each update takes an eighth of an hour."""
    monkeypatch.setattr(Clock, "look", lambda clock: setattr(clock, "hours", clock.hours + 0.125))
    monkeypatch.setattr(Clock, "now", lambda clock: clock.hours)


def test_the_first_of_hours_and_updates_ends_the_run_and_no_number_changes(
    eighths, corpus_dir, tmp_path
):
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
