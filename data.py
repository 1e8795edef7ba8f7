"""What goes in: the dataset that fairseq binarized, as masked batches of numpy arrays.

    python data.py --data_path DIR              describe a dataset: what a run would see and what it would lose
    python data.py --data_path DIR --json       the same as one JSON object, with digests of one epoch's batches
    python data.py --make_demo DIR              write a small demo corpus

Words: a *sentence* is one row of the binarized dataset, a *block* is one training sample cut from consecutive
sentences, a *batch* is a list of blocks. Rules and formats are those of fairseq's TokenBlockDataset, MaskTokensDataset
and batch sampler at commit 3f6ba43f; where the default differs, the place says so.
"""

import bisect
import hashlib
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from config import InputError, option

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")

MAGIC = b"MMIDIDX\0\0"
HEADER = len(MAGIC) + 8 + 1 + 8  # magic, version u64, dtype code u8, sentence count u64
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32, 10: np.uint64}
REBUILD = "rebuild it with: fairseq-preprocess --dataset-impl mmap"


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

    def decode(self, tokens) -> str:
        return " ".join(self.symbols[t] for t in tokens)


class TokenFile:
    """One PREFIX.idx and PREFIX.bin, memory-mapped. `sizes` int64 (N,), `offsets` in items (N,), `items` the flat .bin.

    Every field of the index is checked against the real size of both files, so that no later read can leave them.
    Raises InputError.
    """

    def __init__(self, prefix):
        idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        try:
            raw = np.memmap(idx, np.uint8, "r") if idx.stat().st_size else np.zeros(0, np.uint8)
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
        self.path, self.dtype = idx, np.dtype(DTYPES[code]).newbyteorder("<")
        self.sizes = raw[HEADER : HEADER + 4 * count].view("<i4").astype(np.int64)
        offsets = raw[HEADER + 4 * count :].view("<i8")
        width = self.dtype.itemsize
        wrong = (self.sizes < 0) | (offsets < 0) | (offsets % width != 0) | (offsets > bin_bytes - self.sizes * width)
        if wrong.any():
            i = int(wrong.argmax())
            raise InputError(
                f"{idx}: sentence {i} has {self.sizes[i]} tokens at byte {offsets[i]}, outside {bin_.name}"
                f" ({bin_bytes} bytes); a file is cut or does not belong to the other"
            )
        if int(self.sizes.sum()) * width > bin_bytes:
            raise InputError(f"{idx}: its sentences overlap: {self.sizes.sum()} tokens in {bin_bytes} bytes; {REBUILD}")
        self.offsets = offsets // width
        items = bin_bytes // width
        self.items = np.memmap(bin_, self.dtype, "r", shape=(items,)) if items else np.zeros(0, self.dtype)


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

    `sizes` int64 (N,): tokens of each sentence; `starts` (N + 1,): where each begins in the run.
    """

    def __init__(self, folder, split: str):
        self.folder, self.split = Path(folder), split
        files = [TokenFile(self.folder / split)]
        while split == "train" and (self.folder / f"{split}{len(files)}.idx").exists():
            files.append(TokenFile(self.folder / f"{split}{len(files)}"))
        self.sizes = np.concatenate([file.sizes for file in files])
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.tokens = int(self.starts[-1])
        # Runs of sentences that lie back to back in a file; the writer makes one run a file, other orders are legal.
        self._runs, self._run_starts, first = [], [], 0
        for file in files:
            breaks = np.flatnonzero(file.offsets[1:] != file.offsets[:-1] + file.sizes[:-1]) + 1
            for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(file.sizes)]):
                length = int(self.starts[first + end] - self.starts[first + begin])
                if length:
                    at = int(file.offsets[begin])
                    self._runs.append(file.items[at : at + length])
                    self._run_starts.append(int(self.starts[first + begin]))
            first += len(file.sizes)

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of the flat run, in the file's own integer type."""
        i = bisect.bisect_right(self._run_starts, start) - 1
        at = start - self._run_starts[i]
        if at + end - start <= len(self._runs[i]):
            return self._runs[i][at : at + end - start]
        parts = []
        while start < end:
            part = self._runs[i][start - self._run_starts[i] :][: end - start]
            parts.append(part)
            start, i = start + len(part), i + 1
        return np.concatenate(parts)

    def digest(self) -> str:
        """sha256 over all sizes and 64 samples of the tokens: tells another corpus without reading all of this one."""
        digest = hashlib.sha256(self.sizes.tobytes())
        for start in np.linspace(0, max(0, self.tokens - 1024), 64).astype(np.int64).tolist():
            end = min(start + 1024, self.tokens)
            digest.update(self.read(start, end).astype(np.int64).tobytes() if end > start else b"")
        return digest.hexdigest()

    def sentence_at(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def check_tokens(self, tokens: np.ndarray, positions, dictionary: Dictionary):
        """Raise InputError, with the sentence, if `tokens` (at flat `positions`) hold one that training cannot take."""
        # an unsigned 64-bit id beyond int64 turns negative here
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

    def check_all(self, dictionary: Dictionary, chunk: int = 1 << 22):
        """check_tokens over the whole split, a chunk at a time."""
        for start in range(0, self.tokens, chunk):
            end = min(start + chunk, self.tokens)
            self.check_tokens(self.read(start, end).astype(np.int64), range(start, end), dictionary)


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
    split_long: a sentence longer than block_size becomes pieces of at most block_size first, so that nothing is lost;
    a piece of one token is then no separator, and a block of it is kept.
    """
    total = int(sizes.sum())
    if mode == "none":
        starts = np.arange(0, total, block_size, dtype=np.int64)
        return starts, np.minimum(starts + block_size, total)
    sizes = sizes[sizes > 0]
    separator = sizes == 1
    if split_long:
        pieces = -(-sizes // block_size)
        last = np.cumsum(pieces) - 1
        remainder = sizes - (pieces - 1) * block_size
        sizes, separator = np.full(int(pieces.sum()), block_size, np.int64), np.repeat(separator, pieces)
        sizes[last] = remainder
    starts = np.concatenate([[0], np.cumsum(sizes)])
    if mode == "eos":
        return starts[:-1], starts[1:]
    # Where the block ends that begins at each sentence, for all at once; then follow the chain of blocks.
    n = len(sizes)
    following = np.searchsorted(starts, starts[:-1] + block_size, side="right") - 1
    following = np.maximum(following, np.arange(1, n + 1))  # one longer than a block stands alone
    skip = np.arange(n + 1)
    if mode == "complete_doc":
        positions = np.where(separator, np.arange(n), n)
        next_separator = np.minimum.accumulate(positions[::-1])[::-1]
        following = np.minimum(following, next_separator)
        positions = np.where(separator, n, np.arange(n))
        skip[:-1] = np.minimum.accumulate(positions[::-1])[::-1]  # the next sentence that is no separator
    following = skip[following].tolist() if n else []
    first, i = [], int(skip[0])
    while i < n:
        first.append(i)
        i = following[i]
    first = np.asarray(first, np.int64)
    end = np.minimum(np.searchsorted(starts, starts[first] + block_size, side="right") - 1, n)
    end = np.maximum(end, first + 1)
    if mode == "complete_doc":
        end = np.minimum(end, next_separator[first])
    begin, end = starts[first], starts[end]
    if mode == "complete_doc" and not split_long:
        begin, end = begin[end - begin > 1], end[end - begin > 1]
    return begin, end


def cut_batches(lengths: np.ndarray, max_tokens: int, batch_size: int, multiple: int) -> np.ndarray:
    """Cut blocks in ascending order of length into batches; returns the end of each batch, int64.

    The rule walks the blocks and keeps a *batch*, the longest prefix so far whose size is a multiple of `multiple` or
    below it, and a *tail*, the blocks since. A block that makes batch + tail too large (blocks x longest > max_tokens,
    or more than batch_size blocks) closes the batch, and the tail with that block begins the next one; if the tail is
    too large by itself, it becomes a batch of its own without that block. What is left at the end is a batch and a
    tail. Since lengths ascend, 'too large' is monotone, and each batch takes one binary search instead of a walk.
    """
    longest = lengths.tolist()
    ends, start, n = [], 0, len(longest)
    while start < n:
        most = min(n - start, batch_size or n, max(1, max_tokens // max(1, longest[start])))
        # the first block that no longer fits behind `start`
        stop = (
            bisect.bisect_left(
                range(start, start + most), True, key=lambda i: (i + 1 - start) * longest[i] > max_tokens
            )
            + start
        )
        stop = max(stop, start + 1)
        size = stop - start
        batch_end = stop if size < multiple else start + size // multiple * multiple
        ends.append(batch_end)
        start = batch_end
        if stop == n:
            if batch_end < n:
                ends.append(n)
            break
        if batch_end < stop and longest[stop] * (stop + 1 - batch_end) > max_tokens:  # the tail's own overflow
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
        self.starts, self.ends = cut_blocks(self.stream.sizes, cfg.sample_break_mode, block_size, split_long)
        self.lengths = self.ends - self.starts + 1  # with <s>
        shuffled = np.random.RandomState(cfg.seed).permutation(len(self.lengths))
        order = np.lexsort((shuffled, self.lengths))
        fits = self.lengths[order] <= (limit if self.training else cfg.tokens_per_sample)
        self.too_long = order[~fits]
        order = order[fits]
        if not self.training and len(order) and self.lengths[order[-1]] > cfg.max_tokens:
            raise InputError(
                f"{folder}: {split} has a block of {self.lengths[order[-1]]} tokens, above --max_tokens"
                f" {cfg.max_tokens}"
            )
        ends = cut_batches(self.lengths[order], cfg.max_tokens, cfg.batch_size, cfg.required_batch_size_multiple)
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
        sizes = self.ends - self.starts
        return int(sizes[self.too_long].sum()), int(sizes[self.remainder].sum())

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
        """`<s>` and the block's tokens, int64 (length,). Raises InputError for a token that may not be there."""
        start, end = int(self.starts[index]), int(self.ends[index])
        tokens = np.empty(end - start + 1, np.int64)
        tokens[0] = BOS
        tokens[1:] = self.stream.read(start, end)
        return tokens

    def mask(self, ids: np.ndarray, epoch: int):
        """One batch before its teacher's side is made: tokens, source (B, T) padded, and hidden (B, T) bool, the places
        chosen for masking, of which those that show `<mask>` enter the loss."""
        lengths = self.lengths[ids]
        shape = len(ids), int(lengths.max())
        tokens, hidden = np.full(shape, PAD, np.int64), np.zeros(shape, bool)
        for row, index in enumerate(ids.tolist()):
            tokens[row, : lengths[row]] = self.read_block(index)
        real = np.arange(shape[1]) < lengths[:, None]
        real[:, 0] = False  # <s> is ours, not the text's
        rows, columns = np.nonzero(real)
        self.stream.check_tokens(tokens[real], self.starts[ids][rows] + columns - 1, self.dictionary)
        source = tokens.copy()
        mask_epoch = epoch if self.training and not self.cfg.fixed_masks else 1
        for row, (index, length) in enumerate(zip(ids.tolist(), lengths.tolist())):
            hidden[row, :length], shown, random = mask_block(length, self.dictionary, self.cfg, mask_epoch, index)
            source[row, :length][shown] = self.dictionary.mask_id
            if random is not None:
                source[row, :length][random[0]] = random[1]
        return tokens, source, hidden

    def batch(self, ids: np.ndarray, epoch: int) -> Batch:
        """The masked batch of the blocks `ids` (at least one) in training epoch `epoch`."""
        tokens, source, hidden = self.mask(ids, epoch)
        masked = np.flatnonzero(source == self.dictionary.mask_id)
        if self.cfg.teacher_input == "full":
            target, target_places = tokens, masked
        else:
            # fairseq's teacher reads <pad> at every other place, and pads count neither for attention nor for
            # positions: the same as the masked tokens squeezed together, at a fraction of the work
            counts = hidden.sum(1)
            width = max(1, int(counts.max()))
            target = np.full((len(ids), width), PAD, np.int64)
            target[np.arange(width) < counts[:, None]] = tokens[hidden]
            place = np.cumsum(hidden, axis=1) - 1 + width * np.arange(len(ids))[:, None]
            target_places = place.ravel()[masked]
        return Batch(
            source,
            target,
            masked,
            target_places,
            ids,
            ntokens=int(self.lengths[ids].sum()),
            source_padded=bool((source == PAD).any()),
            target_padded=bool((target == PAD).any()),
        )


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
