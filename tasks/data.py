"""Which labelled text a fine-tuning reads: the files or folders that its settings name, as examples of tokens.

`cfg` is finetune.py's FinetuneConfig.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from config import InputError
from tasks import labelled
from tasks.labelled import GLUE, Columns, Split

MOST_CLASSES = 1000  # the measures hold an example times a class in memory


@dataclass
class Data:
    """The splits as examples. valid: the first split decides; names: of the classes, None for a regression."""

    train: Split
    valid: dict[str, Split]
    test: Split | None
    names: list[str] | None
    texts: int  # 1, or 2 for pairs

    @property
    def outputs(self) -> int:
        return len(self.names) if self.names else 1


def read_data(cfg, longest: int, dictionary, tokenize) -> Data:
    """Raises InputError for whatever cannot be used."""
    folder = Path(cfg.data_path)
    if cfg.data_path and labelled.is_binarized(folder):
        labels = folder / "label"
        others = [
            s
            for s in ("valid1", "test")
            if (labels / f"{s}.idx").is_file() or (labels / f"{s}.label").is_file()
        ]
        splits = ["train", "valid", *others]
        read = {
            split: labelled.read_binarized(folder, split, dictionary, longest) for split in splits
        }
        names, texts = read["train"][1], 1 + (folder / "input1").is_dir()
        found = {split: examples for split, (examples, _) in read.items()}
    elif cfg.data_path and cfg.task == "none":
        raise InputError(
            f"{folder}: no folder input0 in it; for GLUE's files name the task, as --task rte"
        )
    else:
        tables = read_tables(cfg)
        texts, names = len(tables["train"].texts), None
        if not cfg.regression:
            names = labelled.label_names(tables["train"].labels)
        found = {}
        for split, table in tables.items():
            labels = (
                labelled.class_numbers(table, names)
                if names
                else labelled.scores(table, cfg.label_scale)
            )
            found[split] = labelled.make_split(
                [token_rows(tokenize, column, longest) for column in table.texts], labels, longest
            )
    if names and len(names) > MOST_CLASSES:
        raise InputError(
            f"{cfg.train or folder}: {len(names):,} different labels, of at most {MOST_CLASSES:,}; is --label the right"
            " column? Scores need --regression"
        )
    if cfg.regression and names:
        raise InputError(
            f"--regression: {cfg.data_path} has classes in label/dict.txt, and no label/train.label"
        )
    if names and cfg.num_classes:  # as fairseq, whose head may have more than occur
        if cfg.num_classes <= max(examples.labels.max() for examples in found.values()):
            raise InputError(
                f"--num_classes {cfg.num_classes}: the labels are {', '.join(names[:20])}"
            )
        names = [*names, *(f"unused{i}" for i in range(len(names), cfg.num_classes))][
            : cfg.num_classes
        ]
    if names and len(names) < 2:
        raise InputError(f"all training labels are {names[0]!r}; there is nothing to learn")
    for split, examples in found.items():
        if examples.cut and cfg.fairseq_exact:
            raise InputError(
                f"--fairseq_exact: {examples.cut} examples of {split} are longer than {longest} tokens"
            )
        if examples.cut:
            text = f"{examples.cut:,} of {len(examples.rows):,} examples of {split} are longer than {longest} tokens"
            print(f"warning: {text}, and cut there", file=sys.stderr)
    train, test = found.pop("train"), found.pop("test", None)
    return Data(train, found, test, names, texts)


def read_tables(cfg) -> dict[str, labelled.Table]:
    """The files of a GLUE task, or those of --train, --valid and --test, by split."""
    if cfg.task != "none":
        folder, columns = Path(cfg.data_path), GLUE[cfg.task]
        paths = {"train": folder / "train.tsv", "valid": folder / "dev.tsv"}
        if cfg.task == "mnli":
            paths = {"train": folder / "train.tsv", "valid": folder / "dev_matched.tsv"}
            paths["valid_mismatched"] = folder / "dev_mismatched.tsv"
    else:
        header = {"auto": None, "true": True, "false": False}[cfg.header]
        columns = Columns(columns_of(cfg.text), cfg.label, header)
        paths = {
            split: getattr(cfg, split)
            for split in ("train", "valid", "test")
            if getattr(cfg, split)
        }
    tables = {}
    for split, path in paths.items():
        place = GLUE["mnli_dev"] if cfg.task == "mnli" and split != "train" else columns
        tables[split] = labelled.read_table(path, place, cfg.regression)
        if split == "train":  # the other files have a header if this one has
            columns = dataclasses.replace(columns, header=tables["train"].header)
        if tables[split].left_out:
            print(
                f"note: {path}: {tables[split].left_out:,} rows without {place.fields} fields left out"
            )
    return tables


def token_rows(tokenize, texts: list[str], longest: int) -> list:
    """The tokens of each text; of an endless one only what an example of `longest` tokens can show."""
    return tokenize([tokenize.head(text, longest) for text in texts])


def columns_of(text: str) -> tuple:
    columns = tuple(name.strip() for name in text.split(","))
    if not all(columns) or len(columns) > 2:
        raise InputError(f"--text {text}: one column, or two joined by a comma")
    return columns
