"""Labelled text as examples, from tables and from fairseq's folders.

An example is one row of tokens: `<s> a </s>`, and for a pair of texts `<s> a </s> </s> b </s>`,
without segment embeddings. Formats and examples are those of fairseq's task sentence_prediction at
commit 3f6ba43f. `cfg` is finetune.py's FinetuneConfig.
"""

import dataclasses
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from config import InputError, printable, read_text
from tasks.tables import GLUE, Columns, Table, are_scores, read_tables, score_of
from text.binarized import BOS, EOS, SPECIAL, UNK, Dictionary, TokenFile
from text.files import note
from text.tokens import warn_of_unknown

import numpy as np

HEADER = {"auto": None, "true": True, "false": False}  # whether there is one; None: find out
MANY_CLASSES = 10  # of more, some must be in several rows, and numbers may be scores
MOST_CLASSES = 1000  # the measures hold an example times a class in memory


@dataclass
class Split:
    """The examples of one split."""

    rows: list[np.ndarray]  # tokens, int64
    labels: np.ndarray | None  # class numbers int64, or scores float32
    cut: int = 0  # how many rows were longer than the position table

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], np.int64)


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
    folder, header = Path(cfg.data_path), None
    if is_binarized(cfg):
        # labels and tokens are numbers; fairseq's script for STS-B has divided its scores, too
        scale = cfg.label_scale if cfg.task == "none" else 1.0
        splits, names = read_folders(folder, dictionary, longest, scale)
        texts = 1 + (folder / "input1").is_dir()
    elif cfg.data_path and cfg.task == "none":
        raise InputError(f"{folder}: no folder input0 in it; GLUE's files need --task, as rte")
    else:
        # the training split decides which classes there are
        tables = read_tables(files_of(cfg), cfg.regression)
        texts, header = len(tables["train"].texts), tables["train"].header
        names = None if cfg.regression else label_names(tables["train"].labels)
        splits = {}
        for split, table in tables.items():
            labels = class_numbers(table, names) if names else scores(table, cfg.label_scale)
            splits[split] = encode(tokenize, table.texts, labels, longest)
    check_labels(cfg, names, splits["train"])
    for split, examples in splits.items():
        tell_cuts(examples, split, longest, cfg.fairseq_exact)
    train, test = splits.pop("train"), splits.pop("test", None)
    return Data(train, splits, test, names, texts, header)


def files_of(cfg) -> dict[str, tuple]:
    """(path, Columns) of each split of a GLUE task, or of --train, --valid and --test."""
    if cfg.task == "none":
        columns = own_columns(cfg, cfg.label)
        paths = dict(train=cfg.train, valid=cfg.valid, test=cfg.test)
        for path, times in Counter(os.path.realpath(path) for path in paths.values()).items():
            if times > 1 and Path(path).is_file():
                note(
                    f"{path} is several of --train, --valid, --test: no figure on it is of new text"
                )
        return {split: (path, columns) for split, path in paths.items() if path}
    columns, dev = GLUE[cfg.task], GLUE["mnli_dev"]
    files = dict(train=("train", columns), valid=("dev", columns))
    if cfg.task == "mnli":
        files |= dict(valid=("dev_matched", dev), valid_mismatched=("dev_mismatched", dev))
    # --header decides for copies of GLUE's files that have or lack it
    told = {} if cfg.header == "auto" else dict(header=HEADER[cfg.header])
    folder = Path(cfg.data_path)
    return {
        split: (folder / f"{name}.tsv", dataclasses.replace(columns, **told))
        for split, (name, columns) in files.items()
    }


def own_columns(cfg, label: str | None = None) -> Columns:
    """The columns that --text names, and a label's. Raises InputError."""
    text = tuple(name.strip() for name in cfg.text.split(","))
    if not all(text) or len(text) > 2:
        raise InputError(f"--text {cfg.text}: one column, or two joined by a comma")
    return Columns(text, label, HEADER[cfg.header])


def tell_cuts(examples: Split, name: str, longest: int, is_exact: bool = False):
    """Print how many examples were cut, which fairseq would not do. Raises InputError."""
    text = f"{examples.cut:,} of {len(examples.rows):,} examples of {name} are longer"
    if examples.cut and is_exact:
        raise InputError(f"--fairseq_exact: {text} than {longest} tokens")
    if examples.cut:
        said = f"warning: {text} than {longest} tokens, and cut there"
        print(printable(said), file=sys.stderr)


# ------------------------------------------------------------------------------------------ labels


def label_names(labels: list[str]) -> list[str]:
    """The classes in the order of their numbers: by frequency in training, then by alphabet."""
    counts = Counter(labels)
    return sorted(counts, key=lambda name: (-counts[name], name))


def shown(names: list) -> str:
    """Names of classes for a message."""
    more = ["..."] if len(names) > 10 else []
    return ", ".join([name[:80] for name in names[:10]] + more) or "none"


def class_numbers(table: Table, names: list[str]) -> np.ndarray:
    """The class of each row, int64. Raises InputError for a label that training does not have."""
    numbers = {name: i for i, name in enumerate(names)}
    # a new class in valid or test could never be right
    for line, label in zip(table.lines, table.labels):
        if label not in numbers:
            where = f"{table.path}, line {line}: label {label[:80]!r}"
            text = f"{where} does not occur in training, which has {shown(names)}"
            score = score_of(label)
            if score is not None and score in map(score_of, names):
                text += "; it is an equal number, so write both alike"
            elif are_scores([label, *names]):
                text += "; scores need --regression"
            raise InputError(text)
    return np.array([numbers[label] for label in table.labels], np.int64)


def scores(table: Table, scale: float = 1.0) -> np.ndarray:
    """The score of each row divided by `scale`, float32. Raises InputError for one that is none."""
    values = np.array([score_of(label) for label in table.labels], np.float64)  # None is NaN
    with np.errstate(all="ignore"):
        values = values.astype(np.float32) / np.float32(scale)
    for i in np.flatnonzero(~np.isfinite(values))[:1]:
        where = f"{table.path}, line {table.lines[i]}: {table.labels[i][:80]!r} / {scale:g}"
        raise InputError(f"{where} is no number that float32 can hold (--regression)")
    return values


def check_labels(cfg, names: list[str] | None, train: Split):
    """Raise InputError for labels from which nothing can be learned."""
    if not names:
        return
    where, rows = cfg.train or cfg.data_path, len(train.labels)
    if cfg.regression:
        raise InputError(f"--regression: {where} has classes, and no label/train.label")
    if len(names) > MOST_CLASSES or len(names) == rows > MANY_CLASSES:
        counts = f"{len(names):,} classes in {rows:,} rows are too many"
        raise InputError(f"{where}: {counts}; is --label right? Scores need --regression")
    if len(names) > MANY_CLASSES and are_scores(names):
        print(f"note: {len(names):,} classes are numbers: scores need --regression")
    # a binarized folder may name classes that no row has
    if len(np.unique(train.labels)) < 2:
        raise InputError(f"{where}: all training labels are {names[train.labels[0]]!r}")


# ---------------------------------------------------------------------------------------- examples


def join(parts: list[np.ndarray], longest: int) -> tuple[np.ndarray, bool]:
    """Texts as tokens that end in EOS -> (the example, whether it had to be cut to `longest`).

    Of a pair the longer text is cut first, until both are equally long.
    """
    room = longest - len(parts)  # without <s>, and the </s> before a second text
    total = sum(map(len, parts))
    second = total - len(parts[0])
    first = min(len(parts[0]), max(room - second, room - room // 2))
    example = [[BOS]]
    for part, size in zip(parts, (first, room - first)):
        if size < len(part):
            part = np.append(part[: size - 1], EOS)
        example += [part, [EOS]]
    return np.concatenate(example[:-1]).astype(np.int64), total > room


def encode(tokenize, texts: list[list[str]], labels: np.ndarray | None, longest: int) -> Split:
    """texts: for each column the text of every row -> the examples.

    A tab or the end of a line within a text is a space: text for pretraining is read line by line,
    so no encoder has seen their tokens.
    """
    columns = []
    for column in texts:
        lines = (re.split("[\t\n\r]+", text) for text in column)
        columns.append(tokenize([" ".join(map(str.strip, parts)) for parts in lines]))
    rows = [row for column in columns for row in column]
    warn_of_unknown(sum(int((row == UNK).sum()) for row in rows), sum(map(len, rows)) - len(rows))
    return make_split(columns, labels, longest)


def make_split(texts: list[list[np.ndarray]], labels: np.ndarray | None, longest: int) -> Split:
    """texts: for each column the tokens of every row, which end in EOS -> the examples."""
    examples = [join(parts, longest) for parts in zip(*texts)]
    return Split([row for row, _ in examples], labels, sum(is_cut for _, is_cut in examples))


# -------------------------------------------------------------------------------- fairseq's folders


def is_binarized(cfg) -> bool:
    """Whether --data_path is such a folder."""
    return bool(cfg.data_path) and (Path(cfg.data_path) / "input0").is_dir()


def read_folders(folder: Path, dictionary, longest: int, scale: float) -> tuple[dict, list | None]:
    """The splits of fairseq's binarized folders, and the names of the classes."""
    splits = {}
    for split in ("train", "valid", "valid1", "test"):
        label = folder / "label" / split
        is_there = any(label.with_suffix(end).is_file() for end in (".idx", ".label"))
        if is_there or split in ("train", "valid"):
            splits[split], names = read_binarized(folder, split, dictionary, longest, scale)
    return splits, names


def read_binarized(
    folder: Path, split: str, dictionary: Dictionary, longest: int, scale: float = 1.0
) -> tuple[Split, list[str] | None]:
    """A split of the folders input0, input1 (of pairs) and label that fairseq-preprocess wrote.

    Returns also the class names in order, None for scores. Raises InputError.
    """
    labels, names = read_binarized_labels(folder / "label", split, scale)
    if not len(labels):
        raise InputError(f"{folder / 'label' / split}: no rows in it")
    texts = []
    for part in (folder / "input0", folder / "input1"):
        if not part.is_dir():
            continue
        rows = read_sentences(part / split)
        if len(rows) != len(labels):
            counts = f"{len(rows)} rows, but there are {len(labels)} labels"
            raise InputError(f"{part / split}: {counts}")
        tokens = np.concatenate(rows)
        for token in tokens[(tokens < 0) | (tokens >= len(dictionary))][:1]:
            known = f"but dict.txt has {len(dictionary)}"
            raise InputError(f"{part / split}: holds token id {token}, {known}")
        texts.append(rows)
    return make_split(texts, labels, longest), names


def read_binarized_labels(folder: Path, split: str, scale: float) -> tuple[np.ndarray, list | None]:
    """(class numbers int64, all class names); with a SPLIT.label (scores / scale float32, None)."""
    path = folder / f"{split}.label"
    if path.is_file():
        values = [line.strip() for line in read_text(path).splitlines()]
        return scores(Table(path, list(range(1, len(values) + 1)), [], values), scale), None
    dictionary = Dictionary(folder / "dict.txt")
    names = dictionary.symbols[len(SPECIAL) : dictionary.rows]
    # they only fill the dictionary up to a multiple of 8
    while names and names[-1].startswith("madeupword"):
        names.pop()
    # a row is the label and EOS; a label of two words would be that of its first
    rows = read_sentences(folder / split)
    tokens = [row[0] if len(row) and (row[1:] == EOS).all() else -1 for row in rows]
    numbers = np.array(tokens, np.int64) - len(SPECIAL)
    for row in np.flatnonzero((numbers < 0) | (numbers >= len(names)))[:1]:
        where = f"{folder / split}: row {row}"
        raise InputError(f"{where} is not one label that label/dict.txt names")
    return numbers, names


def read_sentences(prefix: Path) -> list[np.ndarray]:
    """The tokens of each row of a binarized file, int64. Raises InputError."""
    file = TokenFile(prefix)
    tokens = file.items[: file.tokens].astype(np.int64)
    return np.split(tokens, np.cumsum(file.sizes))[:-1]
