from run.flags import flags_of

"""What a run tells: train.jsonl, and a line or a progress bar for a person."""

import contextlib
import dataclasses
import json
import math
import os
import re
import statistics
import sys
import threading
import time
import types
from pathlib import Path

from config import VERSION, printable, read_text
from data import BlockDataset
from hardware.device import Device
from hardware.flops import Matmuls
from judge.quality import moments, quality
from run.checkpoint import write_text
from run.curves import TensorBoard
from run.describe import notes
from run.guard import Clock
from run.progress import Bar

import numpy as np
import torch
from tqdm import tqdm

# what a row has and a printed line has not
HIDDEN = re.compile(
    "num_updates|sample_size|nsentences|ntokens|wall|hours|cosine_constant|valid_(r2|loss|gain|beyond)_.*"
)
PULSE = 30  # seconds between two signs of life where there is no bar, until the first row
KNOWN = 20, 10  # updates, or seconds, after which the speed of a run is known
NAMES = {"cpu": "CPU", "cuda": "GPU", "npu": "NPU"}


class Log:
    """The figures of the updates since the last row. They stay on the device until a row is due; only rank 0 writes."""

    def __init__(
        self, device: Device, path: Path, tensorboard_logdir: str = "", clock: Clock | None = None
    ):
        """Raises InputError if TensorBoard curves are asked for and cannot be written."""
        self.device, self.path, self.clock, self.bar = device, path, clock, None
        self.has_limit = (
            clock is not None and clock.left < math.inf
        )  # whether the clock may end the run
        self.curves = (
            TensorBoard(tensorboard_logdir) if tensorboard_logdir and device.rank == 0 else None
        )
        self.peak = (
            Matmuls(device).best if device.type != "cpu" and device.rank == 0 else 1.0
        )  # FLOP/s
        self._began, self._torn = time.perf_counter(), False
        self._idle = 0.0  # seconds that were no training time
        self._ends = []  # when the updates of this start ended, until their speed has been told
        self._has_row = threading.Event()
        self._advice = "; if more follow, lower --lr or raise --warmup_updates"
        self.updates = self.last_update = 0
        self.reset()

    def open(self, num_updates: int, last_update: float):
        """Open the bar, and drop the rows that a crashed run wrote after its last checkpoint: they will come again.
        last_update: inf if only the clock ends the run."""
        if self.device.rank == 0 and self.path.exists():
            rows = [
                row
                for row in read_text(self.path, "replace").splitlines()
                if _updates_of(row) <= num_updates
            ]
            write_text(self.path, "".join(row + "\n" for row in rows))
        if self.curves is not None:
            self.draw(self.curves.open, num_updates)
        self.updates, self.last_update = num_updates, last_update
        if self.device.rank == 0 and num_updates < last_update:
            if sys.stderr.isatty():
                self.bar = Bar(total=last_update, initial=num_updates, unit="update", leave=True)
            else:
                threading.Thread(target=self._show_life, daemon=True).start()

    def _show_life(self):
        while not self._has_row.wait(PULSE):
            of = "" if math.isinf(self.last_update) else f" of {self.last_update:,}"
            self.say(f"running: {self.updates:,}{of} updates done")

    def state(self) -> dict:
        """The interval so far, as plain values; all its flags must have been read."""
        # stacked first: one wait for the device, not one an update
        loss, gnorm, counts = (
            torch.stack([getattr(d, key) for d in self.done]).tolist() if self.done else []
            for key in ("loss", "gnorm", "counts")
        )
        return dict(
            updates=[
                dict(number=d.number, loss=a, gnorm=b, counts=c)
                for d, a, b, c in zip(self.done, loss, gnorm, counts, strict=True)
            ],
            skipped=list(self.skipped),
            seconds=time.perf_counter() - self.since,
        )

    def restore(self, state: dict):
        """Continue in the middle of an interval: its row will be that of an uninterrupted run."""
        where = self.device.torch_device
        for values in state["updates"]:
            tensors = {key: torch.tensor(values[key], device=where) for key in ("loss", "gnorm")}
            counts = torch.tensor(
                values["counts"], device=where if self.device.world_size > 1 else "cpu"
            )
            self.done.append(
                types.SimpleNamespace(number=values["number"], counts=counts, **tensors)
            )
        self.skipped, self.since = list(state["skipped"]), time.perf_counter() - state["seconds"]

    def reset(self):
        self.done, self.skipped, self.last_batch, self.since = [], [], None, time.perf_counter()

    def add(self, done):
        """Take in a train.Update."""
        self.last_batch, done.last_batch = (
            done.last_batch,
            None,
        )  # large, and only the newest is used
        self.done.append(done)
        self.updates = done.number
        if self.bar is not None:
            self.bar.total = self._expected()
            self.bar.update()
        if self._ends is not None:
            self._ends.append(time.perf_counter() - self._idle)
            if self.device.type == "cpu":  # elsewhere an update may have just begun
                self._tell_speed()

    def _expected(self) -> int | None:
        """With which update the run will end, at the pace of its hours so far; None if that is not known."""
        last = self.last_update
        if self.has_limit and self.clock.hours:
            last = min(last, round(self.updates * max(1, self.clock.max_hours / self.clock.hours)))
        return None if math.isinf(last) else last

    def _left(self, each: float) -> float:
        """Seconds to the end of the run, if an update takes `each`."""
        return min(
            (self.last_update - self.updates) * each,
            self.clock.left if self.has_limit else math.inf,
        )

    def _tell_speed(self):
        """Say how long the rest of the run takes, once its first updates have shown their speed."""
        count, seconds = len(self._ends) - 1, time.perf_counter() - self._idle - self._ends[0]
        if (
            self.last_update > self.updates
            and count >= 2
            and (count >= KNOWN[0] or seconds >= KNOWN[1])
        ):
            each, self._ends = seconds / count, None
            left = self._left(each)
            by = "max_hours" if left < (self.last_update - self.updates) * each else "max_update"
            where = f"this {NAMES[self.device.type]}"
            if self.device.world_size > 1:
                where = f"these {self.device.world_size} {NAMES[self.device.type]}s"
            self.say(
                f"{left / each:,.0f} updates at {each:.2g} s: {duration(left)} on {where}; see --{by}"
            )

    def read_skipped(self) -> list[bool]:
        """Whether each update since the last call was skipped; waits for the device. Writes a row for each that was."""
        new = self.done[len(self.skipped) :]
        flags = torch.stack([done.skipped for done in new]).tolist() if new else []
        for done, flag in zip(new, flags):
            if flag:
                self.row(
                    dict(
                        skipped=True, num_updates=done.number, epoch=done.epoch, blocks=done.blocks
                    )
                )
        self.skipped += flags
        return flags

    def write(self) -> dict:
        """One row: means per update over the interval (the loss per masked place), lr and the like of the last one."""
        device, last = self.device, self.done[-1]
        self.read_skipped()
        good = [done for done, skipped in zip(self.done, self.skipped) if not skipped]
        loss, gnorm = (
            sum(torch.stack([getattr(d, k) for d in good]).tolist()) if good else 0.0
            for k in ("loss", "gnorm")
        )
        sample_size, nsentences, ntokens = (
            torch.stack([d.counts for d in self.done]).sum(0).tolist()
        )
        seen = sum(torch.stack([d.counts[0] for d in good]).tolist()) if good else 0
        sums, places = moments(*self.last_batch), len(self.last_batch[0])
        if self.skipped[-1]:
            sums, places = torch.zeros_like(sums), 0
        sums = device.all_reduce(
            torch.cat([sums.flatten(), torch.full((1,), float(places), device=sums.device)])
        )
        figures = quality(sums[:-1].view(6, -1), int(sums[-1]))
        n, seconds = len(self.done), time.perf_counter() - self.since
        row = dict(
            loss=loss / max(1, seen) if good else None,
            sample_size=sample_size / n,
            nsentences=nsentences / n,
            ntokens=ntokens / n,
            gnorm=gnorm / len(good) if good else None,
            lr=last.lr,
            ema_decay=last.ema_decay,
            loss_scale=last.loss_scale,
            **{
                k: figures[k] if sums[-1] else None
                for k in ("target_var", "pred_var", "cosine", "cosine_constant")
            },
            num_updates=last.number,
            epoch=last.epoch,
            fps=nsentences / seconds,
            ups=n / seconds,
            wps=ntokens / seconds,
            wall=time.perf_counter() - self._began,
        )
        if device.type != "cpu":  # of one accelerator
            flops = statistics.mean(
                d.flops for d in self.done if hasattr(d, "flops")
            )  # restored ones have none
            row["tflops"] = flops * row["ups"] / 1e12
            row["mfu"] = flops * row["ups"] / self.peak
        if self.has_limit:
            row["hours"] = self.clock.hours
        self.row(row)
        self.reset()
        self._has_row.set()
        if self._ends is not None:  # the figures above have waited for the device
            self._tell_speed()
        return row

    def row(self, row: dict):
        if self.device.rank:
            return
        row = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        try:
            with self.path.open("a") as f:
                f.write("\n" * self._torn + json.dumps(row) + "\n")
            self._torn = False
        except (
            OSError
        ) as e:  # a full disk must not end a run; the row may have been written in part
            self._torn = True
            self.say(
                f"warning: {self.path}: {e.strerror}; update {row['num_updates']} is not in it"
            )
        if self.curves is not None:
            self.draw(self.curves.row, row)
        if self.bar is not None and None not in (row.get("loss"), row.get("target_var")):
            self.bar.set_postfix_str(
                f"loss {row['loss']:.3f} lr {row['lr']:.1e}"
            )  # more is cut off at 80 columns
        elif row.get("skipped"):
            why = "skipped, since its loss or gradient is not finite"
            self.say(f"update {row['num_updates']}: {why}{self._advice}")
            self._advice = ""  # once is enough
        else:
            shown = {
                k: v
                for k, v in row.items()
                if not HIDDEN.fullmatch(k) and (k, v) != ("loss_scale", 1)
            }
            shown = dict(update=row["num_updates"], **shown)
            words = [
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()
            ]
            left = self._left(1 / row["ups"]) if "ups" in row else 0
            self.say(" | ".join(words + [f"{duration(left)} left"] * (left > 0)))

    def overflow(self, turn, num_updates: int, loss_scale: float):
        """A row for gradients that overflowed float16, which was no update. turn: a train.Turn."""
        blocks = [int(i) for batch in turn.batches for i in batch.ids]
        self.row(
            dict(
                overflow=True,
                loss_scale=loss_scale,
                num_updates=num_updates,
                epoch=turn.epoch,
                blocks=blocks,
            )
        )

    def validation(self, figures: dict, best_loss: float | None, num_updates: int, epoch: int):
        """A row for what `quality.evaluate` found."""
        figures = {
            f"valid_{k}": v for k, v in figures.items() if k not in ("sample_size", "batches")
        }
        self.row(
            {**figures, "valid_best_loss": best_loss, "num_updates": num_updates, "epoch": epoch}
        )

    @contextlib.contextmanager
    def paused(self):
        """What happens inside counts as no training time."""
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - max(begin, self.since)
        self._idle += time.perf_counter() - begin

    def say(self, text: str):
        if self.device.rank == 0:
            try:
                tqdm.write(printable(text)) if self.bar is not None else print(
                    printable(text), flush=True
                )
            except (
                OSError
            ):  # the reader is gone, as `| tee` is after Ctrl-C; that must not end the run
                sys.stdout = Path(os.devnull).open("w")

    def close(self):
        self._has_row.set()
        if self.bar is not None:
            self.bar.close()
        if self.curves is not None:
            self.draw(self.curves.close)

    def draw(self, work, *args):
        """Do a work of the curves; an error in it, such as a full disk, ends them but not the run."""
        try:
            work(*args)
        except OSError as e:
            self.say(
                f"warning: {self.curves.logdir}: {e.strerror or e}; no more curves until the next start"
            )
            self.curves = None


def _updates_of(row: str) -> float:
    try:
        return float(json.loads(row)["num_updates"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # a row that a crash cut short, or no row of ours


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


def padding(dataset: BlockDataset) -> float:
    """The share of the places in a dataset's batches that hold no token."""
    ends, lengths = (
        dataset.batch_ends,
        dataset.lengths[dataset.order[: dataset.batch_ends[-1]]],
    )  # ascending
    places = np.diff(ends, prepend=0) * lengths[ends - 1].astype(np.int64)
    return 1 - int(lengths.sum(dtype=np.int64)) / int(places.sum())


def describe_start(run, train: BlockDataset, log: Log, source: Path | None):
    """Open the log, and say how the run is set up, where it begins, and what it will see. run: a train.Run; train: its
    first training folder; source: the checkpoint that it continues from."""
    device, cfg, t = run.device, run.cfg, run.cfg.train
    an_epoch = -(-len(train.batch_ends) // (device.world_size * t.update_freq))  # updates
    updates = min(run.cfg.train.max_update, t.max_epoch * an_epoch or math.inf)
    log.open(run.num_updates, updates)
    log.say(
        f"data2vec-text {VERSION}: train.py {flags_of([getattr(cfg, f.name) for f in dataclasses.fields(cfg)])}"
    )
    parameters = sum(p.numel() for p in run.weights.parameters)
    log.say(
        f"{device.world_size} x {device.type} ({device.name}), amp {device.amp_name} | {parameters:,} parameters"
    )
    passes = updates / an_epoch / len(cfg.data.data_path.split(":"))  # inf for a run by the clock
    read = (
        f"{100 * passes:.2g}% of the text"
        if passes < 0.995
        else f"the text {passes:,.{passes < 10:d}f} times"
    )
    what = (
        duration(3600 * t.max_hours) if math.isinf(updates) else f"{updates:,} updates read {read}"
    )
    blocks = f"{len(train.lengths):,} blocks and {padding(train):.1%} padding in {len(train.batch_ends):,} batches"
    log.say(f"{blocks} an epoch; {what}")
    too_long, remainder = train.dropped_tokens()
    percent = 100 * (too_long + remainder) / max(1, train.stream.tokens)
    why = f" ({too_long:,} in too long blocks, {remainder:,} in the remainder)" if percent else ""
    advice = "; --long_sentences split --drop_remainder false keep all" if percent else ""
    log.say(
        f"{'warning: ' if percent > 1 else ''}{percent:.2f}% of the training tokens are never seen{why}{advice}"
    )
    if source and run.is_finished():
        flag = "max_update" if run.num_updates >= run.cfg.train.max_update else "max_epoch"
        flag = "max_hours" if run.clock.left <= 0 else flag
        log.say(
            f"finished: {source} is at update {run.num_updates}; to train on, raise --{flag} {getattr(t, flag)}"
        )
    elif source:
        used = f", after {duration(3600 * run.clock.hours)}" if t.max_hours else ""
        log.say(f"resuming from {source} at update {run.num_updates}, epoch {run.epoch}{used}")
    if cfg.train.warmup_updates >= cfg.train.max_update:
        log.say(
            f"note: the learning rate is still warming up at the last of {cfg.train.max_update} updates"
        )
    for text in notes(train):
        log.say(f"note: {text}")
