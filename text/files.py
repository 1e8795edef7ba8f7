"""Text files as the command line names them, read in pieces of whole lines.

A name is a file in UTF-8, one that ends in .gz, or a member of a zip archive as ARCHIVE.zip:MEMBER. A damaged,
encrypted or unusual file is an InputError of one line, whatever the modules that unpack it raise.
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

from config import InputError, printable, read_text, reading

from tqdm import tqdm

CHUNK = 1 << 20  # bytes of text that one worker takes at a time
LONG = 1 << 20  # bytes of one line that are held; a longer one is cut where that changes no token
BETWEEN_WORDS = re.compile(rb"(?<=[!-~])(?= [!-~])")


class Source(NamedTuple):
    path: Path
    member: str | None  # of the archive at `path`
    size: int  # bytes on the disk, still packed


@functools.cache
def note(text: str):
    """Tell a person something about a file, once, however often it is read."""
    print(f"note: {printable(text)}", file=sys.stderr)


def without_mark(text: str, name: str) -> str:
    """The beginning of a file without the byte order mark, which would become a part of its first word."""
    if text.startswith("\ufeff"):
        note(f"{name}: begins with a byte order mark, which is left out")
    return text.removeprefix("\ufeff")


def locate(name: str) -> Source:
    """Find a file. Raises InputError if it, or the archive's member, does not exist."""
    archive = re.fullmatch(r"(.*\.zip):(.+)", name, re.I)
    path, member = (
        (Path(archive[1]), archive[2])
        if archive and not Path(name).exists()
        else (Path(name), None)
    )
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if member is None and not zipfile.is_zipfile(path):
        return Source(path, None, path.stat().st_size)
    with reading(f"{path}: not a readable zip archive"), zipfile.ZipFile(path) as z:
        members = {m.filename: m.compress_size for m in z.infolist() if not m.is_dir()}
    if member not in members:
        what = (
            "an archive; name one of its members" if member is None else f"has no member {member!r}"
        )
        shown = ", ".join(list(members)[:8]) or "nothing"
        raise InputError(f"{path}: {what}, as ARCHIVE.zip:MEMBER; it holds {shown}")
    return Source(path, member, members[member])


@contextlib.contextmanager
def open_file(name: str):
    """Open a file as (file of its plain bytes, file of its bytes on the disk)."""
    source = locate(name)
    with open(source.path, "rb") as raw, contextlib.ExitStack() as stack:
        if source.member is not None:
            archive = stack.enter_context(zipfile.ZipFile(raw))
            yield stack.enter_context(archive.open(source.member)), raw
        elif source.path.suffix.lower() == ".gz":
            yield stack.enter_context(gzip.GzipFile(fileobj=raw)), raw
        else:
            yield raw, raw


def whole_lines(name: str, advance):
    """Yield (bytes, whether their last line continues in the next): a file cut after line ends into pieces of about
    CHUNK, and within a line longer than LONG between two words. `advance` as in read_chunks."""
    held = []  # the beginning of a line whose end has not been read yet
    with reading(f"{name}: cannot be read"), open_file(name) as (file, raw):
        at = raw.tell()
        while block := file.read(CHUNK):
            advance(raw.tell() - at)
            at = raw.tell()
            end = 1 + max(
                block.rfind(b"\n"), block.rfind(b"\r", 0, -1)
            )  # a last \r may be half of a \r\n
            if end:
                yield b"".join([*held, block[:end]]), False
                held = []
            held.append(block[end:])
            if sum(map(len, held)) > LONG:
                line = b"".join(held)
                *_, end = (
                    0,
                    *(
                        match.start()
                        for match in BETWEEN_WORDS.finditer(line, len(line) - LONG // 2)
                    ),
                )
                if end:
                    yield line[:end], True
                elif len(line) > 64 * LONG:
                    raise InputError(
                        f"{name}: {len(line) >> 20} MiB without a line end or a space; not a text"
                    )
                held = [line[end:]]
    if rest := b"".join(held):
        yield rest, False


def read_chunks(name: str, advance=lambda n: None):
    """The text of a file in pieces of whole lines. "\\n", "\\r" and "\\r\\n" end a line, as in Python's text files, and
    become "\\n". A piece that ends with "\\r" ends within a very long line, and the next begins with "\\r".
    `advance` is called with each number of bytes read from the disk.

    Raises InputError if the file cannot be read, or, with the number of the line, if it is not UTF-8.
    """
    line, begun, begins = 1, "", True
    for chunk, is_cut in whole_lines(name, advance):
        error = None
        try:
            text = chunk.decode("utf-8")
        except UnicodeDecodeError as e:
            error, text = e, chunk[: e.start].decode("utf-8")
        if begins:  # differs from fairseq, which keeps the mark
            text, begins = without_mark(text, name), False
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if "\0" in text:
            note(
                f"{name}: holds NUL characters, as UTF-16 does that was not converted, and files that are no text"
            )
        line += text.count("\n")
        if error:
            raise InputError(
                f"{name}, line {line}: not UTF-8 ({error.reason}); convert the file first, as iconv does"
            )
        yield begun + text + (begun := "\r" * is_cut)


def read_all(names: list[str], label: str):
    """The text of several files, as read_chunks, with a progress bar. Between two files an empty line is added if there
    is none, since a new file begins a new document."""
    total = disk_size(names)
    with tqdm(
        desc=label, total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()
    ) as bar:
        last = ""  # line of the file before
        for name in names:
            separator = "\n" if last.strip() else ""
            for text in read_chunks(name, bar.update):
                if text:  # not a byte order mark alone
                    yield separator + text
                    last, separator = text.removesuffix("\n").rpartition("\n")[2], ""


def json_rows(path) -> list[dict]:
    """The objects of a log with one in each line; none if there is no such file. A row cut by a crash is left out."""
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
    path, member, _ = locate(name)
    status = path.stat()
    return dict(
        file=path.name + (f":{member}" if member is not None else ""),
        bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
    )
