"""What a program says: at its start, and one line with the cause where it cannot go on."""

import contextlib
import errno
import io
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import config
import convert
import eval as evaluation
import finetune
import preprocess
import train
from config import InputError
from judge import plot
from run import checkpoint, describe, flags, log, progress
from test.helpers import FEW, HERE, call, few, make_run, rows_of, wait_for
from text import demo

import pytest
import torch

CKPT = ["--device", "cpu", "--ckpt"]


def test_a_finished_run_that_is_started_again_names_the_flag_to_raise(saved, corpus_dir):
    before = (saved / "train.jsonl").read_text()
    printed = call(train.main, *few(corpus_dir, saved, "--max_update", 4))
    assert re.search(
        "^finished: .*checkpoint_last.pt is at update 4; .* --max_update 4$", printed, re.M
    )
    more = few(corpus_dir, saved, "--max_update", 4000, "--max_epoch", 1)
    assert "resuming from" in call(train.main, *more)
    assert "--max_epoch 1" in call(train.main, *more).partition("finished: ")[2]
    assert (saved / "train.jsonl").read_text().startswith(before)


def test_a_folder_or_another_file_as_checkpoint_is_named_as_such(saved, corpus_dir, tmp_path):
    (tmp_path / "checkpoint_best.pt").touch()
    for path, fact in (
        (saved, f"give {saved}/checkpoint_last.pt"),
        (tmp_path, "give .*checkpoint_best.pt"),
        (corpus_dir, "a folder without a checkpoint"),
        (saved / "train.jsonl", "train.jsonl: .*torch.save has not written it"),
        (tmp_path / "none.pt", "none.pt: no such checkpoint file"),
    ):
        with pytest.raises(InputError, match=fact):
            evaluation.main([*CKPT, str(path)])
        with pytest.raises(InputError, match=fact):
            train.main(few(corpus_dir, tmp_path / "run", "--max_update", 1, "--init_from", path))


def test_a_data_path_from_the_checkpoint_is_named_as_such(saved, corpus_dir, tmp_path):
    moved = checkpoint.load(saved / "checkpoint_last.pt").content
    moved["config"]["data_path"] = "gone/demo-bin"
    path = tmp_path / "moved.pt"
    torch.save(moved, path)
    with pytest.raises(InputError, match="gone/demo-bin: .*moved.pt was trained on it"):
        evaluation.main([*CKPT, str(path)])
    with pytest.raises(InputError, match=r"none: no such folder \(--data_path\)"):
        evaluation.main([*CKPT, str(path), "--data_path", str(tmp_path / "none")])
    assert "valid" in call(evaluation.main, *CKPT, path, "--data_path", corpus_dir)


def ended(capsys, main) -> tuple[int, str]:
    """Exit code and standard error of a program whose main() is this."""
    with pytest.raises(SystemExit) as end:
        flags.program(main)
    return end.value.code, capsys.readouterr().err


def test_output_that_is_not_utf_8_gets_escapes_and_ends_no_program(tmp_path, monkeypatch):
    folder = tmp_path / "文"
    folder.mkdir()
    for split, count in (("train", 60), ("valid", 20)):
        rows = [f"文 字{i % 7} b{i % 3}\t{'好坏'[i % 2]}\n" for i in range(count)]
        (folder / f"{split}.tsv").write_text("text\tlabel\n" + "".join(rows), encoding="utf-8")
    (folder / "lines").write_text("文 字1\n", encoding="utf-8")
    run, tuned = folder / "run", folder / "tuned"
    texts = [f"--{split}={folder}/{split}.tsv" for split in ("train", "valid")]
    last, best = run / "checkpoint_last.pt", tuned / "checkpoint_best.pt"
    tuning = ["--text=text", "--label=label", "--max_epoch=1", "--device=cpu", *texts]
    for module, *argv in (
        (preprocess, *texts, "--dest", folder, "--bpe=none"),
        (describe, "--data_path", folder),
        (train, *few(folder, run, "--max_update", 2)),
        (evaluation, *CKPT, last),
        (finetune, "--ckpt", last, "--save_dir", tuned, *tuning),
        (finetune, *CKPT, best, "--predict", folder / "lines"),
        (convert, "--ckpt", last, "--to", "fairseq", folder / "x.pt"),
        (plot, run, "--out", folder / "x.svg"),
    ):
        if module is plot:
            pytest.importorskip("matplotlib")
        streams = [io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict") for _ in range(2)]
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            flags.program(module.main)
        assert streams[0].line_buffering  # a log shows each line at once
        out, errors = (stream.buffer.getvalue() for stream in streams if not stream.flush())
        assert end.value.code == 0, (argv, errors)
        assert b"\\u" in out, (argv, out)


def test_an_interruption_a_full_disk_and_no_memory_are_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["folder/eval.py"])

    def interrupted(*_):
        raise KeyboardInterrupt

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    def writes():
        with checkpoint.whole(tmp_path / "f.npy") as part:
            part.write_text("half")
            full()

    assert ended(capsys, interrupted) == (130, "eval.py: interrupted\n")
    assert ended(capsys, writes) == (1, f"eval.py: stopped: {tmp_path}/f.npy: full\n")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(demo, "_write_demo", full)
    text = f"eval.py: stopped: {tmp_path}/demo: full\n"
    assert ended(capsys, lambda: demo.make_demo(tmp_path / "demo")) == (1, text)
    code, text = ended(capsys, lambda: open(tmp_path / "none" / "file", "w"))
    assert code == 2 and "none/file: No such file" in text and text.count("\n") == 1
    code, text = ended(capsys, lambda: torch.empty(2**50))
    assert code == 1 and re.fullmatch("eval.py: stopped: out of memory: .*\n", text)


def test_an_output_that_nobody_takes_is_no_traceback(corpus_dir):
    pipe, unread = os.pipe()
    os.close(pipe)
    full = os.open("/dev/full", os.O_WRONLY)
    data, lines = ["--json", "--data_path", corpus_dir], subprocess.PIPE
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    for argv, stdout, stderr, ending in (
        (data, unread, lines, (141, b"")),
        (data, full, lines, (1, b"data.py: stopped: No space left on device\n")),
        (["--help"], unread, lines, (0, b"")),
        (["--none"], lines, unread, (2, None)),
        (data, None, lines, (0, b"")),
        (["--none"], lines, None, (2, None)),
    ):
        # None: closed from the start
        closed = "".join(f" {n}>&-" for n, to in ((1, stdout), (2, stderr)) if to is None)
        command = ["bash", "-c", f'"$@"{closed}', "", sys.executable, HERE / "data.py", *argv]
        done = subprocess.run(command, stdout=stdout, stderr=stderr, env=environment)
        assert (done.returncode, done.stderr) == ending


def test_a_disk_that_has_room_again_gets_the_next_lines(monkeypatch):
    gone = OSError(errno.EIO, "the terminal is gone")
    stream = Mock(flush=Mock(side_effect=[OSError(errno.ENOSPC, "full"), None, gone]))
    monkeypatch.setattr(sys, "stdout", stream)
    for _ in range(4):
        progress.say("a line")
    assert stream.flush.call_count == 3 and sys.stdout is not stream


def test_sigterm_removes_what_is_half_written(tmp_path):
    code = """if True:
        import os, signal
        from run import checkpoint, flags
        def main():
            with checkpoint.whole("x") as part:
                part.touch()
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
        flags.program(main)"""
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == 128 + signal.SIGTERM and not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["in torch", "in the work"])
def test_ctrl_c_ends_a_benchmark_without_a_traceback(tmp_path, where):
    command = [sys.executable, "-u", HERE / "bench.py", *FEW, "--updates", "100000"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    if where == "in torch":
        slow = "import time\nprint('device', flush=True)\ntime.sleep(60)\n"
        (tmp_path / "torch.py").write_text(slow)
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # a background job, such as a test's, ignores it
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    process = subprocess.Popen([*command, "--vocabulary", "100"], env=env, **streams, **heard)
    errors = ""
    try:
        wait_for(process, "device")
        # a library that is being imported may catch the first; one while Python ends would kill it
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                errors = process.communicate(timeout=30)[1]
                break
    finally:
        process.kill()
    said = (-signal.SIGINT, "") if where == "in torch" else (130, "bench.py: interrupted")
    assert (process.returncode, errors.strip()) == said


@pytest.mark.parametrize(
    ("argv", "updates", "read"),
    [
        ("--max_update 6", 6, "% of the text"),
        # an epoch has 15 batches
        ("--max_update 900 --max_epoch 2", 30, "the text 2.0 times"),
        ("--max_update 900 --max_epoch 1 --update_freq 2", 8, "the text 1.0 times"),
    ],
)
def test_a_run_says_what_it_reads_and_the_time_left(corpus_dir, tmp_path, argv, updates, read):
    more = ["--disable_validation", "--log_interval", 2, *argv.split()]
    printed = call(train.main, *few(corpus_dir, tmp_path, *more))
    assert re.search(rf"; {updates:,} updates read .*{read}$", printed, re.M)
    rows = re.findall(r"^update (\d+) .*\d (?:second|minute)s left$", printed, re.M)
    assert len(rows) == -(-updates // 2) - 1  # all but the last
    flag = "max_epoch" if "max_epoch" in argv else "max_update"
    speed = rf"^{updates - 2} updates at \S+ s: \d+ seconds; see --{flag}$"
    assert len(re.findall(speed, printed, re.M)) == 1


def test_a_resume_with_longer_updates_counts_those_that_are_left(corpus_dir, tmp_path):
    argv = few(corpus_dir, tmp_path, "--disable_validation", "--max_epoch")
    call(train.main, *argv, 1)
    printed = call(train.main, *argv, 2, "--update_freq", 10)
    assert "; 17 updates read the text 2.0 times" in printed  # of 15 batches, and of 10 and 5
    assert rows_of(tmp_path)[-1]["num_updates"] == 17 and " left\n" in printed


def test_a_run_shows_the_settings_that_differ_and_warns_of_unseen_text(corpus_dir, tmp_path):
    for more, warning in (([], ""), (["--fairseq_exact"], "warning: ")):
        folder = tmp_path / f"run{len(more)}"
        printed = call(train.main, *few(corpus_dir, folder, "--max_update", 1, *more))
        first = printed.splitlines()[0]
        assert first.startswith(f"data2vec-text {config.VERSION}: train.py --config_name tiny ")
        assert "--max_update 1" in first and "mask_prob" not in first
        assert re.search(rf"^{warning}\d+\.\d\d% of the .* never seen", printed, re.M)


def test_a_save_within_a_pause_counts_none_of_it(tmp_path, corpus_dir, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    rows = log.Log(make_run(corpus_dir, save_dir=str(tmp_path))[0])
    now[0] = 3.0
    with rows.paused():
        now[0] = 10.0
        assert rows.state()["seconds"] == 3.0
    now[0] = 12.0
    assert rows.state()["seconds"] == 5.0
