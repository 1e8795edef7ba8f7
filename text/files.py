"""Text files as the command line names them, read in pieces of whole lines.

A name is a file in UTF-8, plain or packed by gzip, bzip2 or xz, or a member of a zip archive as
ARCHIVE.zip:MEMBER. A damaged, encrypted or unusual file is an InputError of one line.
"""

import bz2
import codecs
import contextlib
import functools
import gzip
import io
import itertools
import json
import lzma
import math
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from config import InputError, check_file, printable, read_text, reading

from tqdm import tqdm

CHUNK = 1 << 20  # bytes of text that one worker takes at a time
LONGEST = 64 << 20  # bytes of a line; longer than any text has, and all of it is held
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# how files begin that are no text
FORMATS = {
    ".gz": rb"\x1f\x8b",
    ".bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    ".xz": rb"\xfd7zXZ\0",
    ".zst": rb"\x28\xb5\x2f\xfd",
    ".zip": rb"PK\x03\x04",
    ".parquet": rb"PAR1\x15",
}
NO_WIDTH = "\ufeff\u200b\u2060"  # byte order mark, zero-width space, word joiner
# lines of nothing else, and byte order marks where a line begins, as in files that were joined
UNSEEN = re.compile(rf"^(?:[^\S\n]*[{NO_WIDTH}](?:[{NO_WIDTH}]|[^\S\n])*$|\ufeff+)", re.M)
MARKS = ("<s>", "</s>", "<pad>")  # of the dataset, not of its text
TYPED = re.compile(rf"(?<!\S)(?:{'|'.join(MARKS)})(?!\S)")
OTHER_TEXT = re.compile(r"\.(csv|tsv|jsonl?|html?|xml)(\.(gz|bz2|xz))?$", re.I)
TOKENISED = re.compile(r"[\d ]+|.*(▁|@@ ).*")  # a line of ids, or of another tool's pieces
LOOK = 200  # lines at the beginning of a file that tell what it is


class Source(NamedTuple):
    path: Path
    member: str | None  # of the archive at `path`
    size: int  # bytes on the disk, still packed


@functools.cache
def note(text: str):
    """Tell a person something about a file, once, however often it is read."""
    print(f"note: {printable(text)}", file=sys.stderr)


def visible(text: str) -> str:
    """Lines without byte order marks at their beginning, which would be part of a word.

    A line of nothing but characters of no width is empty. Both differ from fairseq.
    """
    if any(character in text for character in NO_WIDTH):
        return UNSEEN.sub("", text)
    return text


def lines_of(text: str) -> list[str]:
    """The lines of a text; only "\\n" ends one."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def format_of(beginning: bytes) -> str | None:
    """The suffix of files that begin so; None for a text."""
    for suffix, pattern in FORMATS.items():
        if re.match(pattern, beginning):
            return suffix
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(beginning[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        return ".tar"
    return None


def locate(name: str) -> Source:
    """Find a file. Raises InputError if it, or the archive's member, does not exist."""
    path = Path(name)
    member = None
    # a file may have a colon in its own name
    archive = re.fullmatch(r"(.*\.zip):(.+)", name, re.I)
    if archive and not path.exists():
        path = Path(archive[1])
        member = archive[2]
    check_file(path)
    if member is None and not zipfile.is_zipfile(path):
        return Source(path, None, path.stat().st_size)

    with reading(f"{path}: not a readable zip archive"), zipfile.ZipFile(path) as z:
        members = {m.filename: m.compress_size for m in z.infolist() if not m.is_dir()}
    if member not in members:
        what = f"has no member {member!r}"
        if member is None:
            what = "an archive; name one of its members"
        some = ", ".join(list(members)[:8]) or "nothing"
        raise InputError(f"{path}: {what}, as ARCHIVE.zip:MEMBER; it holds {some}")
    return Source(path, member, members[member])


@contextlib.contextmanager
def open_file(name: str):
    """Open a file as (file of its plain bytes, file of its bytes on the disk)."""
    source = locate(name)
    with open(source.path, "rb") as raw:
        kind = format_of(raw.read(tarfile.BLOCKSIZE)) or source.path.suffix.lower()
        raw.seek(0)
        file = raw  # a plain file
        if source.member is not None:
            file = zipfile.ZipFile(raw).open(source.member)
        elif kind in OPENERS:
            file = OPENERS[kind](raw)
        yield file, raw


def read_chunks(name: str, advance=lambda n: None):
    """The text of a file in pieces of about CHUNK bytes that end where a line ends.

    "\\n", "\\r" and "\\r\\n" end a line, as in Python's text files, and become "\\n". `advance` is
    called with each number of bytes read from the disk. Raises InputError if the file cannot be
    read, or, with the number of the line, if it is not UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    rest = ""  # of a line whose end has not been read yet
    lines = 0  # before it
    with reading(f"{name}: cannot be read"), open_file(name) as (file, raw):
        if kind := format_of(file.read(tarfile.BLOCKSIZE)):
            raise InputError(f"{name}: a {kind} file, not a text; take the text out of it first")
        file.seek(0)
        at = raw.tell()
        blocks = iter(lambda: file.read(CHUNK), b"")
        for block in itertools.chain(blocks, [b""]):  # the last one ends the text
            advance(raw.tell() - at)
            at = raw.tell()
            try:
                text = rest + decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                line = lines + len((e.object[: e.start] + b".").splitlines())
                advice = "if it is a text, iconv converts it"
                raise InputError(f"{name}, line {line}: not UTF-8 ({e.reason}); {advice}") from None
            # at the end of the file a line needs no "\n"
            end = text.rfind("\n") + 1 if block else len(text)
            rest = text[end:]
            if len(rest) > LONGEST:
                raise InputError(f"{name}: a line of over {LONGEST >> 20} MiB; not a text")
            if end:
                yield seen(text[:end], name, lines == 0)
            lines += text.count("\n")


def seen(text: str, name: str, is_first: bool) -> str:
    """`visible` of a piece of a file, with notes on what may not be meant to be text.

    is_first: whether the file begins with it.
    """
    text, before = visible(text), len(text)
    if len(text) < before:
        what = "byte order marks are left out, and lines of characters without width are empty"
        note(f"{name}: {what}")
    if "\0" in text:
        note(f"{name}: holds NUL characters, as files in UTF-16 do, and files that are no text")
    if any(mark in text for mark in MARKS) and TYPED.search(text):
        how = "leave it out: every line gets its </s>, and every block its <s>, by itself"
        note(f"{name}: holds {' or '.join(MARKS)} as a word; {how}")
    if is_first:
        lines = first_lines(text)
        if OTHER_TEXT.search(name) or len(json_objects(lines)) > 0.9 * len(lines):
            what = "keys, labels, names of columns and marks become text, too"
            note(f"{name}: read as plain text, so {what}; write the texts alone into a file")
    return text


def first_lines(text: str) -> list[str]:
    """Those of the first LOOK lines that are not blank."""
    return [line for line in text.split("\n", LOOK)[:LOOK] if line.strip()]


def tell_tokenised(names: list[str]):
    """A note on each text for a BPE that seems to be tokens already."""
    for name in names:
        lines = first_lines(next(read_chunks(name), ""))
        if lines and sum(map(bool, map(TOKENISED.fullmatch, lines))) > 0.9 * len(lines):
            how = "--bpe none takes tokens as they are, with the dict.txt that they are of"
            note(f"{name}: seems to be tokenized already; {how}")


def read_all(names: list[str], label: str):
    """The text of several files, as read_chunks, with a progress bar.

    Between two files an empty line is added if there is none: a new file is a new document.
    """
    total = disk_size(names)
    with tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=None) as bar:
        last = ""  # line of the file before
        for name in names:
            separator = "\n" if last.strip() else ""
            for text in read_chunks(name, bar.update):
                if text:  # not a byte order mark alone
                    yield separator + text
                    separator = ""
                    last = text.removesuffix("\n").rpartition("\n")[2]


def json_objects(lines: list[str]) -> list[dict]:
    """The lines that are JSON objects."""
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def with_nulls(value):
    """A value for json.dumps: None for NaN and infinity, for which JSON has no word."""
    if isinstance(value, dict):
        return {name: with_nulls(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_nulls(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_rows(path) -> list[dict]:
    """The objects of a log with one in each line; [] if there is no such file.

    A row that was cut by a crash is left out.
    """
    if not Path(path).is_file():
        return []
    return json_objects(read_text(path, "replace").splitlines())


def splits_made_from(folder: Path) -> dict:
    """{split: the texts and settings it was made from}, as preprocess.log says."""
    rows = json_rows(folder / "preprocess.log")
    return {str(row.get("step")): row.get("made_from") for row in rows}


def disk_size(names: list[str]) -> int:
    """Bytes that the files take on the disk, packed as they are."""
    return sum(locate(name).size for name in names)


def text_size(names: list[str]) -> int:
    """Bytes of the texts, unpacked."""
    size = 0
    for name in names:
        with reading(f"{name}: cannot be read"), open_file(name) as (file, _):
            size += file.seek(0, io.SEEK_END)
    return size


def identity(name: str) -> dict:
    """Name, size and time of a file: if they are the same, so is taken to be its content."""
    source = locate(name)
    status = source.path.stat()
    member = "" if source.member is None else f":{source.member}"
    file = source.path.name + member
    return dict(file=file, bytes=status.st_size, mtime_ns=status.st_mtime_ns)
