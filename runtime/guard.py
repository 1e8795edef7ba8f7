"""What ends a run early, and how: signals, a second run in the same place, numbers that went wrong."""

import fcntl
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from config import InputError, option

UNHEALTHY_INTERVALS = 10  # log intervals in a row with a collapsed variance before the run stops


@dataclass(frozen=True)
class GuardConfig:
    max_skipped: int = option(50, "updates in a row with a non-finite loss or gradient before the run stops", low=1)
    min_target_var: float = option(0.01, "variance of the targets under which they have collapsed (0: no guard)", low=0)
    min_pred_var: float = option(
        1e-6, "variance of the predictions under which they have collapsed (0: no guard)", low=0
    )


class Signals:
    """While in use: SIGTERM and SIGINT ask for an end behind the current update, a second one ends at once; SIGUSR1
    asks for a checkpoint. `stop` is the signal's number or 0, `save` whether one is wanted.

    echo: seconds in which the same signal again is no second one. A scheduler's signal reaches a worker twice, once
    directly and once from torchrun.
    """

    def __init__(self, echo: float = 0.0):
        self.echo = echo

    def __enter__(self):
        self.stop, self.save, self._at = 0, 0, 0.0
        handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGUSR1: self._save}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number, _):
        if self.stop == number and time.monotonic() < self._at + self.echo:
            return
        if self.stop:
            os._exit(128 + number)
        self.stop, self._at = number, time.monotonic()
        # not print: a signal may come in the middle of one
        os.write(
            2, f"\n{signal.Signals(number).name}: finishing this update, then saving; again: exit at once\n".encode()
        )

    def _save(self, *_):
        self.save = 1


class Lock:
    """Keeps a second run out of a directory. The kernel drops the lock with its process, however that ends."""

    def __init__(self, folder: Path, flag: str = "--save_dir"):
        self.file = open(folder / ".lock", "a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise InputError(f"{flag} {folder} is in use by {holder}; choose another, or wait for its end") from None
        except OSError:  # a file system without locks; better to run than to refuse
            return
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self):
        self.file.close()


class Health:
    """Watches figures that have been read anyway; each method returns why the run must stop, or None."""

    def __init__(self, cfg: GuardConfig, warmup_updates: int):
        self.cfg, self.warmup_updates = cfg, warmup_updates
        self.skipped_in_row = self.collapsed_in_row = 0

    def skipped(self, flags: list) -> str | None:
        """flags: for each new update in order, whether it was skipped."""
        for flag in flags:
            self.skipped_in_row = self.skipped_in_row + 1 if flag else 0
            if self.skipped_in_row > self.cfg.max_skipped:
                return (
                    f"{self.skipped_in_row} updates in a row had a non-finite loss or gradient (--max_skipped"
                    f" {self.cfg.max_skipped}); go on from an older checkpoint with a lower --lr, a longer"
                    " --warmup_updates or a smaller --clip_norm"
                )
        return None

    def collapsed(self, row: dict, say) -> str | None:
        """row: a log row. Nothing is judged in the warm-up, where predictions may rest at the mean for long."""
        wrong = [
            f"{name} {row[name]:.3g} is under --min_{name} {least:g}"
            for name, least in (("target_var", self.cfg.min_target_var), ("pred_var", self.cfg.min_pred_var))
            if row["num_updates"] > self.warmup_updates and row[name] is not None and row[name] < least
        ]
        self.collapsed_in_row = self.collapsed_in_row + 1 if wrong else 0
        if not wrong:
            return None
        text = " and ".join(wrong)
        if self.collapsed_in_row < UNHEALTHY_INTERVALS:
            say(f"warning: update {row['num_updates']}: {text}: the representation may be collapsing")
            return None
        return (
            f"collapse: {text} for {UNHEALTHY_INTERVALS} log intervals; lower --lr, warm up longer, raise --ema_decay,"
            " or switch the guard off with 0"
        )
