"""The figures of a run as TensorBoard curves."""

import os
import threading
from pathlib import Path

from config import InputError


class TensorBoard:
    """The rows of train.jsonl as TensorBoard curves over updates, under the names that fairseq
    gives them.

    `{logdir}/train_inner` holds the rows of log intervals and `{logdir}/valid` those of
    validations, as fairseq's two folders of that name do; its third, `train`, holds means over an
    epoch, which no row has. By fairseq's name:

        train_inner  loss, sample_size, ntokens, nsentences, gnorm, lr, loss_scale, ups, wall   as in the row
                     ema_decay               as in the row; there times 1000, here not
                     wpb, bsz                ntokens and nsentences once more, as there
                     wps                     tokens/s; there wps, wpb and ntokens count masked tokens alone
                     fps, tflops, mfu, hours, target_var, pred_var, epoch    no counterpart there
        valid        loss, best_loss         the row's valid_loss, valid_best_loss
                     target_var, pred_var, cosine, cosine_constant, epoch    no counterpart there

    fairseq's clip, train_wall and gb_free have none here. Its lr is the next update's; ours is the
    one that was used. A null makes no point, nor does the row of a skipped update.
    """

    ALSO = dict(ntokens="wpb", nsentences="bsz")

    def __init__(self, logdir: str):
        """Raises InputError if the tensorboard package is missing or the folder cannot be written."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "--tensorboard_logdir needs the tensorboard package: pip install tensorboard"
            ) from None
        self._writer, self._writers, self.logdir = SummaryWriter, {}, Path(logdir)
        threading.excepthook = _without_tensorboards(threading.excepthook)
        try:
            self.logdir.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"--tensorboard_logdir {logdir}: {e.strerror}") from None
        if not os.access(self.logdir, os.W_OK):
            raise InputError(f"--tensorboard_logdir {logdir}: not writable")

    def open(self, num_updates: int):
        """Continue after update num_updates: what an earlier run wrote beyond it is no longer
        shown."""
        for name in ("train_inner", "valid"):
            self._writers[name] = self._writer(str(self.logdir / name), purge_step=num_updates + 1)

    def row(self, row: dict):
        """Raises OSError if it cannot be written."""
        name, prefix = ("valid", "valid_") if "valid_loss" in row else ("train_inner", "")
        if f"{prefix}loss" not in row:
            return
        for key, value in row.items():
            if value is not None and key != "num_updates":
                for tag in (key.removeprefix(prefix), self.ALSO.get(key)):
                    if tag:
                        self._writers[name].add_scalar(tag, value, row["num_updates"])
        self._writers[name].flush()

    def close(self):
        """Raises OSError if the last points cannot be written."""
        for writer in self._writers.values():
            writer.close()


def _without_tensorboards(hook):
    """The hook for errors in threads, but silent for tensorboard's: `row` raises the same error."""

    def quieter(args):
        if not type(args.thread).__module__.startswith("tensorboard"):
            hook(args)

    return quieter
