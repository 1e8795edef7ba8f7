"""What a run tells: train.jsonl, and a line or a progress bar for a person."""

import contextlib
import json
import re
import sys
import time
from pathlib import Path

from config import read_text
from run.checkpoint import write_text
from run.curves import TensorBoard
from run.progress import Bar, say
from text.files import json_objects, with_nulls

import torch
import torch.nn.functional as F
from torch import Tensor

# what a row has and a printed line has not
HIDDEN = re.compile(
    "num_updates|sample_size|nsentences|ntokens|wall|hours|cosine_constant"
    "|valid_(r2|loss|gain|beyond)_.*"
)


# --------------------------------------------------------------- figures of predictions and targets


def moments(prediction: Tensor, target: Tensor) -> Tensor:
    """Sums over the M places from which `quality` computes its figures, (6, C) float32.

    Those of several batches add up.
    """
    p, t = prediction.float(), target.float()
    unit = F.normalize(t, dim=-1)
    cosine = F.normalize(p, dim=-1) * unit
    return torch.stack([x.sum(0) for x in (p, p.square(), t, t.square(), unit, cosine)])


def quality(sums: Tensor, count: int) -> dict:
    """Variances over the masked places, averaged over channels: near 0 is a collapse.

    cosine: mean cosine of prediction and target; cosine_constant: what always predicting the mean
    target would get, which is near 1 where all targets are alike.
    """
    p, p2, t, t2, unit, cosine = (sums.cpu().double() / max(1, count)).unbind()
    constant = float((F.normalize(t, dim=0) * unit).sum())
    return dict(
        target_var=float((t2 - t.square()).clamp(min=0).mean()),
        pred_var=float((p2 - p.square()).clamp(min=0).mean()),
        cosine=float(cosine.sum()),
        cosine_constant=constant,
    )


# ------------------------------------------------------------------------------------- the log


class Log:
    """The figures of the updates since the last row.

    They stay on the device until a row or a save is due; only the first worker writes.
    """

    def __init__(self, run):
        """run: a train.Run.

        Raises InputError if TensorBoard curves are asked for and cannot be written.
        """
        t = run.cfg.train
        self.run, self.device, self.clock = run, run.device, run.clock
        self.path = Path(t.save_dir) / "train.jsonl"
        self.bar = self.curves = None
        if t.tensorboard_logdir and self.device.rank == 0:
            self.curves = TensorBoard(t.tensorboard_logdir)
        self.began = time.perf_counter()
        self.is_torn = False  # whether the last row was written in part
        self.last_update = 0
        self.is_speed_told = False
        self.stopped = None  # when the pause began, within one
        self.reset()

    def open(self, last_update: int):
        """Open the bar, and drop the rows that a crashed run wrote after its last checkpoint.

        They will come again.
        """
        num_updates = self.run.num_updates
        if self.device.rank == 0 and self.path.exists():
            rows = json_objects(read_text(self.path, "replace").splitlines())
            numbered = [row for row in rows if isinstance(row.get("num_updates"), int)]
            rows = [row for row in numbered if row["num_updates"] <= num_updates]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.draw("open", num_updates)
        self.last_update = last_update
        if self.device.rank == 0 and num_updates < last_update and sys.stderr.isatty():
            self.bar = Bar(total=last_update, initial=num_updates, unit="update", leave=True)

    def reset(self):
        """Begin a new interval."""
        self.done = []  # updates whose figures are still on the device
        self.figures = []  # of the updates before them: number, loss, gnorm, counts
        self.skipped = []  # whether each of these was
        self.last_batch = None
        self.since = time.perf_counter()

    def state(self) -> dict:
        """The interval so far, as plain values; all its figures must have been read."""
        end = time.perf_counter() if self.stopped is None else self.stopped
        seconds = max(0.0, end - self.since)
        return dict(updates=self.figures, skipped=self.skipped, seconds=seconds)

    def restore(self, state: dict):
        """Continue in the middle of an interval: its row will be that of an uninterrupted run."""
        for saved in state["updates"]:
            # whatever a damaged file has in place of a number ends here
            figures = {name: float(saved[name]) for name in ("loss", "gnorm")}
            counts = [int(count) for count in saved["counts"]]
            self.figures.append(dict(number=saved["number"], **figures, counts=counts))
        self.skipped = list(state["skipped"])
        self.since = time.perf_counter() - state["seconds"]

    def add(self, done):
        """Take in a train.Update."""
        self.last = done
        self.last_batch = done.last_batch
        done.last_batch = None  # large, and only the newest is used
        self.done.append(done)
        if self.bar is not None:
            self.bar.update()

    def read_skipped(self) -> list[bool]:
        """Whether each update since the last call was skipped; waits for the device.

        Writes a row for each that was.
        """
        if not self.done:
            return []
        # stacked first: a wait for the device for each figure, not for each update
        losses, gnorms, counts, flags = (
            torch.stack([getattr(done.step, name) for done in self.done]).tolist()
            for name in ("loss", "gnorm", "counts", "skipped")
        )
        for done, loss, gnorm, count in zip(self.done, losses, gnorms, counts):
            self.figures.append(dict(number=done.number, loss=loss, gnorm=gnorm, counts=count))
        for done, flag in zip(self.done, flags):
            if flag:
                where = dict(num_updates=done.number, epoch=done.epoch, blocks=done.blocks)
                self.row(dict(skipped=True, **where))
        self.skipped += flags
        self.done = []
        return flags

    def write(self) -> dict:
        """One row: means per update over the interval, the loss per masked place.

        lr and the like are of the last update.
        """
        self.read_skipped()  # waits for the device, so the seconds below are the updates'
        last = self.last
        # of this worker's clock; counts are of all workers already
        n, seconds = len(self.figures), time.perf_counter() - self.since
        counts = [figures["counts"] for figures in self.figures]
        sample_size, nsentences, ntokens = map(sum, zip(*counts))
        # a skipped update moved nothing, so its loss and gradient count for nothing
        good = [figures for figures, skipped in zip(self.figures, self.skipped) if not skipped]
        loss = gnorm = None
        if good:
            places = sum(figures["counts"][0] for figures in good)
            loss = sum(figures["loss"] for figures in good) / max(1, places)
            gnorm = sum(figures["gnorm"] for figures in good) / len(good)
        row = dict(
            loss=loss,
            sample_size=sample_size / n,
            nsentences=nsentences / n,
            ntokens=ntokens / n,
            gnorm=gnorm,
            lr=last.lr,
            ema_decay=last.ema_decay,
            loss_scale=last.step.loss_scale,
            # of the last batch alone: over an interval they would mix many teachers
            **self.variances(),
            num_updates=last.number,
            epoch=last.epoch,
            fps=nsentences / seconds,
            ups=n / seconds,
            wps=ntokens / seconds,
            wall=time.perf_counter() - self.began,
        )
        if self.clock.max_hours:
            row["hours"] = self.clock.hours
        self.row(row)
        self.reset()
        if not self.is_speed_told:
            self.tell_speed(seconds / n)
        return row

    def tell_speed(self, each: float):
        """Say how many updates are left, and how long they take at `each` seconds."""
        self.is_speed_told = True
        left = self.left(each)
        # the limit that ends the run is the one to change
        if left > 0:
            flag = "max_update"
            if self.last_update < self.run.cfg.train.max_update:
                flag = "max_epoch"
            if left == self.clock.left:
                flag = "max_hours"
            self.say(f"{left / each:,.0f} updates at {each:.2g} s: {duration(left)}; see --{flag}")

    def left(self, each: float) -> float:
        """Seconds to the end of the run, if an update takes `each`."""
        return min((self.last_update - self.run.num_updates) * each, self.clock.left)

    def variances(self) -> dict:
        """`quality` of the last batch, over all workers; None where there is no place."""
        width = self.run.cfg.model.embed_dim  # for a worker without any
        sums, places = torch.zeros(6, width, device=self.device.torch_device), 0
        if self.last_batch is not None and not self.skipped[-1]:
            sums, places = moments(*self.last_batch), len(self.last_batch[0])
        # one sum over the workers for all figures and the number of places
        count = torch.full((1,), float(places), device=sums.device)
        sums = self.device.all_reduce(torch.cat([sums.flatten(), count]))
        figures = quality(sums[:-1].view(6, -1), int(sums[-1]))
        return figures if sums[-1] else dict.fromkeys(figures)

    def row(self, row: dict):
        """Write a row, and show it."""
        if self.device.rank > 0:
            return
        row = with_nulls(row)
        try:
            with self.path.open("a") as file:
                file.write("\n" if self.is_torn else "")
                file.write(json.dumps(row) + "\n")
            self.is_torn = False
        except OSError as e:  # a full disk must not end a run
            self.is_torn = True
            number = row["num_updates"]
            self.say(f"warning: {self.path}: {e.strerror}; update {number} is not in it")
        self.draw("row", row)
        self.show(row)

    def show(self, row: dict):
        """A row for a person: in the bar, or as a line."""
        if self.bar is not None and None not in (row.get("loss"), row.get("target_var")):
            # more is cut off at 80 columns
            self.bar.set_postfix_str(f"loss {row['loss']:.3f} lr {row['lr']:.1e}")
        elif row.get("skipped"):
            why = "skipped, since its loss or gradient is not finite"
            advice = "if more follow, lower --lr or raise --warmup_updates"
            self.say(f"update {row['num_updates']}: {why}; {advice}")
        else:
            self.say(self.line_of(row))

    def line_of(self, row: dict) -> str:
        """A row's figures, and the time left."""
        words = [f"update {row['num_updates']}"]
        for name, value in row.items():
            # a loss scale of 1 is no loss scaling
            if HIDDEN.fullmatch(name) or (name, value) == ("loss_scale", 1):
                continue
            short = f"{value:.4g}" if isinstance(value, float) else value
            words.append(f"{name} {short}")
        left = self.left(1 / row["ups"]) if "ups" in row else 0
        if left > 0:
            words.append(f"{duration(left)} left")
        return " | ".join(words)

    def overflow(self, turn):
        """A row for gradients that overflowed float16, which was no update. turn: a train.Turn."""
        blocks = [int(i) for batch in turn.batches for i in batch.ids]
        where = dict(num_updates=self.run.num_updates, epoch=turn.epoch, blocks=blocks)
        self.row(dict(overflow=True, loss_scale=self.run.optimizer.loss_scale, **where))

    def validation(self, figures: dict, epoch: int):
        """A row for the figures of `judge.quality.evaluate`."""
        row = {f"valid_{name}": value for name, value in figures.items()}
        del row["valid_sample_size"], row["valid_batches"]
        row |= dict(valid_best_loss=self.run.best_loss, num_updates=self.run.num_updates)
        self.row(row | dict(epoch=epoch))

    @contextlib.contextmanager
    def paused(self):
        """What happens inside counts as no training time."""
        self.stopped = begin = time.perf_counter()
        yield
        self.stopped = None
        # an interval that began inside pauses only from there on
        self.since += time.perf_counter() - max(begin, self.since)

    def say(self, text: str):
        """A line for a person."""
        if self.device.rank == 0:
            say(text)

    def close(self):
        if self.bar is not None:
            self.bar.close()
        self.draw("close")

    def draw(self, what: str, *args):
        """Tell the curves; an error there, such as a full disk, ends them and not the run."""
        if self.curves is None:
            return
        try:
            getattr(self.curves, what)(*args)
        except OSError as e:
            why = f"{e.strerror or e}; no more curves until the next start"
            self.say(f"warning: {self.curves.logdir}: {why}")
            self.curves = None


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"
