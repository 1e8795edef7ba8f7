"""The figures of a run as TensorBoard curves."""

import threading
from pathlib import Path

from config import reading


class TensorBoard:
    """The rows of train.jsonl as TensorBoard curves over updates, under fairseq's names.

    `{logdir}/train_inner` holds the rows of log intervals, `{logdir}/valid` those of validations,
    as fairseq's two folders of that name do; its third, `train`, holds means over an epoch, which
    no row has. A null makes no point, nor does the row of a skipped update. What differs:

        wpb, bsz    ntokens and nsentences once more, as there
        ema_decay   there times 1000
        lr          the one that was used; there that of the next update
        wps         tokens a second; there wps, wpb and ntokens count masked tokens alone
        best_loss   the row's valid_best_loss
    """

    ALSO = dict(ntokens="wpb", nsentences="bsz")

    def __init__(self, logdir: str):
        """Raises InputError if tensorboard is missing or the folder cannot be written."""
        with reading("--tensorboard_logdir needs the tensorboard package: pip install tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self.logdir = Path(logdir)
        self.make = SummaryWriter
        self.writers = {}
        with reading(f"--tensorboard_logdir {logdir}"):
            for name in ("train_inner", "valid"):  # fails now if no file can be written there
                (self.logdir / name).mkdir(parents=True, exist_ok=True)
        print_error = threading.excepthook

        # tensorboard's thread would print the error that `row` raises
        def print_others(args):
            if not type(args.thread).__module__.startswith("tensorboard"):
                print_error(args)

        threading.excepthook = print_others

    def open(self, num_updates: int):
        """Continue after an update: what an earlier run wrote beyond it is no longer shown."""
        for name in ("train_inner", "valid"):
            self.writers[name] = self.make(str(self.logdir / name), purge_step=num_updates + 1)

    def row(self, row: dict):
        """Raises OSError if it cannot be written."""
        if not {"loss", "valid_loss"} & set(row):
            return
        # fairseq's folder says what a figure is of, so its name need not
        writer = self.writers["valid" if "valid_loss" in row else "train_inner"]
        curves = {name.removeprefix("valid_"): value for name, value in row.items()}
        update = curves.pop("num_updates")
        curves |= {self.ALSO[name]: curves[name] for name in self.ALSO if name in curves}
        for name, value in curves.items():
            if value is not None:
                writer.add_scalar(name, value, update)
        writer.flush()

    def close(self):
        """Raises OSError if the last points cannot be written."""
        for writer in self.writers.values():
            writer.close()
