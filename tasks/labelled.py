"""Labelled text as examples, from tables and from fairseq's folders.

An example is one row of tokens: `<s> a </s>`, and for a pair of texts `<s> a </s> </s> b </s>`,
without segment embeddings. Formats and examples are those of fairseq's task sentence_prediction at
commit 3f6ba43f.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from config import InputError, read_text
from tasks.tables import Table, are_scores, score_of
from text.binarized import BOS, EOS, SPECIAL, UNK, Dictionary, TokenFile
from text.tokens import warn_of_unknown

import numpy as np


@dataclass
class Split:
    """The examples of one split."""

    rows: list[np.ndarray]  # tokens, int64
    labels: np.ndarray | None  # class numbers int64, or scores float32
    cut: int = 0  # how many rows were longer than the position table

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], np.int64)


# ------------------------------------------------------------------------------------------ labels


def label_names(labels: list[str]) -> list[str]:
    """The classes in the order of their numbers: by frequency in training, then by alphabet."""
    counts = Counter(labels)
    return sorted(counts, key=lambda name: (-counts[name], name))


def class_numbers(table: Table, names: list[str]) -> np.ndarray:
    """The class of each row, int64. Raises InputError for a label that training does not have."""
    numbers = {name: i for i, name in enumerate(names)}
    # a new class in valid or test could never be right
    for line, label in zip(table.lines, table.labels):
        if label not in numbers:
            known = ", ".join(name[:80] for name in names[:10])
            where = f"{table.path}, line {line}: label {label[:80]!r}"
            text = f"{where} does not occur in training, which has {known}"
            if score_of(label) in map(score_of, names) and score_of(label) is not None:
                text += "; it is an equal number, so write both alike"
            elif are_scores([label, *names]):
                text += "; --regression predicts numbers"
            raise InputError(text)
    return np.array([numbers[label] for label in table.labels], np.int64)


def scores(table: Table, scale: float = 1.0) -> np.ndarray:
    """The score of each row divided by `scale`, float32. Raises InputError for one that is none."""
    values = []
    for line, label in zip(table.lines, table.labels):
        score = score_of(label)
        where = f"{table.path}, line {line}: {label[:80]!r}"
        if score is None:
            raise InputError(f"{where} is no number (--regression)")
        with np.errstate(all="ignore"):
            values.append(np.float32(score) / np.float32(scale))
        if not np.isfinite(values[-1]):
            raise InputError(f"{where} / {scale:g} is too large for float32")
    return np.array(values, np.float32)


# ---------------------------------------------------------------------------------------- examples


def join(parts: list[np.ndarray], longest: int) -> tuple[np.ndarray, bool]:
    """Texts as tokens that end in EOS -> (the example, whether it had to be cut to `longest`).

    Of a pair the longer text is cut first, until both are equally long.
    """
    room = longest - len(parts)  # without <s>, and the </s> before a second text
    sizes = [len(part) for part in parts]
    is_cut = sum(sizes) > room
    if is_cut and len(parts) == 1:
        sizes = [room]
    elif is_cut:
        first, second = sizes
        half = room // 2
        if first > half:
            first = max(room - second, room - half)
        sizes = [first, room - first]
    pieces = [[BOS]]
    for part, size in zip(parts, sizes):
        if len(pieces) > 1:
            pieces.append([EOS])
        pieces.append(part)
        if size < len(part):
            pieces[-1:] = [part[: size - 1], [EOS]]
    return np.concatenate(pieces).astype(np.int64), is_cut


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
    examples = [join(list(parts), longest) for parts in zip(*texts)]
    return Split([row for row, _ in examples], labels, sum(is_cut for _, is_cut in examples))


# -------------------------------------------------------------------------------- fairseq's folders


def is_binarized(folder) -> bool:
    return (Path(folder) / "input0").is_dir()


def read_binarized(
    folder, split: str, dictionary: Dictionary, longest: int
) -> tuple[Split, list[str] | None]:
    """A split of the folders input0, input1 (of pairs) and label that fairseq-preprocess wrote.

    Returns also the class names in order, None for scores. Raises InputError.
    """
    folder = Path(folder)
    labels, names = read_binarized_labels(folder / "label", split)
    if not len(labels):
        raise InputError(f"{folder}: {split} has no rows")
    texts = []
    for part in (folder / "input0", folder / "input1"):
        if not part.is_dir():
            continue
        file = TokenFile(part / split)
        tokens = file.items[: file.tokens].astype(np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(dictionary):
            known = f"but dict.txt has {len(dictionary)}"
            raise InputError(f"{part / split}: holds token id {tokens.max()}, {known}")
        if len(file.sizes) != len(labels):
            rows = f"{len(file.sizes)} rows, but there are {len(labels)} labels"
            raise InputError(f"{part / split}: {rows}")
        texts.append(np.split(tokens, np.cumsum(file.sizes)[:-1]))
    return make_split(texts, labels, longest), names


def read_binarized_labels(folder: Path, split: str) -> tuple[np.ndarray, list[str] | None]:
    """(class numbers int64, all class names); with a SPLIT.label (scores float32, None)."""
    path = folder / f"{split}.label"
    if path.is_file():
        values = [line.strip() for line in read_text(path).splitlines()]
        return scores(Table(path, list(range(1, len(values) + 1)), [], values)), None
    dictionary = Dictionary(folder / "dict.txt")
    names = dictionary.symbols[len(SPECIAL) : dictionary.rows]
    # they only fill the dictionary up to a multiple of 8
    while names and names[-1].startswith("madeupword"):
        names.pop()
    file = TokenFile(folder / split)
    if (file.sizes < 1).any():
        raise InputError(f"{folder / split}: row {int(file.sizes.argmin())} is empty, not a label")
    # a row is the label and EOS
    ends = np.cumsum(file.sizes, dtype=np.int64)
    numbers = file.items[ends - file.sizes].astype(np.int64) - len(SPECIAL)
    unknown = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
    if len(unknown):
        where = f"{folder / split}: row {unknown[0]}"
        raise InputError(f"{where} has a label that label/dict.txt does not name")
    return numbers, names
