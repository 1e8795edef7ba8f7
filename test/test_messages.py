"""What a program says when it cannot go on, or need not: one line with the cause and what to do."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys

import eval as evaluation
import train
from config import InputError
from run import checkpoint, flags, log
from test.helpers import CPU, FEW, HERE, call, few, rows_of, wait_for
from text import demo

import pytest
import torch

CKPT = ["--device", "cpu", "--ckpt"]


def test_a_finished_run_that_is_started_again_says_that_it_is_finished(saved, corpus_dir):
    before = (saved / "train.jsonl").read_text()
    printed = call(train.main, *few(corpus_dir, saved, "--max_update", 4))
    assert (
        f"finished: {saved / 'checkpoint_last.pt'} is at update 4; to train on, raise --max_update 4"
        in printed
    )
    printed = call(
        train.main, *few(corpus_dir, saved, "--max_update", 4000, "--max_epoch", 1, "--layers", 2)
    )
    assert "finished: " not in printed and "resuming from" in printed
    again = call(train.main, *few(corpus_dir, saved, "--max_update", 4000, "--max_epoch", 1))
    assert "to train on, raise --max_epoch 1" in again
    assert (saved / "train.jsonl").read_text().startswith(before)


def test_a_folder_or_another_file_as_checkpoint_is_named_for_what_it_is(
    saved, corpus_dir, tmp_path
):
    best, text = tmp_path / "best", tmp_path / "README.md"
    best.mkdir()
    (best / "checkpoint_best.pt").write_bytes(b"")
    text.write_text("# some text\n")
    for path, message in (
        (saved, f"{saved}: a folder; it holds checkpoint_last.pt: give {saved}/checkpoint_last.pt"),
        (best, "a folder; it holds checkpoint_best.pt: give"),
        (corpus_dir, "a folder without a checkpoint"),
        (text, "README.md: cannot be read as a checkpoint: torch.save has not written it"),
        (saved / "train.jsonl", "train.jsonl: cannot be read as a checkpoint: torch.save"),
        (tmp_path / "none.pt", "none.pt: no such checkpoint file"),
    ):
        with pytest.raises(InputError, match=message):
            evaluation.main([*CKPT, str(path)])
        with pytest.raises(InputError, match=message):
            call(
                train.main,
                *few(corpus_dir, tmp_path / "run", "--max_update", 1, "--init_from", path),
            )


def test_a_data_path_from_the_checkpoint_is_named_as_such(saved, corpus_dir, tmp_path):
    moved = checkpoint.load(saved / "checkpoint_last.pt").content
    moved["config"]["data_path"] = "gone/demo-bin"
    torch.save(moved, tmp_path / "moved.pt")
    with pytest.raises(
        InputError, match="gone/demo-bin: no such folder; .*moved.pt was trained on it.*--data_path"
    ):
        evaluation.main([*CKPT, str(tmp_path / "moved.pt")])
    with pytest.raises(InputError, match=r"none: no such folder \(--data_path\)"):
        evaluation.main([*CKPT, str(tmp_path / "moved.pt"), "--data_path", str(tmp_path / "none")])
    assert "valid" in call(evaluation.main, *CKPT, tmp_path / "moved.pt", "--data_path", corpus_dir)


def test_a_skipped_update_says_why_and_what_to_do(tmp_path, capsys):
    told = log.Log(CPU, tmp_path / "train.jsonl")
    told.row(dict(skipped=True, num_updates=7, epoch=1, blocks=[1, 2]))
    told.row(dict(skipped=True, num_updates=8, epoch=1, blocks=[3]))
    assert capsys.readouterr().out.splitlines() == [
        "update 7: skipped, since its loss or gradient is not finite; if more follow, lower --lr or raise"
        " --warmup_updates",
        "update 8: skipped, since its loss or gradient is not finite",
    ]
    assert [row["blocks"] for row in rows_of(tmp_path, "skipped")] == [[1, 2], [3]]


def ended(capsys, main) -> tuple[int, str]:
    """Exit code and standard error of a program whose main() is this."""
    with pytest.raises(SystemExit) as end:
        flags.program(main)
    return end.value.code, capsys.readouterr().err


def test_ctrl_c_ends_a_program_with_one_line_and_130(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/eval.py"])

    def interrupted():
        raise KeyboardInterrupt

    assert ended(capsys, interrupted) == (130, "eval.py: interrupted\n")


@pytest.mark.parametrize("where", ["in torch", "in the work"])
def test_ctrl_c_ends_a_benchmark_with_one_line(tmp_path, where):
    argv = [*FEW, "--updates", "100000", "--vocabulary", "100"]
    env = dict(os.environ)
    if where == "in torch":
        (tmp_path / "torch.py").write_text(
            "import time\nprint('device', flush=True)\ntime.sleep(60)\n"
        )
        env["PYTHONPATH"] = str(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-u", HERE / "bench.py", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=env, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        wait_for(process, "device")
        for _ in range(20):  # a library that is being imported may catch the first
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                errors = process.communicate(timeout=5)[1]
                break
    finally:
        process.kill()
    assert process.returncode == 130 and errors.strip() == "bench.py: interrupted"


def test_a_full_disk_is_named_with_the_file(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["eval.py"])

    def writes():
        with checkpoint.whole(tmp_path / "f.npy") as part:
            part.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    code, text = ended(capsys, writes)
    assert code == 1 and re.fullmatch("eval.py: stopped: .*/f.npy: No space left on device\n", text)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(
        demo, "_write_demo", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    code, text = ended(capsys, lambda: demo.make_demo(tmp_path / "demo"))
    assert code == 1 and re.fullmatch("eval.py: stopped: .*/demo: full\n", text)
    code, text = ended(capsys, lambda: open(tmp_path / "none" / "file", "w"))
    assert code == 2 and re.fullmatch(
        "eval.py: error: .*none/file: No such file or directory\n", text
    )
