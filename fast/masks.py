"""What numpy draws, for many seeds at once: np.random.default_rng and Python's hash in vectorized numpy, bit for bit.

Masks take a generator of its own for every block of every epoch, and numpy spends 20 microseconds on making one. Here
all generators of many blocks advance together. The algorithms are numpy's since 1.17: SeedSequence (M. O'Neill,
seed_seq_fe128), PCG64 (PCG XSL RR 128/64), Lemire's bounded integers, Floyd's sampling; and CPython's tuple hash since
3.8 (xxHash). The tests hold all of it against numpy and hash().
"""

import numpy as np

u32, u64 = np.uint32, np.uint64
LOW, HALF = u64(2**32 - 1), u64(32)
FLOYD_LIMIT = 10_000  # from more than this many numpy may choose by another algorithm


def tuple_hashes(first: int, second: int, thirds: np.ndarray) -> np.ndarray:
    """hash((first, second, third)) for each of `thirds`, int64. All integers from 0 to 2**61 - 2."""
    p1, p2, p5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
    bits = 2**64 - 1
    hashed = p5
    for value in (first, second):
        hashed = (hashed + value * p2) & bits
        hashed = ((hashed << 31 | hashed >> 33) * p1) & bits
    hashed = u64(hashed) + thirds.astype(u64) * u64(p2)
    hashed = (hashed << u64(31) | hashed >> u64(33)) * u64(p1)
    return (hashed + u64(3 ^ p5 ^ 3527539)).view(np.int64)


def _seed_words(seeds: np.ndarray) -> np.ndarray:
    """np.random.SeedSequence(seed).generate_state(4, np.uint64) for each seed below 2**32: (4, N) uint64."""

    def constants(value, factor, count):
        values = [value * pow(factor, i, 2**32) % 2**32 for i in range(count + 1)]
        return np.array(values, u32)[:, None]

    def hashed(values, constants):  # constants: one more than there are rows to hash
        values = (values ^ constants[:-1]) * constants[1:]
        return values ^ values >> u32(16)

    steps = constants(0x43B0D7E5, 0x931E8875, 16)
    pool = np.zeros((4, len(seeds)), u32)
    pool[0] = seeds
    pool = hashed(pool, steps[:5])
    for source in range(4):
        others = [i for i in range(4) if i != source]
        at = 4 + 3 * source
        mixed = pool[others] * u32(0xCA01F9DD) - hashed(pool[source], steps[at : at + 4]) * u32(0x4973F715)
        pool[others] = mixed ^ mixed >> u32(16)
    words = hashed(np.concatenate([pool, pool]), constants(0x8B51F9DD, 0x58F38DED, 8)).astype(u64)
    return words[0::2] | words[1::2] << HALF


# 128-bit numbers are pairs (high half, low half) of uint64 arrays, and wrap around.


def _halves(values: list[int]):
    """Numbers as a pair of columns."""
    return tuple(np.array([value >> shift & 2**64 - 1 for value in values], u64)[:, None] for shift in (64, 0))


def _add(a, b):
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]), low


def _multiply(a, b):
    a0, a1, b0, b1 = a[1] & LOW, a[1] >> HALF, b[1] & LOW, b[1] >> HALF
    middle = a1 * b0 + (a0 * b0 >> HALF)
    other = a0 * b1 + (middle & LOW)
    carry = a1 * b1 + (middle >> HALF) + (other >> HALF)  # what the low halves' product leaves for the high half
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
        self.increment = stream_high << u64(1) | stream_low >> u64(63), stream_low << u64(1) | u64(1)
        self.state = _add((high, low), self.increment)
        self._steps(len(seeds), 1)

    def _steps(self, count: int, steps: int):
        """The states of the first `count` generators behind each of the next `steps` steps: a pair of (steps, count).

        They go on from the last; the other generators have come to their end.
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

    def choose(self, n: np.ndarray, count: np.ndarray, begin: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """rng.choice(n, count, replace=False) of each, as a set: chosen[begin + place] becomes True for every place.

        n (at most FLOYD_LIMIT), count and begin are int64 (N,); chosen is bool, and False at all those places. Returns
        the numbers of the few generators (one in millions) for which numpy may have thrown a draw away and drawn again:
        their choices do not count. The generators are at their end then.
        """
        # those with most to draw come first, so that the ones that still draw are the first few
        order = np.argsort(-count.astype(np.int16), kind="stable")
        self.state, self.increment = ((high[order], low[order]) for high, low in (self.state, self.increment))
        n, count, begin = n[order], count[order], begin[order]
        redrawn = np.zeros(len(n), bool)
        drawing = (len(n) - np.cumsum(np.bincount(count)))[:-1].tolist()  # how many have more than k to draw
        for k in range(0, len(drawing), 2 * AHEAD):
            m, draws = drawing[k], min(2 * AHEAD, len(drawing) - k)
            words = self._words(m, (draws + 1) // 2)
            bits = np.stack([words & LOW, words >> HALF], 1).reshape(-1, m)[:draws]  # numpy takes 32 at a time
            # Floyd: a place up to the k-th of the last `count`, or that one itself if the place is taken already.
            # (count = n: numpy draws nothing for the first, which is 0; here it does, and all are chosen either way)
            last = n[:m] - count[:m] + np.arange(k, k + draws)[:, None]
            product = bits * (last + 1).view(u64)
            redrawn[:m] |= ((product & LOW) <= last.view(u64)).any(0)
            places, last = begin[:m] + (product >> HALF).view(np.int64), begin[:m] + last
            for place, itself, m in zip(places, last, drawing[k:]):
                place = np.where(chosen[place[:m]], itself[:m], place[:m])
                chosen[place] = True
        return order[redrawn]
