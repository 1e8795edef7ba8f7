"""Labelled text: GLUE's files, your own .tsv, .csv and .jsonl, and fairseq's binarized folders; examples and batches.

An example is one row of tokens: `<s> a </s>`, and for a pair of texts `<s> a </s> </s> b </s>`, without segment
embeddings. Formats, order and batches are those of fairseq's task sentence_prediction at commit 3f6ba43f, but for
group_lengths, which it does not have.
"""

import csv
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from config import InputError, read_text
from text.binarized import BOS, EOS, PAD, Dictionary, TokenFile

import numpy as np


@dataclass(frozen=True)
class Columns:
    """Where a table has its texts and its label: names, or numbers that count from 1."""

    text: tuple  # one or two
    label: str | int | None = None  # None: the table has no labels
    header: bool | None = None  # whether the first row names the columns; None: find out
    fields: int = 0  # leave out rows that do not have this many fields, and allow empty texts (0: both are errors)


# Where GLUE's files, as they are shipped, have their columns; MNLI's dev files have the label elsewhere.
GLUE = {
    "cola": Columns((4,), 2, header=False),
    "sst2": Columns((1,), 2, header=True),
    "mrpc": Columns((4, 5), 1, header=True),
    "stsb": Columns((8, 9), 10, header=True),
    "qqp": Columns((4, 5), 6, header=True, fields=6),
    "mnli": Columns((9, 10), 12, header=True),
    "mnli_dev": Columns((9, 10), 16, header=True),
    "qnli": Columns((2, 3), 4, header=True),
    "rte": Columns((2, 3), 4, header=True),
}


@dataclass
class Table:
    """The wanted columns of a file. texts: a list for each text column; labels: None if not asked for."""

    path: Path
    lines: list[int]  # the line of each row, from 1
    texts: list[list[str]]
    labels: list[str] | None
    header: bool
    left_out: int  # rows without the right number of fields


@dataclass
class Split:
    """The examples of one split. rows: int64 arrays of tokens; labels: class numbers int64 or scores float32, or None;
    cut: how many rows were longer than the position table."""

    rows: list[np.ndarray]
    labels: np.ndarray | None
    cut: int = 0

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], np.int64)


# ---------------------------------------------------------------------------------------------- tables


def read_cells(path: Path) -> list[tuple[int, list | dict]]:
    """(line number, cells) of each row that is not blank; cells are a dict for .jsonl. Raises InputError."""
    kind, rows = path.suffix.lower(), []
    if kind not in (".tsv", ".csv", ".jsonl"):
        raise InputError(f"{path}: expected a name that ends in .tsv, .csv or .jsonl")
    lines = read_text(path, encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    if kind == ".csv":
        reader = csv.reader([line + "\n" for line in lines], strict=True)
        csv.field_size_limit(2**31 - 1)
        try:
            rows = [(reader.line_num, cells) for cells in reader if cells]
        except csv.Error as e:
            raise InputError(f"{path}, line {reader.line_num}: not CSV: {e}") from None
    elif kind == ".jsonl":
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    cells = json.loads(line)
                    if "\\u" in line:
                        json.dumps(
                            cells, ensure_ascii=False
                        ).encode()  # half of a surrogate pair is no text
                except (ValueError, RecursionError) as e:
                    raise InputError(f"{path}, line {number}: not JSON: {str(e)[:200]}") from None
                if not isinstance(cells, dict):
                    raise InputError(
                        f"{path}, line {number}: expected a JSON object, such as {{...}}"
                    )
                rows.append((number, cells))
    else:  # quotes mean nothing in a .tsv, as in GLUE's files
        rows = [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return rows


def is_header(rows: list, label: int | None, regression: bool) -> bool:
    """Whether the first row names the columns: its label is no number where the labels are, or occurs only once."""
    if label is None or len(rows) < 2 or label >= len(rows[0][1]):
        return False
    first, *others = (cells[label] for _, cells in rows if label < len(cells))
    return number_of(first) is None if regression else first not in others


def number_of(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_table(path, columns: Columns, regression: bool = False) -> Table:
    """Read the wanted columns of a file. Raises InputError, with the line, for a row that cannot be used."""
    path = Path(path)
    rows = read_cells(path)
    names = [*columns.text, *([] if columns.label is None else [columns.label])]
    first, header, left_out = rows[0][1], columns.header, 0
    if isinstance(first, dict):
        keys, header = names, False
    else:
        numbers = [
            int(name) - 1 if str(name).isdecimal() and len(str(name)) < 10 else None
            for name in names
        ]
        if header is None:
            label = None if columns.label is None else numbers[-1]
            header = None in numbers or is_header(rows, label, regression)
        keys = [
            first.index(name) if name in first else number for name, number in zip(names, numbers)
        ]
        for name, key in zip(names, keys):
            if key is None or not 0 <= key < len(first):
                shown = ", ".join(map(repr, first)) if header else f"{len(first)} columns"
                raise InputError(f"{path}: no column {name}; it has {shown[:300]}")
        rows = rows[1:] if header else rows
        if columns.fields:
            kept = [row for row in rows if len(row[1]) == columns.fields]
            rows, left_out = kept, len(rows) - len(kept)
    table = Table(
        path,
        [],
        [[] for _ in columns.text],
        None if columns.label is None else [],
        header,
        left_out,
    )
    for line, cells in rows:
        if isinstance(first, list) and not columns.fields and len(cells) != len(first):
            raise InputError(
                f"{path}, line {line}: {len(cells)} columns, but the first row has {len(first)}"
            )
        table.lines.append(line)
        for i, (name, key) in enumerate(zip(names, keys)):
            cell = cells.get(key) if isinstance(cells, dict) else cells[key]
            if isinstance(cell, (dict, list)):
                raise InputError(f"{path}, line {line}: {name} is neither text nor a number")
            cell = "" if cell is None else str(cell).strip()
            is_text = i < len(columns.text)
            if not cell and not (is_text and columns.fields):
                raise InputError(f"{path}, line {line}: the column {name} is empty or missing")
            (table.texts[i] if is_text else table.labels).append(cell)
    if not table.lines:
        raise InputError(f"{path}: no rows in it but the header")
    return table


def label_names(labels: list[str]) -> list[str]:
    """The classes in the order of their numbers: the most frequent in the training split first, ties by alphabet."""
    counts = Counter(labels)
    return sorted(counts, key=lambda name: (-counts[name], name))


def class_numbers(table: Table, names: list[str]) -> np.ndarray:
    """The class of each row, int64. Raises InputError for a label that the training split does not have."""
    numbers = {name: i for i, name in enumerate(names)}
    for line, label in zip(table.lines, table.labels):
        if label not in numbers:
            known = ", ".join(name[:80] for name in names[:10])
            raise InputError(
                f"{table.path}, line {line}: label {label[:80]!r} does not occur in training, which has {known}"
            )
    return np.array([numbers[label] for label in table.labels], np.int64)


def scores(table: Table, scale: float = 1.0) -> np.ndarray:
    """The score of each row divided by `scale`, float32. Raises InputError for one that is no number."""
    values = [number_of(label) for label in table.labels]
    if None in values:
        i = values.index(None)
        raise InputError(
            f"{table.path}, line {table.lines[i]}: {table.labels[i][:80]!r} is no number (--regression)"
        )
    with np.errstate(all="ignore"):
        scaled = np.array(values, np.float32) / np.float32(scale)
    if not np.isfinite(scaled).all():
        i = int(np.isfinite(scaled).argmin())
        raise InputError(
            f"{table.path}, line {table.lines[i]}: {values[i]:g} / {scale:g} is too large for float32"
        )
    return scaled


# ---------------------------------------------------------------------------------------------- examples


def join(parts: list[np.ndarray], longest: int) -> tuple[np.ndarray, bool]:
    """Texts as tokens that end in EOS -> (the example's tokens, whether they had to be cut to `longest`).

    Of a pair the longer text is cut first, until both are equally long.
    """
    room = longest - len(parts)  # <s>, and the </s> before a second text
    cut = sum(map(len, parts)) > room
    if cut:
        keep = [room]
        if len(parts) == 2:
            first, second, half = len(parts[0]), len(parts[1]), room // 2
            keep = [first if first <= half else max(room - second, room - half)]
            keep.append(room - keep[0])
        parts = [
            np.append(part[: size - 1], EOS) if size < len(part) else part
            for part, size in zip(parts, keep)
        ]
    row = [
        np.array([BOS]),
        parts[0],
        *(piece for part in parts[1:] for piece in (np.array([EOS]), part)),
    ]
    return np.concatenate(row).astype(np.int64), cut


def make_split(texts: list[list[np.ndarray]], labels: np.ndarray | None, longest: int) -> Split:
    """texts: for each text column the tokens of every row, which end in EOS; longest: the most tokens of an example."""
    made = [join(list(parts), longest) for parts in zip(*texts)]
    return Split([row for row, _ in made], labels, sum(cut for _, cut in made))


def is_binarized(folder) -> bool:
    return (Path(folder) / "input0").is_dir()


def read_binarized_labels(folder: Path, split: str) -> tuple[np.ndarray, list[str] | None]:
    """(class numbers int64, all class names) or, where label/SPLIT.label exists, (scores float32, None)."""
    path = folder / "label" / f"{split}.label"
    if path.is_file():
        lines = read_text(path).splitlines()
        table = Table(
            path, list(range(1, len(lines) + 1)), [], [line.strip() for line in lines], False, 0
        )
        return scores(table), None
    dictionary = Dictionary(folder / "label" / "dict.txt")
    names = dictionary.symbols[4 : dictionary.rows]
    while names and names[-1].startswith(
        "madeupword"
    ):  # they only fill the dictionary up to a multiple of 8
        names.pop()
    file = TokenFile(folder / "label" / split)
    if (file.sizes < 1).any():
        raise InputError(
            f"{folder / 'label' / split}: row {int(file.sizes.argmin())} is empty; each needs a label"
        )
    ends = np.cumsum(file.sizes, dtype=np.int64)
    numbers = file.take(ends - file.sizes).astype(np.int64) - 4  # after the four special symbols
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(names):
        raise InputError(
            f"{folder / 'label' / split}: row {int(((numbers < 0) | (numbers >= len(names))).argmax())}"
            f" has a label that label/dict.txt does not name"
        )
    return numbers, names


def read_binarized(
    folder, split: str, dictionary: Dictionary, longest: int
) -> tuple[Split, list[str] | None]:
    """A split of the folders input0, input1 (of pairs) and label that fairseq-preprocess wrote, and the class names in
    order (None for scores). Raises InputError."""
    folder, texts = Path(folder), []
    labels, names = read_binarized_labels(folder, split)
    for name in ("input0", "input1"):
        if name == "input1" and not (folder / name).is_dir():
            continue
        file = TokenFile(folder / name / split)
        tokens = file.take(np.arange(file.tokens)).astype(np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(dictionary):
            raise InputError(
                f"{folder / name / split}: holds token id {tokens.max()}, but dict.txt has {len(dictionary)}"
            )
        if len(file.sizes) != len(labels):
            raise InputError(
                f"{folder / name / split}: {len(file.sizes)} rows, but there are {len(labels)} labels"
            )
        texts.append(np.split(tokens, np.cumsum(file.sizes)[:-1]) if len(labels) else [])
    if not len(labels):
        raise InputError(f"{folder}: {split} has no rows")
    return make_split(texts, labels, longest), names


# ---------------------------------------------------------------------------------------------- batches


def training_order(count: int, seed: int) -> np.ndarray:
    """The order in which examples are cut into batches: sorted by the value that each one drew."""
    return np.argsort(np.random.RandomState(seed).permutation(count), kind="stable")


def group_lengths(lengths: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """The order with each `count` examples in a row sorted by length, so that their batches need little padding."""
    parts = np.split(order, range(count, len(order), count))
    return np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])


def cut_batches(
    lengths: np.ndarray, order: np.ndarray, batch_size: int, max_tokens: int
) -> list[np.ndarray]:
    """Row numbers of each batch. An example that would make the batch longer than `batch_size`, or its examples times
    the longest above `max_tokens` (0: no limit), begins the next one."""
    batches, begin, longest = [], 0, 0
    for i, length in enumerate(lengths[order].tolist()):
        longer, count = max(longest, length), i - begin + 1
        if i > begin and (count > batch_size or (max_tokens and count * longer > max_tokens)):
            batches.append(order[begin:i])
            begin, longer = i, length
        longest = longer
    return batches + [order[begin:]] if len(order) else []


def epoch_batches(batches: list, seed: int, epoch: int) -> list:
    """The batches in the order of an epoch, from 1; their content stays what it is."""
    order = list(range(len(batches)))
    np.random.RandomState(seed + epoch).shuffle(order)
    return [batches[i] for i in order]


def pad(rows: list[np.ndarray]) -> tuple[np.ndarray, bool]:
    """Rows of tokens -> (B, T) int64 filled up with PAD on the right, and whether any PAD is in it."""
    longest = max(map(len, rows))
    tokens = np.full((len(rows), longest), PAD, np.int64)
    for place, row in zip(tokens, rows):
        place[: len(row)] = row
    return tokens, min(map(len, rows)) < longest
