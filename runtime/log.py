"""What a run tells: train.jsonl, and a line or a progress bar for a person."""

import contextlib
import json
import math
import os
import re
import sys
import time
import types
from pathlib import Path

import torch
from tqdm import tqdm

from config import printable, read_text
from data import BlockDataset
from device import Device
from runtime.checkpoint import write_text
from runtime.curves import TensorBoard
from runtime.quality import moments, quality

# what a row has and a printed line has not
HIDDEN = re.compile("num_updates|sample_size|nsentences|ntokens|wall|cosine_constant|valid_(r2|loss|gain|beyond)_.*")


class Log:
    """The figures of the updates since the last row. They stay on the device until a row is due; only rank 0 writes."""

    def __init__(self, device: Device, path: Path, tensorboard_logdir: str = ""):
        """Raises InputError if TensorBoard curves are asked for and cannot be written."""
        self.device, self.path, self.bar = device, path, None
        self.curves = TensorBoard(tensorboard_logdir) if tensorboard_logdir and device.rank == 0 else None
        self._began, self._torn = time.perf_counter(), False
        self.reset()

    def open(self, num_updates: int, max_update: int):
        """Open the bar, and drop the rows that a crashed run wrote after its last checkpoint: they will come again."""
        if self.device.rank == 0 and self.path.exists():
            rows = [row for row in read_text(self.path, "replace").splitlines() if _updates_of(row) <= num_updates]
            write_text(self.path, "".join(row + "\n" for row in rows))
        if self.curves is not None:
            self.draw(self.curves.open, num_updates)
        if self.device.rank == 0 and sys.stderr.isatty():
            self.bar = tqdm(total=max_update, initial=num_updates, unit="update", dynamic_ncols=True)

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
            counts = torch.tensor(values["counts"], device=where if self.device.world_size > 1 else "cpu")
            self.done.append(types.SimpleNamespace(number=values["number"], counts=counts, **tensors))
        self.skipped, self.since = list(state["skipped"]), time.perf_counter() - state["seconds"]

    def reset(self):
        self.done, self.skipped, self.last_batch, self.since = [], [], None, time.perf_counter()

    def add(self, done):
        """Take in a train.Update."""
        self.last_batch, done.last_batch = done.last_batch, None  # large, and only the newest is used
        self.done.append(done)
        if self.bar is not None:
            self.bar.update()

    def read_skipped(self) -> list[bool]:
        """Whether each update since the last call was skipped; waits for the device. Writes a row for each that was."""
        new = self.done[len(self.skipped) :]
        flags = torch.stack([done.skipped for done in new]).tolist() if new else []
        for done, flag in zip(new, flags):
            if flag:
                self.row(dict(skipped=True, num_updates=done.number, epoch=done.epoch, blocks=done.blocks))
        self.skipped += flags
        return flags

    def write(self) -> dict:
        """One row: means per update over the interval (the loss per masked place), lr and the like of the last one."""
        device, last = self.device, self.done[-1]
        self.read_skipped()
        good = [done for done, skipped in zip(self.done, self.skipped) if not skipped]
        loss, gnorm = (
            sum(torch.stack([getattr(d, k) for d in good]).tolist()) if good else 0.0 for k in ("loss", "gnorm")
        )
        sample_size, nsentences, ntokens = torch.stack([d.counts for d in self.done]).sum(0).tolist()
        seen = sum(torch.stack([d.counts[0] for d in good]).tolist()) if good else 0
        sums, places = moments(*self.last_batch), len(self.last_batch[0])
        if self.skipped[-1]:
            sums, places = torch.zeros_like(sums), 0
        sums = device.all_reduce(torch.cat([sums.flatten(), torch.full((1,), float(places), device=sums.device)]))
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
            **{k: figures[k] if sums[-1] else None for k in ("target_var", "pred_var", "cosine", "cosine_constant")},
            num_updates=last.number,
            epoch=last.epoch,
            fps=nsentences / seconds,
            ups=n / seconds,
            wps=ntokens / seconds,
            wall=time.perf_counter() - self._began,
        )
        self.row(row)
        self.reset()
        return row

    def row(self, row: dict):
        if self.device.rank:
            return
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            with self.path.open("a") as f:
                f.write("\n" * self._torn + json.dumps(row) + "\n")
            self._torn = False
        except OSError as e:  # a full disk must not end a run; the row may have been written in part
            self._torn = True
            self.say(f"warning: {self.path}: {e.strerror}; update {row['num_updates']} is not in it")
        if self.curves is not None:
            self.draw(self.curves.row, row)
        if self.bar is not None and None not in (row.get("loss"), row.get("target_var")):
            self.bar.set_postfix_str(
                f"epoch {row['epoch']} loss {row['loss']:.3f} gnorm {row['gnorm']:.2f} lr {row['lr']:.2e}"
                f" ema {row['ema_decay']:.4f} var {row['target_var']:.2f}/{row['pred_var']:.2f}"
                f" fps {row['fps']:.0f} wps {row['wps']:.0f}"
            )
        else:
            shown = dict(update=row["num_updates"], **{k: v for k, v in row.items() if not HIDDEN.fullmatch(k)})
            self.say(" | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()))

    def overflow(self, turn, num_updates: int, loss_scale: float):
        """A row for gradients that overflowed float16, which was no update. turn: a train.Turn."""
        blocks = [int(i) for batch in turn.batches for i in batch.ids]
        self.row(dict(overflow=True, loss_scale=loss_scale, num_updates=num_updates, epoch=turn.epoch, blocks=blocks))

    def validation(self, figures: dict, best_loss: float | None, num_updates: int, epoch: int):
        """A row for what `quality.evaluate` found."""
        figures = {f"valid_{k}": v for k, v in figures.items() if k not in ("sample_size", "batches")}
        self.row({**figures, "valid_best_loss": best_loss, "num_updates": num_updates, "epoch": epoch})

    @contextlib.contextmanager
    def paused(self):
        """What happens inside counts as no training time."""
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - max(begin, self.since)

    def say(self, text: str):
        if self.device.rank == 0:
            try:
                tqdm.write(printable(text)) if self.bar is not None else print(printable(text), flush=True)
            except OSError:  # the reader is gone, as `| tee` is after Ctrl-C; that must not end the run
                sys.stdout = Path(os.devnull).open("w")

    def close(self):
        if self.bar is not None:
            self.bar.close()
        if self.curves is not None:
            self.draw(self.curves.close)

    def draw(self, work, *args):
        """Do a work of the curves; an error in it, such as a full disk, ends them but not the run."""
        try:
            work(*args)
        except OSError as e:
            self.say(f"warning: {self.curves.logdir}: {e.strerror or e}; no more curves until the next start")
            self.curves = None


def _updates_of(row: str) -> float:
    try:
        return float(json.loads(row)["num_updates"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # a row that a crash cut short, or no row of ours


def describe_start(run, train: BlockDataset, log: Log):
    """Say how the run is set up, and what it will not see. run: a train.Run; train: its first training folder."""
    device, cfg = run.device, run.cfg
    log.say(f"config {json.dumps(cfg.flat())}")
    parameters = sum(p.numel() for p in run.weights.parameters)
    log.say(
        f"{device.world_size} x {device.type} ({device.name}), amp {device.amp_name} | {parameters:,} parameters"
        f" | {len(train.lengths):,} blocks in {len(train.batch_ends):,} batches an epoch"
    )
    too_long, remainder = train.dropped_tokens()
    percent = 100 * (too_long + remainder) / max(1, train.stream.tokens)
    advice = "; --long_sentences split --drop_remainder false keep all" if percent else ""
    log.say(
        f"{'warning: ' if percent > 1 else ''}{percent:.2f}% of the training tokens are never seen"
        f" ({too_long:,} in too long blocks, {remainder:,} in the remainder){advice}"
    )
    if cfg.train.warmup_updates >= cfg.train.max_update:
        log.say(f"note: the learning rate is still warming up at the last of {cfg.train.max_update} updates")
