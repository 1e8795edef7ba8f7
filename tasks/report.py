"""Several fine-tunings of one command: which one is the best, their mean and spread, results.json."""

import json
import os
import re
import shutil
import statistics
from pathlib import Path

from config import InputError, printable
from run import checkpoint

import numpy as np

SMALL, SMALL_LR = 256, 1e-4  # up to this width, learning rates below this train next to nothing
BAG = "a bag of the tokens, without an encoder"
OWN = re.compile(
    r"(untrained_)?(probe|lr_[\d.e+-]+)_seed_\d+"
)  # the folder of one of several fine-tunings


def prepare(folder: Path, ckpt: str, overwrite: bool) -> list[Path]:
    """Make --save_dir. Returns what an older fine-tuning left there, which goes once all inputs are known to be good.
    Raises InputError if --overwrite does not allow that, or if something else would be lost."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = any((folder / name).exists() for name in ("train.jsonl", "train.idx"))
    if taken or Path(ckpt).resolve().parent == folder.resolve():
        raise InputError(
            f"--save_dir {folder} holds the run to start from, or a dataset; choose another folder"
        )
    held = [folder / name for name in ("finetune.jsonl", "results.json", "checkpoint_best.pt")]
    held = [path for path in held if path.exists()] + [
        path.parent for path in folder.glob("*/finetune.jsonl") if OWN.fullmatch(path.parent.name)
    ]
    if held and not overwrite:
        raise InputError(
            f"--save_dir {folder} holds {held[0].name}; add --overwrite, or choose another folder"
        )
    return held


def remove(paths: list[Path]):
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def groups_of(results: list) -> dict:
    """The runs that differ in their seed alone: {(untrained, lr): runs}."""
    groups = {}
    for result in results:
        groups.setdefault((result["untrained"], result["lr"]), []).append(result)
    return groups


def best_of(runs: list, metric: str) -> dict:
    return max(runs, key=lambda result: result["valid"][metric])


def keep_best(results: list, metric: str):
    """Remove the checkpoints that cannot be the best any more: one for each lr stays."""
    for runs in groups_of(results).values():
        for result in runs:
            if result is not best_of(runs, metric) or result["untrained"] and len(results) > 1:
                Path(result["checkpoint"]).unlink(missing_ok=True)


def summary(runs: list, split: str, metric: str) -> str:
    values = [result[split][metric] for result in runs]
    shown = f"{split} {metric} {statistics.fmean(values):.4f}"
    if len(values) > 1:
        shown += f" +- {statistics.stdev(values):.4f} (sd of {len(values)} seeds: {' '.join(f'{v:.4f}' for v in values)})"
    return shown


def say(runs: list, metric: str, label: str):
    """Print a line for runs that differ in their seed alone."""
    splits = [name for name, value in runs[0].items() if isinstance(value, dict)]
    print(f"{label}: " + ", ".join(summary(runs, split, metric) for split in splits))


def finish(results: list, counted: dict, metric: str, folder: Path):
    """Print a line for each group and for the bag of tokens, move the best checkpoint to `folder`, and write
    results.json. The best learning rate is the one with the best mean on valid; of its seeds the best on valid."""
    groups = groups_of(results)
    for runs in groups.values():
        say(runs, metric, runs[0]["name"].rpartition(" seed")[0])
    say([counted], metric, BAG)
    trained = {lr: runs for (untrained, lr), runs in groups.items() if not untrained}
    lr = max(
        trained, key=lambda lr: statistics.fmean(result["valid"][metric] for result in trained[lr])
    )
    best, final = best_of(trained[lr], metric), folder / "checkpoint_best.pt"
    os.replace(best["checkpoint"], final)
    for result in results:
        if result["checkpoint"] != str(final):
            Path(result["checkpoint"]).unlink(missing_ok=True)
    rows = [{k: v for k, v in result.items() if k != "checkpoint"} for result in results]
    checkpoint.write_text(
        folder / "results.json",
        json.dumps(dict(metric=metric, best=best["name"], runs=rows, bag=counted), indent=1),
    )
    print(printable(f"best on valid: {best['name']} | {final}"))


def describe(source, data, metric: str, lrs: tuple):
    """Print what is about to be done. source: a Pretrained; data: a finetune_data.Data; lrs: (0,) for --freeze."""
    width = source.shape.embed_dim
    if width <= SMALL and 0 < max(lrs) < SMALL_LR:
        print(
            f"note: width {width} needs a higher --lr, and --pool mean --embed_rms 0.02 helps it (docs/finetune.md)"
        )
    sizes = [f"{len(data.train.rows):,} train"] + [
        f"{len(split.rows):,} {name}" for name, split in data.valid.items()
    ]
    print(printable(f"{source.path} | {', '.join(sizes)} | best by {metric} on valid"))
    if data.names:
        common = np.bincount(data.train.labels, minlength=data.outputs).argmax()
        share = np.mean(data.valid["valid"].labels == common)
        shown = ", ".join(data.names[:20]) + ", ..." * (data.outputs > 20)
        print(
            printable(
                f"{data.outputs} classes: {shown} | accuracy of always {data.names[common]!r}: {share:.4f}"
            )
        )
