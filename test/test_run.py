"""Whole runs: a resume, a guarded folder, workers, learning."""

import json

import eval as evaluation
import train
from config import InputError
from test.helpers import call, compare_checkpoints, few, progress_of, rows_of, torchrun
from text import demo

import pytest


def test_a_finished_run_continues_when_max_update_is_raised_and_a_used_folder_is_guarded(
    tmp_path, corpus_dir
):
    argv = few(corpus_dir, tmp_path)
    call(train.main, *argv, "--max_update", 3)
    call(train.main, *argv, "--max_update", 5)
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


def test_two_workers_equal_one_with_update_freq_2(tmp_path, corpus_dir):
    one, two = tmp_path / "one", tmp_path / "two"
    argv = "--max_update 14 --max_epoch 1 --validate_interval_updates 5".split()
    call(train.main, *few(corpus_dir, one, *argv, "--update_freq", 2))
    size = ["--distributed_training.distributed_world_size", 2]
    result = torchrun(2, *few(corpus_dir, two, *argv, *size))
    assert result.returncode == 0, result.stderr
    rows = rows_of(one)
    assert len(rows) > 5
    for a, b in zip(rows, rows_of(two), strict=True):
        assert all(a[k] == b[k] for k in "sample_size nsentences ntokens lr ema_decay".split())
        assert all(a[k] == pytest.approx(b[k], rel=1e-5) for k in ("loss", "gnorm"))
    for a, b in zip(rows_of(one, "valid_loss"), rows_of(two, "valid_loss"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    last = "checkpoint_last.pt"
    compare_checkpoints(one / last, two / last, exactly=False)


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
