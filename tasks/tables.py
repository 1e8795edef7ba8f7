"""Tables of labelled text: GLUE's files, your own .tsv and .csv, and JSON lines.

A column is named, or numbered from 1: a number is always a place, also where the names of a header
are numbers. Whether files with numbered columns begin with a header is guessed once for all files
of a set, and said.
"""

import csv
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from config import InputError, read_text, reading
from text.files import lines_of, note

JSON = (".jsonl", ".json")  # an object in each line
MISSING = ("", "na", "n/a", "nan", "<na>", "null", "none", "nat", "inf", "-inf")  # of numbers


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


class File:
    """A file that has been read, before it is known whether its first row is a header."""

    def __init__(self, path: Path, columns: Columns):
        self.path, self.columns = path, columns
        self.rows = read_rows(path, columns.names)  # (line from 1, cells)
        self.first = self.rows[0][1]
        self.places = []  # of the columns, None for one that goes by its name
        is_json = path.suffix.lower() in JSON  # whose names are in every row
        for name in columns.names:
            is_number = re.fullmatch("[0-9]{1,9}", str(name)) and not is_json
            self.places.append(int(name) - 1 if is_number else None)
        self.has_header = columns.header
        if is_json or (None in self.places and columns.header is None):
            self.has_header = True

    def label_of(self, cells: list[str]) -> str | None:
        """The label of a row, if it has one. For numbered columns only."""
        place = self.places[-1]
        if self.columns.label is None or place >= len(cells):
            return None
        return cells[place].strip()

    def table(self) -> Table:
        """The wanted columns. Raises InputError, with the line, for a row without them."""
        columns, count = self.columns, len(self.columns.text)
        places = [self.place_of(*pair) for pair in zip(columns.names, self.places)]
        if len(set(places)) < len(places):
            raise InputError(f"{self.path}: --text and --label name one column twice")
        names = [self.first[i] if self.has_header else i + 1 for i in places]
        rows = self.rows[1:] if self.has_header else self.rows
        if columns.fields:
            others = [row for row in rows if len(row[1]) != columns.fields]
            rows = [row for row in rows if len(row[1]) == columns.fields]
            if others:
                what = f"{len(others):,} rows without {columns.fields} fields are left out"
                note(f"{self.path}: {what}")
        if not rows:
            raise InputError(f"{self.path}: no rows in it but the header")
        # texts to predict, and QQP's, may be empty
        begin = count if columns.fields or columns.label is None else 0
        filled = list(zip(names, places))[begin:]
        width = columns.fields or len(self.first)
        for line, cells in rows:
            where = f"{self.path}, line {line}"
            if len(cells) != width:
                raise InputError(f"{where}: {len(cells)} columns, the first row has {width}")
            for name, place in filled:
                if not cells[place].strip():
                    raise InputError(f"{where}: the column {name} is empty or missing")
        values = [[cells[place].strip() for _, cells in rows] for place in places]
        labels = [] if columns.label is None else values[count]
        header = names[:count] if self.has_header else None
        return Table(self.path, [line for line, _ in rows], values[:count], labels, header)

    def place_of(self, name, place: int | None) -> int:
        """Where a column is. Raises InputError if it is nowhere, or a name is there twice."""
        if place is None and self.has_header and self.first.count(name) == 1:
            return self.first.index(name)
        if place is not None and 0 <= place < len(self.first):
            return place
        cells = ", ".join(map(repr, self.first))[:300]
        what = f"no column {str(name)[:80]}, or more than one"
        if place is None and not self.has_header:
            what = f"--header false leaves only numbers for columns, not {str(name)[:80]}"
        raise InputError(f"{self.path}: {what}; the first row is {cells}")


def read_tables(files: dict, regression: bool = False, known: list | None = None) -> dict:
    """{split: Table} of {split: (path, Columns)}.

    known: what another header called the text columns. Raises InputError, with the line, for a row
    without the columns.
    """
    files = {split: File(Path(path), columns) for split, (path, columns) in files.items()}
    guess_header([f for f in files.values() if f.has_header is None], regression, known)
    check_numbers([f for f in files.values() if f.has_header], known)
    return {split: file.table() for split, file in files.items()}


def plain(names) -> list[str]:
    """Names of columns, to be compared."""
    return [name.strip().lower() for name in names]


def check_numbers(files: list[File], known: list | None):
    """Raise InputError where the number of a column means another one than in the first file."""
    for file in files:
        if None in file.places or max(file.places) >= len(file.first):
            continue
        names = plain(file.first[place] for place in file.places)
        # another name may mean the same, unless the right one is elsewhere
        for place, expected, name in zip(file.places, plain(known or names), names):
            if expected != name and expected in plain(file.first):
                what = f"column {place + 1} is {name!r} here, and {expected!r} is another"
                raise InputError(f"{file.path}: {what}; name columns instead of numbering them")
        known = known or names


# ---------------------------------------------------------------------------------------- a header


def guess_header(files: list[File], regression: bool, known: list | None):
    """Decide has_header, with a note. Raises InputError where only some of the files have one."""
    labels = {file.label_of(cells) for file in files for _, cells in file.rows[1:]}
    for file in files:
        file.has_header = looks_like_header(file, labels - {None}, regression, known)
    named = [file for file in files if file.has_header]
    plain = [file for file in files if not file.has_header]
    if not named:
        for file in plain:
            if file.columns.label is None:  # with a label, the first row's is like the others'
                row = f"{', '.join(file.first)[:200]} (--header true leaves it out)"
                note(f"first row of {file.path} taken for a text: {row}")
        return
    cells = ", ".join(named[0].first)[:200]
    if plain:
        both = f"{named[0].path} seems to begin with a header ({cells}), {plain[0].path} does not"
        raise InputError(f"{both}; make them alike, or say --header true or false")
    for first in {tuple(file.first): None for file in named}:
        paths = ", ".join(str(file.path) for file in named if tuple(file.first) == first)
        note(f"first row of {paths} taken for a header: {', '.join(first)[:200]}")


def looks_like_header(file: File, labels: set, regression: bool, known: list | None) -> bool:
    """Whether the first row is unlike the others. labels: of all rows but the first ones."""
    first, places = file.first, file.places
    if max(places) >= len(first):
        return False
    # what the texts were called in training
    texts = [first[place] for place in places[: len(file.columns.text)]]
    if known and plain(texts) == plain(known):
        return True
    # pandas' numbers, without and with its index
    numbers = [str(i) for i in range(len(first))]
    if len(first) > 1 and first in (numbers, ["", *numbers[:-1]]):
        return True
    # what is no label
    label = file.label_of(first)
    is_other = regression or label not in labels
    if labels and is_other and score_of(label) is None:
        return True
    # the name of an index, or of another column of numbers
    for place in set(range(len(first))) - set(places):
        others = [cells[place] for _, cells in file.rows[1:] if place < len(cells)]
        is_name = first[place].strip().lower() not in MISSING and score_of(first[place]) is None
        if is_name and others and are_scores(others):
            return True
    return False


def score_of(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def are_scores(texts: list[str]) -> bool:
    """Whether all of them are numbers."""
    return all(score_of(text) is not None for text in texts)


# ------------------------------------------------------------------------------------------ rows


def lines_in(path: Path) -> list[str]:
    """The lines of a text file, from the first.

    A "\\r" alone ends a line only in a file without any "\\n": elsewhere it is within a text.
    """
    text = read_text(path, encoding="utf-8-sig", newline="").replace("\r\n", "\n")
    if "\n" not in text:
        text = text.replace("\r", "\n")
    return lines_of(text)


def read_rows(path: Path, names: list) -> list[tuple[int, list[str]]]:
    """(line number, cells) of each row. Raises InputError.

    Empty lines at the end are no rows, nor are any where rows have several cells. Of JSON objects
    these are the cells under `names`, after a row of the names.
    """
    kind = path.suffix.lower()
    if kind not in (".tsv", ".csv", *JSON):
        raise InputError(f"{path}: expected a name that ends in .tsv, .csv or .jsonl")
    lines = lines_in(path)
    while lines and not lines[-1].strip(" "):
        lines.pop()
    if not any(map(str.strip, lines)):
        raise InputError(f"{path}: no rows in it")
    if kind in JSON:
        rows, keys = [(0, [*names])], set()
        for number, line in enumerate(lines, 1):
            if line.strip():
                values = values_of_json(line, names, f"{path}, line {number}")
                cells = (values.get(name) for name in names)
                rows.append((number, ["" if cell is None else str(cell) for cell in cells]))
                keys |= values.keys()
        for name in names:  # one that some lack is empty there
            if name not in keys:
                raise InputError(f"{path}: no {name!r} in it, but {', '.join(sorted(keys))[:300]}")
        return rows
    if kind == ".tsv":  # quotes mean nothing there, as in GLUE's files
        rows = [(number, line.split("\t")) for number, line in enumerate(lines, 1)]
    else:
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader(io.StringIO("\n".join(lines)), strict=True)
        try:
            rows = [(reader.line_num, cells or [""]) for cells in reader]
        except csv.Error as e:
            what = f"not a table: {e}"
            if ";" in lines[0] and "," not in lines[0]:
                what += "; semicolons do not part columns, commas do"
            raise InputError(f"{path}, line {reader.line_num}: {what}") from None
    has_one_cell = len(rows[0][1]) == 1
    return [row for row in rows if has_one_cell or row[1] != [""]]


def values_of_json(line: str, names: list, where: str) -> dict:
    """A JSON object, its texts or numbers under `names`. Raises InputError with `where`."""
    if line.lstrip().startswith("["):
        raise InputError(f"{where}: an array; write a JSON object in each line, as .jsonl")
    with reading(f"{where}: not JSON"):
        values = json.loads(line, parse_constant=lambda name: None)  # NaN is null
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    is_object = isinstance(values, dict)
    if not is_object or any(isinstance(values.get(name), (dict, list)) for name in names):
        what = f"texts or numbers under {', '.join(names)}"
        raise InputError(f"{where}: expected a JSON object with {what}")
    return values
