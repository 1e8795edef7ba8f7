"""A bar with the time left, for a person who waits; without a terminal there is none."""

import sys
import threading

from tqdm import tqdm

FORMAT = "{desc}{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}, {rate_fmt}{postfix}"  # fits 80 columns
TICK = 1.0  # seconds


class Bar(tqdm):
    """tqdm's bar, drawn again every second: its clock shows that something happens, however long a step takes."""

    def __init__(
        self, iterable=None, rank: int = 0, what: str = "", leave: bool = False, **options
    ):
        """rank: of the worker; only the first one's shows. leave: whether it stays when it is closed."""
        plain = dict(
            bar_format=FORMAT, dynamic_ncols=True, file=sys.stderr, desc=what and f"{what}: "
        )
        super().__init__(
            iterable, leave=leave, disable=rank > 0 or not sys.stderr.isatty(), **plain, **options
        )
        self._closed = threading.Event()
        self._ticking = threading.Thread(target=self._tick, daemon=True)
        if not self.disable:
            self._ticking.start()

    def _tick(self):
        while not self._closed.wait(TICK):
            self.refresh()

    def close(self):
        if not self.disable:
            self._closed.set()
            self._ticking.join()
        super().close()
