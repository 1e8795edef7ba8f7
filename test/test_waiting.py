"""What a person sees who waits: bars on a terminal, a few lines elsewhere, how long it will take."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import config
import eval as evaluation
import train
from run import log
from test.helpers import CPU, FEW, HERE, call, few, make_run

NUMBER = r"[\d,.]+(e-\d\d)?"


def on_a_terminal(*command) -> list[str]:
    """What the command draws on a terminal of 80 columns, drawing by drawing."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [str(word) for word in command], stdout=theirs, stderr=theirs, stdin=theirs
    )
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 65536):
            seen += part
    except OSError:  # its end, on Linux
        pass
    assert process.wait(60) == 0, seen.decode()
    return re.split(r"[\r\n]+|\x1b\[\w", seen.decode())


def test_on_80_columns_every_bar_fits_with_its_numbers_whole(corpus_dir, tmp_path):
    argv = few(
        corpus_dir, tmp_path, "--max_update", 12, "--probe_interval_updates", 6, "--lr", 0.00012345
    )
    drawn = on_a_terminal(sys.executable, HERE / "train.py", *argv)
    bars = [text for text in drawn if "|" in text and "<" in text]
    assert max(map(len, bars)) <= 80
    last = [text for text in bars if text.startswith("12/12 |")][-1]
    assert re.search(
        rf"\| \d+:\d\d<\d+:\d\d, +{NUMBER}(update/s|s/update), loss \d+\.\d{{3}} lr \d\.\de-\d\d$",
        last,
    )
    names = {text.partition(":")[0] for text in bars if not text[0].isdigit()}
    assert {"valid", "position guess", "probe, reading", "probe, fitting at most"} <= names


def test_without_a_terminal_there_is_no_bar(corpus_dir, tmp_path, capfd):
    call(train.main, *few(corpus_dir, tmp_path, "--max_update", 2))
    call(
        evaluation.main,
        "--ckpt",
        tmp_path / "checkpoint_last.pt",
        "--device",
        "cpu",
        "--probe",
        "--untrained",
    )
    assert capfd.readouterr().err == ""


def test_a_run_says_how_long_it_will_take_and_what_it_reads(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "KNOWN", (3, 1e9))
    _, dataset = make_run(corpus_dir)
    batches = len(dataset.batch_ends)
    for more, updates, read in (
        ([], 6, f"{600 / batches:.2g}% of the text"),
        (["--max_update", 2 * batches], 2 * batches, "the text 2.0 times"),
        (["--max_update", 900, "--max_epoch", 1], batches, "the text 1.0 times"),
        (
            ["--max_update", 900, "--max_epoch", 1, "--update_freq", 2],
            -(-batches // 2),
            "the text 1.0 times",
        ),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        argv = few(
            corpus_dir,
            folder,
            "--max_update",
            6,
            "--disable_validation",
            "--log_interval",
            2,
            *more,
        )
        lines = call(train.main, *argv).splitlines()
        assert any(
            line.endswith(f"batches an epoch; {updates:,} updates read {read}") for line in lines
        ), lines
        told = [line for line in lines if line.endswith("; see --max_update")]
        assert len(told) == 1 and re.match(
            rf"{updates - 4} updates at {NUMBER} s: \d+ seconds on this CPU;", told[0]
        )


def test_the_speed_of_a_run_leaves_out_what_is_no_training(
    corpus_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(log, "KNOWN", (2, 1e9))
    run, dataset = make_run(corpus_dir)
    batch = dataset.batch(dataset.epoch_batches(1)[0], 1)
    told = log.Log(CPU, tmp_path / "train.jsonl")
    told.open(0, 1000)
    for _ in range(3):
        time.sleep(0.05)
        with told.paused():
            told.add(train.update(run, [batch]))
            time.sleep(0.5)
    told.close()
    line = capsys.readouterr().out
    assert re.fullmatch(
        r"997 updates at 0\.(0\d+|1\d*) s: \d+ (seconds|minutes) on this CPU; see --max_update\n",
        line,
    )


def test_durations_are_in_words():
    texts = [
        log.duration(seconds) for seconds in (0.2, 45, 119, 120, 7200, 172_799, 172_800, 8e6, 1e9)
    ]
    assert (
        texts
        == "0 seconds,45 seconds,119 seconds,2 minutes,2 hours,48 hours,2 days,93 days,11,574 days".split(
            ",", 8
        )
    )


def test_the_start_of_a_run_shows_only_the_settings_that_differ(corpus_dir, tmp_path):
    lines = call(train.main, "--config_name", "tiny", *FEW[2:], "--data_path", corpus_dir, "--save_dir", tmp_path / "a",
                 "--max_update", 1).splitlines()  # fmt: skip
    assert lines[0].startswith(
        f"data2vec-text {config.VERSION}: train.py --config_name tiny --data_path"
    )
    assert (
        "--max_update 1" in lines[0] and "mask_prob" not in lines[0] and "ema_decay" not in lines[0]
    )


def test_no_table_is_wider_than_79_columns(corpus_dir, tmp_path, capsys):
    call(train.main, *few(corpus_dir, tmp_path, "--max_update", 2))
    text = call(
        evaluation.main,
        "--ckpt",
        tmp_path / "checkpoint_last.pt",
        "--device",
        "cpu",
        "--probe",
        "--untrained",
    )
    lines = text.splitlines()[1:]  # the first has the path
    assert max(map(len, lines)) <= 79, lines
