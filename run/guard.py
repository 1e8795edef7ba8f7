"""What ends a run early, and how: signals, hours, memory, numbers that went wrong."""

import contextlib
import math
import os
import signal
import time

from config import GuardConfig, InputError, ModelConfig, RunError, is_out_of_memory
from hardware.device import LOWEST_LOSS_SCALE, Device

ALIKE = 0.9  # always guessing the mean target has a higher cosine: half a collapse
HALF_COLLAPSE = 3  # the variance of the targets fell to a third: a warning
ECHO = 1.0  # seconds in which the same signal again is the same one
UNHEALTHY_INTERVALS = 10  # log intervals in a row with a collapsed variance: the run stops


class Signals:
    """While in use: SIGTERM, SIGINT and SIGHUP (of a terminal that closes) ask the run to stop
    after the current update, a second one ends it at once; SIGUSR1 asks for a checkpoint.

    A SIGHUP that was ignored at the start, as under nohup, stays so.
    """

    def __init__(self, device: Device):
        self.device = device
        self.stop = 0  # the signal's number, or 0
        self.save = 0
        self.stopped_at = 0.0

    def __enter__(self):
        # restored at the end, for whoever calls train() from a program of their own
        handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), self._stop)
        handlers[signal.SIGUSR1] = self._save
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            del handlers[signal.SIGHUP]
        self.before = {number: signal.signal(number, to) for number, to in handlers.items()}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, late: bool = False) -> tuple[int, int, int]:
        """(the number of a signal to stop or 0, whether to save now, whether `late` is true
        anywhere), the same on all workers."""
        stop, save, late = self.device.agree([self.stop, self.save, int(late)])
        self.save = 0
        return stop, save, late

    def _stop(self, number, _):
        # one signal may arrive twice: from a scheduler or a terminal, and from torchrun or
        # run_1p.sh, which pass it on; a person who presses Ctrl-C twice means it
        is_passed_on = number != signal.SIGINT or self.device.world_size > 1
        is_recent = time.monotonic() < self.stopped_at + ECHO
        if self.stop == number and is_passed_on and is_recent:
            return
        if self.stop:
            os._exit(128 + number)
        self.stop = number
        self.stopped_at = time.monotonic()
        name = signal.Signals(number).name
        text = f"\n{name}: finishing this update, then saving; again: exit at once\n"
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())  # not print: a signal may arrive in the middle of one

    def _save(self, *_):
        self.save = 1


class Clock:
    """The wall-clock hours of a run, over all its starts.

    Workers take the largest of their clocks, so that they stop after the same update.
    """

    def __init__(self, device: Device, max_hours: float):
        self.device, self.max_hours = device, max_hours
        self.restore(0.0)

    def restore(self, hours: float):
        """Continue after what earlier starts have used."""
        self.hours = hours
        self.began = time.monotonic() - 3600 * hours

    def now(self) -> float:
        """Hours used, by this worker's clock."""
        return (time.monotonic() - self.began) / 3600

    def look(self):
        """Bring `hours` up to now, once an update."""
        self.hours = self.now()
        if self.max_hours:  # workers agree on integers
            milliseconds = self.device.agree([int(3.6e6 * self.hours)])[0]
            self.hours = milliseconds / 3.6e6

    @property
    def left(self) -> float:
        """Seconds until --max_hours have passed (inf: there is no such limit)."""
        return 3600 * (self.max_hours - self.hours) if self.max_hours else math.inf


class Unhealthy(Exception):
    """The run must save and stop; the text says why and what to do."""


class Health:
    """Watches figures that have been read anyway. Raises Unhealthy where the run must stop."""

    def __init__(self, cfg: GuardConfig, warmup_updates: int, say):
        """say(text) tells a person."""
        self.cfg, self.warmup_updates, self.say = cfg, warmup_updates, say
        self.skipped_in_row = self.collapsed_in_row = 0
        self.half_collapsed = False

    def check_skipped(self, flags: list):
        """flags: for each new update in order, whether it was skipped."""
        # flags may come late, many at once: each is counted in its order
        for flag in flags:
            self.skipped_in_row = self.skipped_in_row + 1 if flag else 0
            if self.skipped_in_row > self.cfg.max_skipped:
                raise Unhealthy(
                    f"{self.skipped_in_row} updates in a row had a non-finite loss or gradient"
                    f" (--max_skipped {self.cfg.max_skipped}); resume from an older checkpoint with"
                    " a lower --lr, a longer --warmup_updates or a smaller --clip_norm"
                )

    def check_loss_scale(self, scale: float):
        if scale < LOWEST_LOSS_SCALE:
            raise Unhealthy(
                "gradients overflow float16 at any loss scale; lower --lr, or use --amp bf16"
            )

    def check_variance(self, row: dict, first_target_var: float | None):
        """row: a log row; first_target_var: of the first validation.

        Nothing is judged in the warm-up, where predictions may rest at the mean for long.
        """
        if row["num_updates"] <= self.warmup_updates or row["target_var"] is None:
            self.collapsed_in_row = 0
            self.half_collapsed = False
            return
        warning = f"warning: update {row['num_updates']}"
        signs = " and ".join(self.half_collapse(row, first_target_var))
        if signs and not self.half_collapsed:  # said once: the loss falls meanwhile
            self.say(
                f"{warning}: {signs}: the targets are becoming alike, so a low loss proves nothing;"
                " lower --lr, raise --ema_decay, lengthen --ema_anneal_end_step, or try"
                " --teacher_input full"
            )
        self.half_collapsed = bool(signs)

        wrong = " and ".join(self.collapsed(row))
        self.collapsed_in_row = self.collapsed_in_row + 1 if wrong else 0
        if self.collapsed_in_row >= UNHEALTHY_INTERVALS:
            raise Unhealthy(
                f"collapse: {wrong} for {UNHEALTHY_INTERVALS} log intervals; lower --lr, warm up"
                " longer, raise --ema_decay, or switch the guard off with 0"
            )
        if wrong:
            self.say(f"{warning}: {wrong}: the representation may be collapsing")

    def collapsed(self, row: dict) -> list:
        """Which variances are under their limits, in words."""
        limits = {"target_var": self.cfg.min_target_var, "pred_var": self.cfg.min_pred_var}
        return [
            f"{name} {row[name]:.3g} is under --min_{name} {least:g}"
            for name, least in limits.items()
            if row[name] < least
        ]

    def half_collapse(self, row: dict, first_target_var: float | None) -> list:
        """The signs that targets become alike, long before their variance is near 0, in words."""
        signs = []
        now, constant = row["target_var"], row["cosine_constant"]
        if first_target_var and now < first_target_var / HALF_COLLAPSE:
            signs.append(f"target_var {now:.3g} was {first_target_var:.3g} at the first validation")
        if constant > ALIKE:
            signs.append(f"always predicting the mean target has a cosine of {constant:.3f}")
        return signs


def check_memory(cfg: ModelConfig, vocabulary_size: int, device: Device, copies: int = 2):
    """Raise InputError if so many float32 copies of the weights do not fit the device's memory:
    student and teacher, and to train them also gradients and Adam's two moments."""
    # the matrices, and the tables of words and positions
    C, F = cfg.embed_dim, cfg.ffn_embed_dim
    weights = (vocabulary_size + cfg.max_source_positions) * C
    weights += cfg.layers * (4 * C * C + 2 * C * F)
    weights += 4 * C * C * (cfg.head_layers - 1)  # and few more
    if cfg.objective == "data2vec2":  # convolutions, too
        D = cfg.decoder_dim
        weights += cfg.decoder_layers * cfg.decoder_kernel * D * D // cfg.decoder_groups
    needed = weights * 4 * copies
    memory = device.memory()
    if needed > memory:
        raise InputError(
            f"too large for this {device.type}: {weights:,} weights need"
            f" {needed / 2**30:,.1f} GiB, its memory is {memory / 2**30:,.1f} GiB; lower --layers,"
            " --embed_dim or --ffn_embed_dim, or use a smaller vocabulary"
        )


@contextlib.contextmanager
def explained_out_of_memory(device: Device, batches: list, number: int):
    """Turn 'out of memory' at update `number` into a RunError that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        # the shape says more than the device's message, which names one allocation
        shapes = ", ".join(f"{b.source.shape[0]} x {b.source.shape[1]}" for b in batches)
        raise RunError(
            f"out of memory at update {number}: batch of {shapes} tokens, peak"
            f" {device.peak_memory() / 2**30:.1f} GiB; lower --max_tokens (and raise"
            f" --update_freq), use --amp; the device said: {' '.join(str(e).split())[:200]}"
        ) from None
