"""--help and mistakes: answered at once, in groups, within 80 columns."""

import dataclasses
import os
import shlex
import subprocess
import sys

import config
import convert
import finetune
import preprocess
import text.demo
from judge import plot
from run import flags
from test.helpers import HERE
from text import reviews

import pytest


@pytest.fixture
def without_torch(tmp_path):
    """Runs a program where importing torch ends it with code 99."""
    (tmp_path / "torch.py").write_text("raise SystemExit(99)")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "80"}

    def run(program, *argv):
        command = [sys.executable, HERE / program, *argv]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)

    return run


@pytest.mark.parametrize("program", ["train.py", "eval.py", "bench.py"])
def test_help_and_mistakes_are_answered_before_torch_is_imported(without_torch, program):
    assert without_torch(program).returncode == (2 if program == "train.py" else 99)
    for argv, answer in (
        (["--max_updates", "5"], "did you mean --max_update?"),
        (["--learning_rate", "1e-3"], "did you mean --lr?"),
        (["--lr", "abc"], "'abc' is not a number"),
        (["--amp", "bf-16"], "choose from auto, off"),
        (["--config_name", "smal"], "choose from base, npu_1p, tiny, small"),
        (["--fp16"], "--amp auto|off|fp16|bf16"),
    ):
        result = without_torch(program, *argv)
        assert (
            result.returncode == 2
            and answer in result.stderr
            and len(result.stderr.splitlines()) == 1
        ), argv
    for flag in ("--help", "--help_all"):
        result = without_torch(program, flag)
        assert (
            result.returncode == 0
            and result.stdout.startswith(f"usage: {program}")
            and not result.stderr
        )
        width = max(map(len, result.stdout.splitlines()))
        assert width < 80 and (len(result.stdout.splitlines()) <= flags.HELP_LINES) == (
            flag == "--help"
        )


@pytest.mark.parametrize("program", ["finetune.py", "convert.py", "preprocess.py"])
def test_the_other_programs_answer_before_torch_is_imported(without_torch, program):
    result = without_torch(
        program,
        "--dicct",
        "x",
        *("--dest x --bpe none".split() if program == "preprocess.py" else []),
    )
    assert (
        result.returncode == 2
        and "did you mean --dict?" in result.stderr
        and result.stderr.count("\n") == 1
    )
    assert without_torch(program, "--help").returncode == 0


@pytest.mark.parametrize("program", [convert, finetune, plot, preprocess, reviews, text.demo])
def test_the_help_of_every_program_fits_80_columns(program, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="^0$"):
        program.main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80


def test_train_refuses_what_does_not_fit_together_before_torch_is_imported(without_torch):
    assert without_torch("train.py", "--data_path", "x").returncode == 99
    for argv, answer in (
        ([], "--data_path is missing"),
        (["--data_path", "x", "--layers", "2"], "there are only 2 layers"),
        (["--data_path", "x", "--tokens_per_sample", "600"], "--max_source_positions 512"),
    ):
        result = without_torch("train.py", *argv)
        assert result.returncode == 2 and answer in result.stderr, argv


def test_a_program_may_be_started_through_a_link_of_another_name(without_torch, tmp_path):
    (tmp_path / "pretrain").symlink_to(HERE / "train.py")
    assert "no such preset" in without_torch(tmp_path / "pretrain", "--config_name", "smal").stderr


def test_notes_on_ignored_options_are_printed_once(without_torch):
    result = without_torch("train.py", "common.user_dir=x", "--data_path", "x")
    assert result.returncode == 99 and not result.stderr


def test_help_shows_the_programs_flags_first_then_groups_then_what_presets_set(without_torch):
    text = without_torch("train.py", "--help").stdout
    parts = [
        "--no_resume",
        "--fairseq_exact",
        "\ndata (",
        "--data_path",
        "\nmodel (",
        "--layers",
        "\nteacher (",
    ]
    parts += [
        "--ema_decay",
        "\ndevice (",
        "--amp",
        "\ntraining (",
        "--lr",
        "\npresets:",
        "npu_1p",
        "=64",
        "tiny",
        "=128",
    ]
    at = text.index("\noptions:")
    for part in parts:
        assert part in text[at:], part
        at = text.index(part, at)
    everything = without_torch("train.py", "--help_all").stdout
    for part in config.PARTS:
        assert all(f"--{field.name}" in everything for field in dataclasses.fields(part))
    assert "--adam_betas X,Y" in everything and "[0.9,0.98]" in everything


@pytest.mark.parametrize(
    "line",
    [
        "--data_path 'a b'",
        "--data_path x --config_name tiny --lr 0.5 --adam_betas 0.5,0.75 --compile yes",
        "--data_path x --config_name npu_1p --fairseq_exact --drop_remainder no",
        "--data_path x --config_name base --fixed_masks",
    ],
)
def test_the_shortest_command_line_gives_the_same_settings(line):
    parts, _ = flags.parse(config.PARTS, "", shlex.split(line))
    short = flags.flags_of(parts)
    assert flags.parse(config.PARTS, "", shlex.split(short))[0] == parts
    assert len(short.split("--")) <= len(line.split("--"))


def test_an_old_python_is_refused_in_one_line():
    command = [sys.executable, "-c", "import sys; sys.version_info = (3, 9, 18); import config"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 1 and result.stderr.startswith(
        "Python 3.10 or newer is needed; this is 3."
    )


def test_missing_packages_are_named_in_one_line():
    for program in ("train.py", "eval.py", "finetune.py", "convert.py", "bench.py"):
        command = [
            sys.executable,
            "-S",
            HERE / program,
            *(["--data_path", "x"] if program == "train.py" else []),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        expected = f"{program}: error: this Python has no numpy and no torch and no tqdm: pip install -r requirements.txt"
        assert (
            result.returncode == 2
            and result.stderr.startswith(expected)
            and result.stderr.count("\n") == 1
        )
