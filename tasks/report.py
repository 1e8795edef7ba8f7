"""The fine-tunings of one command: their folders, mean and spread, the best, results.json."""

import contextlib
import itertools
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

from config import InputError, printable
from run import checkpoint
from tasks.labelled import shown
from tasks.table import best_runs
from text.tokens import TEXT_FILES

import numpy as np

BEST = "checkpoint_best.pt"
SMALL, SMALL_LR = 256, 1e-4  # up to this width, learning rates below this train next to nothing


@dataclass(frozen=True)
class Job:
    """One of the fine-tunings of a command."""

    lr: float
    seed: int
    untrained: bool  # from random weights, for comparison
    is_probe: bool = False  # on frozen features; lr is 0 then

    @property
    def group(self) -> str:
        """What it shares with those that differ in their seed alone."""
        kind = "probe" if self.is_probe else f"lr {self.lr:g}"
        return f"untrained {kind}" if self.untrained else kind

    @property
    def name(self) -> str:
        return f"{self.group} seed {self.seed}"


def jobs_of(cfg) -> list[Job]:
    """All fine-tunings that the settings ask for."""
    jobs = []
    for untrained in (False, True) if cfg.untrained else (False,):
        for lr in (0.0,) if cfg.freeze else cfg.lr:
            # a probe on given features is the same at every seed
            seeds = 1 if cfg.freeze and not untrained else cfg.seeds
            jobs += [Job(lr, cfg.seed + i, untrained, cfg.freeze) for i in range(seeds)]
    return jobs


def older_results(folder: Path, ckpt: str, overwrite: bool) -> list[Path]:
    """What an older fine-tuning left in --save_dir, if --overwrite says that it may go.

    Raises InputError otherwise, and if something else would be lost.
    """
    names = ("finetune.jsonl", "results.json", BEST)
    older = [folder / name for name in names if (folder / name).exists()]
    # of several each has its folder; one with a dict.txt is a fine-tuning of its own
    logs = folder.glob("*_seed_*/finetune.jsonl")
    older += [log.parent for log in logs if not (log.parent / "dict.txt").exists()]
    is_taken = any((folder / name).exists() for name in ("train.jsonl", "train.idx"))
    if is_taken or Path(ckpt).resolve().parent in {path.resolve() for path in (folder, *older)}:
        what = "holds the run to start from, or a dataset"
        raise InputError(f"--save_dir {folder} {what}; choose another folder")
    if older and not overwrite:
        what = f"holds {older[0].name}; add --overwrite"
        raise InputError(f"--save_dir {folder} {what}, or choose another folder")
    return older


class SaveDir:
    """The folder of a fine-tuning. What an older one left there stays until the first save."""

    def __init__(self, folder: Path, older: list[Path], files: dict[str, bytes]):
        """files: those of the tokenizer. Raises InputError if others are there, and not older."""
        self.folder, self.older, self.files = folder, older, files
        self.is_empty = True  # of what this fine-tuning saves
        for name in TEXT_FILES:
            path = folder / name
            is_same = path.is_file() and path.read_bytes() == files.get(name)
            if os.path.lexists(path) and not is_same and not older:
                raise InputError(f"--save_dir {folder} holds another {name}; choose another folder")

    def save(self, content: dict, path: Path):
        """Write a checkpoint; with the first one, put the tokenizer's files into the folder."""
        if not self.is_empty:
            checkpoint.save(content, path)
            return
        # each is written in full before any of them takes its place
        with contextlib.ExitStack() as stack:
            for name, data in self.files.items():
                stack.enter_context(checkpoint.whole(self.folder / name)).write_bytes(data)
            checkpoint.save(content, path)
        self.is_empty = False
        # an older tokenizer's, such as a BPE's two where this one knows words
        for name in set(TEXT_FILES) - set(self.files):
            (self.folder / name).unlink(missing_ok=True)
        for old in set(self.older) - {path, path.parent}:
            if not old.is_dir():
                old.unlink()
                continue
            for name in ("finetune.jsonl", "finetune.new.jsonl", BEST):
                (old / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what else is there is someone's
                old.rmdir()


def keep_best(group: list, metric: str):
    """Of fine-tunings that differ in their seed alone, remove all checkpoints but the best.

    The mean of the seeds decides on a learning rate, and is known at the end: one for each stays.
    """
    best = max(group, key=lambda result: result.best["valid"][metric])
    for result in group:
        if result is not best:
            result.path.unlink(missing_ok=True)


def say_figures(figures: list[dict], metric: str, label: str):
    """Print a line for the figures of fine-tunings that differ in their seed alone."""
    parts = []
    for split in [name for name, value in figures[0].items() if isinstance(value, dict)]:
        values = [entry[split][metric] for entry in figures]
        parts.append(f"{split} {metric} {statistics.fmean(values):.4f}")
        if len(values) > 1:
            each = " ".join(f"{value:.4f}" for value in values)
            spread = f"{statistics.stdev(values):.4f} (sd of {len(values)} seeds: {each})"
            parts[-1] += f" +- {spread}"
    print(f"{label}: {', '.join(parts)}")


def say_bag(bag: dict | None, metric: str):
    """Print what a bag of the tokens reaches, if that was measured."""
    if bag:
        say_figures([bag], metric, "a bag of the tokens, without an encoder")


def finish(results: list, bag: dict | None, metric: str, folder: Path):
    """Move the best checkpoint to `folder`, write results.json, and print a line for each group.

    results: finetune.Outlet of each fine-tuning, the seeds of a group in a row.
    """
    # all figures, not only the best one's
    rows = []
    for result in results:
        job = result.job
        place = dict(lr=job.lr, seed=job.seed, untrained=job.untrained)
        rows.append(dict(name=job.name, **place, **result.best))
    # of the best learning rate the best seed; one from random weights is there to be compared
    seeds = best_runs([row for row in rows if not row["untrained"]], metric)
    best = max(seeds.values(), key=lambda row: row["valid"][metric])["name"]
    final = folder / BEST
    for result in results:
        if result.job.name == best:
            os.replace(result.path, final)
        else:
            result.path.unlink(missing_ok=True)
    content = dict(metric=metric, best=best, runs=rows, bag=bag)
    checkpoint.write_text(folder / "results.json", json.dumps(content, indent=1))
    # last, so that a terminal that is gone loses none of it
    for name, group in itertools.groupby(results, lambda result: result.job.group):
        say_figures([result.best for result in group], metric, name)
    say_bag(bag, metric)
    print(printable(f"best on valid: {best} | {final}"))


def describe(source, data, metric: str, lr: float):
    """Print what is about to be done. source: a Pretrained; data: a Data; lr: the highest."""
    width = source.shape.embed_dim
    if width <= SMALL and 0 < lr < SMALL_LR:
        tip = "and --pool mean --embed_rms 0.02 helps it (docs/finetune.md)"
        print(f"note: width {width} needs a higher --lr, {tip}")
    sizes = [f"{len(split.rows):,} {name}" for name, split in data.valid.items()]
    sizes = ", ".join([f"{len(data.train.rows):,} train", *sizes])
    print(printable(f"{source.path} | {sizes} | best by {metric} on valid"))
    long = int((data.train.lengths > source.longest).sum())
    if long and source.longest:
        what = f"{long:,} examples of train are longer than the {source.longest} tokens of"
        print(f"note: {what} pretraining's blocks, and the positions beyond are untrained")
    if not data.names:
        return
    # what a model reaches that has learned nothing
    common = np.bincount(data.train.labels, minlength=data.outputs).argmax()
    share = np.mean(data.valid["valid"].labels == common)
    always = f"accuracy of always {data.names[common]!r}: {share:.4f}"
    print(printable(f"{data.outputs} classes: {shown(data.names)} | {always}"))
