"""Text files as the command line names them, read in pieces of whole lines.

A name is a file in UTF-8, one that ends in .gz, or a member of a zip archive as ARCHIVE.zip:MEMBER.
A damaged, encrypted or unusual file is an InputError of one line.
"""

import contextlib
import functools
import gzip
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from config import InputError, printable, read_text, reading, refuse_pointer

from tqdm import tqdm

CHUNK = 1 << 20  # bytes of text that one worker takes at a time
LONGEST = 64 << 20  # bytes of a line; longer than any text has, and all of it is held


class Source(NamedTuple):
    path: Path
    member: str | None  # of the archive at `path`
    size: int  # bytes on the disk, still packed


@functools.cache
def note(text: str):
    """Tell a person something about a file, once, however often it is read."""
    print(f"note: {printable(text)}", file=sys.stderr)


def without_mark(text: str, name: str) -> str:
    """The beginning of a file without its byte order mark, which would be part of a word."""
    if text.startswith("\ufeff"):
        note(f"{name}: begins with a byte order mark, which is left out")
    return text.removeprefix("\ufeff")


def locate(name: str) -> Source:
    """Find a file. Raises InputError if it, or the archive's member, does not exist."""
    path = Path(name)
    member = None
    # a file may have a colon in its own name
    archive = re.fullmatch(r"(.*\.zip):(.+)", name, re.I)
    if archive and not path.exists():
        path = Path(archive[1])
        member = archive[2]
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
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
    refuse_pointer(source.path)
    with open(source.path, "rb") as raw:
        if source.member is not None:
            with zipfile.ZipFile(raw) as archive, archive.open(source.member) as file:
                yield file, raw
        elif source.path.suffix.lower() == ".gz":
            with gzip.GzipFile(fileobj=raw) as file:
                yield file, raw
        else:
            yield raw, raw


def whole_lines(name: str, advance):
    """Yield the bytes of a file in pieces of about CHUNK that end where a line ends."""
    rest = b""  # of a line whose end has not been read yet
    with reading(f"{name}: cannot be read"), open_file(name) as (file, raw):
        at = raw.tell()
        while block := file.read(CHUNK):
            advance(raw.tell() - at)
            at = raw.tell()
            rest += block
            # a last \r may be half of a \r\n
            end = 1 + max(rest.rfind(b"\n"), rest.rfind(b"\r", 0, -1))
            if end:
                yield rest[:end]
                rest = rest[end:]
            if len(rest) > LONGEST:
                raise InputError(f"{name}: a line of over {LONGEST >> 20} MiB; not a text")
    if rest:
        yield rest


def read_chunks(name: str, advance=lambda n: None):
    """The text of a file in pieces of whole lines.

    "\\n", "\\r" and "\\r\\n" end a line, as in Python's text files, and become "\\n". `advance` is
    called with each number of bytes read from the disk. Raises InputError if the file cannot be
    read, or, with the number of the line, if it is not UTF-8.
    """
    line = 1
    for number, chunk in enumerate(whole_lines(name, advance)):
        error = None
        try:
            text = chunk.decode("utf-8")
        except UnicodeDecodeError as e:
            error = e
            text = chunk[: e.start].decode("utf-8")
        if number == 0:  # differs from fairseq, which keeps the mark
            text = without_mark(text, name)
        if "\r" in text:  # rare, and looking for it is fast
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if "\0" in text:
            note(f"{name}: holds NUL characters, as files in UTF-16 do, and files that are no text")
        line += text.count("\n")
        if error:
            advice = "convert the file first, as iconv does"
            raise InputError(f"{name}, line {line}: not UTF-8 ({error.reason}); {advice}")
        yield text


def read_all(names: list[str], label: str):
    """The text of several files, as read_chunks, with a progress bar.

    Between two files an empty line is added if there is none: a new file is a new document.
    """
    total = disk_size(names)
    hidden = not sys.stderr.isatty()
    with tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=hidden) as bar:
        last = ""  # line of the file before
        for name in names:
            separator = "\n" if last.strip() else ""
            for text in read_chunks(name, bar.update):
                if text:  # not a byte order mark alone
                    yield separator + text
                    separator = ""
                    last = text.removesuffix("\n").rpartition("\n")[2]


def json_rows(path) -> list[dict]:
    """The objects of a log with one in each line; [] if there is no such file.

    A row that was cut by a crash is left out.
    """
    rows = []
    if Path(path).is_file():
        for line in read_text(path, "replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def disk_size(names: list[str]) -> int:
    """Bytes that the files take on the disk, packed as they are."""
    return sum(locate(name).size for name in names)


def identity(name: str) -> dict:
    """Name, size and time of a file: if they are the same, so is taken to be its content."""
    source = locate(name)
    status = source.path.stat()
    member = "" if source.member is None else f":{source.member}"
    file = source.path.name + member
    return dict(file=file, bytes=status.st_size, mtime_ns=status.st_mtime_ns)
