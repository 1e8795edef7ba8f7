"""data.mask_block for the blocks of a batch at once, bit for bit: np.random.default_rng in arrays.

Each block of each epoch has a generator of its own, and numpy takes 20 microseconds to make one.
Here those of N blocks draw together. The algorithms are numpy's since 1.17:
SeedSequence (M. O'Neill, seed_seq_fe128), PCG64 (PCG XSL RR 128/64), Lemire's bounded integers and
Floyd's sampling; and CPython's tuple hash since 3.8 (xxHash). test/test_data.py compares all of it
with numpy, hash() and mask_block.
"""

import functools
import itertools
from types import SimpleNamespace

from config import DataConfig

import numpy as np

u32, u64 = np.uint32, np.uint64
LOW, HALF = u64(2**32 - 1), u64(32)
FLOYD_LIMIT = 10_000  # above this many numpy may choose by another algorithm

# ------------------------------------------------------------------------------------------- seeds


def tuple_hashes(first: int, second: int, thirds: np.ndarray) -> np.ndarray:
    """hash((first, second, third)) for each of `thirds`, int64; all lie from 0 to 2**61 - 2."""
    p1, p2, p5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
    bits = 2**64 - 1
    hashed = p5
    for value in (first, second):
        hashed = (hashed + value * p2) & bits
        hashed = ((hashed << 31 | hashed >> 33) * p1) & bits
    hashed = u64(hashed) + thirds.astype(u64) * u64(p2)
    hashed = (hashed << u64(31) | hashed >> u64(33)) * u64(p1)
    return (hashed + u64(3 ^ p5 ^ 3527539)).view(np.int64)


def _constants(value: int, factor: int, count: int) -> np.ndarray:
    """SeedSequence's constants: each is the one before times `factor`; (count + 1, 1)."""
    values = [value * pow(factor, i, 2**32) % 2**32 for i in range(count + 1)]
    return np.array(values, u32)[:, None]


MIXING = _constants(0x43B0D7E5, 0x931E8875, 16)
DRAWING = _constants(0x8B51F9DD, 0x58F38DED, 8)


def _hashed(values: np.ndarray, constants: np.ndarray) -> np.ndarray:
    """There is one constant more than rows of values."""
    values = (values ^ constants[:-1]) * constants[1:]
    return values ^ values >> u32(16)


def seed_words(seeds: np.ndarray) -> np.ndarray:
    """SeedSequence(seed).generate_state(4, np.uint64) for each seed, uint32 (N,): (4, N) uint64."""
    pool = np.zeros((4, len(seeds)), u32)
    pool[0] = seeds
    pool = _hashed(pool, MIXING[:5])
    for source in range(4):
        others = [i for i in range(4) if i != source]
        at = 4 + 3 * source
        hashed = _hashed(pool[source], MIXING[at : at + 4])
        mixed = pool[others] * u32(0xCA01F9DD) - hashed * u32(0x4973F715)
        pool[others] = mixed ^ mixed >> u32(16)
    words = _hashed(np.concatenate([pool, pool]), DRAWING).astype(u64)
    return words[0::2] | words[1::2] << HALF


# -------------------------------------------------------------------------------------- generators
# A 128-bit number is a pair (high half, low half) of uint64 arrays; arithmetic wraps around.

MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645  # PCG64's step is state * MULTIPLIER + increment


def _halves(values: list[int]):
    """Python integers as one such pair of columns."""
    high = np.array([value >> 64 for value in values], u64)[:, None]
    low = np.array([value & 2**64 - 1 for value in values], u64)[:, None]
    return high, low


@functools.lru_cache(64)
def _powers(count: int):
    """k steps at once are state * powers + increment * sums, for k from 2 to count + 1."""
    powers = [pow(MULTIPLIER, k, 2**128) for k in range(count + 2)]
    sums = [value % 2**128 for value in itertools.accumulate(powers[:-1])]
    return _halves(powers[2:]), _halves(sums[1:])


def _add(a, b):
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]), low


def _multiply(a, b):
    a0, a1 = a[1] & LOW, a[1] >> HALF
    b0, b1 = b[1] & LOW, b[1] >> HALF
    # the product of the low halves has 128 bits: `carry` goes into the high half
    middle = a1 * b0 + (a0 * b0 >> HALF)
    other = a0 * b1 + (middle & LOW)
    carry = a1 * b1 + (middle >> HALF) + (other >> HALF)
    return a[0] * b[1] + a[1] * b[0] + carry, a[1] * b[1]


def random_words(seeds: np.ndarray, count: int) -> np.ndarray:
    """The first 64-bit words of np.random.default_rng(seed) for each seed: uint64 (count, N)."""
    high, low, stream_high, stream_low = seed_words(seeds)
    one = u64(1)
    increment = (stream_high << one | stream_low >> u64(63), stream_low << one | one)
    start = _add((high, low), increment)
    # numpy steps once when it seeds, and before each word
    powers, sums = _powers(count)
    high, low = _add(_multiply(start, powers), _multiply(increment, sums))
    mixed, turn = high ^ low, high >> u64(58)
    return mixed >> turn | mixed << (u64(64) - turn & u64(63))


# ------------------------------------------------------------------------------------------- masks


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """np.arange(start, start + length) of each pair, concatenated: int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    out = np.repeat(starts - (ends - lengths), lengths)
    out += np.arange(len(out))
    return out


def hide_blocks(
    lengths: np.ndarray, ids: np.ndarray, cfg: DataConfig, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """What data.mask_block hides in each of N blocks, without mask_stdev, one after the other.

    lengths and ids are int64 (N,); returns bool (sum of lengths,). Also returns the numbers of the
    few blocks whose part is not valid: very long ones, and those (one in millions) for which numpy
    may have rejected a draw and drawn again.
    """
    ends = np.cumsum(lengths)
    expected = cfg.mask_prob * lengths / cfg.mask_multiple_length  # (N,)
    draws = int(expected.max()) + 2  # at most
    # mask_block's seed of each block: int(hash((seed, epoch, id)) % 1e6)
    seeds = np.remainder(tuple_hashes(cfg.seed, epoch, ids).astype(np.float64), 1e6).astype(u32)
    words = random_words(seeds, 1 + (draws + 1) // 2)
    # how many spans: rng.random() rounds their expected number up or down
    counts = (expected + (words[0] >> u64(11)) * 2.0**-53).astype(np.int64)
    too_long = lengths > FLOYD_LIMIT
    counts[too_long] = 0

    # where they start: rng.choice(length, count, replace=False), which is Floyd's sampling: draw a
    # place up to the k-th of the last `count`; if it is taken, that one itself. For count = length
    # numpy skips the first draw, which must be 0; all are chosen either way.
    bits = np.stack([words[1:] & LOW, words[1:] >> HALF], 1)  # numpy draws 32 bits at a time
    bits = bits.reshape(-1, len(lengths))[:draws]  # (draws, N)
    k = np.arange(draws)[:, None]
    used = k < counts
    last = lengths - counts + k
    product = bits * (last + 1).view(u64)
    rejected = used & ((product & LOW) <= last.view(u64))
    begins = ends - lengths
    nowhere = ends[-1]
    places = np.where(used, begins + (product >> HALF).view(np.int64), nowhere)
    last = np.where(used, begins + last, nowhere)
    chosen = np.zeros(nowhere + 1, bool)
    for place, itself in zip(places, last):
        chosen[np.where(chosen[place], itself, place)] = True

    # a span ends with its block
    starts = np.flatnonzero(chosen[:-1])
    room = np.repeat(ends, counts) - starts
    hidden = np.zeros(nowhere, bool)
    hidden[ranges(starts, np.minimum(room, cfg.mask_multiple_length))] = True
    return hidden, np.flatnonzero(too_long | rejected.any(0))


@functools.cache
def hide_blocks_is_exact(rule) -> bool:
    """Whether this Python's hash and this numpy's generator draw what hide_blocks draws.

    rule: data.mask_block.
    """
    cfg = DataConfig(seed=12345)
    lengths = np.arange(2, 66) * 5
    hidden, invalid = hide_blocks(lengths, lengths * 977, cfg, 7)
    symbols = SimpleNamespace(mask_id=0)
    blocks = [rule(n, symbols, cfg, 7, n * 977)[0] for n in lengths.tolist()]
    return len(invalid) == 0 and np.array_equal(hidden, np.concatenate(blocks))
