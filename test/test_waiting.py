"""What a person sees who waits: bars on a terminal, lines elsewhere, how long it will take."""

import re

import config
import train
from test.helpers import call, few, make_run

import pytest


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
