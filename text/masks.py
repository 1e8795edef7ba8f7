"""data.mask_block for many blocks at once, bit for bit: np.random.default_rng and Python's hash in vectorized numpy.

Each block of each epoch has a generator of its own, and numpy takes 20 microseconds to make one. Here the generators of
many blocks advance together. The algorithms are numpy's since 1.17: SeedSequence (M. O'Neill, seed_seq_fe128), PCG64
(PCG XSL RR 128/64), Lemire's bounded integers and Floyd's sampling; and CPython's tuple hash since 3.8 (xxHash).
test/test_data.py compares all of it with numpy, hash() and mask_block.
"""

import functools

import numpy as np

u32, u64 = np.uint32, np.uint64
LOW, HALF = u64(2**32 - 1), u64(32)
FLOYD_LIMIT = 10_000  # above this many numpy may choose by another algorithm


def tuple_hashes(first: int, second: int, thirds: np.ndarray) -> np.ndarray:
    """hash((first, second, third)) for each of `thirds`, int64; all integers lie from 0 to 2**61 - 2."""
    p1, p2, p5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
    bits = 2**64 - 1
    hashed = p5
    for value in (first, second):
        hashed = (hashed + value * p2) & bits
        hashed = ((hashed << 31 | hashed >> 33) * p1) & bits
    hashed = u64(hashed) + thirds.astype(u64) * u64(p2)
    hashed = (hashed << u64(31) | hashed >> u64(33)) * u64(p1)
    return (hashed + u64(3 ^ p5 ^ 3527539)).view(np.int64)


def block_seeds(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """mask_block's seed of each block: int(hash((seed, epoch, id)) % 1e6), uint32 (N,)."""
    return np.remainder(tuple_hashes(seed, epoch, ids).astype(np.float64), 1e6).astype(u32)


def _seed_words(seeds: np.ndarray) -> np.ndarray:
    """np.random.SeedSequence(seed).generate_state(4, np.uint64) for each seed below 2**32: (4, N) uint64."""

    def constants(value, factor, count):
        values = [value * pow(factor, i, 2**32) % 2**32 for i in range(count + 1)]
        return np.array(values, u32)[:, None]

    def hashed(values, constants):  # there is one constant more than rows to hash
        values = (values ^ constants[:-1]) * constants[1:]
        return values ^ values >> u32(16)

    steps = constants(0x43B0D7E5, 0x931E8875, 16)
    pool = np.zeros((4, len(seeds)), u32)
    pool[0] = seeds
    pool = hashed(pool, steps[:5])
    for source in range(4):
        others = [i for i in range(4) if i != source]
        at = 4 + 3 * source
        mixed = pool[others] * u32(0xCA01F9DD) - hashed(pool[source], steps[at : at + 4]) * u32(
            0x4973F715
        )
        pool[others] = mixed ^ mixed >> u32(16)
    words = hashed(np.concatenate([pool, pool]), constants(0x8B51F9DD, 0x58F38DED, 8)).astype(u64)
    return words[0::2] | words[1::2] << HALF


# A 128-bit number is a pair (high half, low half) of uint64 arrays; arithmetic wraps around.


def _halves(values: list[int]):
    """Python integers as one such pair of columns."""
    return tuple(
        np.array([value >> shift & 2**64 - 1 for value in values], u64)[:, None]
        for shift in (64, 0)
    )


def _add(a, b):
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]), low


def _multiply(a, b):
    a0, a1, b0, b1 = a[1] & LOW, a[1] >> HALF, b[1] & LOW, b[1] >> HALF
    middle = a1 * b0 + (a0 * b0 >> HALF)
    other = a0 * b1 + (middle & LOW)
    carry = (
        a1 * b1 + (middle >> HALF) + (other >> HALF)
    )  # into the high half, from the low halves' product
    return a[0] * b[1] + a[1] * b[0] + carry, a[1] * b[1]


# PCG64's step is state * MULTIPLIER + increment; k steps are state * POWERS[k - 1] + increment * SUMS[k - 1].
MULTIPLIER, AHEAD = 0x2360ED051FC65DA44385DF649FCCF645, 8
POWERS = [pow(MULTIPLIER, k, 2**128) for k in range(1, AHEAD + 1)]
SUMS = _halves([1 + sum(POWERS[:k]) for k in range(AHEAD)])
POWERS = _halves(POWERS)


class Generators:
    """np.random.default_rng(seed) for each of N integer seeds from 0 to 2**32 - 1."""

    def __init__(self, seeds: np.ndarray):
        high, low, stream_high, stream_low = _seed_words(seeds)
        self.increment = (
            stream_high << u64(1) | stream_low >> u64(63),
            stream_low << u64(1) | u64(1),
        )
        self.state = _add((high, low), self.increment)
        self._steps(len(seeds), 1)

    def _steps(self, count: int, steps: int):
        """The states of the first `count` generators after each of the next `steps` steps: a pair of (steps, count).

        These generators continue from the last state; the others are used up.
        """
        state, increment, powers, sums = (
            (high[..., :count], low[..., :count]) if part else (high[:steps], low[:steps])
            for part, (high, low) in ((1, self.state), (1, self.increment), (0, POWERS), (0, SUMS))
        )
        states = _add(_multiply(state, powers), _multiply(increment, sums))
        self.state = states[0][-1], states[1][-1]
        return states

    def _words(self, count: int, words: int) -> np.ndarray:
        """The next 64-bit words of the first `count` generators, (words, count); words is at most AHEAD."""
        high, low = self._steps(count, words)
        mixed, turn = high ^ low, high >> u64(58)
        return mixed >> turn | mixed << (u64(64) - turn & u64(63))

    def random(self) -> np.ndarray:
        """rng.random() of each: float64 (N,) in [0, 1)."""
        return (self._words(len(self.state[0]), 1)[0] >> u64(11)) * 2.0**-53

    def choose(
        self, n: np.ndarray, count: np.ndarray, begin: np.ndarray, chosen: np.ndarray
    ) -> np.ndarray:
        """rng.choice(n, count, replace=False) of each, as a set: sets chosen[begin + place] for every chosen place.

        n (at most FLOYD_LIMIT), count and begin are int64 (N,); chosen is bool, all False. Returns the numbers of the
        few generators (one in millions) for which numpy may have rejected a draw and drawn again: their choices are not
        valid. All generators are used up afterwards.
        """
        # those with most to draw come first, so the ones that still draw are always the first few
        order = np.argsort(-count.astype(np.int16), kind="stable")
        self.state, self.increment = (
            (high[order], low[order]) for high, low in (self.state, self.increment)
        )
        n, count, begin = n[order], count[order], begin[order]
        redrawn = np.zeros(len(n), bool)
        drawing = (len(n) - np.cumsum(np.bincount(count)))[
            :-1
        ].tolist()  # how many have more than k to draw
        for k in range(0, len(drawing), 2 * AHEAD):
            m, draws = drawing[k], min(2 * AHEAD, len(drawing) - k)
            words = self._words(m, (draws + 1) // 2)
            bits = np.stack([words & LOW, words >> HALF], 1).reshape(-1, m)[
                :draws
            ]  # numpy draws 32 bits at a time
            # Floyd: draw a place up to the k-th of the last `count`; if it is taken, that k-th place itself.
            # (For count = n numpy skips the first draw, which must be 0; all are chosen either way.)
            last = n[:m] - count[:m] + np.arange(k, k + draws)[:, None]
            product = bits * (last + 1).view(u64)
            redrawn[:m] |= ((product & LOW) <= last.view(u64)).any(0)
            places, last = begin[:m] + (product >> HALF).view(np.int64), begin[:m] + last
            for place, itself, m in zip(places, last, drawing[k:]):
                place = np.where(chosen[place[:m]], itself[:m], place[:m])
                chosen[place] = True
        return order[redrawn]


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """np.arange(start, start + length) of each pair, concatenated: int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    out = np.repeat(starts - (ends - lengths), lengths)
    out += np.arange(len(out))
    return out


def hide_blocks(
    hidden, begins, lengths, ids, seed: int, epoch: int, mask_prob: float, span: int, mask_one
):
    """Set hidden[begin : begin + length] of each block to what data.mask_block draws, without mask_stdev.

    hidden is bool, all False; begins (ascending), lengths and ids are int64 (N,). mask_one(length, index=id) is
    mask_block, for the few blocks that this file cannot draw. test/test_data.py compares the two.
    """
    drawn = lengths <= FLOYD_LIMIT
    generators = Generators(block_seeds(seed, epoch, ids))
    counts = (mask_prob * lengths / span + generators.random()).astype(np.int64) * drawn
    chosen = np.zeros(len(hidden), bool)
    redrawn = generators.choose(lengths, counts, begins, chosen)
    starts = np.flatnonzero(chosen)
    room = np.repeat(begins + lengths, counts) - starts  # a span ends with its block
    hidden[ranges(starts, np.minimum(room, span))] = True
    for i in [*np.flatnonzero(~drawn).tolist(), *redrawn.tolist()]:
        hidden[begins[i] : begins[i] + lengths[i]] = mask_one(
            int(lengths[i]), index=int(ids[i])
        ).hidden


@functools.cache
def hide_blocks_is_exact() -> bool:
    """Whether this Python's hash and this numpy's generator draw what this file draws."""
    ids, lengths = np.arange(64) * 977, np.arange(2, 66) * 5
    begins, chosen = np.cumsum(lengths) - lengths, np.zeros(int(lengths.sum()), bool)
    generators = Generators(block_seeds(12345, 7, ids))
    floats = generators.random()
    generators.choose(lengths, lengths // 5, begins, chosen)
    for index, length, draw, row in zip(
        ids.tolist(), lengths.tolist(), floats, np.split(chosen, begins[1:])
    ):
        rng = np.random.default_rng(int(hash((12345, 7, index)) % 1e6))
        if rng.random() != draw or set(rng.choice(length, length // 5, replace=False)) != {
            *np.flatnonzero(row)
        }:
            return False
    return True
