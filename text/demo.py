"""Describe a dataset, or write a demo corpus: the command of data.py.

    python data.py --data_path DIR              describe a dataset: what a run would see and what it would lose
    python data.py --data_path DIR --json       the same as one JSON object, with digests of one epoch's batches
    python data.py --make_demo DIR              write a small demo corpus

The settings of a run are options here too.
"""

import contextlib
import filecmp
import hashlib
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

from config import DataConfig, InputError, printable
from data import BlockDataset, Corpus
from run import flags
from text.binarized import (
    EOS,
    PAD,
    SPECIAL,
    UNK,
    Dictionary,
    TokenStream,
    build_dictionary,
    write_dataset,
)
from text.files import json_rows
from text.notes import notes
from text.tokens import load_tokenizer

import numpy as np


def describe(corpus: Corpus, split: str, epoch: int, rank: int, world_size: int) -> dict:
    """Figures and digests of one split as worker `rank` sees it in `epoch`. Reads every token."""
    dataset, dictionary = corpus.split(split, epoch), corpus.dictionary
    stream, cfg = dataset.stream, dataset.cfg
    unknown = int(stream.counts(dictionary)[UNK])  # reads, and checks, every token
    digests = {name: hashlib.sha256() for name in ("source", "target", "ids")}
    batches = dataset.epoch_batches(epoch, rank, world_size)
    tokens_used = masked = places = 0
    for ids in batches:
        if len(ids) == 0:
            continue
        tokens, source, hidden = dataset.mask(ids, epoch)
        # fairseq's teacher_input=masked is padded at the other places, where Batch.target leaves them out
        target = tokens if cfg.teacher_input == "full" else np.where(hidden, tokens, PAD)
        for name, array in (("source", source), ("target", target), ("ids", ids.astype(np.int64))):
            digests[name].update(np.ascontiguousarray(array))
        tokens_used += int(dataset.lengths[ids].sum())
        masked += int((source == dictionary.mask_id).sum())
        places += source.size
    separators = stream.sizes == 1
    # a document begins at a sentence that is no separator and comes first or after a separator
    documents = (
        int((~separators & np.concatenate([[True], separators[:-1]])).sum())
        if len(separators)
        else 0
    )
    too_long, remainder = dataset.dropped_tokens()
    quantiles = (
        np.quantile(dataset.lengths, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
        if len(dataset.lengths)
        else []
    )
    return dict(
        split=split,
        epoch=epoch,
        sentences=len(stream.sizes),
        documents=documents,
        tokens=stream.tokens,
        unknown=unknown,
        dictionary_size=len(dictionary),
        mask_id=dictionary.mask_id,
        blocks=len(dataset.lengths),
        block_length_quantiles=[float(q) for q in quantiles],
        blocks_too_long=len(dataset.too_long),
        blocks_in_remainder=len(dataset.remainder),
        tokens_too_long=too_long,
        tokens_in_remainder=remainder,
        dropped_percent=100 * (too_long + remainder) / max(1, stream.tokens),
        batches=len(batches),
        empty_batches=sum(len(ids) == 0 for ids in batches),
        sentences_used=sum(map(len, batches)),
        tokens_used=tokens_used,
        masked=masked,
        padding_percent=100 * (1 - tokens_used / max(1, places)),
        masked_percent=100 * masked / max(1, tokens_used),
        **{f"sha256_{name}": digest.hexdigest() for name, digest in digests.items()},
    )


def first_block(dataset: BlockDataset) -> str:
    """The first block as text, or as symbols where its tokens are those of a BPE that cannot be read."""
    tokens, dictionary = dataset.read_block(0), dataset.dictionary
    try:
        text = load_tokenizer(dataset.stream.folder, dictionary).decode(tokens, dictionary)
    except InputError as e:
        text = f"({e}) {dictionary.decode(tokens)}"
    return printable(text if len(text) <= 600 else text[:600] + " ...")


def shared_text(folder: Path) -> str:
    """What train and valid share: the files that preprocess.py read for both, or "everything"; "" if nothing is known
    to be in both."""
    rows = {str(row.get("step")): row for row in json_rows(folder / "preprocess.log")}
    with contextlib.suppress(
        InputError, KeyError, TypeError
    ):  # there is no valid, or the log was edited
        if TokenStream(folder, "train").digest() == TokenStream(folder, "valid").digest():
            return "everything"
        read = {split: rows[split]["made_from"]["text"] for split in ("train", "valid")}
        return ", ".join(text["file"] for text in read["train"] if text in read["valid"])
    return ""


def warnings(facts: dict, dataset: BlockDataset) -> list[str]:
    """What should be looked at before training."""
    found, share = notes(dataset), 100 / max(1, facts["tokens"])
    if facts["dropped_percent"] > 1:
        found.append(f"{facts['dropped_percent']:.1f}% of the tokens are never seen")
    if facts["unknown"] * share > 5:
        found.append(
            f"{facts['unknown'] * share:.0f}% of the tokens are <unk>; with --bpe train there would be none"
        )
    if shared := shared_text(dataset.stream.folder):
        found.append(
            f"train and valid share {shared}; a figure on valid then says little of new text"
        )
    return found


def print_description(facts: dict, dataset: BlockDataset):
    first = first_block(dataset) if facts["blocks"] else ""
    share = 100 / max(1, facts["tokens"])
    for name, text in (
        ("sentences", f"{facts['sentences']:,} in {facts['documents']:,} documents"),
        ("tokens", f"{facts['tokens']:,}, {facts['unknown'] * share:.1f}% <unk>"),
        ("dictionary", f"{facts['dictionary_size']:,} symbols, <mask> is {facts['mask_id']}"),
        ("blocks", f"{facts['blocks']:,}"),
        (
            "block length",
            "min 10% 25% 50% 75% 90% max: "
            + " ".join(f"{q:.0f}" for q in facts["block_length_quantiles"]),
        ),
        (
            "lost, too long",
            f"{facts['tokens_too_long']:,} tokens ({facts['tokens_too_long'] * share:.2f}%)"
            f" in {facts['blocks_too_long']:,} blocks",
        ),
        (
            "lost, remainder",
            f"{facts['tokens_in_remainder']:,} tokens ({facts['tokens_in_remainder'] * share:.2f}%)"
            f" in {facts['blocks_in_remainder']:,} blocks",
        ),
        (
            f"epoch {facts['epoch']}",
            f"{facts['batches']:,} batches, {facts['empty_batches']} empty;"
            f" {facts['sentences_used']:,} blocks, {facts['tokens_used']:,} tokens with <s>",
        ),
        ("padding", f"{facts['padding_percent']:.2f}%"),
        ("masked", f"{facts['masked_percent']:.2f}% ({facts['masked']:,} tokens)"),
        ("first block", first),
    ):
        print(f"{name:16} {text}")


# ---------------------------------------------------------------------------------------------- demo corpus


def make_demo(folder, words: int = 4000):
    """Write a demo corpus from the help topics that come with Python: a document is a topic, a sentence a paragraph.

    train, valid and test share no topic. The dictionary holds the most frequent words of train, padded to a multiple of
    8 as fairseq-preprocess does. The same Python version writes the same bytes. Raises InputError if the folder holds
    anything else: it may be someone's dataset.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{folder}: {e.strerror}") from None
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as made:
        made = Path(made)
        try:
            lines = _write_demo(made, words)
        except OSError as e:  # a full disk, of which Python names no file
            e.filename = str(folder)
            raise
        for path in folder.iterdir():
            if not (made / path.name).exists() or not filecmp.cmp(
                path, made / path.name, shallow=False
            ):
                raise InputError(
                    f"--make_demo {folder}: {path.name} in it is not this demo's; choose a new folder"
                )
        for path in sorted(
            made.iterdir(), key=lambda path: path.name == "train.idx"
        ):  # it marks the set as complete
            path.replace(folder / path.name)
    for line in lines:
        print(printable(f"{folder}/{line}"))


def _write_demo(folder: Path, words: int) -> list[str]:
    """The files of `make_demo`; returns a line about each split."""
    names = sorted(topics)
    splits = {"valid": names[3::8], "test": names[7::8]}
    splits["train"] = [name for name in names if name not in splits["valid"] + splits["test"]]
    documents = {
        split: [
            [
                re.findall(r"\w+|[^\w\s]+", paragraph)
                for paragraph in re.split(r"\n\s*\n", topics[name])
                if paragraph.strip()
            ]
            for name in members
        ]
        for split, members in splits.items()
    }
    counts = Counter(
        word for document in documents["train"] for sentence in document for word in sentence
    )
    (folder / "dict.txt").write_text(
        build_dictionary(counts, words + len(SPECIAL)), encoding="utf-8"
    )
    dictionary = Dictionary(folder / "dict.txt")
    lines = []
    for split, members in documents.items():
        sentences = []
        for document in members:
            sentences += [
                [dictionary.ids.get(word, UNK) for word in sentence] + [EOS]
                for sentence in document
            ]
            sentences.append([EOS])
        count, tokens = write_dataset(folder / split, sentences, dictionary.rows)
        lines.append(f"{split}: {count:,} sentences, {tokens:,} tokens, {len(members)} documents")
    return lines


def main(argv: list | None = None) -> int:
    def extra(parser):
        parser.add_argument("--split", default="train")
        parser.add_argument("--epoch", type=int, default=1)
        parser.add_argument("--world_size", type=int, default=1)
        parser.add_argument("--rank", type=int, default=0)
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument("--make_demo", metavar="DIR", help="write a demo corpus and stop")

    (cfg,), args = flags.parse([DataConfig], __doc__, argv, extra=extra)
    if args.epoch < 1 or args.world_size < 1 or not 0 <= args.rank < args.world_size:
        raise InputError(
            "--epoch and --world_size must be at least 1, and --rank from 0 to world_size - 1"
        )
    if args.make_demo is not None:
        if not args.make_demo:
            raise InputError("--make_demo needs a folder")
        make_demo(args.make_demo)
        return 0
    corpus = Corpus(cfg)
    facts = describe(corpus, args.split, args.epoch, args.rank, args.world_size)
    if args.json:
        print(json.dumps(facts))
    else:
        print_description(facts, corpus.split(args.split, args.epoch))
        for text in warnings(facts, corpus.split(args.split, args.epoch)):
            print(f"warning: {printable(text)}", file=sys.stderr)
    return 0
