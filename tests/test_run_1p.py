"""run_1p.sh: the ModelZoo's modes, files and exit codes."""

import os
import re
import shutil
import subprocess

# must be first: device.py sets TORCH_DEVICE_BACKEND_AUTOLOAD, which torch reads on import
import pytest

from tests.helpers import FEW, HERE, copy_of_the_project


def test_run_1p_refuses_what_it_cannot_do():
    for argv, message in (
        ([["fly"]], "no mode 'fly'"),
        ([["full"]], "--data_path=DIR is missing"),
        ([["eval", "--data_path"]], "needs a value"),
    ):
        result = subprocess.run(["bash", HERE / "run_1p.sh", *argv[0]], capture_output=True, text=True)
        assert result.returncode == 2 and message in result.stderr


def test_run_1p_passes_the_exit_code_and_writes_the_modelzoo_s_files(tmp_path, corpus_dir):
    env = {**copy_of_the_project(tmp_path), "ASCEND_DEVICE_ID": "3"}
    if shutil.which("python3", path=env["PATH"]) is None:
        pytest.skip("no python3 beside this Python")
    run = lambda *argv: subprocess.run(
        ["bash", tmp_path / "run_1p.sh", *map(str, argv)], capture_output=True, text=True, env=env, cwd=HERE
    )  # noqa: E731
    few = [*FEW, "--max_update", "4"]
    relative = os.path.relpath(tmp_path / "none", HERE)  # of the caller's folder, not of the script's
    failed = run("full", "--data_path", relative, *few)
    assert failed.returncode == 2 and re.search(rf"{tmp_path.name}/none: no such folder", failed.stdout)
    done = run("full", f"--data_path={corpus_dir}", *few)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        r"Final Performance images/sec : [\d.]+",
        r"Final Valid Best Loss: [\d.]+",
        r"E2E Training Duration sec : \d+",
        r"UPS \(updates/s\) : [\d.]+",
        r"FPS \(blocks/s\) : [\d.]+",
        r"\| 1p-cpu \| - \| [\d.]+ \| 1 \| off \| 2\.",
    ):
        assert re.search(f"^{line}", done.stdout, re.M), (line, done.stdout)
    output = tmp_path / "output" / "3"
    assert len((output / "train_data2vec_for_PyTorch_1p_loss.txt").read_text().split()) == 4
    log = (output / "data2vec_for_PyTorch_1p.log").read_text()
    assert re.findall(r"^(\w+) = ", log, re.M) == [
        "Network",
        "RankSize",
        "DeviceType",
        "CaseName",
        "ActualUPS",
        "ActualFPS",
        "E2ETrainingTime",
    ]
    assert "update 4" in (output / "train_3.log").read_text()
    checked = run("eval", "--data_path", corpus_dir, "--checkpoint_path", output / "full" / "checkpoint_best.pt")
    assert checked.returncode == 0 and "cosine" in checked.stdout
