"""What ends a run early, and how: signals, memory, numbers that went wrong."""

import contextlib
import os
import signal
import time

from config import GuardConfig, InputError, ModelConfig, RunError
from hardware.device import LOWEST_LOSS_SCALE, Device
from judge.quality import ALIKE

HALF_COLLAPSE = 3  # the variance of the targets fell to a third: a warning
UNHEALTHY_INTERVALS = (
    10  # log intervals in a row with a collapsed variance after which the run stops
)


class Signals:
    """While in use: SIGTERM and SIGINT ask the run to stop after the current update, a second one ends it at once;
    SIGUSR1 asks for a checkpoint.

    Under torchrun, repeats of a signal within a second are ignored: a scheduler's signal reaches a worker twice, once
    directly and once from torchrun.
    """

    def __init__(self, device: Device):
        self.device, self.echo = device, 1.0 if device.world_size > 1 else 0.0  # seconds

    def __enter__(self):
        self.stop, self.save, self._at = 0, 0, 0.0  # stop: the signal's number, or 0
        handlers = {
            signal.SIGTERM: self._stop,
            signal.SIGINT: self._stop,
            signal.SIGUSR1: self._save,
        }
        self._before = {
            number: signal.signal(number, handler) for number, handler in handlers.items()
        }
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, late: bool = False) -> tuple[int, int, int]:
        """(the number of a signal to stop or 0, whether to save now, whether `late` is true anywhere), the same on all
        workers."""
        stop, save, late = self.device.agree([self.stop, self.save, int(late)])
        self.save = 0
        return stop, save, late

    def _stop(self, number, _):
        if self.stop == number and time.monotonic() < self._at + self.echo:
            return
        if self.stop:
            os._exit(128 + number)
        self.stop, self._at = number, time.monotonic()
        # not print: a signal may arrive in the middle of one
        os.write(
            2,
            f"\n{signal.Signals(number).name}: finishing this update, then saving; again: exit at once\n".encode(),
        )

    def _save(self, *_):
        self.save = 1


class Unhealthy(Exception):
    """The run must save and stop; the text says why and what to do."""


class Health:
    """Watches figures that have been read anyway. Raises Unhealthy where the run must stop."""

    def __init__(self, cfg: GuardConfig, warmup_updates: int, say, at=int):
        """say(text) tells a person; at(updates) is where the schedules are then, as `Clock.at` tells."""
        self.cfg, self.warmup_updates, self.say, self.at = cfg, warmup_updates, say, at
        self.skipped_in_row = self.collapsed_in_row = 0
        self.half_collapsed = False

    def check_skipped(self, flags: list):
        """flags: for each new update in order, whether it was skipped."""
        for flag in flags:
            self.skipped_in_row = self.skipped_in_row + 1 if flag else 0
            if self.skipped_in_row > self.cfg.max_skipped:
                raise Unhealthy(
                    f"{self.skipped_in_row} updates in a row had a non-finite loss or gradient (--max_skipped"
                    f" {self.cfg.max_skipped}); resume from an older checkpoint with a lower --lr, a longer"
                    " --warmup_updates or a smaller --clip_norm"
                )

    def check_loss_scale(self, scale: float):
        if scale < LOWEST_LOSS_SCALE:
            raise Unhealthy(
                "gradients overflow float16 at any loss scale; lower --lr, or use --amp bf16"
            )

    def check_variance(self, row: dict, first_target_var: float | None):
        """row: a log row; first_target_var: of the first validation. Nothing is judged in the warm-up, where
        predictions may rest at the mean for long."""
        self.warn_of_half_collapse(row, first_target_var)
        wrong = [
            f"{name} {row[name]:.3g} is under --min_{name} {least:g}"
            for name, least in (
                ("target_var", self.cfg.min_target_var),
                ("pred_var", self.cfg.min_pred_var),
            )
            if self.at(row["num_updates"]) > self.warmup_updates
            and row[name] is not None
            and row[name] < least
        ]
        self.collapsed_in_row = self.collapsed_in_row + 1 if wrong else 0
        if self.collapsed_in_row >= UNHEALTHY_INTERVALS:
            raise Unhealthy(
                f"collapse: {' and '.join(wrong)} for {UNHEALTHY_INTERVALS} log intervals; lower --lr, warm up longer,"
                " raise --ema_decay, or switch the guard off with 0"
            )
        if wrong:
            self.say(
                f"warning: update {row['num_updates']}: {' and '.join(wrong)}: the representation may be collapsing"
            )

    def warn_of_half_collapse(self, row: dict, first_target_var: float | None):
        """Say once when the targets become alike, long before their variance is near 0; the loss falls meanwhile."""
        signs = []
        if self.at(row["num_updates"]) > self.warmup_updates and row["target_var"] is not None:
            if first_target_var and row["target_var"] < first_target_var / HALF_COLLAPSE:
                signs.append(
                    f"target_var {row['target_var']:.3g} was {first_target_var:.3g} at the first validation"
                )
            if row["cosine_constant"] > ALIKE:
                signs.append(
                    f"always predicting the mean target has a cosine of {row['cosine_constant']:.3f}"
                )
        if signs and not self.half_collapsed:
            self.say(
                f"warning: update {row['num_updates']}: {' and '.join(signs)}: the targets are becoming alike, so a low"
                " loss proves nothing; lower --lr, raise --ema_decay, lengthen --ema_anneal_end_step, or try"
                " --teacher_input full"
            )
        self.half_collapsed = bool(signs)


def check_memory(cfg: ModelConfig, vocabulary_size: int, device: Device, copies: int = 2):
    """Raise InputError if so many float32 copies of the weights do not fit the device's memory: student and teacher,
    and to train them also gradients and Adam's two moments."""
    C, F = cfg.embed_dim, cfg.ffn_embed_dim
    weights = (vocabulary_size + cfg.max_source_positions) * C + cfg.layers * (
        4 * C * C + 2 * C * F
    )
    weights += 4 * C * C * (cfg.head_layers - 1)  # and few more
    needed, there = weights * 4 * copies, device.memory()
    if needed > there:
        raise InputError(
            f"too large for this {device.type}: {weights:,} weights need {needed / 2**30:,.1f} GiB, its memory is"
            f" {there / 2**30:,.1f} GiB; lower --layers, --embed_dim or --ffn_embed_dim, or use a smaller vocabulary"
        )


@contextlib.contextmanager
def explained_out_of_memory(device: Device, batches: list, number: int):
    """Turn 'out of memory' at update `number` into a RunError that says what was tried and what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not device.is_out_of_memory(e):
            raise
        shapes = ", ".join(f"{b.source.shape[0]} x {b.source.shape[1]}" for b in batches)
        raise RunError(
            f"out of memory at update {number}: batch of {shapes} tokens, peak {device.peak_memory() / 2**30:.1f} GiB;"
            " lower --max_tokens (and raise --update_freq), use --amp;"
            f" the device said: {' '.join(str(e).split())[:200]}"
        ) from None
