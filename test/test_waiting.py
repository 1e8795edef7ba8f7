"""What a person sees who waits: bars on a terminal, lines elsewhere, how long it will take."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import config
import eval as evaluation
import train
from test.helpers import HERE, call, few, make_run

import pytest

NUMBER = r"[\d,.]+(e-\d\d)?"


def on_a_terminal(*command) -> list[str]:
    """What the command draws on a terminal of 80 columns, drawing by drawing."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdout=theirs, stderr=theirs, stdin=theirs)
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
    argv = "--max_update 12 --probe_interval_updates 6 --lr 0.00012345".split()
    drawn = on_a_terminal(sys.executable, HERE / "train.py", *few(corpus_dir, tmp_path, *argv))
    bars = [text for text in drawn if "|" in text and "<" in text]
    assert max(map(len, bars)) <= 80
    last = [text for text in bars if text.startswith("12/12 |")][-1]
    speed = rf"\d+:\d\d<\d+:\d\d, +{NUMBER}(update/s|s/update)"
    assert re.search(rf"\| {speed}, loss \d+\.\d{{3}} lr \d\.\de-\d\d$", last)
    names = {text.partition(":")[0] for text in bars if not text[0].isdigit()}
    assert {"valid", "position guess", "probe, reading", "probe, fitting at most"} <= names


def test_without_a_terminal_there_is_no_bar_and_no_table_is_wider_than_79_columns(
    corpus_dir, tmp_path, capfd
):
    call(train.main, *few(corpus_dir, tmp_path, "--max_update", 2))
    ckpt = ["--ckpt", tmp_path / "checkpoint_last.pt", "--device", "cpu"]
    text = call(evaluation.main, *ckpt, "--probe", "--untrained")
    assert capfd.readouterr().err == ""
    assert max(map(len, text.splitlines()[1:])) <= 79  # the first has the path


@pytest.mark.parametrize(
    ("argv", "epochs", "read"),
    [
        ("--max_update 6", None, "% of the text"),
        ("--max_update 900 --max_epoch 2", 2, "the text 2.0 times"),
        ("--max_update 900 --max_epoch 1 --update_freq 2", 0.5, "the text 1.0 times"),
    ],
)
def test_a_run_says_what_it_reads_and_how_much_time_is_left(
    corpus_dir, tmp_path, argv, epochs, read
):
    updates = 6
    if epochs:
        updates = -int(-epochs * len(make_run(corpus_dir)[1].batch_ends) // 1)
    more = ["--disable_validation", "--log_interval", 2, *argv.split()]
    printed = call(train.main, *few(corpus_dir, tmp_path, *more))
    assert re.search(rf"; {updates:,} updates read .*{read}$", printed, re.M)
    rows = re.findall(r"^update (\d+) .*\d (?:second|minute)s left$", printed, re.M)
    assert len(rows) == -(-updates // 2) - 1  # all but the last


def test_a_run_shows_the_settings_that_differ_and_warns_of_text_that_is_never_seen(
    corpus_dir, tmp_path
):
    for flags, warning in (([], ""), (["--fairseq_exact"], "warning: ")):
        folder = tmp_path / f"run{len(flags)}"
        printed = call(train.main, *few(corpus_dir, folder, "--max_update", 1, *flags))
        first = printed.splitlines()[0]
        assert first.startswith(f"data2vec-text {config.VERSION}: train.py --config_name tiny ")
        assert "--max_update 1" in first and "mask_prob" not in first
        assert re.search(rf"^{warning}\d+\.\d\d% of the .* never seen", printed, re.M)
