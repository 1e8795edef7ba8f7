"""Work of others, in order: a tokenizer in several processes, batches made by a thread."""

import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process, resource_tracker

from config import RunError
from text import files
from text.tokens import Tokenizer

_tokenizer = None  # a worker process has its own


def _end_with_parent():
    """A parent that gets SIGKILL cannot end its workers."""
    parent_process().join()
    os._exit(1)  # sys.exit would end this thread alone


def _begin(*arguments):
    global _tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = Tokenizer(*arguments)


def _submit(pool, method: str, chunk: str):
    """The parent answers Ctrl-C: a process that this starts never hears it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_work, method, chunk)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(method: str, chunk: str):
    return getattr(_tokenizer, method)(chunk)


def tokenize(method: str, tokenizer: Tokenizer, names: list[str], label: str, workers: int):
    """Yield Tokenizer.`method` of each piece of the texts, in order, made by several processes.

    The results do not depend on `workers`. Raises RunError if a process dies.
    """
    chunks = files.read_all(names, label)
    workers = min(workers, files.disk_size(names) // files.CHUNK)
    if workers < 2:
        yield from map(getattr(tokenizer, method), chunks)
        return
    resource_tracker.ensure_running()  # which unblocks SIGINT
    # not fork: threads of tokenizers may be running
    parts = (tokenizer.ids, tokenizer.dtype, tokenizer.bpe)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, parts)
    ahead = deque()  # results to come, in order
    try:
        for chunk in chunks:
            ahead.append(_submit(pool, method, chunk))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool:
        what = "a worker was killed, perhaps out of memory (try fewer --workers)"
        raise RunError(f"{what}; the same command continues") from None
    finally:
        pool.shutdown(cancel_futures=True)


def prefetch(iterable, depth: int, begin=None):
    """Yield the items in order while a thread makes up to `depth` of them in advance.

    The thread calls `begin` first. An error of the iterable is raised in place of its item. If the
    generator is closed, or its consumer fails, the thread stops after the item it is working on.
    """
    items = iter(iterable)
    end = object()  # no item can be it
    maker = ThreadPoolExecutor(1, "prefetch", begin)
    try:
        ahead = deque(maker.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(maker.submit(next, items, end))
            yield item
    finally:
        maker.shutdown(cancel_futures=True)
