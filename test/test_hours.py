"""--max_hours: a run by the clock, its schedules, its resume; the time left, and what an accelerator reaches."""

import dataclasses
import math
import re
import shlex
import time

import config
import ema
import train
from config import GuardConfig, InputError
from hardware.device import Device
from hardware.flops import update_flops
from run import flags
from run.clock import Clock
from run.guard import Health, Unhealthy
from run.log import Log
from test.helpers import CPU, call, compare_checkpoints, few, make_run, rows_of, speed_aside  # noqa: F401

import pytest
import torch

EIGHTH = [
    "--max_hours",
    1,
    "--ema_anneal_end_step",
    200,
]  # of an hour, which `eighths` makes each update take


@pytest.fixture
def eighths(monkeypatch):
    monkeypatch.setattr(Clock, "look", lambda clock: setattr(clock, "hours", clock.hours + 0.125))
    monkeypatch.setattr(Clock, "now", lambda clock: clock.hours)


def settings(line: str) -> config.Config:
    return config.Config(*flags.parse(config.PARTS, "", shlex.split(line))[0])


@pytest.mark.parametrize(
    "line, goes_by",
    [
        ("--data_path x", "auto"),
        ("--data_path x --max_hours 8", "hours"),
        ("--data_path x --max_hours 8 --config_name tiny", "hours"),
        ("--data_path x --max_hours 8 --config_name tiny --max_update 400", "updates"),
        (
            "--data_path x --max_hours 8 --config_name tiny --max_update 400 --schedule_by hours",
            "hours",
        ),
    ],
)
def test_the_schedule_goes_by_hours_where_only_these_are_given_and_the_shown_command_line_keeps_that(
    line, goes_by
):
    cfg = settings(line)
    assert cfg.train.schedule_by == goes_by
    parts = [getattr(cfg, part.name) for part in dataclasses.fields(cfg)]
    assert settings(flags.flags_of(parts)) == cfg
    clock = Clock(CPU, cfg.train)
    clock.hours = 2.0
    assert clock.at(100) == (cfg.train.max_update / 4 if goes_by == "hours" else 100)
    assert clock.last_update == (math.inf if goes_by == "hours" else cfg.train.max_update)


def test_a_schedule_by_hours_without_hours_is_refused():
    with pytest.raises(InputError, match="--schedule_by hours needs --max_hours"):
        settings("--data_path x --schedule_by hours")


def test_by_the_clock_each_update_has_the_rates_of_its_share_of_the_time(
    eighths, corpus_dir, tmp_path
):
    argv = few(corpus_dir, tmp_path, *EIGHTH, "--validate_interval", 0)
    lines = call(train.main, *argv).splitlines()
    rows, cfg = rows_of(tmp_path), settings(shlex.join(argv))
    assert [row["hours"] for row in rows] == [
        i / 8 for i in range(1, 9)
    ]  # more updates than fit are no matter
    at = [cfg.train.max_update * i / 8 for i in range(8)]
    assert [row["lr"] for row in rows] == [train.lr_at(u, cfg.train) for u in at]
    assert [row["ema_decay"] for row in rows] == [ema.decay_at(u, cfg.ema) for u in at]
    assert (
        rows[0]["lr"] == 0
        and train.lr_at(cfg.train.max_update, cfg.train) == 0 < rows[-1]["lr"] < rows[1]["lr"]
    )
    assert [row["num_updates"] for row in rows_of(tmp_path, "valid_loss")] == [
        8
    ]  # at the end, as ever
    said = "the learning rate rises for 18 seconds and is 0 after 60 minutes, the teacher's decay for 30 minutes"
    assert f"by the clock: {said}" in lines
    left = [
        re.search(r"(\d+ minutes) left$", line)
        for line in lines
        if line.startswith("update ") and "| lr" in line
    ]
    assert [found and found[1] for found in left] == [
        *(f"{m:.0f} minutes" for m in (52.5, 45, 37.5, 30, 22.5, 15, 7.5)),
        None,
    ]
    assert "tflops" not in rows[0]  # on a CPU


def test_more_updates_than_max_update_may_fit_into_the_hours(eighths, corpus_dir, tmp_path):
    call(
        train.main, *few(corpus_dir, tmp_path, *EIGHTH, "--schedule_by", "hours", "--max_update", 3)
    )
    assert len(rows_of(tmp_path)) == 8


def test_an_interrupted_run_by_the_clock_continues_with_the_hours_that_it_had_used(
    eighths, corpus_dir, tmp_path, monkeypatch
):
    argv = [*EIGHTH, "--save_interval_updates", 2, "--dropout", 0.1]
    call(train.main, *few(corpus_dir, tmp_path / "whole", *argv))
    update = train.update
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            train,
            "update",
            lambda run, batches: update(run, batches) if run.num_updates < 5 else exit_now(),
        )
        call(train.main, *few(corpus_dir, tmp_path / "parts", *argv))
    text = call(train.main, *few(corpus_dir, tmp_path / "parts", *argv))
    assert "at update 4, epoch 1, after 30 minutes" in text
    names = [folder / "checkpoint_last.pt" for folder in (tmp_path / "whole", tmp_path / "parts")]
    compare_checkpoints(*names)
    assert speed_aside(rows_of(tmp_path / "whole")) == speed_aside(rows_of(tmp_path / "parts"))


def exit_now():
    raise KeyboardInterrupt


def test_with_max_update_given_the_first_of_both_ends_the_run_and_no_number_changes(
    eighths, corpus_dir, tmp_path
):
    for name, argv in (
        ("plain", ["--max_update", 12]),
        ("updates", ["--max_update", 12, "--max_hours", 100]),
        ("hours", ["--max_update", 12, "--max_hours", 1]),
    ):
        call(train.main, *few(corpus_dir, tmp_path / name, *argv))
    plain, updates, hours = (
        speed_aside(rows_of(tmp_path / name)) for name in ("plain", "updates", "hours")
    )
    assert [row.pop("hours") for row in updates] == [
        i / 8 for i in range(1, 13)
    ] and updates == plain
    assert [row.pop("hours") for row in hours] == [i / 8 for i in range(1, 9)] and hours == plain[
        :8
    ]
    compare_checkpoints(
        tmp_path / "plain" / "checkpoint_last.pt", tmp_path / "updates" / "checkpoint_last.pt"
    )


def test_a_run_ends_after_its_seconds_on_a_real_clock_and_more_hours_continue_it(
    corpus_dir, tmp_path
):
    began = time.monotonic()
    call(train.main, *few(corpus_dir, tmp_path, "--max_hours", 1 / 3600, "--disable_validation"))
    assert 1 <= time.monotonic() - began < 30
    rows = rows_of(tmp_path)
    assert rows[-1]["hours"] >= 1 / 3600 and all(row["hours"] < 1 / 3600 for row in rows[:-1])
    text = call(
        train.main, *few(corpus_dir, tmp_path, "--max_hours", 1 / 3600, "--disable_validation")
    )
    assert "to train on, raise --max_hours" in text and len(rows_of(tmp_path)) == len(rows)
    call(train.main, *few(corpus_dir, tmp_path, "--max_hours", 1.5 / 3600, "--disable_validation"))
    more = rows_of(tmp_path)[len(rows) :]
    assert more and more[0]["hours"] > rows[-1]["hours"] and more[-1]["hours"] >= 1.5 / 3600


def test_the_guards_wait_for_the_end_of_the_warm_up_by_the_clock():
    clock = Clock(CPU, settings("--data_path x --max_hours 8").train)  # 1% of it is warm-up
    health = Health(GuardConfig(), 10_000, [].append, clock.at)
    row = dict(num_updates=99_999, target_var=0.0, pred_var=0.0, cosine_constant=0.0)
    for clock.hours in (0.04, 0.08):
        for _ in range(20):
            health.check_variance(row, None)
    clock.hours = 0.081
    with pytest.raises(Unhealthy, match="collapse"):
        for _ in range(20):
            health.check_variance(row, None)


def test_a_worker_that_is_lost_while_the_clocks_are_compared_leaves_the_weights_as_they_were(
    corpus_dir, monkeypatch
):
    run, dataset = make_run(corpus_dir, max_hours=1)
    before = [p.clone() for p in run.weights.parameters]

    def lost(clock):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Clock, "look", lost)
    with pytest.raises(RuntimeError):
        train.update(run, [dataset.batch(dataset.epoch_batches(1)[0], 1)])
    assert run.num_updates == 0 and all(map(torch.equal, run.weights.parameters, before))


def test_the_bar_expects_the_update_that_the_pace_so_far_leads_to(tmp_path):
    clock = Clock(CPU, settings("--data_path x --max_hours 8").train)
    log = Log(CPU, tmp_path / "train.jsonl", clock=clock)
    log.last_update, log.updates = math.inf, 0
    assert log._expected() is None
    log.updates, clock.hours = 300, 2.0
    assert log._expected() == 1200
    log.last_update = 1000
    assert log._expected() == 1000


class Accelerator(Device):
    type = "cuda"

    def synchronize(self):
        pass


def test_rows_of_an_accelerator_have_its_model_flops_per_second(corpus_dir, tmp_path):
    run, dataset = make_run(corpus_dir)
    log = Log(Accelerator(torch.device("cpu"), "test", None), tmp_path / "train.jsonl")
    batches = [dataset.batch(ids, 1) for ids in dataset.epoch_batches(1)[:3]]
    for batch in batches:
        log.add(train.update(run, [batch]))
    log.read_skipped()
    state = log.state()
    row = log.write()
    assert log.peak > 1e8 and row["mfu"] == pytest.approx(row["tflops"] * 1e12 / log.peak)
    assert row["tflops"] * 1e12 / row["ups"] == pytest.approx(
        sum(update_flops([b], run) for b in batches) / 3
    )
    log.restore(
        state
    )  # in the middle of an interval: the updates of the earlier start count as mean ones
    log.add(train.update(run, batches[:1]))
    row = log.write()
    assert row["tflops"] * 1e12 / row["ups"] == pytest.approx(update_flops(batches[:1], run))
