"""Raw text to the dataset that training reads, byte-identical to that of fairseq's two steps.

    python preprocess.py --train F... --valid F... --test F... --dest DIR HOW

where HOW is one of

    --bpe gpt2 --encoder_json F --vocab_bpe F --dict F     GPT-2's BPE and fairseq's dictionary
    --bpe train --vocab_size 32000                         a BPE of your own, trained on --train
    --bpe none --nwords 50000                              words; rare ones become <unk>

F is a text file in UTF-8, plain, .gz, .bz2 or .xz, or a member of a zip archive as
ARCHIVE.zip:MEMBER; several files of a split are concatenated. A line is a sentence; a document ends
at an empty line or with its file. Byte order marks at the beginning of lines are left out, and a
line of nothing but characters without width (U+FEFF, U+200B, U+2060) counts as empty. Without
--dict the dictionary holds the train files' tokens, the most frequent first.
DIR receives dict.txt, {train,valid,test}.{bin,idx}, the BPE's files (encoder.json and vocab.bpe: a
folder without them holds words) and preprocess.log, a JSON object for each split. The index of
train appears last: once it exists, everything does. If preprocessing is interrupted, run the same
command again to continue after the last finished split. Both BPEs need the tokenizers package.

Source: fairseq 3f6ba43f, multiprocessing_bpe_encoder.py (--keep-empty), preprocess.py
(--only-source).
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

from config import InputError, printable, read_text
from formats.fairseq_config import whole_number
from run import flags

if __name__ == "__main__":
    flags.start()

from run.lock import lock
from text import files
from text.binarized import Dictionary, build_dictionary, publish, write_parts
from text.tokens import TEXT_FILES, Tokenizer, need_tokenizers, read_bpe, tokenizer_of, train_bpe
from text.workers import tokenize

# which --bpe a flag belongs to
BELONGS = dict(vocab_size="train", bpe_sample_mb="train", encoder_json="gpt2", vocab_bpe="gpt2")
SPLITS = ("test", "valid", "train")  # train last: a folder without it is not taken for a dataset
# the least value of each number, and what it is if it is not named
NUMBERS = dict(vocab_size=(256, 32000), bpe_sample_mb=(1, 20), nwords=(5, 0), threshold=(0, 0))
NUMBERS |= dict(workers=(1, min(16, os.cpu_count() or 1)))
MOST = 10**6  # of each of these; memory for all tokens of a BPE is taken at once
MANY_UNKNOWN = 0.05  # share of <unk> above which a warning is due

# ------------------------------------------------------------------------------------------- steps


def write_file(path: Path, content: bytes):
    """Write a file that appears complete or not at all."""
    with open(f"{path}.tmp", "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())  # the content outlives a power cut, before the name does
    os.replace(f"{path}.tmp", path)


def settings_of(args: argparse.Namespace, given: dict[str, bytes]) -> dict:
    """All that a split is made from but its own text, as preprocess.log holds it."""
    settings = dict(bpe=args.bpe)
    if args.bpe == "gpt2":
        both = given["encoder.json"] + given["vocab.bpe"]
        settings["bpe_sha256"] = hashlib.sha256(both).hexdigest()
    if args.bpe == "train":
        settings |= dict(vocab_size=args.vocab_size, bpe_sample_mb=args.bpe_sample_mb)
    if args.dict:
        settings["dict_sha256"] = hashlib.sha256(given["dict.txt"]).hexdigest()
    else:
        train = [files.identity(name) for name in args.train]
        settings |= dict(nwords=args.nwords, threshold=args.threshold, train=train)
    return settings


def check_folder(dest: Path, settings: dict, texts: dict, given: dict[str, bytes]):
    """Raise InputError if the folder holds splits or a dictionary of something else.

    A split's row in preprocess.log says from which texts and settings it was made.
    """
    made_from = files.splits_made_from(dest)
    for split in SPLITS:
        path = dest / f"{split}.idx"
        if not path.exists():
            continue
        old = made_from.get(split)
        if not isinstance(old, dict):
            raise InputError(f"{path} was not made by preprocess.py; --overwrite replaces it")
        # a split that is not asked for must fit the settings, too
        new = settings | dict(text=texts.get(split, old.get("text")))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                values = f"{json.dumps(old.get(key))}, not {json.dumps(new.get(key))}"
                how = f"--overwrite removes all splits of {dest} first"
                raise InputError(f"{path} was made with {key} {values}; {how}")
    # without a log of ours these may be someone's; fairseq's own has that name, too
    log = dest / "preprocess.log"
    is_ours = log.exists() and not read_text(log, "replace").startswith("Namespace(")
    for name in () if is_ours else TEXT_FILES:
        path = dest / name
        if path.exists() and read_text(path, newline="").encode() != given.get(name):
            raise InputError(f"{path} was not made by preprocess.py; --overwrite replaces it")


def new_dictionary(args: argparse.Namespace, bpe) -> bytes:
    """The dict.txt of the tokens of --train."""
    # differs from fairseq-preprocess: ids that do not occur in train are listed too, after the
    # others, so that these keep their places; else rare characters elsewhere would be <unk>
    ids = {str(i): i for i in bpe.get_vocab().values()} if bpe else {}
    counts = Counter(dict.fromkeys(ids, 0))
    tokenizer = Tokenizer(ids, "<u4", bpe)
    for part in tokenize("count", tokenizer, args.train, "counting", args.workers):
        counts.update(part)
    if not counts.total():
        raise InputError(f"--train {' '.join(args.train)}: no text in it")
    return build_dictionary(counts, args.nwords, args.threshold).encode()


def write_split(prefix: Path, names: list[str], tokenizer: Tokenizer, workers: int) -> dict:
    """Write PREFIX.bin.tmp and PREFIX.idx.tmp; returns their row for preprocess.log."""
    began = time.perf_counter()
    split = prefix.name
    unknown = 0
    if tokenizer.bpe:
        files.tell_tokenised(names)

    def chunks():
        nonlocal unknown
        for tokens, sizes, unk in tokenize("encode", tokenizer, names, split, workers):
            unknown += unk
            yield tokens, sizes

    sizes = write_parts(prefix, chunks(), tokenizer.dtype)
    sentences = len(sizes)
    tokens = int(sizes.sum())
    empty = int((sizes == 1).sum())
    if sentences == empty:
        raise InputError(f"--{split} {' '.join(names)}: no text in it")
    seconds = round(time.perf_counter() - began, 3)
    share = unknown / tokens
    about = f"{sentences:,} sentences, {empty:,} of them empty, {tokens:,} tokens"
    print(f"{printable(str(prefix))}: {about}, {share:.1%} <unk>, {seconds:.1f} s")
    if share > MANY_UNKNOWN:
        advice = "--bpe train knows every text"
        if tokenizer.bpe:
            advice = "is it the dictionary of this BPE?"
        lacking = f"dict.txt lacks {share:.0%} of the tokens of {split}"
        print(f"warning: {lacking}; {advice}", file=sys.stderr)
    facts = dict(sentences=sentences, empty=empty, tokens=tokens, unk=unknown, seconds=seconds)
    return dict(step=split) | facts


def preprocess(args: argparse.Namespace, dest: Path):
    # read everything that is given before anything is removed
    given = {}
    for name, path in zip(TEXT_FILES, (args.dict, args.encoder_json, args.vocab_bpe)):
        if path:
            given[name] = read_text(path, newline="").encode()
    asked = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    texts = {split: [files.identity(name) for name in names] for split, names in asked.items()}
    settings = settings_of(args, given)
    if args.dict:
        Dictionary(args.dict)
    bpe = None
    if args.bpe == "gpt2":
        bpe = read_bpe(args.encoder_json, args.vocab_bpe)
    if args.bpe == "train":
        need_tokenizers()
    if args.overwrite:  # the indexes first
        names = [f"{split}.{kind}" for kind in ("idx", "bin") for split in reversed(SPLITS)]
        for name in (*names, *TEXT_FILES, "preprocess.log"):
            (dest / name).unlink(missing_ok=True)
    check_folder(dest, settings, texts, given)

    log = dest / "preprocess.log"
    log.touch()  # from here on the folder is ours
    done = [split for split in SPLITS if (dest / f"{split}.idx").exists()]
    # the dictionary and the BPE: those of the finished splits, or new ones
    if not done:
        for name in TEXT_FILES:  # a killed run's may be of another kind
            (dest / name).unlink(missing_ok=True)
        if args.bpe == "train":
            trained = train_bpe(args.train, args.vocab_size, args.bpe_sample_mb)
            given = dict(zip(TEXT_FILES[1:], trained))
        for name, content in given.items():
            write_file(dest / name, content)
    if args.bpe == "train":
        bpe = read_bpe(dest / "encoder.json", dest / "vocab.bpe")
    if not done and not args.dict:
        write_file(dest / "dict.txt", new_dictionary(args, bpe))
    tokenizer = tokenizer_of(Dictionary(dest / "dict.txt"), bpe)

    for split, names in asked.items():
        if split in done:
            print(f"{printable(str(dest / split))}: already done")
            continue
        row = write_split(dest / split, names, tokenizer, args.workers)
        row["made_from"] = settings | dict(text=texts[split])
        # first the row, then the index: a split whose index exists has a row
        write_file(log, log.read_bytes() + json.dumps(row).encode() + b"\n")
        publish(dest / split)


# ----------------------------------------------------------------------------------------- command


def parse(argv: list | None) -> argparse.Namespace:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    number = dict(type=whole_number, metavar="N")
    kinds = ("gpt2", "train", "none")
    for split in reversed(SPLITS):
        many = dict(nargs="+", action="extend", default=[], metavar="F")
        add(f"--{split}", help=f"text of the {split} split", **many)
    add("--dest", required=True, metavar="DIR", help="folder to write to")
    add("--bpe", required=True, choices=kinds, help="how text becomes tokens, see above")
    add("--encoder_json", metavar="F", help="GPT-2's encoder.json")
    add("--vocab_bpe", metavar="F", help="GPT-2's vocab.bpe")
    add("--vocab_size", help="tokens of a trained BPE, 256 single bytes included [32000]", **number)
    add("--bpe_sample_mb", help="most MB of text that a BPE is trained on [20]", **number)
    add("--dict", metavar="F", help="use this dict.txt instead of building one")
    add("--nwords", help="most symbols in a built one, 4 special included [no limit]", **number)
    add("--threshold", help="least occurrences of a symbol in a built one [0]", **number)
    add("--workers", help=f"processes [{NUMBERS['workers'][1]}]", **number)
    add("--overwrite", action="store_true", help="remove the dataset in DIR and start over")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace):
    """Refuse flags that do not go together and numbers out of range; set those not named."""
    # a flag that would be ignored is a mistake
    for name, kind in BELONGS.items():
        if args.bpe != kind and getattr(args, name) is not None:
            raise InputError(f"--{name} has no meaning with --bpe {args.bpe}")
    if args.bpe == "train" and args.dict:
        raise InputError("--dict has no meaning with --bpe train")
    if args.bpe == "gpt2" and not (args.encoder_json and args.vocab_bpe):
        raise InputError("--bpe gpt2 needs --encoder_json and --vocab_bpe")
    if args.dict and (args.nwords or args.threshold):
        raise InputError("--nwords and --threshold have no meaning with --dict")
    for name, (least, default) in NUMBERS.items():
        value = getattr(args, name)
        if value is None:
            setattr(args, name, default)
        elif not least <= value <= MOST:
            raise InputError(f"--{name} {value}: must be from {least} to {MOST:,}")
    if not (args.train or args.valid or args.test):
        raise InputError("no text: give --train F, --valid F or --test F")
    if not args.dict and not args.train:
        raise InputError("--train is missing: without --dict the dictionary is built from it")


def main(argv: list | None = None) -> int:
    args = parse(argv)
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.workers))  # threads of the BPE's trainer
    dest = Path(args.dest)
    dest.mkdir(parents=True, exist_ok=True)
    with lock(dest, "--dest"):
        path = dest / "train1.idx"  # never one of ours
        if path.exists() and (args.overwrite or not (dest / "train.idx").exists()):
            raise InputError(f"{path}: training would read it after train; choose another --dest")
        preprocess(args, dest)
    return 0


if __name__ == "__main__":
    flags.program(main)
