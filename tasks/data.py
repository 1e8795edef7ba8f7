"""Which labelled text a fine-tuning reads: the files or folders that its settings name.

`cfg` is finetune.py's FinetuneConfig.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from config import InputError
from tasks import labelled
from tasks.labelled import Split
from tasks.tables import GLUE, Columns, are_scores, read_tables

import numpy as np

MANY_CLASSES = 10  # of more, if all are numbers, it is said that they may be scores
MOST_CLASSES = 1000  # the measures hold an example times a class in memory


@dataclass
class Data:
    """The splits as examples."""

    train: Split
    valid: dict[str, Split]  # the split `valid` decides, others are scored beside it
    test: Split | None
    names: list[str] | None  # of the classes; None for a regression
    texts: int  # 1, or 2 for pairs
    header: list[str] | None = None  # what the table's first row calls the text columns

    @property
    def outputs(self) -> int:
        return len(self.names) if self.names else 1


def read_data(cfg, longest: int, dictionary, tokenize) -> Data:
    """The labelled text as examples of at most `longest` tokens. Raises InputError."""
    folder = Path(cfg.data_path)
    if cfg.data_path and labelled.is_binarized(folder):
        # labels and tokens are numbers already
        splits, names = read_folders(folder, dictionary, longest)
        texts = 1 + (folder / "input1").is_dir()
        header = None
    elif cfg.data_path and cfg.task == "none":
        raise InputError(f"{folder}: no folder input0 in it; GLUE's files need --task, as rte")
    else:
        # the training split decides which classes there are
        tables = read_tables(files_of(cfg), cfg.regression)
        texts = len(tables["train"].texts)
        names = None if cfg.regression else labelled.label_names(tables["train"].labels)
        splits = {}
        for split, table in tables.items():
            if names:
                labels = labelled.class_numbers(table, names)
            else:
                labels = labelled.scores(table, cfg.label_scale)
            splits[split] = labelled.encode(tokenize, table.texts, labels, longest)
        header = tables["train"].header
    check_labels(cfg, names, splits["train"])
    tell_cuts(splits, longest, cfg.fairseq_exact)
    train = splits.pop("train")
    test = splits.pop("test", None)
    return Data(train, splits, test, names, texts, header)


def read_folders(folder: Path, dictionary, longest: int) -> tuple[dict, list[str] | None]:
    """The splits of fairseq's binarized folders, and the names of the classes."""
    splits = {}
    for split in ("train", "valid", "valid1", "test"):
        label = folder / "label" / split
        is_there = any(label.with_suffix(end).is_file() for end in (".idx", ".label"))
        if is_there or split in ("train", "valid"):
            splits[split], names = labelled.read_binarized(folder, split, dictionary, longest)
    return splits, names


def files_of(cfg) -> dict[str, tuple]:
    """(path, Columns) of each split of a GLUE task, or of --train, --valid and --test."""
    if cfg.task == "none":
        columns = own_columns(cfg, cfg.label)
        paths = dict(train=cfg.train, valid=cfg.valid, test=cfg.test)
        return {split: (path, columns) for split, path in paths.items() if path}
    columns, dev = GLUE[cfg.task], GLUE["mnli_dev"]
    files = dict(train=("train", columns), valid=("dev", columns))
    if cfg.task == "mnli":
        files |= dict(valid=("dev_matched", dev), valid_mismatched=("dev_mismatched", dev))
    folder = Path(cfg.data_path)
    return {split: (folder / f"{name}.tsv", columns) for split, (name, columns) in files.items()}


def own_columns(cfg, label: str | None = None) -> Columns:
    """The columns that --text names, and a label's. Raises InputError."""
    text = tuple(name.strip() for name in cfg.text.split(","))
    if not all(text) or len(text) > 2:
        raise InputError(f"--text {cfg.text}: one column, or two joined by a comma")
    return Columns(text, label, {"auto": None, "true": True, "false": False}[cfg.header])


def check_labels(cfg, names: list[str] | None, train: Split):
    """Raise InputError for labels from which nothing can be learned."""
    if not names:
        return
    where = cfg.train or cfg.data_path
    if cfg.regression:
        raise InputError(f"--regression: {where} has classes, and no label/train.label")
    if len(names) > MOST_CLASSES:
        counts = f"{len(names):,} different labels, of at most {MOST_CLASSES:,}"
        raise InputError(f"{where}: {counts}; is --label right? Scores need --regression")
    if len(names) > MANY_CLASSES and are_scores(names):
        few = ", ".join(names[:5])
        print(f"note: {len(names):,} classes are numbers ({few}, ...): scores need --regression")
    if len(names) == len(train.labels) > MANY_CLASSES:
        raise InputError(
            f"{where}: every row has another label; is --label right? Scores need --regression"
        )
    # a binarized folder may name classes that no row has
    if len(np.unique(train.labels)) < 2:
        raise InputError(f"{where}: all training labels are {names[train.labels[0]]!r}")


def tell_cuts(splits: dict[str, Split], longest: int, is_exact: bool):
    """Print how many examples were cut, which fairseq would not do. Raises InputError."""
    for name, split in splits.items():
        text = f"examples of {name} are longer than {longest} tokens"
        if split.cut and is_exact:
            raise InputError(f"--fairseq_exact: {split.cut} {text}")
        if split.cut:
            cut = f"{split.cut:,} of {len(split.rows):,}"
            print(f"warning: {cut} {text}, and cut there", file=sys.stderr)
