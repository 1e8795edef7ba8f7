"""What a run would see of a dataset, and what it would lose: the command of data.py.

    python data.py --data_path DIR [--json]

The settings of a run are options here too.
"""

import contextlib
import hashlib
import json
import sys

import data
from config import DataConfig, InputError, printable
from data import BlockDataset, Corpus
from run import flags
from text.binarized import PAD, UNK, TokenStream
from text.demo import make_demo
from text.files import splits_made_from
from text.tokens import load_tokenizer

import numpy as np

FIRST_BLOCK = 600  # characters of it that are printed


def describe(corpus: Corpus, split: str, epoch: int, rank: int, world_size: int) -> dict:
    """Figures and digests of one split as worker `rank` sees it in `epoch`. Reads every token."""
    dataset = corpus.split(split, epoch)
    stream = dataset.stream
    # what the blocks are, and what is lost
    too_long, remainder = dataset.dropped_tokens()
    lengths = dataset.lengths
    quantiles = np.quantile(lengths, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
    # a document begins at a sentence that is no separator and comes first or after a separator
    separators = stream.sizes == 1
    begins = ~separators & np.concatenate([[True], separators])[:-1]
    facts = dict(
        split=split,
        epoch=epoch,
        sentences=len(stream.sizes),
        documents=int(begins.sum()),
        tokens=stream.tokens,
        unknown=int(stream.counts(corpus.dictionary)[UNK]),  # checks every token
        dictionary_size=len(corpus.dictionary),
        mask_id=corpus.dictionary.mask_id,
        blocks=len(lengths),
        block_length_quantiles=quantiles.tolist(),
        blocks_too_long=len(dataset.too_long),
        blocks_in_remainder=len(dataset.remainder),
        tokens_too_long=too_long,
        tokens_in_remainder=remainder,
        dropped_percent=100 * (too_long + remainder) / max(1, stream.tokens),
    )
    return facts | describe_batches(dataset, dataset.epoch_batches(epoch, rank, world_size), epoch)


def describe_batches(dataset: BlockDataset, lists: list[np.ndarray], epoch: int) -> dict:
    """Counts of one epoch's batches, and sha256 digests of what is in them."""
    # docs/golden.md has the same digests of fairseq's batches
    digests = {name: hashlib.sha256() for name in ("source", "target", "ids")}
    tokens_used = masked = places = 0
    for ids in lists:
        if len(ids) == 0:  # a worker with fewer batches than the others
            continue
        tokens, source, hidden = dataset.mask(ids, epoch)
        # fairseq's teacher_input=masked is padded where Batch.target leaves places out
        target = tokens
        if dataset.cfg.teacher_input == "masked":
            target = np.where(hidden, tokens, PAD)
        digests["source"].update(source)
        digests["target"].update(target)
        digests["ids"].update(ids.astype(np.int64))
        tokens_used += int(dataset.lengths[ids].sum())
        masked += int((source == dataset.dictionary.mask_id).sum())
        places += source.size
    return dict(
        batches=len(lists),
        empty_batches=sum(len(ids) == 0 for ids in lists),
        sentences_used=sum(map(len, lists)),
        tokens_used=tokens_used,
        masked=masked,
        padding_percent=100 * (1 - tokens_used / max(1, places)),
        masked_percent=100 * masked / max(1, tokens_used),
        **{f"sha256_{name}": digest.hexdigest() for name, digest in digests.items()},
    )


# --------------------------------------------------------------------------------- what to look at


def notes(dataset: BlockDataset) -> list[str]:
    """What may not be meant so in a dataset. A run says this at its start, too."""
    cfg = dataset.cfg
    rows = []
    if dataset.limit < cfg.tokens_per_sample and cfg.long_sentences == "split":
        wanted = f"--tokens_per_sample {cfg.tokens_per_sample}"
        rows.append(f"blocks are cut to --max_tokens {cfg.max_tokens}, which is below {wanted}")
    # empty lines may part paragraphs instead of documents
    median = np.median(dataset.lengths)
    separators = dataset.stream.sizes[:-1] == 1
    short = 4 * median < dataset.limit
    if cfg.sample_break_mode == "complete_doc" and short and separators.any():
        what = f"half of the blocks have at most {median:.0f} of {dataset.limit} tokens"
        how = "--sample_break_mode complete joins paragraphs that empty lines part"
        rows.append(f"{what}, since no block crosses an empty line; {how}")
    shared = shared_text(dataset.stream) if dataset.training else ""
    if shared:
        rows.append(f"train and valid share {shared}; figures on valid say little of new text")
    return rows


def shared_text(train: TokenStream) -> str:
    """What train and valid share: the files that preprocess.py read for both, or "everything".

    "" if nothing is known to be in both.
    """
    # there may be no valid, and the log may have been edited
    with contextlib.suppress(InputError, KeyError, TypeError):
        # the same tokens, whoever made the dataset
        valid = TokenStream(train.folder, "valid")
        if train.tokens == valid.tokens and train.digest() == valid.digest():
            return "everything"
        # the same file, by name, size and time
        made_from = splits_made_from(train.folder)
        train, valid = (made_from[split]["text"] for split in ("train", "valid"))
        return ", ".join(text["file"] for text in train if text in valid)
    return ""


def first_block(dataset: BlockDataset) -> str:
    """The first block as text, or as symbols if its BPE cannot be read."""
    tokens = dataset.read_block(0)
    dictionary = dataset.dictionary
    try:
        text = load_tokenizer(dataset.stream.folder, dictionary).decode(tokens, dictionary)
    except InputError as e:
        text = f"({e}) {dictionary.decode(tokens)}"
    return printable(text if len(text) <= FIRST_BLOCK else f"{text[:FIRST_BLOCK]} ...")


def print_description(facts: dict, dataset: BlockDataset):
    def share(tokens: int, digits: int) -> str:
        return f"{100 * tokens / max(1, facts['tokens']):.{digits}f}%"

    def lost(why: str) -> str:
        tokens = facts[f"tokens_{why}"]
        return f"{tokens:,} tokens ({share(tokens, 2)}) in {facts[f'blocks_{why}']:,} blocks"

    # each row is a name and a text; the figures are those of --json
    quantiles = " ".join(f"{q:.0f}" for q in facts["block_length_quantiles"])
    batches = f"{facts['batches']:,} batches, {facts['empty_batches']} empty"
    used = f"{facts['sentences_used']:,} blocks, {facts['tokens_used']:,} tokens with <s>"
    rows = {
        "sentences": f"{facts['sentences']:,} in {facts['documents']:,} documents",
        "tokens": f"{facts['tokens']:,}, {share(facts['unknown'], 1)} <unk>",
        "dictionary": f"{facts['dictionary_size']:,} symbols, <mask> is {facts['mask_id']}",
        "blocks": f"{facts['blocks']:,}",
        "block length": f"min 10% 25% 50% 75% 90% max: {quantiles}",
        "lost, too long": lost("too_long"),
        "lost, remainder": lost("in_remainder"),
        f"epoch {facts['epoch']}": f"{batches}; {used}",
        "padding": f"{facts['padding_percent']:.2f}%",
        "masked": f"{facts['masked_percent']:.2f}% ({facts['masked']:,} tokens)",
        "first block": first_block(dataset),
    }
    for name, text in rows.items():
        print(f"{name:16} {text}")


# ----------------------------------------------------------------------------------------- command


def add_flags(parser: flags.Parser):
    parser.add_argument("--split", default="train")
    parser.add_argument("--epoch", type=int, default=1)
    parser.add_argument("--world_size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--make_demo", metavar="DIR", help="write a demo corpus and stop")


def main(argv: list | None = None) -> int:
    (cfg,), args = flags.parse([DataConfig], data.__doc__, argv, extra=add_flags)
    # mistakes first: reading every token can take minutes
    if args.epoch < 1:
        raise InputError("--epoch must be at least 1")
    if args.world_size < 1 or not 0 <= args.rank < args.world_size:
        raise InputError("--world_size must be at least 1, and --rank from 0 to world_size - 1")
    if args.make_demo is not None:
        make_demo(args.make_demo)
        return 0

    corpus = Corpus(cfg)  # the same that a run makes
    facts = describe(corpus, args.split, args.epoch, args.rank, args.world_size)
    if args.json:
        print(json.dumps(facts))
        return 0
    dataset = corpus.split(args.split, args.epoch)
    print_description(facts, dataset)
    for text in notes(dataset):
        print(f"warning: {printable(text)}", file=sys.stderr)
    return 0
