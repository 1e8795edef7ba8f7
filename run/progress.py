"""A bar with the time left, for a person who waits; without a terminal there is none."""

import sys

from tqdm import tqdm

# fits 80 columns
FORMAT = "{desc}{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"


def Bar(iterable=None, rank: int = 0, what: str = "", leave: bool = False, **options) -> tqdm:
    """tqdm's bar. rank: only the first worker's shows. leave: whether it stays when closed."""
    desc = f"{what}: " if what else ""
    is_hidden = rank > 0 or not sys.stderr.isatty()
    form = dict(bar_format=FORMAT, dynamic_ncols=True, file=sys.stderr)
    return tqdm(iterable, desc=desc, leave=leave, disable=is_hidden, **form, **options)
