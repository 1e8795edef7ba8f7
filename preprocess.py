"""Raw text to the dataset that training reads, byte for byte as fairseq's BPE encoder and fairseq-preprocess write it.

    python preprocess.py --train F... --valid F... --test F... --dest DIR HOW

where HOW is one of

    --bpe gpt2 --encoder_json F --vocab_bpe F --dict F     GPT-2's byte-level BPE and fairseq's dictionary of its ids
    --bpe train --vocab_size 32000                         a byte-level BPE of one's own, from the train files
    --bpe none --nwords 50000                              words as white space parts them; the rest becomes <unk>

F is a text file in UTF-8, one that ends in .gz, or a member of a zip archive as ARCHIVE.zip:MEMBER; several files of a
split follow each other. A line is a sentence, an empty line parts documents. Without --dict the dictionary holds the
train files' tokens, the most frequent first. DIR receives dict.txt, {train,valid,test}.{bin,idx}, the BPE's files
(encoder.json and vocab.bpe: a folder without them holds words) and preprocess.log, a JSON object for each step. The
index of train appears last: once it is there, everything is. The same command again continues behind the last finished
step. Both BPEs need the tokenizers package.

Source: fairseq at commit 3f6ba43f, examples/roberta/multiprocessing_bpe_encoder.py (with --keep-empty) and
fairseq_cli/preprocess.py (with --only-source).
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
from config import InputError, RunError
from dataset.binarized import (
    EOS,
    UNK,
    Dictionary,
    build_dictionary,
    publish,
    token_type,
    write_parts,
)
from runtime.guard import Lock

SPLITS = ("test", "valid", "train")  # train last, since nothing takes a folder without it for a dataset
BPE_FILES = ("encoder.json", "vocab.bpe")
CHUNK = 1 << 20  # bytes of text that one worker takes at a time
CONTINUE = "the same command continues behind the last finished step"
# GPT-2's pattern always cuts before a space that stands between two characters which are no white space, and looks at
# nothing beyond it; so these pieces can be encoded, and remembered, one by one.
CUT = re.compile(r"(?<=\S)(?= \S)")
MEMO, MEMO_PIECE = 1 << 18, 32  # pieces of text whose tokens are remembered, and the longest of these


# ---------------------------------------------------------------------------------------------- text to tokens


def lines_of(chunk: str) -> list[str]:
    """The lines of a piece of text; only "\\n" ends one."""
    lines = chunk.split("\n")
    return lines if lines[-1] else lines[:-1]


def need_tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise InputError("BPE needs the tokenizers package: pip install tokenizers") from None
    return tokenizers


def byte_level(bpe_model=None):
    """A `tokenizers` BPE that cuts text as GPT-2 does and knows no special text: "<s>" is three ordinary characters."""
    tokenizers = need_tokenizers()
    bpe = tokenizers.Tokenizer(bpe_model or tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return bpe


def read_bpe(encoder_json, vocab_bpe):
    """The `tokenizers` BPE of GPT-2's two files, which gives every text the ids that fairseq's encoder gives it.

    Raises InputError for a missing, foreign or cut file.
    """
    tokenizers = need_tokenizers()
    texts = []
    for path in (encoder_json, vocab_bpe):
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as e:
            raise InputError(f"{path}: not UTF-8 at byte {e.start}") from None
        except OSError as e:
            raise InputError(f"{path}: {e.strerror}") from None
    try:
        vocab = json.loads(texts[0])
    except ValueError as e:
        raise InputError(f"{encoder_json}: not JSON: {e}") from None
    if not isinstance(vocab, dict) or not all(type(i) is int and 0 <= i < 1 << 24 for i in vocab.values()):
        raise InputError(f"{encoder_json}: expected GPT-2's encoder.json, an object of tokens and their ids")
    rows = texts[1].split("\n")
    merges = [tuple(row.split(" ")) for row in rows[rows[0].startswith("#version") :] if row]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise InputError(f"{vocab_bpe}: {' '.join(merge)[:80]!r} merges no two tokens of {encoder_json}")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if missing := set(alphabet) - vocab.keys():
        raise InputError(f"{encoder_json}: {len(missing)} of the 256 single bytes are no tokens; not a byte-level BPE")
    special = r"<.*>|\[.*\]"  # as <|endoftext|>, which no merge makes
    unmade = vocab.keys() - {"".join(merge) for merge in merges} - set(alphabet)
    if unmade := sorted(token for token in unmade if not re.fullmatch(special, token, re.S)):
        raise InputError(
            f"{vocab_bpe} makes {len(unmade)} tokens of {encoder_json} by no merge, such as {unmade[0]!r}; one of the"
            " files is cut, or does not belong to the other"
        )
    return byte_level(tokenizers.models.BPE(vocab, merges))


class _Memo(dict):
    """piece of text -> its tokens as bytes, each worked out once as long as there is room."""

    def __init__(self, work):
        self.work = work

    def __missing__(self, piece):
        tokens = self.work(piece)
        if len(piece) <= MEMO_PIECE:  # a longer one, such as a Chinese clause, hardly comes again
            if len(self) >= MEMO:
                self.clear()
            self[piece] = tokens
        return tokens


class Tokenizer:
    """Lines of text -> their token ids, each line ending in EOS, exactly as a dataset holds them.

    ids: {symbol: id}; bpe: a `tokenizers` BPE whose ids, as decimal numbers, are the symbols, or None where the symbols
    are words; dtype: the integer type of the .bin. What `ids` lacks becomes UNK. Called with a list of lines it returns
    a list of int64 arrays; an empty line is [2].
    """

    def __init__(self, ids: dict, dtype, bpe=None):
        self.ids, self.dtype, self.bpe = ids, np.dtype(dtype), bpe
        self.eos = np.array([EOS], dtype).tobytes()
        if bpe is None:
            self.later = _Memo(lambda word: np.array([ids.get(word, UNK)], dtype).tobytes())
        else:
            size = 1 + max(bpe.get_vocab(with_added_tokens=False).values())
            self.table = np.array([ids.get(str(i), UNK) for i in range(size)], dtype)
            self.first, self.later = _Memo(self._encode), _Memo(lambda word: self._encode(" " + word))

    def _encode(self, text: str) -> bytes:
        return self.table[self.bpe.encode(text, add_special_tokens=False).ids].tobytes()

    def _row(self, line: str) -> bytes:
        """The tokens of one line as bytes."""
        words, line = line.split(), line.strip()
        if self.bpe is None or not words:
            return b"".join(map(self.later.__getitem__, words)) + self.eos
        if " ".join(words) != line:  # other white space
            return b"".join(map(self.first.__getitem__, CUT.split(line))) + self.eos
        return self.first[words[0]] + b"".join(map(self.later.__getitem__, words[1:])) + self.eos

    def __call__(self, lines: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(self._row(line), self.dtype).astype(np.int64) for line in lines]

    def encode(self, chunk: str):
        """Some lines -> (their tokens as bytes, sizes int32 (lines,), number of UNK)."""
        rows = [self._row(line) for line in lines_of(chunk)]
        tokens = b"".join(rows)
        sizes = np.fromiter(map(len, rows), np.int32, len(rows)) // self.dtype.itemsize
        return tokens, sizes, int(np.count_nonzero(np.frombuffer(tokens, self.dtype) == UNK))

    def count(self, chunk: str) -> Counter:
        """Some lines -> how often each word, or each id, occurs; EOS is not counted."""
        if self.bpe is None:
            return Counter(chunk.split())
        tokens, sizes, _ = self.encode(chunk)
        counts = np.bincount(np.frombuffer(tokens, self.dtype), minlength=EOS + 1)
        counts[EOS] -= len(sizes)  # the one that ends each line
        return Counter({str(i): int(counts[i]) for i in np.flatnonzero(counts).tolist()})


def load_tokenizer(folder, dictionary: Dictionary, encoder_json=None, vocab_bpe=None) -> Tokenizer:
    """The tokenizer of a data folder: BPE if encoder.json and vocab.bpe are in it or given here, else words.

    Raises InputError for what is missing.
    """
    given = dict(zip(BPE_FILES, (encoder_json, vocab_bpe)))
    paths = {name: Path(path or Path(folder) / name) for name, path in given.items()}
    there = [name for name in BPE_FILES if given[name] or paths[name].exists()]
    if not there and dictionary.holds_bpe_ids():
        raise InputError(
            f"{folder}: its dict.txt holds the ids of a BPE, but encoder.json and vocab.bpe are not beside it; put them"
            " there, or name them (--encoder_json F --vocab_bpe F)"
        )
    if len(there) == 1:
        missing = next(name for name in BPE_FILES if name not in there)
        raise InputError(f"no {missing} in {folder}, which belongs to {paths[there[0]]}")
    return Tokenizer(text_ids(dictionary), token_type(dictionary.rows), read_bpe(*paths.values()) if there else None)


def text_ids(dictionary: Dictionary) -> dict:
    """{symbol: id} of what a text may hold. <mask> is none of it: training would refuse it."""
    return {symbol: i for symbol, i in dictionary.ids.items() if i != dictionary.mask_id}


# ---------------------------------------------------------------------------------------------- files of text


def locate(name: str) -> tuple[Path, str | None]:
    """A file as the command line names it -> (path, member of the archive or None). Raises InputError."""
    archive = re.fullmatch(r"(.*\.zip):(.+)", name, re.I)
    path, member = (Path(archive[1]), archive[2]) if archive and not Path(name).exists() else (Path(name), None)
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if member is None and not zipfile.is_zipfile(path):
        return path, None
    try:
        with zipfile.ZipFile(path) as z:
            members = [m for m in z.namelist() if not m.endswith("/")]
    except (OSError, zipfile.BadZipFile) as e:
        raise InputError(f"{path}: not a readable zip archive: {e}") from None
    if member not in members:
        what = "an archive; name one of its members" if member is None else f"has no member {member!r}"
        raise InputError(f"{path}: {what}, as ARCHIVE.zip:MEMBER; it holds {', '.join(members[:8]) or 'nothing'}")
    return path, member


@contextlib.contextmanager
def open_file(name: str):
    """A file's bytes as (file of the plain ones, file of those on the disk, size on the disk)."""
    path, member = locate(name)
    with open(path, "rb") as raw, contextlib.ExitStack() as stack:
        size = path.stat().st_size
        if member is not None:
            archive = stack.enter_context(zipfile.ZipFile(raw))
            size = archive.getinfo(member).compress_size
            yield stack.enter_context(archive.open(member)), raw, size
        elif path.suffix.lower() == ".gz":
            yield stack.enter_context(gzip.GzipFile(fileobj=raw)), raw, size
        else:
            yield raw, raw, size


def whole_lines(name: str, advance):
    """The bytes of a file, cut behind line ends into pieces of about CHUNK."""
    held = []  # the beginning of a line whose end has not been read
    try:
        with open_file(name) as (file, raw, _):
            at = raw.tell()
            while block := file.read(CHUNK):
                advance(raw.tell() - at)
                at = raw.tell()
                end = 1 + max(block.rfind(b"\n"), block.rfind(b"\r", 0, -1))  # a last \r may be half of a \r\n
                if end:
                    yield b"".join([*held, block[:end]])
                    held = []
                held.append(block[end:])
    # RuntimeError: an encrypted member; NotImplementedError: a compression that Python lacks
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as e:
        raise InputError(f"{name}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if rest := b"".join(held):
        yield rest


def read_chunks(name: str, advance=lambda n: None):
    """The text of a file in pieces of whole lines. "\\n", "\\r" and "\\r\\n" end a line, as in Python's text files, and
    come out as "\\n". `advance` hears of the bytes read from the disk. Raises InputError, with the line if not UTF-8.
    """
    line = 1
    for chunk in whole_lines(name, advance):
        error = None
        try:
            text = chunk.decode("utf-8")
        except UnicodeDecodeError as e:
            error, text = e, chunk[: e.start].decode("utf-8")
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        line += text.count("\n")
        if error:
            raise InputError(f"{name}, line {line}: not UTF-8 ({error.reason}); convert the file first, as iconv does")
        yield text


def disk_size(names: list[str]) -> int:
    total = 0
    for name in names:
        with open_file(name) as (_, _, size):
            total += size
    return total


def identity(name: str) -> dict:
    """What tells that a file is another one than before."""
    path, member = locate(name)
    status = path.stat()
    return dict(
        file=path.name + (f":{member}" if member is not None else ""), bytes=status.st_size, mtime_ns=status.st_mtime_ns
    )


# ---------------------------------------------------------------------------------------------- workers


_tokenizer = None  # a worker process's own


def _begin(*arguments):
    global _tokenizer
    _tokenizer = Tokenizer(*arguments)
    # a parent that is killed outright cannot end its workers
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _work(method: str, chunk: str):
    return getattr(_tokenizer, method)(chunk)


class Pool:
    """`count` processes with the tokenizer, or this process alone for one; what comes out is the same."""

    def __init__(self, count: int, tokenizer: Tokenizer, names: list[str]):
        self.tokenizer, self.count, self.processes = tokenizer, min(count, disk_size(names) // CHUNK), None
        if self.count > 1:
            # not fork: threads of torch or tokenizers may be running
            self.processes = ProcessPoolExecutor(
                self.count, get_context("spawn"), _begin, (tokenizer.ids, tokenizer.dtype, tokenizer.bpe)
            )
            # inherited: Ctrl-C is this process's to answer, a moment later if it comes now
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
                f"a worker was killed, perhaps for lack of memory (fewer --workers need less); {CONTINUE}"
            ) from None


# ---------------------------------------------------------------------------------------------- steps


def read_all(names: list[str], label: str):
    """The text of all files, as read_chunks, with a progress bar."""
    total = disk_size(names)
    with tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for name in names:
            yield from read_chunks(name, bar.update)


def train_bpe(args: argparse.Namespace) -> list[bytes]:
    """Train a byte-level BPE; returns GPT-2's two files of it.

    The trainer's memory grows with the different pieces of text, and in a language without spaces nearly all differ:
    100 MB for each MB of Chinese. So it sees at most --bpe_sample_mb MB, spread evenly over the files.
    """
    share = min(1.0, args.bpe_sample_mb * 1e6 / max(1, disk_size(args.train)))
    tokenizers = need_tokenizers()
    bpe = byte_level()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        min_frequency=2,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    sample = []
    for i, text in enumerate(read_all(args.train, "reading for the BPE")):
        if int((i + 1) * share) > int(i * share):
            sample += [line.strip() for line in lines_of(text)]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # the trainer does not come back to Python for long
    try:
        bpe.train_from_iterator(sample, trainer, len(sample))
    finally:
        signal.signal(signal.SIGINT, before)
    with tempfile.TemporaryDirectory() as folder:
        _, merges = bpe.model.save(folder)
        merges = Path(merges).read_bytes()
    vocab = dict(sorted(bpe.get_vocab().items(), key=lambda item: item[1]))
    return [json.dumps(vocab).encode(), merges]


def built_dictionary(args: argparse.Namespace, bpe) -> bytes:
    """A dict.txt of the train files' words, or of the ids of a BPE."""
    # differs from fairseq-preprocess: ids that train does not hold are listed, too (behind the others, so that these
    # keep their places); without them another text's rare characters would be <unk>
    ids = {str(i): i for i in bpe.get_vocab().values()} if bpe else {}
    counts = Counter(dict.fromkeys(ids, 0))
    with Pool(args.workers, Tokenizer(ids, "<u4", bpe), args.train) as pool:
        for part in pool.map("count", read_all(args.train, "counting")):
            counts.update(part)
    return build_dictionary(counts, args.nwords, args.threshold).encode()


class Steps:
    """The steps done in a folder, by preprocess.log: a JSON row for each, written just before the step's files appear.

    A step is done if its files are there and its row says that they were made from what it would be made from now.
    """

    FILES = {"bpe": BPE_FILES, "dict": ("dict.txt",), **{split: (f"{split}.bin", f"{split}.idx") for split in SPLITS}}

    def __init__(self, folder: Path):
        self.folder, self.log, self.rows = folder, folder / "preprocess.log", {}
        if self.log.exists():
            for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):  # fairseq's own log, or cut by a crash
                    row = json.loads(line)
                    if isinstance(row["made_from"], dict):
                        self.rows[row["step"]] = row

    def paths(self, step: str) -> list[Path]:
        return [self.folder / name for name in self.FILES[step]]

    def done(self, step: str, made_from: dict, contents: list | None = None) -> bool:
        """Raises InputError if the step's files are there, but neither hold `contents` nor were made from the same."""
        *_, last = paths = self.paths(step)
        if not last.exists():
            return False
        if contents and [path.read_bytes() for path in paths if path.exists()] == contents:
            return True
        before = self.rows.get(step, {}).get("made_from")
        if before is None:
            raise InputError(f"{last} is there, but was not made by preprocess.py; --overwrite replaces it")
        for key in sorted(before.keys() | made_from.keys()):
            old, new = (json.dumps(values.get(key)) for values in (before, made_from))
            if old != new:
                raise InputError(f"{last} was made with {key} {old}, not {new}; --overwrite replaces it")
        if [path.stat().st_size for path in paths if path.exists()] == self.rows[step].get("bytes"):
            return True
        print(f"{last}: not of the size it was made with; made again", flush=True)
        return False

    def finish(self, step: str, made_from: dict, **facts):
        """Let the step's files, written as NAME.tmp, appear."""
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
        """Remove what steps made, the indexes first; with ".tmp", what a killed run left half-written."""
        for step in (*reversed(SPLITS), "dict", "bpe"):
            for path in reversed(self.paths(step)):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
        if not suffix:
            self.log.unlink(missing_ok=True)


def write_split(steps: Steps, split: str, names: list[str], pool: Pool, made_from: dict):
    began, empty, unknown = time.perf_counter(), 0, 0

    def chunks():
        nonlocal empty, unknown
        for tokens, sizes, unk in pool.map("encode", read_all(names, split)):
            empty, unknown = empty + int((sizes == 1).sum()), unknown + unk
            yield tokens, sizes

    sentences, tokens = write_parts(steps.folder / split, chunks(), pool.tokenizer.dtype)
    seconds = round(time.perf_counter() - began, 3)
    steps.finish(split, made_from, sentences=sentences, empty=empty, tokens=tokens, unk=unknown, seconds=seconds)
    print(
        f"{steps.folder / split}: {sentences:,} sentences, {empty:,} of them empty, {tokens:,} tokens,"
        f" {100 * unknown / max(1, tokens):.1f}% <unk>, {seconds:.1f} s",
        flush=True,
    )


# ---------------------------------------------------------------------------------------------- command


def parse(argv: list | None) -> argparse.Namespace:
    parser = config.Parser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for split in reversed(SPLITS):
        add(f"--{split}", nargs="+", default=[], metavar="F", help=f"text of the {split} split")
    add("--dest", required=True, metavar="DIR", help="folder to write to")
    add("--bpe", required=True, choices=("gpt2", "train", "none"), help="how text becomes tokens, see above")
    add("--encoder_json", metavar="F", help="GPT-2's encoder.json")
    add("--vocab_bpe", metavar="F", help="GPT-2's vocab.bpe")
    add("--vocab_size", type=config.whole_number, help="tokens of a trained BPE, 256 single bytes included [32000]")
    add("--bpe_sample_mb", type=config.whole_number, help="most text, in MB, that a BPE is trained on [20]")
    add("--dict", metavar="F", help="take this dict.txt instead of building one")
    add("--nwords", type=config.whole_number, help="most symbols in a built one, 4 special ones included [no limit]")
    add("--threshold", type=config.whole_number, help="a built one leaves out what occurs less often [0]")
    add("--workers", type=config.whole_number, default=min(16, os.cpu_count() or 1), help="processes [%(default)s]")
    add("--overwrite", action="store_true", help="remove the dataset in DIR and start over")
    argv = sys.argv[1:] if argv is None else argv  # --encoder-json is --encoder_json
    args = parser.parse_args([re.sub("(?<=^--)[^=]*", lambda m: m[0].replace("-", "_"), word) for word in argv])

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
            raise InputError(f"--{name} has no meaning with --bpe {args.bpe}{' and --dict' if args.dict else ''}")
    args.vocab_size, args.bpe_sample_mb = args.vocab_size or 32000, args.bpe_sample_mb or 20
    args.nwords, args.threshold = max(0, args.nwords or 0), args.threshold or 0
    for name, low in (("workers", 1), ("vocab_size", 256), ("bpe_sample_mb", 1)):
        if getattr(args, name) < low:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least {low}")
    if 0 < args.nwords < 5:
        raise InputError(f"--nwords {args.nwords}: four of them are special, so it must be at least 5")
    if not any(getattr(args, split) for split in SPLITS):
        raise InputError("no text: give --train F, --valid F or --test F")
    if not args.dict and not args.train:
        raise InputError("--train is missing: without --dict the dictionary is built from it")
    return args


def preprocess(args: argparse.Namespace):
    texts = {split: names for split in SPLITS if (names := getattr(args, split))}
    inputs = {split: [identity(name) for name in names] for split, names in texts.items()}
    given = {"dict": [args.dict], "bpe": [args.encoder_json, args.vocab_bpe]}
    given = {step: [Path(path).read_bytes() for path in paths] for step, paths in given.items() if paths[0]}
    digests = {f"{step}_sha256": hashlib.sha256(b"".join(contents)).hexdigest() for step, contents in given.items()}
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
        for split in SPLITS:  # one that is not asked for must fit, too
            text = inputs.get(split) or steps.rows.get(split, {}).get("made_from", {}).get("text")
            done[split] = steps.done(split, {**made_from, "text": text})
    left = {split: names for split, names in texts.items() if not done[split]}
    for split in texts:
        if done[split]:
            print(f"{dest / split}: done before", flush=True)
    if not left and done["dict"] and (done["bpe"] or args.bpe == "none"):
        return

    # all that may be wrong, before anything is removed
    bpe = read_bpe(args.encoder_json, args.vocab_bpe) if args.bpe == "gpt2" else None
    dictionary = Dictionary(args.dict) if args.dict else None
    if bpe and dictionary and not dictionary.ids.keys() & set(map(str, bpe.get_vocab().values())):
        raise InputError(f"--dict {args.dict}: holds none of the ids of {args.encoder_json}; it is another tokenizer's")
    if args.bpe == "train":
        need_tokenizers()
    steps.remove(".tmp")
    if args.overwrite:
        steps.remove()
    if args.bpe != "none" and not done["bpe"]:
        steps.write("bpe", made_from, given.get("bpe") or train_bpe(args))
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
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.workers))  # the threads of the BPE's trainer
    try:
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
    config.program(main)
