"""Whole runs: resume, workers, warnings, learning."""

import json
import re

import eval as evaluation
import train
from config import InputError
from run import checkpoint
from run import describe as dataset
from test.helpers import FEW, call, compare_checkpoints, rows_of, torchrun

import pytest


def test_a_finished_run_continues_when_max_update_is_raised_and_a_used_directory_is_guarded(
    tmp_path, corpus_dir
):
    argv = [*FEW, "--data_path", corpus_dir, "--save_dir", tmp_path]
    call(train.main, *argv, "--max_update", 3)
    call(train.main, *argv, "--max_update", 5)
    assert [row["num_updates"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="seed was 1, is 2"):
        call(train.main, *argv, "--max_update", 6, "--seed", 2)
    with pytest.raises(InputError, match="--overwrite"):
        call(train.main, *argv, "--max_update", 2, "--no_resume")
    with pytest.raises(
        InputError, match="no such folder"
    ):  # nothing is removed before every check has passed
        call(train.main, *argv, "--no_resume", "--overwrite", "--data_path", tmp_path / "none")
    assert checkpoint.load(tmp_path / "checkpoint_last.pt").content["progress"]["num_updates"] == 5
    call(train.main, *argv, "--max_update", 2, "--no_resume", "--overwrite")
    assert [row["num_updates"] for row in rows_of(tmp_path)] == [1, 2]


def test_two_workers_equal_one_with_update_freq_2(tmp_path, corpus_dir):
    argv = [
        *FEW,
        "--data_path",
        corpus_dir,
        "--max_update",
        14,
        "--max_epoch",
        1,
        "--validate_interval_updates",
        5,
    ]
    call(train.main, *argv, "--save_dir", tmp_path / "one", "--update_freq", 2)
    result = torchrun(
        2, *argv, "--save_dir", tmp_path / "two", "--distributed_training.distributed_world_size", 2
    )
    assert result.returncode == 0, result.stderr
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert len(one) == len(two) > 5
    for a, b in zip(one, two):
        assert all(
            a[k] == b[k] for k in ("sample_size", "nsentences", "ntokens", "lr", "ema_decay")
        )
        assert all(a[k] == pytest.approx(b[k], rel=1e-5) for k in ("loss", "gnorm"))
    for a, b in zip(
        rows_of(tmp_path / "one", "valid_loss"),
        rows_of(tmp_path / "two", "valid_loss"),
        strict=True,
    ):
        assert all(a[k] == pytest.approx(b[k], rel=1e-4) for k in a)
    compare_checkpoints(
        tmp_path / "one" / "checkpoint_last.pt",
        tmp_path / "two" / "checkpoint_last.pt",
        exactly=False,
    )


def test_train_warns_of_text_that_is_never_seen(tmp_path, corpus_dir):
    printed = call(
        train.main,
        *FEW,
        "--data_path",
        corpus_dir,
        "--max_update",
        1,
        "--save_dir",
        tmp_path / "a",
        "--fairseq_exact",
    )
    assert re.search(r"^warning: \d+\.\d\d% of the training tokens are never seen", printed, re.M)
    printed = call(
        train.main, *FEW, "--data_path", corpus_dir, "--max_update", 1, "--save_dir", tmp_path / "b"
    )
    assert re.search(r"^0\.00% of the training tokens are never seen", printed, re.M)


def test_the_small_model_learns_more_than_to_predict_the_mean(tmp_path):
    call(dataset.main, "--make_demo", tmp_path / "demo")
    call(
        train.main,
        "--config_name",
        "tiny",
        "--data_path",
        tmp_path / "demo",
        "--save_dir",
        tmp_path / "run",
        "--max_update",
        100,
        "--tokens_per_sample",
        64,
        "--max_tokens",
        1024,
        "--embed_dim",
        64,
        "--ffn_embed_dim",
        256,
        "--device",
        "cpu",
    )
    result = json.loads(
        call(
            evaluation.main,
            "--ckpt",
            tmp_path / "run" / "checkpoint_best.pt",
            "--untrained",
            "--json",
        )
    )
    before = result["untrained"]
    assert result["loss"] < 0.8 * before["loss"]
    assert (
        result["cosine"] > result["cosine_constant"] + 0.1
        and result["cosine"] > before["cosine"] + 0.3
    )
    assert result["pred_var"] > 0.05 and result["target_var"] > 0.05
