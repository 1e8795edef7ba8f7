"""What goes in: the dataset that fairseq binarized, as masked batches of numpy arrays.

    python data.py --data_path DIR              describe a dataset: what a run would see and what it would lose
    python data.py --data_path DIR --json       the same as one JSON object, with digests of one epoch's batches
    python data.py --make_demo DIR              write a small demo corpus

Words: a *sentence* is one row of the binarized dataset, a *block* is one training sample cut from consecutive
sentences, a *batch* is a list of blocks. Rules and formats are those of fairseq's TokenBlockDataset, MaskTokensDataset
and batch sampler at commit 3f6ba43f; where the default differs, the place says so.
"""

import functools
import hashlib
import itertools
import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from config import InputError, option
from fast.masks import FLOYD_LIMIT, Generators, tuple_hashes

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")

MAGIC = b"MMIDIDX\0\0"
HEADER = len(MAGIC) + 8 + 1 + 8  # magic, version u64, dtype code u8, sentence count u64
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32, 10: np.uint64}
REBUILD = "rebuild it with: fairseq-preprocess --dataset-impl mmap"
PIECE = 1 << 17  # sentences or tokens worked on at once: more would not be faster, and all would fill the memory


@dataclass(frozen=True)
class DataConfig:
    data_path: str = option("", "folder with dict.txt and {train,valid}.{bin,idx}; several joined by ':', one an epoch")
    sample_break_mode: str = option(
        "complete_doc", "how blocks are cut from sentences", choices=("none", "eos", "complete", "complete_doc")
    )
    tokens_per_sample: int = option(512, "longest block, <s> included", low=2)
    long_sentences: str = option(
        "split", "a sentence longer than a block: cut it, or lose it as fairseq does", choices=("split", "skip")
    )
    max_tokens: int = option(8192, "most tokens in a batch, padding included", low=1)
    batch_size: int = option(0, "most blocks in a batch (0: no limit)", low=0)
    required_batch_size_multiple: int = option(8, "a batch holds a multiple of this, or fewer", low=1)
    drop_remainder: bool = option(False, "drop the last batch if its size is not such a multiple, as fairseq does")
    mask_prob: float = option(0.35, "share of tokens to mask, before overlaps", above=0, below=1)
    mask_multiple_length: int = option(4, "tokens masked in a row", low=1, high=10_000)
    mask_stdev: float = option(0.0, "standard deviation of that length", low=0, high=10_000)
    random_token_prob: float = option(0.0, "share of the masked tokens replaced by a random one", low=0, high=1)
    leave_unmasked_prob: float = option(0.0, "share of the masked tokens left as they are", low=0, high=1)
    fixed_masks: bool = option(False, "the masks of epoch 1 in every epoch, as fairseq with its default num_workers=1")
    teacher_input: str = option(
        "full",
        "what the teacher reads: the block (the paper), or its masked tokens alone (fairseq)",
        choices=("full", "masked"),
    )
    seed: int = option(1, "seed of order, masks, initial weights and dropout", low=0, high=2**32 - 1 - 10**6)

    def check(self):
        if not self.data_path:
            raise InputError("--data_path is missing: the folder with dict.txt, train.bin and train.idx")
        if self.random_token_prob + self.leave_unmasked_prob > 1:
            raise InputError("--random_token_prob and --leave_unmasked_prob: their sum must be at most 1")


# ---------------------------------------------------------------------------------------------- files


class Dictionary:
    """Symbols and their ids, from a fairseq dict.txt: the four special ones, one a row, `<mask>` last unless listed.

    Raises InputError with the line number for a malformed row or an unmarked duplicate.
    """

    def __init__(self, path):
        path = Path(path)
        self.symbols = list(SPECIAL)
        ids = {symbol: i for i, symbol in enumerate(SPECIAL)}
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            raise InputError(
                f"no dict.txt in {path.parent}: it is written beside the .bin files by preprocessing"
            ) from None
        except UnicodeDecodeError as e:
            raise InputError(f"{path}: not UTF-8 at byte {e.start}") from None
        except OSError as e:
            raise InputError(f"{path}: {e.strerror}") from None
        if lines[-1] == "":
            lines.pop()
        for number, line in enumerate(lines, 1):
            symbol, _, count = line.rstrip().rpartition(" ")
            overwrite = count == "#fairseq:overwrite"
            if overwrite:
                symbol, _, count = symbol.rpartition(" ")
            if not symbol or not count.lstrip("+-").isdigit():
                raise InputError(f"{path}, line {number}: expected '<symbol> <count>', found {line[:80]!r}")
            if symbol in ids and not overwrite:
                raise InputError(f"{path}, line {number}: duplicate of {symbol!r}; each symbol may stand once")
            ids[symbol] = len(self.symbols)
            self.symbols.append(symbol)
        self.rows = len(self.symbols)  # without a <mask> that the file does not list: what the writer's type goes by
        if "<mask>" not in ids:
            ids["<mask>"] = len(self.symbols)
            self.symbols.append("<mask>")
        self.mask_id, self.ids = ids["<mask>"], ids

    def __len__(self):
        return len(self.symbols)

    def digest(self) -> str:
        """sha256 over the symbols in order: equal for dictionaries that give every token the same id."""
        return hashlib.sha256("\n".join(self.symbols).encode()).hexdigest()

    def holds_bpe_ids(self) -> bool:
        """Whether its symbols are a BPE's ids: those of the first rows are numbers."""
        return all(symbol.isdigit() for symbol in self.symbols[4 : min(104, self.rows)])

    def decode(self, tokens) -> str:
        return " ".join(self.symbols[t] for t in tokens)


def pieces(count: int):
    """Slices of a bounded length that cover range(count): arrays as long as a corpus are worked through in these."""
    return (slice(begin, begin + PIECE) for begin in range(0, count, PIECE))


class TokenFile:
    """The sentences of one PREFIX.idx and PREFIX.bin as a flat run of tokens, memory-mapped.

    `sizes` int32 (N,), a view of the file: tokens of each sentence; `tokens` their sum. Every field of the index is
    checked against the real size of both files, so that no later read can leave them. Raises InputError.
    """

    def __init__(self, prefix):
        idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        try:
            raw = np.asarray(np.memmap(idx, np.uint8, "r")) if idx.stat().st_size else np.zeros(0, np.uint8)
            bin_bytes = bin_.stat().st_size
            if not bin_.is_file():
                raise InputError(f"{bin_}: not a file")
        except FileNotFoundError as e:
            raise InputError(_no_dataset(idx, e.filename)) from None
        except InputError:
            raise
        except (OSError, ValueError) as e:
            raise InputError(f"{idx}: cannot be read: {e}") from None
        head = raw[:HEADER].tobytes()
        if not head.startswith(MAGIC):
            kind = {b"TNTIDX\0\0": "the older cached/lazy format", b"HUFFIDX\0": "the huffman format"}.get(head[:8])
            raise InputError(f"{idx}: {kind or 'not an mmap index (wrong magic)'}; {REBUILD}")
        if len(head) < HEADER:
            raise InputError(f"{idx}: cut off after {len(head)} bytes; {REBUILD}")
        version = int.from_bytes(head[9:17], "little")
        code, count = head[17], int.from_bytes(head[18:26], "little")
        if version != 1:
            raise InputError(f"{idx}: version {version}, expected 1; {REBUILD}")
        if code not in DTYPES:
            what = "floating point" if code in (6, 7) else "unknown"
            raise InputError(f"{idx}: dtype code {code} ({what}), expected an integer type; {REBUILD}")
        if len(raw) != HEADER + 12 * count:
            hint = (
                "Megatron's variant, or a cut or damaged file"
                if len(raw) > HEADER + 12 * count
                else "a cut or damaged file"
            )
            raise InputError(
                f"{idx}: {len(raw)} bytes, but {count} sentences need {HEADER + 12 * count}: {hint}; {REBUILD}"
            )
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        width = dtype.itemsize
        self.sizes = raw[HEADER : HEADER + 4 * count].view("<i4")
        offsets = raw[HEADER + 4 * count :].view("<i8")
        # A run is a stretch of sentences that lie back to back: those with the same shift from the place in the text to
        # the item in the file. The writer makes one run a file, other orders are legal.
        self.tokens, runs, shift = 0, [np.zeros((2, 1), np.int64)], 0
        for part in pieces(count):
            size, offset = self.sizes[part].astype(np.int64), offsets[part].astype(np.int64)
            wrong = (size < 0) | (offset < 0) | (offset % width != 0) | (offset > bin_bytes - size * width)
            if wrong.any():
                i = int(wrong.argmax())
                raise InputError(
                    f"{idx}: sentence {part.start + i} has {size[i]} tokens at byte {offset[i]}, outside {bin_.name}"
                    f" ({bin_bytes} bytes); a file is cut or does not belong to the other"
                )
            start = self.tokens + np.cumsum(size) - size
            shifts = offset // width - start
            new = np.diff(shifts, prepend=shift) != 0
            runs.append(np.stack([start[new], shifts[new]]))
            self.tokens, shift = self.tokens + int(size.sum()), shifts[-1]
        if self.tokens * width > bin_bytes:
            raise InputError(f"{idx}: its sentences overlap: {self.tokens} tokens in {bin_bytes} bytes; {REBUILD}")
        self._run_starts, self._run_shifts = np.concatenate(runs, axis=1)
        items = bin_bytes // width
        self._items = np.asarray(np.memmap(bin_, dtype, "r", shape=(items,))) if items else np.zeros(0, dtype)

    def take(self, places: np.ndarray) -> np.ndarray:
        """The tokens at these places of the run, in the file's own integer type."""
        if len(self._run_starts) > 1:
            places = places + self._run_shifts[np.searchsorted(self._run_starts, places, side="right") - 1]
        return self._items[places]


def _no_dataset(idx: Path, missing) -> str:
    folder, split = idx.parent, idx.stem
    if not folder.is_dir():
        return f"{folder}: no such folder (--data_path)"
    for name, what in ((split, "raw text"), (f"{split}.fasta", "fasta")):
        if (folder / name).is_file():
            return f"{folder / name}: {what}, not a binarized dataset; {REBUILD}"
    return f"no {Path(missing).name} in {folder}; it holds {', '.join(sorted(os.listdir(folder))[:8]) or 'nothing'}"


class TokenStream:
    """The sentences of one split as one flat run of tokens: train with train1, train2, ... behind it.

    `sizes` int32 (N,): tokens of each sentence; `starts` int64 (N + 1,): where each begins in the run.
    """

    def __init__(self, folder, split: str):
        self.folder, self.split = Path(folder), split
        self._files = [TokenFile(self.folder / split)]
        while split == "train" and (self.folder / f"{split}{len(self._files)}.idx").exists():
            self._files.append(TokenFile(self.folder / f"{split}{len(self._files)}"))
        sizes = [file.sizes for file in self._files]
        self.sizes = sizes[0] if len(sizes) == 1 else np.concatenate(sizes)
        self._file_ends = np.cumsum([file.tokens for file in self._files])
        self.tokens = int(self._file_ends[-1])

    @functools.cached_property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])

    def take(self, places: np.ndarray) -> np.ndarray:
        """The tokens at these places of the flat run, in the file's own integer type, or int64 if there are several."""
        if len(self._files) == 1:
            return self._files[0].take(places)
        tokens, file_of = np.empty(len(places), np.int64), np.searchsorted(self._file_ends, places, side="right")
        for i, file in enumerate(self._files):
            tokens[file_of == i] = file.take(places[file_of == i] - (self._file_ends[i] - file.tokens))
        return tokens

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of the flat run, int64."""
        return self.take(np.arange(start, end)).astype(np.int64)

    def digest(self) -> str:
        """sha256 over all sizes and 64 samples of the tokens: tells another corpus without reading all of this one."""
        digest = hashlib.sha256()
        for piece in pieces(len(self.sizes)):
            digest.update(self.sizes[piece].astype(np.int64))
        for start in np.linspace(0, max(0, self.tokens - 1024), 64).astype(np.int64).tolist():
            digest.update(self.read(start, min(start + 1024, self.tokens)))
        return digest.hexdigest()

    def sentence_at(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def check_tokens(self, tokens: np.ndarray, positions, dictionary: Dictionary):
        """Raise InputError, with the sentence, if `tokens` (at flat `positions`) hold one that training cannot take."""
        wrong = (tokens < 0) | (tokens >= len(dictionary)) | (tokens == dictionary.mask_id)
        if not wrong.any():
            return
        i = int(wrong.argmax())
        token, sentence = int(tokens[i]), self.sentence_at(int(positions[i]))
        where = f"{self.folder / self.split}: sentence {sentence}"
        if token == dictionary.mask_id:
            raise InputError(f"{where} holds <mask> (id {token}), which no text may; remove it and rebuild the dataset")
        raise InputError(
            f"{where} holds token id {token}, but dict.txt has {len(dictionary)} symbols; wrong dictionary?"
        )

    def checked(self, dictionary: Dictionary):
        """Yield the tokens of the whole split, a piece at a time, each behind check_tokens."""
        for piece in pieces(self.tokens):
            places = np.arange(piece.start, min(piece.stop, self.tokens))
            tokens = self.take(places)
            self.check_tokens(tokens, places, dictionary)
            yield tokens

    def check_all(self, dictionary: Dictionary):
        """check_tokens over the whole split."""
        for _ in self.checked(dictionary):
            pass


def build_dictionary(counts: dict, nwords: int = 0, threshold: int = 0) -> str:
    """The dict.txt that fairseq-preprocess builds from {word: count}: the most frequent first, ties by code point.

    nwords limits the number of symbols, the four special ones included (0: no limit); threshold is the least count.
    Symbols that no text needs pad the number to a multiple of 8.
    """
    # differs from fairseq: a <mask> in the text gets no row, so it becomes <unk>; as a token no training could take it
    words = counts.keys() - {*SPECIAL, "<mask>"}
    kept = sorted((word for word in words if counts[word] >= threshold), key=lambda word: (-counts[word], word))
    if nwords > 0:
        kept = kept[: nwords - len(SPECIAL)]
    taken = {word for word in kept if word.startswith("madeupword")}
    unused = (name for i in itertools.count() if (name := f"madeupword{i:04d}") not in taken)
    padding = itertools.islice(unused, -(len(kept) + len(SPECIAL)) % 8)
    return "".join([f"{word} {counts[word]}\n" for word in kept] + [f"{word} 0\n" for word in padding])


def token_type(vocabulary_size: int) -> np.dtype:
    """The type of a .bin: uint16 under 65,500 symbols (<mask> not counted, unless dict.txt lists it), else uint32."""
    return np.dtype("<u2" if vocabulary_size < 65500 else "<u4")


def write_parts(prefix, chunks, dtype: np.dtype) -> tuple[int, int]:
    """Write chunks as PREFIX.bin.tmp and PREFIX.idx.tmp, byte for byte as fairseq's mmap writer does.

    A chunk is (the tokens of some sentences, as bytes of `dtype`; the sentences' sizes). Returns (sentences, tokens).
    Memory does not grow with their number. `publish` gives the files their names.
    """
    count, tokens, code = 0, 0, {np.dtype(t): code for code, t in DTYPES.items()}[np.dtype(dtype)]
    with open(f"{prefix}.bin.tmp", "wb") as bin_, open(f"{prefix}.idx.tmp", "w+b") as idx:
        idx.write(bytes(HEADER))
        for blob, sizes in chunks:
            bin_.write(blob)
            idx.write(np.asarray(sizes, "<i4").tobytes())
            count += len(sizes)
        for first in range(0, count, 1 << 20):
            idx.seek(HEADER + 4 * first)
            sizes = np.frombuffer(idx.read(4 * min(1 << 20, count - first)), "<i4")
            ends = tokens + np.cumsum(sizes, dtype=np.int64)
            idx.seek(0, os.SEEK_END)
            idx.write(((ends - sizes) * dtype.itemsize).astype("<i8").tobytes())
            tokens = int(ends[-1])
        idx.seek(0)
        idx.write(MAGIC + (1).to_bytes(8, "little") + bytes([code]) + count.to_bytes(8, "little"))
        for file in (bin_, idx):
            file.flush()
            os.fsync(file.fileno())
    return count, tokens


def publish(paths: list):
    """Let PATH.tmp appear as PATH, the last of them last; an older last one goes first, for it fits no other."""
    Path(paths[-1]).unlink(missing_ok=True)
    for path in paths:
        os.replace(f"{path}.tmp", path)


def write_dataset(prefix, sentences, vocabulary_size: int) -> tuple[int, int]:
    """Write an iterable of int arrays as PREFIX.bin and PREFIX.idx; both appear complete or not at all.

    Returns (sentences, tokens). A sentence should end with EOS (2); a sentence [2] separates documents.
    """
    dtype = token_type(vocabulary_size)
    counts = write_parts(prefix, ((np.asarray(s, dtype).tobytes(), [len(s)]) for s in sentences), dtype)
    publish([f"{prefix}.bin", f"{prefix}.idx"])
    return counts


# ---------------------------------------------------------------------------------------------- blocks


def cut_blocks(sizes: np.ndarray, mode: str, block_size: int, split_long: bool) -> tuple[np.ndarray, np.ndarray]:
    """Cut the flat run of sentences into blocks: (start, end) of each in the run, int64, `<s>` not counted.

    none: equal cuts; eos: one sentence each; complete: as many whole sentences as fit; complete_doc: the same, but a
    sentence of one token ends the block and belongs to none, and a block of one token is not kept.
    split_long: a sentence longer than block_size becomes parts of at most block_size first, so that nothing is lost;
    a part of one token is then no separator, and a block of it is kept.
    """
    if mode == "none":
        total = int(sizes.sum(dtype=np.int64))
        starts = np.arange(0, total, block_size, dtype=np.int64)
        return starts, np.minimum(starts + block_size, total)
    blocks, at = [np.zeros((2, 0), np.int64)], 0
    parts, separator = np.zeros(0, np.int64), np.zeros(0, bool)  # what is not in a block yet; it begins at `at`
    for piece in pieces(len(sizes)):
        more, ends_document = _split_sentences(sizes[piece].astype(np.int64), block_size, split_long)
        parts, separator = np.concatenate([parts, more]), np.concatenate([separator, ends_document])
        first, stop = _chain_of_blocks(parts, separator, mode, block_size)
        rest = len(parts)
        if piece.stop < len(sizes) and len(first):  # the last block may go on in the next piece
            first, stop, rest = first[:-1], stop[:-1], first[-1]
        starts = at + np.concatenate([[0], np.cumsum(parts)])
        blocks.append(np.stack([starts[first], starts[stop]]))
        at, parts, separator = starts[rest], parts[rest:], separator[rest:]
    starts, ends = np.concatenate(blocks, axis=1)
    if mode == "complete_doc" and not split_long:
        kept = ends - starts > 1
        starts, ends = starts[kept], ends[kept]
    return starts, ends


def _split_sentences(sizes: np.ndarray, block_size: int, split_long: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of the sentences, or of their parts, that hold something, and which of them are separators."""
    sizes = sizes[sizes > 0]
    separator = sizes == 1
    if split_long:
        counts = -(-sizes // block_size)
        remainder = sizes - (counts - 1) * block_size
        last = np.cumsum(counts) - 1
        sizes, separator = np.full(int(counts.sum()), block_size, np.int64), np.repeat(separator, counts)
        sizes[last] = remainder
    return sizes, separator


def _chain_of_blocks(sizes: np.ndarray, separator: np.ndarray, mode: str, block_size: int):
    """(first sentence, sentence behind the last) of each block."""
    n = len(sizes)
    here = np.arange(n)
    if mode == "eos":
        return here, here + 1
    # Where the block ends that begins at each sentence, for all at once; then follow the chain of blocks.
    ends = np.cumsum(sizes)
    stop = np.searchsorted(ends, ends - sizes + block_size, side="right")
    stop = np.maximum(stop, here + 1)  # one longer than a block stands alone
    following = np.arange(n + 1)
    if mode == "complete_doc":
        next_separator = np.minimum.accumulate(np.where(separator, here, n)[::-1])[::-1]
        stop = np.minimum(stop, next_separator)
        following[:-1] = np.minimum.accumulate(np.where(separator, n, here)[::-1])[::-1]  # the next that is none
    chain, first, i = following[stop].tolist(), [], int(following[0])
    while i < n:
        first.append(i)
        i = chain[i]
    return np.asarray(first, np.int64), stop[first]


def order_by_length(lengths: np.ndarray, seed: int) -> np.ndarray:
    """Block numbers in ascending order of length, ties in the random order that numpy's older generator gives `seed`;
    int32 where that holds them."""
    n = len(lengths)
    by_rank = np.empty(n, np.int32 if n < 2**31 else np.int64)
    # what is permuted are the ranks of the blocks among their equals, as in lexsort((permutation, lengths))
    by_rank[np.random.RandomState(seed).permutation(n)] = np.arange(n, dtype=by_rank.dtype)
    keys = lengths[by_rank]
    if keys.max(initial=0) < 2**16:
        keys = keys.astype(np.uint16)  # which numpy sorts in linear time
    return by_rank[np.argsort(keys, kind="stable")]


def cut_batches(lengths: np.ndarray, max_tokens: int, batch_size: int, multiple: int) -> np.ndarray:
    """Cut blocks in ascending order of length into batches; returns the end of each batch, int64.

    The rule walks the blocks and keeps a *batch*, the longest prefix so far whose size is a multiple of `multiple` or
    below it, and a *tail*, the blocks since. A block that makes batch + tail too large (blocks x longest > max_tokens,
    or more than batch_size blocks) closes the batch, and the tail with that block begins the next one; if the tail is
    too large by itself, it becomes a batch of its own without that block. What is left at the end is a batch and a
    tail. Since lengths ascend, the blocks of one length are a run in which all batches have the same size, and only
    the batches at the border of two runs take a look at each.
    """
    n = len(lengths)
    runs = np.flatnonzero(np.concatenate([[n > 0], lengths[1:] != lengths[:-1]]))
    longest, begins = lengths[runs].tolist(), [*runs.tolist(), n]
    room = [max(1, min(batch_size or n, max_tokens // max(1, length))) for length in longest]  # in a batch that fits
    ends, start, run = [], 0, 0
    while start < n:
        while begins[run + 1] <= start:
            run += 1
        last = run  # the run, this one or a later, that holds the first block which no longer fits behind `start`
        while last < len(room) and start + room[last] >= begins[last + 1]:
            last += 1
        stop = max(start + room[last], begins[last]) if last < len(room) else n
        size = stop - start
        size = size if size < multiple else size // multiple * multiple
        if last == run:  # and the same again and again, while that block is of this run
            count = (begins[run + 1] - 1 - stop) // size + 1
            ends.extend(range(start + size, start + count * size + 1, size))
            start += count * size
            continue
        start += size
        ends.append(start)
        if stop == n:
            if start < n:
                ends.append(n)
            break
        if start < stop and longest[last] * (stop + 1 - start) > max_tokens:  # the tail's own overflow
            ends.append(stop)
            start = stop
    return np.asarray(ends, np.int64)


# ---------------------------------------------------------------------------------------------- masks


def mask_block(length: int, dictionary: Dictionary, cfg: DataConfig, epoch: int, index: int):
    """Draw the mask of one block, `length` tokens with `<s>`: (hidden, shown, random_tokens).

    hidden (length,) bool: the places chosen for masking; shown (length,) bool: those that become `<mask>` or a random
    token; random_tokens: None or (places (length,) bool, their tokens). Each block of each epoch has a generator of its
    own, so masks depend neither on the order of blocks nor on the number of workers.
    """
    # float remainder of Python's own hash of the three integers: the reference's seed, to the bit
    rng = np.random.default_rng(int(hash((cfg.seed, epoch, index)) % 1e6))
    hidden = np.zeros(length, bool)
    count = int(cfg.mask_prob * length / cfg.mask_multiple_length + rng.random())
    places = rng.choice(length, count, replace=False)
    if cfg.mask_stdev > 0:
        spans = np.maximum(np.rint(rng.normal(cfg.mask_multiple_length, cfg.mask_stdev, size=count)), 0).astype(
            np.int64
        )
        within = np.arange(spans.sum()) - np.repeat(np.cumsum(spans) - spans, spans)
        places = np.repeat(places, spans) + within
    else:
        places = (places[:, None] + np.arange(cfg.mask_multiple_length)).ravel()
    hidden[places[places < length]] = True
    special = cfg.random_token_prob + cfg.leave_unmasked_prob
    if special == 0:
        return hidden, hidden, None
    chosen = hidden & (rng.random(length) < special)
    if cfg.random_token_prob == 0:
        left, random = chosen, None
    elif cfg.leave_unmasked_prob == 0:
        left, random = None, chosen
    else:
        decision = rng.random(length) < cfg.leave_unmasked_prob / special
        left, random = chosen & decision, chosen & ~decision
    shown = hidden if left is None else hidden & ~left
    count = 0 if random is None else int(random.sum())
    if count == 0:
        return hidden, shown, None
    weights = np.ones(len(dictionary))
    weights[: len(SPECIAL)] = 0
    return hidden, shown, (random, rng.choice(len(dictionary), count, p=weights / weights.sum()))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each `start`, as many as its length says, one behind the other: int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    out = np.repeat(starts - (ends - lengths), lengths)
    out += np.arange(len(out))
    return out


def cut(flat: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """The parts of an array between one end and the next."""
    ends = ends.tolist()
    return [flat[begin:end] for begin, end in zip([0, *ends], ends)]


def hide_blocks(hidden, begins, lengths, dictionary: Dictionary, cfg: DataConfig, epoch: int, ids: np.ndarray):
    """mask_block's `hidden` for the blocks `ids` at once, without mask_stdev: True in hidden[begin : begin + length].

    hidden is bool and False there; begins (ascending), lengths and ids are int64 (N,).
    """
    # rng.choice goes another way in long blocks, which pay for a generator of their own anyway
    floyd = lengths <= FLOYD_LIMIT
    generators = Generators(np.remainder(tuple_hashes(cfg.seed, epoch, ids).astype(np.float64), 1e6).astype(np.uint32))
    counts = (cfg.mask_prob * lengths / cfg.mask_multiple_length + generators.random()).astype(np.int64) * floyd
    starts = np.zeros(len(hidden), bool)
    redrawn = generators.choose(lengths, counts, begins, starts)
    starts = np.flatnonzero(starts)
    room = np.repeat(begins + lengths, counts) - starts
    hidden[ranges(starts, np.minimum(room, cfg.mask_multiple_length))] = True
    for i in [*np.flatnonzero(~floyd).tolist(), *redrawn.tolist()]:
        alone, _, _ = mask_block(int(lengths[i]), dictionary, cfg, epoch, int(ids[i]))
        hidden[begins[i] : begins[i] + lengths[i]] = alone


@functools.cache
def hide_blocks_is_exact() -> bool:
    """Whether this Python's hash and this numpy's generator are those that rng.py knows."""
    cfg, ids, lengths = DataConfig(seed=12345), np.arange(64) * 977, np.arange(2, 66) * 5
    begins, hidden = np.cumsum(lengths) - lengths, np.zeros(int(lengths.sum()), bool)
    hide_blocks(hidden, begins, lengths, None, cfg, 7, ids)
    rows = [mask_block(length, None, cfg, 7, index)[0] for length, index in zip(lengths.tolist(), ids.tolist())]
    return np.array_equal(hidden, np.concatenate(rows))


# ---------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Masked blocks, on the host. B blocks, T their longest length, U the teacher's; arrays are int64.

    source (B, T): what the student reads; target (B, U): what the teacher reads, the whole blocks (U = T) or, with
    teacher_input=masked, their masked tokens squeezed together; masked (M,): flat places in B x T that show `<mask>`;
    target_places (M,): the same tokens' flat places in B x U. Counted here, so that no step asks the device.
    """

    source: np.ndarray
    target: np.ndarray
    masked: np.ndarray
    target_places: np.ndarray
    ids: np.ndarray  # (B,) block numbers
    ntokens: int  # tokens that are not padding
    source_padded: bool  # holds at least one <pad>
    target_padded: bool

    @property
    def nsentences(self) -> int:
        return len(self.ids)

    @property
    def sample_size(self) -> int:
        return len(self.masked)


def queries_of(places: np.ndarray, blocks: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat places (M,) in blocks x width, ascending, block by block: (index (blocks, Q), slots (M,)), int64.

    index holds each block's places, filled up to the longest row with its first token; slots (M,) are where the places
    stand in blocks x Q.
    """
    rows = places // width
    counts = np.bincount(rows, minlength=blocks)
    most = max(1, int(counts.max()))
    slots = rows * most + np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    index = np.repeat(np.arange(blocks) * width, most)
    index[slots] = places
    return index.reshape(blocks, most), slots


class BlockDataset:
    """The blocks of one split of one folder, in batches; the part of the work that is done once.

    training: order shuffled each epoch, blocks longer than max_tokens skipped. Otherwise (validation) the order is
    fixed, the masks are those of epoch 1, and such a block is an error.
    """

    def __init__(self, cfg: DataConfig, folder, split: str, dictionary: Dictionary):
        cfg.check()
        self.cfg, self.dictionary, self.split = cfg, dictionary, split
        self.training = split == "train"
        self.stream = TokenStream(folder, split)
        split_long = cfg.long_sentences == "split"
        limit = min(cfg.tokens_per_sample, cfg.max_tokens)
        # differs from fairseq: with long_sentences=split a max_tokens below tokens_per_sample shortens the blocks
        # instead of throwing away those between the two
        block_size = (limit if split_long else cfg.tokens_per_sample) - 1
        if block_size < 1:
            raise InputError(f"--max_tokens {cfg.max_tokens}: no room for <s> and a token")
        self.starts, ends = cut_blocks(self.stream.sizes, cfg.sample_break_mode, block_size, split_long)
        self.lengths = (ends - self.starts + 1).astype(np.int32)  # with <s>
        order = order_by_length(self.lengths, cfg.seed)
        ascending = self.lengths[order]
        fit = int(np.searchsorted(ascending, limit if self.training else cfg.tokens_per_sample, side="right"))
        order, ascending, self.too_long = order[:fit], ascending[:fit], order[fit:]
        if not self.training and fit and ascending[-1] > cfg.max_tokens:
            raise InputError(
                f"{folder}: {split} has a block of {ascending[-1]} tokens, above --max_tokens {cfg.max_tokens}"
            )
        ends = cut_batches(ascending, cfg.max_tokens, cfg.batch_size, cfg.required_batch_size_multiple)
        last = int(ends[-1] - (ends[-2] if len(ends) > 1 else 0)) if len(ends) else 0
        dropped = cfg.drop_remainder and last % cfg.required_batch_size_multiple
        self.remainder = order[len(order) - last :] if dropped else order[:0]
        self.order, self.batch_ends = order, ends[:-1] if dropped else ends
        if len(self.batch_ends) == 0:
            raise InputError(
                f"{folder}: {split} gives no batch: {len(self.stream.sizes)} sentences, {len(self.lengths)} blocks,"
                f" {len(self.too_long)} longer than {limit} tokens, {len(self.remainder)} in a dropped remainder"
            )

    def dropped_tokens(self) -> tuple[int, int]:
        """Tokens of the text that training never sees: (in blocks too long, in the dropped remainder)."""
        return tuple(int(self.lengths[part].sum()) - len(part) for part in (self.too_long, self.remainder))

    def epoch_batches(self, epoch: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
        """Block numbers of this worker's batches in order; all workers get equally many, the last may be empty."""
        begins = np.concatenate([[0], self.batch_ends[:-1]])
        which = np.arange(len(self.batch_ends))
        if self.training:
            np.random.RandomState((self.cfg.seed + epoch) % 2**32).shuffle(which)
        mine = [self.order[begins[i] : self.batch_ends[i]] for i in which[rank::world_size].tolist()]
        if len(mine) < -(-len(which) // world_size):
            mine.append(self.order[:0])
        return mine

    def read_block(self, index: int) -> np.ndarray:
        """`<s>` and the block's tokens, int64 (length,), unchecked."""
        start, end = int(self.starts[index]), int(self.starts[index] + self.lengths[index]) - 1
        return np.concatenate([[BOS], self.stream.read(start, end)])

    def _masked_rows(self, ids: np.ndarray, widths: np.ndarray, epoch: int):
        """The blocks `ids` before their teacher's side is made, in rows of these widths one behind the other: tokens
        and source, padded, and hidden, bool, the places chosen for masking, of which those that show `<mask>` enter the
        loss. Raises InputError for a token that may not be there.
        """
        begins, lengths = np.cumsum(widths) - widths, self.lengths[ids].astype(np.int64)
        positions = ranges(self.starts[ids], lengths - 1)
        text = self.stream.take(positions)
        self.stream.check_tokens(text, positions, self.dictionary)
        tokens = np.full(int(widths.sum()), PAD, np.int64)
        tokens[begins], of_text = BOS, np.ones(len(tokens), bool)
        of_text[begins] = of_text[ranges(begins + lengths, widths - lengths)] = False
        tokens[of_text] = text

        cfg, source, hidden = self.cfg, tokens.copy(), np.zeros(len(tokens), bool)
        mask_epoch = epoch if self.training and not cfg.fixed_masks else 1
        plain = cfg.mask_stdev == cfg.random_token_prob == cfg.leave_unmasked_prob == 0
        if plain and hide_blocks_is_exact():
            hide_blocks(hidden, begins, lengths, self.dictionary, cfg, mask_epoch, ids)
            source[hidden] = self.dictionary.mask_id
            return tokens, source, hidden
        for begin, length, index in zip(begins.tolist(), lengths.tolist(), ids.tolist()):
            row = slice(begin, begin + length)
            hidden[row], shown, random = mask_block(length, self.dictionary, cfg, mask_epoch, index)
            source[row][shown] = self.dictionary.mask_id
            if random is not None:
                source[row][random[0]] = random[1]
        return tokens, source, hidden

    def mask(self, ids: np.ndarray, epoch: int):
        """One batch before its teacher's side is made: tokens, source (B, T) padded, and hidden (B, T) bool, the places
        chosen for masking, of which those that show `<mask>` enter the loss."""
        width = int(self.lengths[ids].max())
        return tuple(flat.reshape(-1, width) for flat in self._masked_rows(ids, np.full(len(ids), width), epoch))

    def _batches_at_once(self, lists: list[np.ndarray], epoch: int) -> list[Batch]:
        """The masked batches of several lists of blocks: made as one run of rows, and cut."""
        ids, rows = np.concatenate(lists).astype(np.int64), np.array([len(ids) for ids in lists])
        first, lengths = np.cumsum(rows) - rows, self.lengths[ids]
        widths = np.maximum.reduceat(lengths, first)
        row_widths = np.repeat(widths, rows)
        tokens, source, hidden = self._masked_rows(ids, row_widths, epoch)
        if self.cfg.teacher_input == "full":
            masked = target_places = np.flatnonzero(source == self.dictionary.mask_id)
            target, target_widths = tokens, widths
        else:
            # fairseq's teacher reads <pad> at every other place, and pads count neither for attention nor for
            # positions: the same as the masked tokens squeezed together, at a fraction of the work
            masked = np.flatnonzero(hidden)
            counts = np.diff(np.searchsorted(masked, np.cumsum(row_widths)), prepend=0)
            target_widths = np.maximum(np.maximum.reduceat(counts, first), 1)
            row_widths = np.repeat(target_widths, rows)
            target = np.full(int(row_widths.sum()), PAD, np.int64)
            target_places = ranges(np.cumsum(row_widths) - row_widths, counts)
            target[target_places] = tokens[masked]
            shown = source[masked] == self.dictionary.mask_id
            masked, target_places = masked[shown], target_places[shown]

        ends, target_ends = np.cumsum(rows * widths), np.cumsum(rows * target_widths)
        begins, target_begins = ends - rows * widths, target_ends - rows * target_widths
        place_ends = np.searchsorted(masked, ends)  # flat places count from the batch's own begin
        places = np.diff(place_ends, prepend=0)
        masked, target_places = masked - np.repeat(begins, places), target_places - np.repeat(target_begins, places)
        return [
            Batch(source.reshape(count, -1), target.reshape(count, -1), *rest)
            for count, source, target, *rest in zip(
                rows.tolist(),
                cut(source, ends),
                cut(target, target_ends),
                cut(masked, place_ends),
                cut(target_places, place_ends),
                cut(ids, np.cumsum(rows)),
                np.add.reduceat(lengths, first).tolist(),
                np.logical_or.reduceat(source == PAD, begins).tolist(),
                np.logical_or.reduceat(target == PAD, target_begins).tolist(),
            )
        ]

    def batches(self, lists: list[np.ndarray], epoch: int):
        """Yield the masked batch of each list of blocks in training epoch `epoch`, in order; an empty list has none."""
        at_once = max(1, PIECE // self.cfg.max_tokens)
        for first in range(0, len(lists), at_once):
            some = [ids for ids in lists[first : first + at_once] if len(ids)]
            try:
                ready = self._batches_at_once(some, epoch) if some else []
            except InputError:  # a bad token in one of them; those before it are good
                ready = (self.batch(ids, epoch) for ids in some)
            yield from ready

    def batch(self, ids: np.ndarray, epoch: int) -> Batch:
        """The masked batch of the blocks `ids` (at least one) in training epoch `epoch`."""
        return self._batches_at_once([ids], epoch)[0]


def prefetch(iterable, depth: int):
    """Yield the items in their order while a thread makes up to `depth` of them in advance.

    An error of the iterable is raised at its item's place. Closing the generator, or an error of the one who reads it,
    ends the thread behind the item that it is at.
    """
    items, end = iter(iterable), object()
    maker = ThreadPoolExecutor(1, "prefetch")
    try:
        ahead = deque(maker.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(maker.submit(next, items, end))
            yield item
    finally:
        maker.shutdown(cancel_futures=True)


class Corpus:
    """All folders of `data_path`: training epoch e reads number (e - 1) mod n, everything else the first."""

    def __init__(self, cfg: DataConfig):
        cfg.check()
        self.cfg = cfg
        self.folders = [Path(folder) for folder in cfg.data_path.split(":") if folder]
        if not self.folders:
            raise InputError(f"--data_path {cfg.data_path}: names no folder")
        for folder in self.folders:
            if not folder.is_dir():
                raise InputError(f"{folder}: no such folder (--data_path)")
        self.dictionary = Dictionary(self.folders[0] / "dict.txt")
        self._kept = {}

    def split(self, name: str, epoch: int = 1) -> BlockDataset:
        folder = self.folders[(epoch - 1) % len(self.folders) if name == "train" else 0]
        if name not in self._kept or self._kept[name][0] != folder:
            self._kept[name] = folder, BlockDataset(self.cfg, folder, name, self.dictionary)
        return self._kept[name][1]


# ---------------------------------------------------------------------------------------------- describe


def describe(corpus: Corpus, split: str, epoch: int, rank: int, world_size: int) -> dict:
    """Figures and digests of one split as worker `rank` sees it in `epoch`; reads every token once."""
    dataset, dictionary = corpus.split(split, epoch), corpus.dictionary
    stream, cfg = dataset.stream, dataset.cfg
    stream.check_all(dictionary)
    digests = {name: hashlib.sha256() for name in ("source", "target", "ids")}
    batches = dataset.epoch_batches(epoch, rank, world_size)
    tokens_used = masked = places = 0
    for ids in batches:
        if len(ids) == 0:
            continue
        tokens, source, hidden = dataset.mask(ids, epoch)
        target = tokens if cfg.teacher_input == "full" else np.where(hidden, tokens, PAD)
        for name, array in (("source", source), ("target", target), ("ids", ids.astype(np.int64))):
            digests[name].update(np.ascontiguousarray(array).tobytes())
        tokens_used += int(dataset.lengths[ids].sum())
        masked += int((source == dictionary.mask_id).sum())
        places += source.size
    separators = stream.sizes == 1
    # a document begins at a sentence that is no separator and has none, or nothing, before it that is not one
    documents = int((~separators & np.concatenate([[True], separators[:-1]])).sum()) if len(separators) else 0
    too_long, remainder = dataset.dropped_tokens()
    quantiles = np.quantile(dataset.lengths, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1]) if len(dataset.lengths) else []
    return dict(
        split=split,
        epoch=epoch,
        sentences=len(stream.sizes),
        documents=documents,
        tokens=stream.tokens,
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


def print_description(facts: dict, dataset: BlockDataset):
    first = config.printable(dataset.dictionary.decode(dataset.read_block(0))) if facts["blocks"] else ""
    first = first if len(first) <= 600 else first[:600] + " ..."
    share = 100 / max(1, facts["tokens"])
    for name, text in (
        ("sentences", f"{facts['sentences']:,} in {facts['documents']:,} documents"),
        ("tokens", f"{facts['tokens']:,}"),
        ("dictionary", f"{facts['dictionary_size']:,} symbols, <mask> is {facts['mask_id']}"),
        ("blocks", f"{facts['blocks']:,}"),
        (
            "block length",
            "min 10% 25% 50% 75% 90% max: " + " ".join(f"{q:.0f}" for q in facts["block_length_quantiles"]),
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
    """Write a demo corpus from the help topics that every Python carries: documents are topics, sentences paragraphs.

    train, valid and test share no topic; the dictionary holds the most frequent words of train, padded to a multiple of
    8 as fairseq-preprocess does. Takes a second; the same Python gives the same bytes.
    """
    import re
    from collections import Counter
    from pydoc_data.topics import topics

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{folder}: {e.strerror}") from None
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
    counts = Counter(word for document in documents["train"] for sentence in document for word in sentence)
    (folder / "dict.txt").write_text(build_dictionary(counts, words + len(SPECIAL)), encoding="utf-8")
    dictionary = Dictionary(folder / "dict.txt")
    for split, members in documents.items():
        sentences = []
        for document in members:
            sentences += [[dictionary.ids.get(word, UNK) for word in sentence] + [EOS] for sentence in document]
            sentences.append([EOS])
        count, tokens = write_dataset(folder / split, sentences, dictionary.rows)
        print(f"{folder / split}: {count:,} sentences, {tokens:,} tokens, {len(members)} documents")


def main(argv: list | None = None) -> int:
    def extra(parser):
        parser.add_argument("--split", default="train")
        parser.add_argument("--epoch", type=int, default=1)
        parser.add_argument("--world_size", type=int, default=1)
        parser.add_argument("--rank", type=int, default=0)
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument("--make_demo", metavar="DIR", help="write a demo corpus and stop")

    (cfg,), args = config.parse([DataConfig], __doc__, argv, extra=extra)
    if args.epoch < 1 or args.world_size < 1 or not 0 <= args.rank < args.world_size:
        raise InputError("--epoch and --world_size must be at least 1, and --rank from 0 to world_size - 1")
    if args.make_demo is not None:
        if not args.make_demo:
            raise InputError("--make_demo: names no folder")
        make_demo(args.make_demo)
        return 0
    corpus = Corpus(cfg)
    facts = describe(corpus, args.split, args.epoch, args.rank, args.world_size)
    if args.json:
        print(json.dumps(facts))
    else:
        print_description(facts, corpus.split(args.split, args.epoch))
        if facts["dropped_percent"] > 1:
            print(f"warning: {facts['dropped_percent']:.1f}% of the tokens are never seen", file=sys.stderr)
    return 0


if __name__ == "__main__":
    config.program(main)
