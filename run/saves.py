"""When a run saves, and what a failed save or an error means for it."""

import math
import time
from pathlib import Path

from config import InputError, RunError
from run import checkpoint
from run.guard import Health, Unhealthy
from run.log import Log
from run.resume import contents

import torch


class Saves:
    """The checkpoints of a run, written in the background, one at a time. As a context: at its end everything is
    written, after an error too."""

    def __init__(self, run, corpus, fingerprint: dict, log: Log, health: Health):
        """run: a train.Run; fingerprint: of the data, as `resume.fingerprint_of` makes it."""
        self.run, self.corpus, self.fingerprint, self.log, self.health = (
            run,
            corpus,
            fingerprint,
            log,
            health,
        )
        self.folder = Path(run.cfg.train.save_dir)
        # with --fairseq_exact the teacher moves at an update's beginning, before Adam's step
        self.saver = checkpoint.Saver(
            run.device, None if run.cfg.train.fairseq_exact else run.optimizer.adam
        )
        self.since = time.monotonic()  # the last save, or the start
        self.writing = None  # update number of the save under way
        self.best_written = self.best_saved = (
            self.best()
        )  # in the save under way, and in the last good one
        self.failure = ""  # of the last save

    def save(self, *also: str):
        """Begin to write checkpoint_last.pt and the files named `also`. Raises RunError for non-finite weights."""
        run = self.run
        self.settle()
        self.failure = ""
        # a norm could overflow where the weights did not; isfinite() of each weight takes ten times as long
        weights = (
            *run.weights.parameters,
            *run.weights.averaged[0].parameters(),
        )  # the student's and the teacher's
        ends = torch.stack([end for p in weights for end in (p.amin(), p.amax())])
        if not ends.isfinite().all():
            raise RunError(
                f"update {run.num_updates}: the weights are not finite, so the last checkpoint stays as it is; resume"
                " from it with a lower --lr"
            )
        self.look_at_skipped()
        self.writing, self.best_written, self.since = run.num_updates, self.best(), time.monotonic()
        if run.device.rank == 0:
            content = {**contents(run, self.corpus, self.fingerprint), "log": self.log.state()}
            paths = (self.folder / name for name in ("checkpoint_last.pt", *also))
            self.saver.start(content, *paths, keep=run.cfg.train.keep_interval_updates)

    def settle(self):
        """Wait for the save under way, if any. A failed save loses nothing, and the next one tries again."""
        try:
            if self.saver.finish():
                self.best_saved = self.best_written
        except OSError as e:
            self.run.best_loss, self.run.best_gain = (
                self.best_saved
            )  # the better one's file was not written
            self.failure = (
                f"update {self.writing} could not be saved in {self.folder}: {e.strerror or e}"
            )
            self.log.say(
                f"warning: {self.failure}; earlier saves are untouched, the next save tries again"
            )

    def save_now(self, why: str):
        """Save and wait for it."""
        self.save()
        self.settle()
        self.log.say(self.failure or f"update {self.run.num_updates}: saved, {why}")

    def is_late(self) -> bool:
        """Whether the clock asks for a save (--save_interval_minutes). Clocks of workers differ: they must agree."""
        minutes = self.run.cfg.train.save_interval_minutes
        return 0 < 60 * minutes <= time.monotonic() - self.since

    def settle_if_idle(self):
        if not self.saver.is_busy():
            self.settle()

    def names(self, best: bool, counted: bool, epoch: int) -> list[str]:
        """The files to write beside checkpoint_last.pt. counted: this was an update, not an overflow."""
        interval, number = self.run.cfg.train.save_interval_updates, self.run.num_updates
        kept = counted and interval > 0 and number % interval == 0
        return ["checkpoint_best.pt"] * best + [f"checkpoint_{epoch}_{number}.pt"] * kept

    def look_at_skipped(self):
        """Count the updates that were skipped since the last look; waits for the device. Raises Unhealthy."""
        flags = self.log.read_skipped()
        self.run.optimizer.skipped += sum(flags)
        self.health.check_skipped(flags)

    def best(self) -> tuple:
        return self.run.best_loss, self.run.best_gain

    def note(self, figures: dict) -> bool:
        """Take in a validation's figures; returns whether they are the best so far, by --best_by."""
        run, loss, gain = self.run, figures["loss"], figures.get("probe_gain")
        if run.cfg.train.best_by == "cosine_gain":
            gain = figures["cosine"] - max(figures["cosine_position"], figures["cosine_block"])
        run.first_target_var = run.first_target_var or figures.get("target_var")
        lower = math.isfinite(loss) and (run.best_loss is None or loss < run.best_loss)
        higher = gain is not None and (run.best_gain is None or gain > run.best_gain)
        run.best_loss, run.best_gain = (
            loss if lower else run.best_loss,
            gain if higher else run.best_gain,
        )
        return lower if run.cfg.train.best_by == "loss" else higher

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        run = self.run
        lost_worker = isinstance(error, RuntimeError) and run.device.lost_worker(error)
        try:
            # The state is consistent between updates, so save before failing on a bad block or a lost worker.
            if isinstance(error, (InputError, Unhealthy)) or (
                lost_worker and not isinstance(error, RunError)
            ):
                self.save()
        finally:
            self.settle()
        if isinstance(error, Unhealthy):
            saved = self.failure or f"saved update {run.num_updates}"
            raise RunError(f"update {run.num_updates}: {error} ({saved})") from None
        if error is None and self.failure:
            raise RunError(self.failure)
        if error is None and run.is_finished() and 2 * run.optimizer.skipped > run.num_updates:
            raise RunError(
                f"{run.optimizer.skipped} of {run.num_updates} updates were skipped, since their loss or gradient was"
                " not finite, so little or nothing was learned; lower --lr, raise --warmup_updates or try --amp off"
            )
