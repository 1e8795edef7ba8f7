"""For a person who waits: lines, and a bar with the time left, if there is a terminal."""

import errno
import os
import sys
from pathlib import Path

from config import printable

from tqdm import tqdm

# fits 80 columns
FORMAT = "{desc}{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"


def Bar(iterable=None, rank: int = 0, what: str = "", leave: bool = False, **options) -> tqdm:
    """tqdm's bar. rank: only the first worker's shows. leave: whether it stays when closed."""
    desc = f"{what}: " if what else ""
    is_hidden = rank > 0 or not sys.stderr.isatty()
    form = dict(bar_format=FORMAT, dynamic_ncols=True, file=sys.stderr)
    return tqdm(iterable, desc=desc, leave=leave, disable=is_hidden, **form, **options)


def say(text: str):
    """Print a line, above a bar if there is one. Work that has begun goes on if nobody takes it."""
    try:
        tqdm.write(printable(text))
        sys.stdout.flush()
    except OSError as e:
        # the reader is gone, as `| tee` is after Ctrl-C; a disk may have room again
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            sys.stdout = Path(os.devnull).open("w", errors="replace")
