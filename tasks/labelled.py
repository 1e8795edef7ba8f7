"""Labelled text as examples: GLUE's files, your own .tsv, .csv and .jsonl, fairseq's folders.

An example is one row of tokens: `<s> a </s>`, and for a pair of texts `<s> a </s> </s> b </s>`,
without segment embeddings. Formats and examples are those of fairseq's task sentence_prediction at
commit 3f6ba43f.
"""

import csv
import dataclasses
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from config import InputError, printable, read_text, reading
from text.binarized import BOS, EOS, SPECIAL, Dictionary, TokenFile

import numpy as np


@dataclass(frozen=True)
class Columns:
    """Where a table has its texts and its label: names, or numbers that count from 1."""

    text: tuple  # one or two
    label: str | int | None = None  # None: the table has no labels
    header: bool | None = None  # whether the first row names the columns; None: find out
    fields: int = 0  # leave out rows without so many, allow empty texts (0: both are errors)

    @property
    def names(self) -> list:
        return [*self.text] if self.label is None else [*self.text, self.label]

    def is_guess(self, path) -> bool:
        """Whether only the file can tell if it has a header: columns that are named must have."""
        numbers = [number_of(name) for name in self.names]
        return self.header is None and None not in numbers and not is_json(path)


# Where GLUE's files, as they are shipped, have their columns; MNLI's dev files have the label
# elsewhere.
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
    """The wanted columns of a file."""

    path: Path
    lines: list[int]  # the line of each row, from 1
    texts: list[list[str]]  # of each text column
    labels: list[str]  # empty if not asked for
    header: list[str] | None = None  # what the first row calls the text columns
    left_out: int = 0  # rows without the right number of fields


@dataclass
class Split:
    """The examples of one split."""

    rows: list[np.ndarray]  # tokens, int64
    labels: np.ndarray | None  # class numbers int64, or scores float32
    cut: int = 0  # how many rows were longer than the position table

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], np.int64)


# ------------------------------------------------------------------------------------------ tables


def read_tables(files: dict, regression: bool = False, known: list | None = None) -> dict:
    """{split: Table} of {split: (path, Columns)}, which all have a header or have none.

    known: what another header called the text columns. Raises InputError, with the line, for a row
    without the columns.
    """
    files = {split: (Path(path), columns) for split, (path, columns) in files.items()}
    rows = {split: read_rows(path, columns.names) for split, (path, columns) in files.items()}
    guessed = {s: rows[s] for s, (path, columns) in files.items() if columns.is_guess(path)}
    header = find_header(guessed, files, regression, known) if guessed else False
    tables = {}
    for split, (path, columns) in files.items():
        named = header if split in guessed else columns.header is not False or is_json(path)
        columns = dataclasses.replace(columns, header=named)
        tables[split] = table_of(path, columns, rows[split])
    return tables


def table_of(path: Path, columns: Columns, rows: list) -> Table:
    """The wanted columns of a file, once columns.header says whether the first row names them."""
    first = rows[0][1]
    places = places_of(first, columns, path)
    names = [first[place] if columns.header else place + 1 for place in places]
    header = names[: len(columns.text)] if columns.header else None
    table = Table(path, [], [[] for _ in columns.text], [], header)
    outlets = [*table.texts, table.labels]
    width = columns.fields or len(first)
    for line, cells in rows[columns.header :]:
        if len(cells) != width and columns.fields:
            table.left_out += 1
            continue
        if len(cells) != width:
            raise InputError(
                f"{path}, line {line}: {len(cells)} columns, the first row has {width}"
            )
        table.lines.append(line)
        for name, place, outlet in zip(names, places, outlets):
            text = cells[place].strip()
            if not text and (outlet is table.labels or not columns.fields):
                raise InputError(f"{path}, line {line}: the column {name} is empty or missing")
            outlet.append(text)
    if not table.lines:
        raise InputError(f"{path}: no rows in it but the header")
    return table


def is_json(path: Path) -> bool:
    """Whether it is a file with a JSON object in each line."""
    return path.suffix.lower() in (".jsonl", ".json")


def read_rows(path: Path, names: list) -> list[tuple[int, list[str]]]:
    """(line number, cells) of each row that is not blank.

    Of JSON objects these are the cells under `names`, after a row of the names.
    """
    kind = path.suffix.lower()
    if kind not in (".tsv", ".csv") and not is_json(path):
        raise InputError(f"{path}: expected a name that ends in .tsv, .csv or .jsonl")
    lines = read_text(path, encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    if kind == ".csv":
        rows = rows_of_csv(lines, path)
    else:
        rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if kind == ".tsv":  # quotes mean nothing here, as in GLUE's files
        rows = [(number, line.split("\t")) for number, line in rows]
    if not rows:
        raise InputError(f"{path}: no rows in it")
    if is_json(path):
        rows = [(n, cells_of_json(line, names, f"{path}, line {n}")) for n, line in rows]
        rows.insert(0, (0, list(map(str, names))))
    return rows


def rows_of_csv(lines: list[str], path: Path) -> list[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader([line + "\n" for line in lines], strict=True)
    try:
        return [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as e:
        raise InputError(f"{path}, line {reader.line_num}: not CSV: {e}") from None


def cells_of_json(line: str, names: list, where: str) -> list[str]:
    """The values under `names` of a JSON object. Raises InputError, which begins with `where`."""
    with reading(f"{where}: not JSON"):
        values = json.loads(line)
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a JSON object, such as {{...}}")
    cells = [values.get(name) for name in names]
    if any(isinstance(cell, (dict, list)) for cell in cells):
        raise InputError(f"{where}: {', '.join(names)}: neither texts nor numbers")
    return ["" if cell is None else str(cell) for cell in cells]


def find_header(rows: dict, files: dict, regression: bool, known: list | None) -> bool:
    """Whether the first rows name the columns, in one line; InputError if some do and some do not.

    rows and files: of each split. known: what another header called the text columns.
    """
    labels = set()
    for split, (_, *others) in rows.items():
        columns = files[split][1]
        if columns.label is not None:
            place = number_of(columns.label)
            labels.update(cells[place].strip() for _, cells in others if place < len(cells))
    found = {}
    for split, part in rows.items():
        found[split] = names_columns(part, files[split][1], regression, labels, known)
    with_header = [str(files[split][0]) for split, is_header in found.items() if is_header]
    if not with_header:
        return False
    first = next(rows[split][0][1] for split, is_header in found.items() if is_header)
    names = printable(", ".join(first)[:200])
    without = [str(files[split][0]) for split, is_header in found.items() if not is_header]
    if without:
        both = f"{with_header[0]} seems to begin with a header ({names}), {without[0]} does not"
        raise InputError(f"{both}; make them alike, or say --header true or false")
    files = ", ".join(with_header)
    print(f"note: first row of {files} taken for a header: {names}", file=sys.stderr)
    return True


def names_columns(rows: list, columns: Columns, regression: bool, labels: set, known) -> bool:
    """Whether a first row looks like a header. columns: by number; labels: of all other rows."""
    first = rows[0][1]
    wanted = [number_of(name) for name in columns.names]
    if max(wanted) >= len(first):
        return False
    numbers = [str(i) for i in range(len(first))]
    # what the texts were called in training
    if known and known == [first[place] for place in wanted[: len(columns.text)]]:
        return True
    # pandas' numbers, without and with its index
    if len(first) > 1 and first in (numbers, ["", *numbers[:-1]]):
        return True
    if labels:
        label = first[wanted[-1]].strip()
        is_other = regression or label not in labels
        if is_other and score_of(label) is None:
            return True
    # the name of an index, or of another column of numbers
    for place in set(range(len(first))) - set(wanted):
        others = [cells[place] for _, cells in rows[1:] if place < len(cells)]
        if others and first[place].strip() and score_of(first[place]) is None:
            if all(score_of(cell) is not None for cell in others):
                return True
    return False


def places_of(first: list, columns: Columns, path: Path) -> list[int]:
    """Where in a row the columns are. first: the first row. Raises InputError.

    A number is a place, counted from 1, also where the names in a header are numbers.
    """
    if is_json(path):
        return list(range(len(first)))
    places = []
    for name in columns.names:
        place = number_of(name)
        if place is None and columns.header and name in first:
            place = first.index(name)
        if place is None or not 0 <= place < len(first):
            cells = ", ".join(map(repr, first)) if columns.header else f"{len(first)} columns"
            raise InputError(f"{path}: no column {str(name)[:80]}; it has {cells[:300]}")
        places.append(place)
    return places


def number_of(name) -> int | None:
    """The place of a column that is named by its number; None for another name."""
    is_number = str(name).isdecimal() and len(str(name)) < 10
    return int(name) - 1 if is_number else None


def score_of(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------ labels


def label_names(labels: list[str]) -> list[str]:
    """The classes in the order of their numbers: by frequency in training, then by alphabet."""
    counts = Counter(labels)
    return sorted(counts, key=lambda name: (-counts[name], name))


def are_scores(labels: list[str]) -> bool:
    """Whether all of them are numbers."""
    return all(score_of(label) is not None for label in labels)


def class_numbers(table: Table, names: list[str]) -> np.ndarray:
    """The class of each row, int64. Raises InputError for a label that training does not have."""
    numbers = {name: i for i, name in enumerate(names)}
    for line, label in zip(table.lines, table.labels):
        if label not in numbers:
            known = ", ".join(name[:80] for name in names[:10])
            where = f"{table.path}, line {line}: label {label[:80]!r}"
            text = f"{where} does not occur in training, which has {known}"
            if are_scores([label, *names]):
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
        tokens = file.take(np.arange(file.tokens)).astype(np.int64)
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
    numbers = file.take(ends - file.sizes).astype(np.int64) - len(SPECIAL)
    unknown = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
    if len(unknown):
        where = f"{folder / split}: row {unknown[0]}"
        raise InputError(f"{where} has a label that label/dict.txt does not name")
    return numbers, names
