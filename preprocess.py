"""Raw text to the dataset that training reads. The output is byte-identical to that of fairseq's two steps.

    python preprocess.py --train F... --valid F... --test F... --dest DIR HOW

where HOW is one of

    --bpe gpt2 --encoder_json F --vocab_bpe F --dict F     GPT-2's byte-level BPE and fairseq's dictionary of its ids
    --bpe train --vocab_size 32000                         a byte-level BPE of your own, trained on the train files
    --bpe none --nwords 50000                              words, separated by white space; rare ones become <unk>

F is a text file in UTF-8, one that ends in .gz, or a member of a zip archive as ARCHIVE.zip:MEMBER; several files of a
split are concatenated. A line is a sentence; a document ends at an empty line or with its file. Without --dict the
dictionary holds the train files' tokens, the most frequent first. DIR receives dict.txt, {train,valid,test}.{bin,idx},
the BPE's files (encoder.json and vocab.bpe: a folder without them holds words) and preprocess.log, a JSON object for
each step. The index of train appears last: once it exists, everything does. If preprocessing is interrupted, run the
same command again to continue after the last finished step. Both BPEs need the tokenizers package.

Source: fairseq 3f6ba43f, multiprocessing_bpe_encoder.py (with --keep-empty), preprocess.py (with --only-source).
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime
from multiprocessing import get_context, parent_process
from pathlib import Path

import config
from config import InputError, RunError, printable, read_text
from run import flags
from run.lock import Lock
from text import files
from text.binarized import Dictionary, build_dictionary, publish, token_type, write_parts
from text.files import disk_size, identity, json_rows, read_all
from text.tokens import BPE_FILES, Tokenizer, need_tokenizers, read_bpe, text_ids, train_bpe

SPLITS = (
    "test",
    "valid",
    "train",
)  # train last, since a folder without it is not taken for a dataset
MANY_UNKNOWN = 0.05  # share of <unk> above which a warning is due
CONTINUE = "the same command continues after the last finished step"


def warn(text: str):
    print(f"warning: {printable(text)}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- workers

_tokenizer = None  # a worker process has its own


def _begin(*arguments):
    global _tokenizer
    _tokenizer = Tokenizer(*arguments)
    # a parent that gets SIGKILL cannot end its workers
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _work(method: str, chunk: str):
    return getattr(_tokenizer, method)(chunk)


class Pool:
    """`count` processes with the tokenizer, or only this one if count is 1; the results are the same."""

    def __init__(self, count: int, tokenizer: Tokenizer, names: list[str]):
        self.tokenizer, self.count, self.processes = (
            tokenizer,
            min(count, disk_size(names) // files.CHUNK),
            None,
        )
        if self.count > 1:
            # not fork: threads of torch or tokenizers may be running
            self.processes = ProcessPoolExecutor(
                self.count,
                get_context("spawn"),
                _begin,
                (tokenizer.ids, tokenizer.dtype, tokenizer.bpe),
            )
            # workers inherit this mask: only this process answers Ctrl-C, a moment later if it comes now
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            for _ in range(self.count):
                self.processes.submit(int)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.processes:
            self.processes.shutdown(cancel_futures=True)

    def map(self, method: str, chunks):
        """Yield Tokenizer.`method` of each chunk, in order. Raises RunError if a process dies."""
        if not self.processes:
            yield from map(getattr(self.tokenizer, method), chunks)
            return
        ahead = deque()
        try:
            for chunk in chunks:
                ahead.append(self.processes.submit(_work, method, chunk))
                if len(ahead) > 2 * self.count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool:
            raise RunError(
                f"a worker was killed, perhaps out of memory (try fewer --workers); {CONTINUE}"
            ) from None


# ---------------------------------------------------------------------------------------------- steps


def built_dictionary(args: argparse.Namespace, bpe) -> bytes:
    """The dict.txt of the train files' words, or of the ids of a BPE."""
    # differs from fairseq-preprocess: ids that do not occur in train are listed too, after the others, so that these
    # keep their places; without them rare characters of another text would be <unk>
    ids = {str(i): i for i in bpe.get_vocab().values()} if bpe else {}
    counts = Counter(dict.fromkeys(ids, 0))
    with Pool(args.workers, Tokenizer(ids, "<u4", bpe), args.train) as pool:
        for part in pool.map("count", read_all(args.train, "counting")):
            counts.update(part)
    if not counts.total():
        raise InputError(f"--train {' '.join(args.train)}: no text in it")
    return build_dictionary(counts, args.nwords, args.threshold).encode()


def difference(key: str, old, new) -> str:
    """In words: that a step was made with another setting, or from another text, than is asked for now."""
    if key in ("train", "text"):
        with contextlib.suppress(
            TypeError, KeyError, ValueError, OverflowError
        ):  # a log that was edited
            names = [", ".join(text["file"] for text in texts) for texts in (old, new)]
            if names[0] != names[1]:
                return f"from {names[0]}, not {names[1]}"
            for a, b in zip(old, new, strict=True):
                if a != b:
                    size = (
                        "the same size"
                        if a["bytes"] == b["bytes"]
                        else f"{a['bytes']:,}, now {b['bytes']:,} bytes"
                    )
                    was, now = (
                        datetime.fromtimestamp(text["mtime_ns"] // 10**9) for text in (a, b)
                    )
                    return f"from {a['file']} as it was on {was}; now it is of {now} ({size})"
    if key.endswith("_sha256"):
        return f"with another {'dictionary' if key == 'dict_sha256' else 'BPE'}"
    return f"with {key} {json.dumps(old)}, not {json.dumps(new)}"


class Steps:
    """The finished steps of a folder. preprocess.log has a JSON row for each, written just before its files appear.

    A step is done if its files exist and its row says that they were made from the same inputs and settings as now.
    """

    FILES = {
        "bpe": BPE_FILES,
        "dict": ("dict.txt",),
        **{split: (f"{split}.bin", f"{split}.idx") for split in SPLITS},
    }

    def __init__(self, folder: Path):
        self.folder, self.log, self.rows = folder, folder / "preprocess.log", {}
        for row in json_rows(self.log):  # none of fairseq's own log
            if isinstance(row.get("made_from"), dict):
                self.rows[str(row.get("step"))] = row

    def paths(self, step: str) -> list[Path]:
        return [self.folder / name for name in self.FILES[step]]

    def done(self, step: str, made_from: dict, contents: list | None = None) -> bool:
        """Raises InputError if the step's files exist, but neither hold `contents` nor were made from the same."""
        *_, last = paths = self.paths(step)
        if not last.exists():
            return False
        if contents and [path.read_bytes() for path in paths if path.is_file()] == contents:
            return True
        before = self.rows.get(step, {}).get("made_from")
        if before is None:
            raise InputError(
                f"{last} exists, but was not made by preprocess.py; --overwrite replaces it"
            )
        for key in sorted(before.keys() | made_from.keys()):
            old, new = (values.get(key) for values in (before, made_from))
            if json.dumps(old) != json.dumps(new):
                raise InputError(
                    f"{last} was made {difference(key, old, new)}; --overwrite makes it anew"
                )
        if [path.stat().st_size for path in paths if path.exists()] == self.rows[step].get("bytes"):
            return True
        print(
            f"{printable(str(last))}: its size has changed since it was made; making it again",
            flush=True,
        )
        return False

    def finish(self, step: str, made_from: dict, **facts):
        """Log the step, then rename its files from NAME.tmp."""
        paths = self.paths(step)
        sizes = [Path(f"{path}.tmp").stat().st_size for path in paths]
        row = dict(step=step, **facts, bytes=sizes, made_from=made_from)
        with self.log.open("a+b") as f:
            torn = f.tell() and (f.seek(-1, os.SEEK_END), f.read())[1] != b"\n"
            f.write(b"\n" * bool(torn) + json.dumps(row).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        publish(paths)

    def write(self, step: str, made_from: dict, contents: list[bytes]):
        for path, content in zip(self.paths(step), contents, strict=True):
            with open(f"{path}.tmp", "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
        self.finish(step, made_from)

    def remove(self, suffix: str = ""):
        """Remove the files of all steps, the indexes first; with ".tmp", what a killed run left half-written."""
        for step in (*reversed(SPLITS), "dict", "bpe"):
            for path in reversed(self.paths(step)):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
        if not suffix:
            self.log.unlink(missing_ok=True)


def write_split(steps: Steps, split: str, names: list[str], pool: Pool, made_from: dict):
    began, empty, unknown = time.perf_counter(), 0, 0

    def chunks():
        nonlocal empty, unknown
        begun = 0  # tokens of a line that is not complete
        for tokens, sizes, unk, is_cut in pool.map("encode", read_all(names, split)):
            sizes[0] += begun
            sizes, begun = (sizes[:-1], sizes[-1]) if is_cut else (sizes, 0)
            empty, unknown = empty + int((sizes == 1).sum()), unknown + unk
            yield tokens, sizes

    sentences, tokens = write_parts(steps.folder / split, chunks(), pool.tokenizer.dtype)
    if sentences == tokens:
        steps.remove(".tmp")
        raise InputError(f"--{split} {' '.join(names)}: no text in it")
    seconds = round(time.perf_counter() - began, 3)
    steps.finish(
        split,
        made_from,
        sentences=sentences,
        empty=empty,
        tokens=tokens,
        unk=unknown,
        seconds=seconds,
    )
    print(
        f"{printable(str(steps.folder / split))}: {sentences:,} sentences, {empty:,} of them empty, {tokens:,} tokens,"
        f" {100 * unknown / tokens:.1f}% <unk>, {seconds:.1f} s",
        flush=True,
    )
    if unknown > MANY_UNKNOWN * tokens:
        advice = (
            "--bpe train knows every text"
            if pool.tokenizer.bpe is None
            else "is it the dictionary of this BPE?"
        )
        warn(f"dict.txt lacks {100 * unknown / tokens:.0f}% of the tokens of {split}; {advice}")


# ---------------------------------------------------------------------------------------------- command


def parse(argv: list | None) -> argparse.Namespace:
    parser = flags.Parser(description=__doc__)
    add, number = parser.add_argument, dict(type=config.whole_number, metavar="N")
    for split in reversed(SPLITS):
        add(f"--{split}", nargs="+", default=[], metavar="F", help=f"text of the {split} split")
    add("--dest", required=True, metavar="DIR", help="folder to write to")
    add(
        "--bpe",
        required=True,
        choices=("gpt2", "train", "none"),
        help="how text becomes tokens, see above",
    )
    add("--encoder_json", metavar="F", help="GPT-2's encoder.json")
    add("--vocab_bpe", metavar="F", help="GPT-2's vocab.bpe")
    add("--vocab_size", help="tokens of a trained BPE, 256 single bytes included [32000]", **number)
    add("--bpe_sample_mb", help="MB of text, at most, that a BPE is trained on [20]", **number)
    add("--dict", metavar="F", help="use this dict.txt instead of building one")
    add(
        "--nwords", help="most symbols in a built one, 4 special ones included [no limit]", **number
    )
    add("--threshold", help="least occurrences of a symbol in a built dictionary [0]", **number)
    add("--workers", default=min(16, os.cpu_count() or 1), help="processes [%(default)s]", **number)
    add("--overwrite", action="store_true", help="remove the dataset in DIR and start over")
    argv = sys.argv[1:] if argv is None else argv  # --encoder-json is --encoder_json
    args = parser.parse_args(
        [re.sub("(?<=^--)[^=]*", lambda m: m[0].replace("-", "_"), word) for word in argv]
    )

    for name, needed, allowed in (
        ("encoder_json", args.bpe == "gpt2", args.bpe == "gpt2"),
        ("vocab_bpe", args.bpe == "gpt2", args.bpe == "gpt2"),
        ("vocab_size", False, args.bpe == "train"),
        ("bpe_sample_mb", False, args.bpe == "train"),
        ("dict", False, args.bpe != "train"),
        ("nwords", False, not args.dict),
        ("threshold", False, not args.dict),
    ):
        if needed and getattr(args, name) is None:
            raise InputError(f"--{name} is missing, which --bpe {args.bpe} needs")
        if not allowed and getattr(args, name) is not None:
            raise InputError(
                f"--{name} has no meaning with --bpe {args.bpe}{' and --dict' if args.dict else ''}"
            )
    args.vocab_size, args.bpe_sample_mb = (
        args.vocab_size or 32000,
        min(args.bpe_sample_mb or 20, 10**6),
    )
    args.nwords, args.threshold = max(0, args.nwords or 0), args.threshold or 0
    for name, low in (("workers", 1), ("vocab_size", 256), ("bpe_sample_mb", 1)):
        if getattr(args, name) < low:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least {low}")
    if args.vocab_size > 10**6:  # memory for all of them is taken at once
        raise InputError(f"--vocab_size {args.vocab_size}: must be at most 1,000,000")
    if 0 < args.nwords < 5:
        raise InputError(
            f"--nwords {args.nwords}: four of them are special, so it must be at least 5"
        )
    if not any(getattr(args, split) for split in SPLITS):
        raise InputError("no text: give --train F, --valid F or --test F")
    if not args.dict and not args.train:
        raise InputError("--train is missing: without --dict the dictionary is built from it")
    return args


def preprocess(args: argparse.Namespace):
    texts = {split: names for split in SPLITS if (names := getattr(args, split))}
    inputs = {split: [identity(name) for name in names] for split, names in texts.items()}
    for first, second in itertools.combinations(inputs, 2):
        if shared := [text["file"] for text in inputs[first] if text in inputs[second]]:
            warn(
                f"{', '.join(shared)} is in {first} and {second}: figures on {first} will say little of new text"
            )
    given = {"dict": [args.dict], "bpe": [args.encoder_json, args.vocab_bpe]}
    for path in filter(None, sum(given.values(), [])):
        read_text(path)  # refuses what is no file or no text
    given = {
        step: [Path(path).read_bytes() for path in paths]
        for step, paths in given.items()
        if paths[0]
    }
    digests = {
        f"{step}_sha256": hashlib.sha256(b"".join(contents)).hexdigest()
        for step, contents in given.items()
    }
    made_from = dict(bpe=args.bpe, **digests)
    if args.bpe == "train":
        made_from |= dict(vocab_size=args.vocab_size, bpe_sample_mb=args.bpe_sample_mb)
    if not args.dict:
        made_from |= dict(nwords=args.nwords, threshold=args.threshold, train=inputs["train"])

    dest = Path(args.dest)
    steps, done = Steps(dest), dict.fromkeys(Steps.FILES, False)
    if not args.overwrite:
        for step in ("bpe", "dict"):
            done[step] = steps.done(step, made_from, given.get(step))
        for split in SPLITS:  # one that is not asked for must fit too
            text = inputs.get(split) or steps.rows.get(split, {}).get("made_from", {}).get("text")
            done[split] = steps.done(split, {**made_from, "text": text})
    left = {split: names for split, names in texts.items() if not done[split]}
    for split in texts:
        if done[split]:
            print(f"{printable(str(dest / split))}: already done", flush=True)
    if not left and done["dict"] and (done["bpe"] or args.bpe == "none"):
        return

    # check everything before anything is removed
    bpe = read_bpe(args.encoder_json, args.vocab_bpe) if args.bpe == "gpt2" else None
    dictionary = Dictionary(args.dict) if args.dict else None
    if bpe and dictionary and not dictionary.ids.keys() & set(map(str, bpe.get_vocab().values())):
        raise InputError(
            f"--dict {args.dict}: holds none of the ids of {args.encoder_json}; it is another tokenizer's"
        )
    if args.bpe == "train":
        need_tokenizers()
    steps.remove(".tmp")
    if args.overwrite:
        steps.remove()
    if args.bpe != "none" and not done["bpe"]:
        steps.write(
            "bpe",
            made_from,
            given.get("bpe") or train_bpe(args.train, args.vocab_size, args.bpe_sample_mb),
        )
    if args.bpe == "train":
        bpe = read_bpe(*steps.paths("bpe"))
    if not done["dict"]:
        steps.write("dict", made_from, given.get("dict") or [built_dictionary(args, bpe)])
    dictionary = Dictionary(dest / "dict.txt")
    if left:
        tokenizer = Tokenizer(text_ids(dictionary), token_type(dictionary.rows), bpe)
        with Pool(args.workers, tokenizer, sum(left.values(), [])) as pool:
            for split, names in left.items():
                write_split(steps, split, names, pool, {**made_from, "text": inputs[split]})


def main(argv: list | None = None) -> int:
    args = parse(argv)
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.workers))  # threads of the BPE's trainer
    try:
        if Path(args.dest).exists() and not Path(args.dest).is_dir():
            raise InputError(f"--dest {args.dest}: a file, not a folder")
        Path(args.dest).mkdir(parents=True, exist_ok=True)
        lock = Lock(Path(args.dest), "--dest")
        try:
            preprocess(args)
        finally:
            lock.release()
    except KeyboardInterrupt:
        print(f"\npreprocess.py: interrupted; {CONTINUE}", file=sys.stderr)
        return 130
    except OSError as e:
        if e.filename:
            raise
        raise RunError(f"--dest {args.dest}: {e.strerror or e}; {CONTINUE}") from None
    return 0


if __name__ == "__main__":
    flags.program(main)
