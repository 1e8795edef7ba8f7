"""What a run tells: figures of quality, train.jsonl, and a line or a progress bar for a person."""

import json
import math
import os
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import write_text
from config import printable
from device import Device


def moments(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sums over the M places from which `quality` makes its figures, (6, C) float32; sums of several batches add up."""
    p, t = prediction.float(), target.float()
    unit = F.normalize(t, dim=-1)
    cosine = F.normalize(p, dim=-1) * unit
    return torch.stack([x.sum(0) for x in (p, p.square(), t, t.square(), unit, cosine)])


def quality(sums: torch.Tensor, count: int) -> dict:
    """What the loss cannot tell. Variances are over the masked places, averaged over channels: near 0 is a collapse.

    cosine: mean cosine of prediction and target; cosine_constant: what always predicting the mean target would get.
    """
    p, p2, t, t2, unit, cosine = (sums.cpu().double() / max(1, count)).unbind()
    constant = float((F.normalize(t, dim=0) * unit).sum())
    return dict(
        target_var=float((t2 - t.square()).clamp(min=0).mean()),
        pred_var=float((p2 - p.square()).clamp(min=0).mean()),
        cosine=float(cosine.sum()),
        cosine_constant=constant,
    )


class Log:
    """Figures of the updates since the last row. Everything stays on the device until a row is due; only rank 0
    writes."""

    def __init__(self, device: Device, path: Path):
        self.device, self.path, self.bar = device, path, None
        self._began, self._torn = time.perf_counter(), False
        self.reset()

    def open(self, num_updates: int, max_update: int):
        """Open the bar, and drop the rows that a crashed run wrote behind its last checkpoint: they will come again."""
        if self.device.rank == 0 and self.path.exists():
            rows = [
                row for row in self.path.read_text(errors="replace").splitlines() if _updates_of(row) <= num_updates
            ]
            write_text(self.path, "".join(row + "\n" for row in rows))
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
        """Go on in the middle of an interval: its row is then that of a run that was never interrupted."""
        where = self.device.torch_device
        for values in state["updates"]:
            tensors = {key: torch.tensor(values[key], device=where) for key in ("loss", "gnorm")}
            counts = torch.tensor(values["counts"], device=where if self.device.world_size > 1 else "cpu")
            self.done.append(types.SimpleNamespace(number=values["number"], counts=counts, **tensors))
        self.skipped, self.since = list(state["skipped"]), time.perf_counter() - state["seconds"]

    def reset(self):
        self.done, self.skipped, self.pair, self.since = [], [], None, time.perf_counter()

    def add(self, done):
        """Take in a train.Update."""
        self.pair, done.pair = done.pair, None  # large, and only the last one is looked at
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
        sums, places = moments(*self.pair), len(self.pair[0])
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
            target_var=figures["target_var"] if sums[-1] else None,
            pred_var=figures["pred_var"] if sums[-1] else None,
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
        except OSError as e:  # a full disk shall not end a run; the row may have been written in part
            self._torn = True
            self.say(f"warning: {self.path}: {e.strerror}; update {row['num_updates']} is not in it")
        if self.bar is not None and None not in (row.get("loss"), row.get("target_var")):
            self.bar.set_postfix_str(
                f"epoch {row['epoch']} loss {row['loss']:.3f} gnorm {row['gnorm']:.2f} lr {row['lr']:.2e}"
                f" ema {row['ema_decay']:.4f} var {row['target_var']:.2f}/{row['pred_var']:.2f}"
                f" fps {row['fps']:.0f} wps {row['wps']:.0f}"
            )
        else:
            hidden = ("num_updates", "sample_size", "nsentences", "ntokens", "wall")
            shown = dict(update=row["num_updates"], **{k: v for k, v in row.items() if k not in hidden})
            self.say(" | ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()))

    def say(self, text: str):
        if self.device.rank == 0:
            try:
                tqdm.write(printable(text)) if self.bar is not None else print(printable(text), flush=True)
            except OSError:  # whoever read this is gone, as `| tee` is at Ctrl-C; that shall not end the run
                sys.stdout = Path(os.devnull).open("w")

    def close(self):
        if self.bar is not None:
            self.bar.close()


def _updates_of(row: str) -> float:
    try:
        return json.loads(row)["num_updates"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a row that a crash cut short
