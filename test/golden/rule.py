"""The text and the first weights of the recorded run, by rule: whoever repeats it starts from the
same bytes.

Read by record.py, which runs in fairseq's own Python, and by test/test_golden.py; needs numpy
alone.
"""

import numpy as np

LINES = {"train": 1200, "valid": 200}
# different ones in the text; the dictionary takes fewer, so that there are unknown words
WORDS = 260


def draws(state: int):
    """Numbers below 2**31 of a linear congruential generator."""
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        yield state >> 33


def spell(number: int) -> str:
    """A word of two syllables or more."""
    number, word = number + 20, ""
    while number:
        number, digit = divmod(number, 20)
        word = "bdfgklmnprst"[digit % 12] + "aeiou"[(digit + number) % 5] + word
    return word


def text(split: str) -> str:
    """Lines of pseudo-words, the small numbers the more frequent; one line in 9 is empty and ends a
    document, one in 15 is longer than a block of 64 tokens can be."""
    lines, draw = [], draws(list(LINES).index(split) + 1)
    for _ in range(LINES[split]):
        kind = next(draw)
        count = 0 if kind % 9 == 0 else 64 + kind % 30 if kind % 15 == 1 else 1 + kind % 14
        lines.append(" ".join(spell(next(draw) * next(draw) * WORDS >> 62) for _ in range(count)))
    return "".join(f"{line}\n" for line in lines)


def weights(shapes: dict) -> dict:
    """The first weights, float32, for {name: shape} of fairseq's names: uniform with a standard
    deviation of 0.05, one stream for all names in alphabetical order. The weights of norms lie
    around 1; the rows of <pad> are 0."""
    stream, made = np.random.RandomState(1), {}
    for name in sorted(shapes):
        drawn = (stream.random_sample(shapes[name]) - 0.5) * 0.05 * 12**0.5
        if "norm" in name and name.endswith("weight"):
            drawn += 1
        if "embed_" in name:
            drawn[1] = 0
        made[name] = drawn.astype(np.float32)
    return made
