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


def by_itself(value):
    """The value with each tensor on the host and in memory of its own, as other programs expect.

    On an NPU all weights are views of two long vectors.
    """
    if isinstance(value, torch.Tensor):
        is_whole = value.untyped_storage().nbytes() == value.nbytes
        return value if value.is_cpu and is_whole else value.detach().to("cpu", copy=True)
    # no list of a checkpoint holds a tensor
    if isinstance(value, dict):
        return {name: by_itself(part) for name, part in value.items()}
    return value


class Saves:
    """The checkpoints of a run. As a context: what an error must not lose is saved at its end."""

    def __init__(self, run, corpus, fingerprint: dict, log: Log, health: Health):
        """run: a train.Run; fingerprint: of the data, as `resume.fingerprint_of` makes it."""
        self.run, self.corpus, self.fingerprint = run, corpus, fingerprint
        self.log, self.health = log, health
        self.folder = Path(run.cfg.train.save_dir)
        self.since = time.monotonic()  # the last save, or the start
        self.best_saved = run.best_loss, run.best_gain  # of the last save that succeeded
        self.failure = ""  # of the last save

    def save(self, is_best: bool = False, epoch: int = 0):
        """Write checkpoint_last.pt, checkpoint_best.pt too if it is the best, and, with the epoch
        of this update, that of --save_interval_updates.

        A save that fails is said and loses nothing: the next one tries again. Raises RunError for
        non-finite weights.
        """
        run, interval = self.run, self.run.cfg.train.save_interval_updates
        self.check_weights()
        self.look_at_skipped()
        self.since = time.monotonic()
        self.failure = ""
        if run.device.rank > 0:  # the first worker writes for all
            return
        # the last one first: the others are copies of it, and a full disk then costs only these
        names = ["checkpoint_last.pt"]
        if is_best:
            names.append("checkpoint_best.pt")
        is_kept = epoch > 0 and interval > 0 and run.num_updates % interval == 0
        if is_kept:
            names.append(f"checkpoint_{epoch}_{run.num_updates}.pt")
        content = {**contents(run, self.corpus, self.fingerprint), "log": self.log.state()}
        try:
            checkpoint.save(by_itself(content), *(self.folder / name for name in names))
            if is_kept:
                checkpoint.prune(self.folder, run.cfg.train.keep_interval_updates)
            self.best_saved = run.best_loss, run.best_gain
        except OSError as e:
            run.best_loss, run.best_gain = self.best_saved  # the better one was not written
            why = e.strerror or e
            self.failure = f"update {run.num_updates} could not be saved in {self.folder}: {why}"
            self.log.say(
                f"warning: {self.failure}; earlier saves are untouched, the next save tries again"
            )

    def check_weights(self):
        """Raise RunError unless the weights of student and teacher are finite."""
        run = self.run
        weights = (*run.weights.parameters, *run.weights.averaged[0].parameters())
        # a norm could overflow where the weights did not; isfinite() of each takes ten times longer
        ends = torch.stack([end for p in weights for end in (p.amin(), p.amax())])
        if not ends.isfinite().all():
            raise RunError(
                f"update {run.num_updates}: the weights are not finite, so the last checkpoint"
                " stays as it is; resume from it with a lower --lr"
            )

    def save_for_signal(self):
        self.save()
        text = f"update {self.run.num_updates}: saved, as the signal asked"
        self.log.say(self.failure or text)

    def is_late(self) -> bool:
        """Whether the clock asks for a save (--save_interval_minutes); workers' clocks differ."""
        minutes = self.run.cfg.train.save_interval_minutes
        return 0 < 60 * minutes <= time.monotonic() - self.since

    def look_at_skipped(self):
        """Count the updates that were skipped since the last look; waits for the device.

        Raises Unhealthy.
        """
        flags = self.log.read_skipped()
        self.run.optimizer.skipped += sum(flags)
        self.health.check_skipped(flags)

    def note(self, figures: dict) -> bool:
        """Take in a validation's figures; returns whether they are the best, by --best_by."""
        run = self.run
        loss, gain = figures["loss"], figures.get("probe_gain")
        run.first_target_var = run.first_target_var or figures.get("target_var")
        # both are kept, since a resumed run may go by the other
        lower = math.isfinite(loss) and (run.best_loss is None or loss < run.best_loss)
        higher = gain is not None and (run.best_gain is None or gain > run.best_gain)
        if lower:
            run.best_loss = loss
        if higher:
            run.best_gain = gain
        return lower if run.cfg.train.best_by == "loss" else higher

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        run = self.run
        lost = isinstance(error, RuntimeError) and run.device.lost_worker(error)
        # The state is consistent between updates, so save before failing on a bad block or a lost
        # worker.
        must_save = isinstance(error, (InputError, Unhealthy))
        if must_save or (lost and not isinstance(error, RunError)):
            self.save()
        if isinstance(error, Unhealthy):
            saved = self.failure or f"saved update {run.num_updates}"
            raise RunError(f"update {run.num_updates}: {error} ({saved})") from None
        if error is not None:
            return
        # a run that seems to have ended well, but has not
        if self.failure:
            raise RunError(self.failure)
        skipped, updates = run.optimizer.skipped, run.num_updates
        if run.is_finished() and 2 * skipped > updates:
            raise RunError(
                f"{skipped} of {updates} updates were skipped, since their loss or gradient was not"
                " finite, so little or nothing was learned; lower --lr, raise --warmup_updates or"
                " try --amp off"
            )
