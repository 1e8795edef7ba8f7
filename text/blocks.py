"""How sentences become blocks and blocks become batches, for all of them at once.

The rules are those of fairseq's TokenBlockDataset and batch sampler, at commit 3f6ba43f.
test/test_blocks.py walks the same rules one item at a time. A *block* is one training sample cut
from consecutive sentences; a *batch* is a list of blocks.
"""

import bisect

from text.binarized import pieces

import numpy as np


def cut_blocks(
    sizes: np.ndarray, mode: str, block_size: int, split_long: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the run of sentences of these sizes into blocks: the (start, end) of each, int64.

    `<s>` is not counted. none: equal cuts. eos: one sentence per block. complete: as many whole
    sentences as fit. complete_doc: the same, but a sentence of one token ends the block and belongs
    to none, and a block of one token is dropped.
    split_long: a sentence longer than block_size is first cut into parts of at most block_size, so
    nothing is lost; a part of one token is then no separator, and a block of one token is kept.
    """
    if mode == "none":
        total = int(sizes.sum(dtype=np.int64))
        starts = np.arange(0, total, block_size, dtype=np.int64)
        return starts, np.minimum(starts + block_size, total)
    blocks = [np.zeros((2, 0), np.int64)]
    # what is not in a block yet; the first part of it begins at `at`
    at = 0
    parts = np.zeros(0, np.int64)
    separator = np.zeros(0, bool)
    for piece in pieces(len(sizes)):
        more = _split_sentences(sizes[piece].astype(np.int64), block_size, split_long)
        parts = np.concatenate([parts, more[0]])
        separator = np.concatenate([separator, more[1]])
        first, stop = _chain_of_blocks(parts, separator, mode, block_size)
        done = len(parts)
        if piece.stop < len(sizes) and len(first):  # the last block may continue in the next piece
            done = first[-1]
            first, stop = first[:-1], stop[:-1]
        starts = at + np.concatenate([[0], np.cumsum(parts)])
        blocks.append(np.stack([starts[first], starts[stop]]))
        at = starts[done]
        parts, separator = parts[done:], separator[done:]
    starts, ends = np.concatenate(blocks, axis=1)
    if mode == "complete_doc" and not split_long:
        long_enough = ends - starts > 1
        starts, ends = starts[long_enough], ends[long_enough]
    return starts, ends


def _split_sentences(
    sizes: np.ndarray, block_size: int, split_long: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The sizes of the sentences, or of their parts, without empty ones; which are separators."""
    sizes = sizes[sizes > 0]
    separator = sizes == 1
    if not split_long:
        return sizes, separator
    counts = -(-sizes // block_size)
    parts = np.full(int(counts.sum()), block_size, np.int64)
    parts[np.cumsum(counts) - 1] = sizes - (counts - 1) * block_size  # the last of each sentence
    return parts, np.repeat(separator, counts)


def _chain_of_blocks(sizes: np.ndarray, separator: np.ndarray, mode: str, block_size: int):
    """The first sentence of each block, and the sentence after its last."""
    n = len(sizes)
    here = np.arange(n)
    if mode == "eos":
        return here, here + 1

    # where a block would end that begins at each sentence, for all at once
    ends = np.cumsum(sizes)
    stop = np.searchsorted(ends, ends - sizes + block_size, side="right")
    stop = np.maximum(stop, here + 1)  # a sentence longer than a block is a block of its own
    following = np.arange(n + 1)  # where the next block begins, if this one stops here
    if mode == "complete_doc":
        stop = np.minimum(stop, _next(separator))
        following[:-1] = _next(~separator)

    # then follow the chain of actual blocks
    chain = following[stop].tolist()
    first = []
    i = int(following[0])
    while i < n:
        first.append(i)
        i = chain[i]
    return np.asarray(first, np.int64), stop[first]


def _next(wanted: np.ndarray) -> np.ndarray:
    """The first place from each one on that is wanted, or the length."""
    places = np.where(wanted, np.arange(len(wanted)), len(wanted))
    return np.minimum.accumulate(places[::-1])[::-1]


def order_by_length(lengths: np.ndarray, seed: int) -> np.ndarray:
    """Block numbers in ascending order of length: int32, or int64 from 2**31 blocks on.

    Ties are in the order of numpy's legacy permutation for `seed`.
    """
    n = len(lengths)
    by_rank = np.empty(n, np.int32 if n < 2**31 else np.int64)
    # the permutation holds each block's rank among its equals: lexsort((permutation, lengths))
    by_rank[np.random.RandomState(seed).permutation(n)] = np.arange(n, dtype=by_rank.dtype)
    keys = lengths[by_rank]
    if keys.max(initial=0) < 2**16:
        keys = keys.astype(np.uint16)  # numpy sorts these in linear time
    return by_rank[np.argsort(keys, kind="stable")]


def cut_batches(lengths: np.ndarray, max_tokens: int, batch_size: int, multiple: int) -> np.ndarray:
    """Cut blocks in ascending order of length into batches; returns the end of each batch, int64.

    The rule walks the blocks and keeps a *batch*, the longest prefix so far whose size is below
    `multiple` or divisible by it, and a *tail*, the blocks since. A block that makes batch + tail
    too large (blocks x longest > max_tokens, or more than batch_size blocks) closes the batch, and
    the tail with that block begins the next one; if the tail with that block has too many tokens by
    itself, the tail without it becomes a batch of its own. At the end the batch and the tail are
    what is left.
    """
    n = len(lengths)
    lengths = memoryview(np.ascontiguousarray(lengths))  # much faster to look into
    ends = []
    start = 0  # of the batch
    while start < n:
        # the first block that makes batch + tail too large; later blocks are longer still
        most = min(n - start, batch_size or n, max(1, max_tokens // max(1, lengths[start])))
        stop = start + bisect.bisect_right(
            range(1, most + 1), max_tokens, key=lambda count: count * lengths[start + count - 1]
        )
        stop = max(stop, start + 1)
        size = stop - start
        if size >= multiple:
            size -= size % multiple
        start += size  # now of the tail
        ends.append(start)
        if start < stop == n:
            ends.append(n)
            break
        if start < stop and lengths[stop] * (stop + 1 - start) > max_tokens:
            ends.append(stop)
            start = stop
    return np.asarray(ends, np.int64)
