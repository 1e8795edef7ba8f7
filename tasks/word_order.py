"""Make a task of word order from any text: are two neighbouring words of a sentence swapped?

    python -m tasks.word_order --text FILE --dest DIR [--rows 13000]

FILE has a sentence a line, and should not be in the pretraining text. DIR receives train.tsv,
valid.tsv and test.tsv with the columns `text` and `label` (original, swapped): of --rows sentences
9 in 13, 1 in 13 and 3 in 13. No sentence is used twice, half of them are swapped, and the order of
words is all that tells which: a bag of words can only guess. In Chinese and Japanese, characters
stand for words; swapped ones become other pieces of a BPE, so that a bag of these knows something.
Source: the bigram shift of SentEval (Conneau et al. 2018, arXiv 1805.01070).
"""

import random
import re
from pathlib import Path

from config import InputError, printable, read_text
from run import flags

if __name__ == "__main__":
    flags.start()

from run.checkpoint import write_text
from text.files import lines_of, read_chunks

FEWEST, MOST = 5, 30  # words of a sentence
ROWS = 13_000
IDEOGRAPH = "[\u3040-\u30ff\u3400-\u9fff]"
LETTERS = rf"(?:(?!{IDEOGRAPH})[^\W\d_])+"
# no part of what is more than a word, such as 7th, AT&T, or letters with marks of their own
BEFORE, AFTER = r"(?<![^\s(\[\"“‘«])", r"(?![^\s.,;:!?)\]\"”’»…])"
WORD = re.compile(rf"{IDEOGRAPH}|{BEFORE}{LETTERS}(?:['’\-]{LETTERS})*{AFTER}")


def swap(sentence: str, rng: random.Random) -> str | None:
    """The sentence with two different neighbouring words swapped; None if it has no such two."""
    words = list(WORD.finditer(sentence))
    pairs = []
    for left, right in zip(words, words[1:]):
        between = sentence[left.end() : right.start()]
        # nothing but space: no comma, no digit
        if not between.strip() and left[0] != right[0]:
            pairs.append((left, between, right))
    # of a few words the order is free, of many the swap is hard to see for a person, too
    if not pairs or not FEWEST <= len(words) <= MOST:
        return None
    # each place is as likely, so that no position tells where to look
    left, between, right = rng.choice(pairs)
    swapped = right[0] + between + left[0]
    return sentence[: left.start()] + swapped + sentence[right.end() :]


def rows_of(sentences: list[str], most: int = ROWS) -> list[tuple[str, str]]:
    """Up to `most` (text, label) in random order, half of them swapped; the same at each call."""
    rng = random.Random(1)
    # each once, in the order of the text, without tabs
    sentences = list(dict.fromkeys(" ".join(sentence.split()) for sentence in sentences))
    rng.shuffle(sentences)
    rows = []
    for sentence in sentences:
        if len(rows) == most:
            break
        swapped = swap(sentence, rng)
        if swapped:  # drawn for both labels, so that both have sentences that can be swapped
            is_swapped = len(rows) % 2
            rows.append((swapped, "swapped") if is_swapped else (sentence, "original"))
    rng.shuffle(rows)  # so that no split has them in turn
    return rows


def write(path: Path, text: str):
    """Write a file, unless it is there. Raises InputError if another is: it may be someone's."""
    if path.exists() and read_text(path, "replace") != text:
        raise InputError(f"--dest: {path} is not what this writes; choose a new folder")
    write_text(path, text)


def write_task(folder: Path, rows: list, valid: int, test: int):
    """Write {train,valid,test}.tsv with a header from (text, label) rows. Raises InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    train = len(rows) - valid - test
    splits = {"train": rows[:train], "valid": rows[train:][:valid], "test": rows[train:][valid:]}
    for split, part in splits.items():
        lines = [f"{text}\t{label}\n" for text, label in part]
        write(folder / f"{split}.tsv", "text\tlabel\n" + "".join(lines))
        print(printable(f"{folder / split}.tsv: {len(part):,} rows"))


def write_word_order(folder: Path, rows: list):
    """Write the three splits of the task from its rows."""
    write_task(folder, rows, len(rows) // 13, len(rows) * 3 // 13)


def main(argv: list | None = None) -> int:
    parser = flags.Parser(description=__doc__)
    flag = parser.add_argument
    flag("--text", required=True, metavar="FILE", help="a sentence a line")
    flag("--dest", required=True, metavar="DIR", help="where train, valid and test.tsv go")
    flag("--rows", type=int, default=ROWS, metavar="N", help=f"at most so many [{ROWS}]")
    args = parser.parse_args(argv)
    lines = [line for text in read_chunks(args.text) for line in lines_of(text)]
    rows = rows_of(lines, max(0, args.rows))
    if len(rows) < 13:
        fit = f"{len(rows)} sentences of {FEWEST} to {MOST} words"
        raise InputError(f"--text {args.text}: {fit} are too few for three splits")
    write_word_order(Path(args.dest), rows)
    return 0


if __name__ == "__main__":
    flags.program(main)
