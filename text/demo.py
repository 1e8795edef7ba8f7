"""Make a small corpus to try things on, from the help topics that come with Python.

It is the work of `python data.py --make_demo DIR`.
"""

import filecmp
import re
import tempfile
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

from config import InputError, printable
from text.binarized import EOS, SPECIAL, UNK, Dictionary, build_dictionary, write_dataset

SENTENCE_END = re.compile(r"\n\s*\n")
WORD = re.compile(r"\w+|[^\w\s]+")
WORDS = 4000  # of the dictionary


def make_demo(folder):
    """Write a demo corpus: a document is a topic, a sentence a paragraph.

    train, valid and test share no topic. The dictionary holds the most frequent words of train,
    padded to a multiple of 8 as fairseq-preprocess does. The same Python version writes the same
    bytes. Raises InputError if the folder holds anything else: it may be someone's dataset.
    """
    if not str(folder):
        raise InputError("--make_demo needs a folder")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{folder}: {e.strerror}") from None
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as part:
        part = Path(part)
        try:
            lines = _write_demo(part)
        except OSError as e:  # a full disk, of which Python names no file
            e.filename = str(folder)
            raise
        for path in folder.iterdir():
            ours = part / path.name
            if not ours.exists() or not filecmp.cmp(path, ours, shallow=False):
                raise InputError(
                    f"--make_demo {folder}: {path.name} in it is not this demo's; choose a new"
                    " folder"
                )
        # train.idx marks the set as complete, so it is the last
        for path in sorted(part.iterdir(), key=lambda path: path.name == "train.idx"):
            path.replace(folder / path.name)
    for line in lines:
        print(printable(f"{folder}/{line}"))


def _write_demo(folder: Path) -> list[str]:
    """The files of `make_demo`; returns a line about each split."""
    names = sorted(topics)
    members = {"valid": names[3::8], "test": names[7::8]}
    members["train"] = [name for name in names if name not in members["valid"] + members["test"]]

    # the documents of each split: lists of sentences, which are lists of words
    documents = {}
    for split, topic_names in members.items():
        documents[split] = []
        for name in topic_names:
            paragraphs = SENTENCE_END.split(topics[name])
            document = [WORD.findall(text) for text in paragraphs if text.strip()]
            documents[split].append(document)

    counts = Counter()
    for document in documents["train"]:
        for words in document:
            counts.update(words)
    text = build_dictionary(counts, WORDS + len(SPECIAL))
    (folder / "dict.txt").write_text(text, encoding="utf-8")
    dictionary = Dictionary(folder / "dict.txt")
    lines = []
    # the sentences of a split, one document after the other
    for split in documents:
        sentences = []
        for document in documents[split]:
            for words in document:
                sentences.append([dictionary.ids.get(word, UNK) for word in words] + [EOS])
            sentences.append([EOS])  # ends the document
        count, tokens = write_dataset(folder / split, sentences, dictionary.rows)
        about = f"{count:,} sentences, {tokens:,} tokens, {len(documents[split])} documents"
        lines.append(f"{split}: {about}")
    return lines
