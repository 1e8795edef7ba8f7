"""Make a small corpus to try things on, from the help topics that come with Python.

It is the work of `python data.py --make_demo DIR`.
"""

import re
import tempfile
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

from config import InputError, printable, reading
from text.binarized import SPECIAL, Dictionary, build_dictionary, write_dataset
from text.tokens import tokenizer_of

SENTENCE_END = re.compile(r"\n\s*\n")
WORD = re.compile(r"\w+|[^\w\s]+")
WORDS = 4000  # of the dictionary
PART = ".demo-"  # begins the name of the folder in which it is being made


def make_demo(folder):
    """Write a demo corpus: a document is a topic, a sentence a paragraph.

    train, valid and test share no topic. The dictionary holds the most frequent words of train,
    padded to a multiple of 8 as fairseq-preprocess does. The same Python version writes the same
    bytes. Raises InputError if the folder holds anything: it may be someone's dataset.
    """
    if not str(folder):
        raise InputError("--make_demo needs a folder")
    with reading(str(folder)):
        folder = Path(folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
    if any(not path.name.startswith(PART) for path in folder.iterdir()):
        raise InputError(f"--make_demo {folder}: is not empty; choose a new folder")
    # what a killed start leaves begins with PART
    with tempfile.TemporaryDirectory(dir=folder, prefix=PART, ignore_cleanup_errors=True) as part:
        try:
            rows = _write_demo(Path(part))
        except OSError as e:  # a full disk, of which Python names no file
            e.filename = str(folder)
            raise
        # train's index, without which it is no dataset, is the last
        for path in sorted(Path(part).iterdir(), key=lambda path: path.name == "train.idx"):
            path.replace(folder / path.name)
    for row in rows:
        print(printable(f"{folder}/{row}"))


def _write_demo(folder: Path) -> list[str]:
    """The files of `make_demo`; returns a line about each split."""
    names = sorted(topics)
    splits = {"valid": names[3::8], "test": names[7::8]}
    splits["train"] = [name for i, name in enumerate(names) if i % 8 not in (3, 7)]
    # each sentence is a line; an empty line ends a document
    lines = {}
    for split, members in splits.items():
        lines[split] = []
        for name in members:
            paragraphs = [text for text in SENTENCE_END.split(topics[name]) if text.strip()]
            lines[split] += [" ".join(WORD.findall(text)) for text in paragraphs] + [""]

    text = build_dictionary(Counter(" ".join(lines["train"]).split()), WORDS + len(SPECIAL))
    (folder / "dict.txt").write_text(text, encoding="utf-8")
    dictionary = Dictionary(folder / "dict.txt")
    tokenize = tokenizer_of(dictionary, None)
    rows = []
    for split, members in splits.items():
        count, tokens = write_dataset(folder / split, tokenize(lines[split]), dictionary.rows)
        about = f"{count:,} sentences, {tokens:,} tokens, {len(members)} documents"
        rows.append(f"{split}: {about}")
    return rows
