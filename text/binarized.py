"""The dataset format of fairseq-preprocess: dict.txt, and the sentences of each split in PREFIX.bin and PREFIX.idx.

A *sentence* is one row of the dataset. The sentences of a split are read as one flat run of tokens. PREFIX.bin holds
the tokens; PREFIX.idx holds the magic, the version, the integer type, then the number of tokens and the first byte of
each sentence. Rules and bytes are those of fairseq's Dictionary and MMapIndexedDataset at commit 3f6ba43f.
"""

import functools
import hashlib
import itertools
import os
from pathlib import Path

from config import InputError, read_text

import numpy as np

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")

MAGIC = b"MMIDIDX\0\0"
HEADER = len(MAGIC) + 8 + 1 + 8  # magic, version u64, dtype code u8, sentence count u64
DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
    9: np.uint32,
    10: np.uint64,
}
REBUILD = "rebuild it with: fairseq-preprocess --dataset-impl mmap"
PIECE = (
    1 << 17
)  # sentences or tokens handled at once; larger pieces are no faster and take more memory


def pieces(count: int):
    """Slices of at most PIECE items that cover range(count), for arrays as long as a corpus."""
    return (slice(begin, begin + PIECE) for begin in range(0, count, PIECE))


# ---------------------------------------------------------------------------------------------- dictionary


class Dictionary:
    """Symbols and their ids from a fairseq dict.txt: the four special ones, one per line, then `<mask>` unless listed.

    Raises InputError, with the line number, for a malformed line or a duplicate that is not marked as an overwrite.
    """

    def __init__(self, path):
        path = Path(path)
        self.symbols = list(SPECIAL)
        ids = {symbol: i for i, symbol in enumerate(SPECIAL)}
        if not path.exists():
            raise InputError(
                f"no dict.txt in {path.parent}: preprocessing writes it into the folder of the .bin files"
            )
        lines = read_text(path).split("\n")
        if lines[-1] == "":
            lines.pop()
        for number, line in enumerate(lines, 1):
            symbol, _, count = line.rstrip().rpartition(" ")
            overwrite = count == "#fairseq:overwrite"
            if overwrite:
                symbol, _, count = symbol.rpartition(" ")
            if not symbol or not count.lstrip("+-").isdigit():
                raise InputError(
                    f"{path}, line {number}: expected '<symbol> <count>', found {line[:80]!r}"
                )
            if symbol in ids and not overwrite:
                raise InputError(
                    f"{path}, line {number}: duplicate of {symbol!r}; each symbol may be listed once"
                )
            ids[symbol] = len(self.symbols)
            self.symbols.append(symbol)
        self.rows = len(
            self.symbols
        )  # without an unlisted <mask>; the integer type of the .bin depends on it
        if "<mask>" not in ids:
            ids["<mask>"] = len(self.symbols)
            self.symbols.append("<mask>")
        self.mask_id, self.ids = ids["<mask>"], ids

    def __len__(self):
        return len(self.symbols)

    def digest(self) -> str:
        """sha256 of the symbols in order: equal for dictionaries that give every token the same id."""
        return hashlib.sha256("\n".join(self.symbols).encode()).hexdigest()

    def holds_bpe_ids(self) -> bool:
        """Whether the symbols are ids of a BPE: the first 100 that the file lists are numbers."""
        return all(symbol.isdigit() for symbol in self.symbols[4 : min(104, self.rows)])

    def decode(self, tokens) -> str:
        return " ".join(self.symbols[t] for t in tokens)


def build_dictionary(counts: dict, nwords: int = 0, threshold: int = 0) -> str:
    """The dict.txt that fairseq-preprocess builds from {word: count}: most frequent first, ties by code point.

    nwords limits the number of symbols, the four special ones included (0: no limit). Words rarer than threshold are
    left out. Unused symbols pad the number to a multiple of 8.
    """
    # differs from fairseq: a <mask> in the text is not listed and becomes <unk>, since no training takes it as a token
    words = counts.keys() - {*SPECIAL, "<mask>"}
    kept = sorted(
        (word for word in words if counts[word] >= threshold),
        key=lambda word: (-counts[word], word),
    )
    if nwords > 0:
        kept = kept[: nwords - len(SPECIAL)]
    taken = {word for word in kept if word.startswith("madeupword")}
    unused = (name for i in itertools.count() if (name := f"madeupword{i:04d}") not in taken)
    padding = itertools.islice(unused, -(len(kept) + len(SPECIAL)) % 8)
    return "".join(
        [f"{word} {counts[word]}\n" for word in kept] + [f"{word} 0\n" for word in padding]
    )


# ---------------------------------------------------------------------------------------------- reading


class TokenFile:
    """The sentences of one PREFIX.idx and PREFIX.bin as a flat run of tokens, memory-mapped.

    `sizes`, int32 (N,), is a view of the index: the number of tokens in each sentence; `tokens` is their sum. Every
    field of the index is checked against the sizes of both files, so no later read can leave them. Raises InputError.
    """

    def __init__(self, prefix):
        idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        try:
            raw = (
                np.asarray(np.memmap(idx, np.uint8, "r"))
                if idx.stat().st_size
                else np.zeros(0, np.uint8)
            )
            bin_bytes = bin_.stat().st_size
            if not bin_.is_file():
                raise InputError(f"{bin_}: not a file")
        except FileNotFoundError as e:
            raise InputError(_no_dataset(idx, e.filename)) from None
        except InputError:
            raise
        except (OSError, ValueError) as e:
            raise InputError(f"{idx}: cannot be read: {e}") from None

        # the header, then the length that it implies
        head = raw[:HEADER].tobytes()
        if not head.startswith(MAGIC):
            kind = {
                b"TNTIDX\0\0": "the older cached/lazy format",
                b"HUFFIDX\0": "the huffman format",
            }.get(head[:8])
            raise InputError(f"{idx}: {kind or 'not an mmap index (wrong magic)'}; {REBUILD}")
        if len(head) < HEADER:
            raise InputError(f"{idx}: cut off after {len(head)} bytes; {REBUILD}")
        version = int.from_bytes(head[9:17], "little")
        code, count = head[17], int.from_bytes(head[18:26], "little")
        if version != 1:
            raise InputError(f"{idx}: version {version}, expected 1; {REBUILD}")
        if code not in DTYPES:
            what = "floating point" if code in (6, 7) else "unknown"
            raise InputError(
                f"{idx}: dtype code {code} ({what}), expected an integer type; {REBUILD}"
            )
        expected = HEADER + 12 * count
        if len(raw) != expected:
            hint = (
                "a cut or damaged file"
                if len(raw) < expected
                else "Megatron's variant, or a cut or damaged file"
            )
            raise InputError(
                f"{idx}: {len(raw)} bytes, but {count} sentences need {expected}: {hint}; {REBUILD}"
            )

        # the sentences, which lie back to back in order
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        self.sizes, offsets = (
            raw[HEADER : HEADER + 4 * count].view("<i4"),
            raw[HEADER + 4 * count :].view("<i8"),
        )
        self.tokens, items = 0, bin_bytes // dtype.itemsize
        for part in pieces(count):
            size = self.sizes[part].astype(np.int64)
            start = self.tokens + np.cumsum(size) - size
            moved = offsets[part] != start * dtype.itemsize
            wrong = moved | (size < 0) | (start + size > items)
            if wrong.any():
                i = int(wrong.argmax())
                where = f"sentence {part.start + i} has {size[i]} tokens at byte {offsets[part][i]}"
                if moved[i]:
                    raise InputError(
                        f"{idx}: {where}, not right after the sentence before it; {REBUILD}"
                    )
                raise InputError(
                    f"{idx}: {where}, outside {bin_.name} ({bin_bytes} bytes);"
                    " one of the two files is cut, or they do not belong together"
                )
            self.tokens += int(size.sum())
        self._items = (
            np.asarray(np.memmap(bin_, dtype, "r", shape=(items,))) if items else np.zeros(0, dtype)
        )

    def take(self, places: np.ndarray) -> np.ndarray:
        """The tokens at these places of the run, in the file's own integer type."""
        return self._items[places]


def no_folder(folder: Path) -> str:
    what = (
        "a file, not a dataset's folder; preprocess.py makes one of text"
        if folder.is_file()
        else "no such folder"
    )
    return f"{folder}: {what} (--data_path)"


def _no_dataset(idx: Path, missing) -> str:
    folder, split = idx.parent, idx.stem
    if not folder.is_dir():
        return no_folder(folder)
    for name, what in ((split, "raw text"), (f"{split}.fasta", "fasta")):
        if (folder / name).is_file():
            return f"{folder / name}: {what}, not a binarized dataset; {REBUILD}"
    return f"no {Path(missing).name} in {folder}; it holds {', '.join(sorted(os.listdir(folder))[:8]) or 'nothing'}"


class TokenStream:
    """The sentences of one split as one flat run of tokens: those of train, then train1, train2, ...

    `sizes`, int32 (N,): the number of tokens in each sentence; `starts`, int64 (N + 1,): where each begins in the run.
    """

    def __init__(self, folder, split: str):
        self.folder, self.split, self._counts = Path(folder), split, None
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
        """The tokens at these places of the run, in the file's own integer type; int64 if there are several files."""
        if len(self._files) == 1:
            return self._files[0].take(places)
        tokens, file_of = (
            np.empty(len(places), np.int64),
            np.searchsorted(self._file_ends, places, side="right"),
        )
        for i, file in enumerate(self._files):
            tokens[file_of == i] = file.take(
                places[file_of == i] - (self._file_ends[i] - file.tokens)
            )
        return tokens

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of the run, int64."""
        return self.take(np.arange(start, end)).astype(np.int64)

    def digest(self) -> str:
        """sha256 of all sizes and 64 samples of the tokens: recognizes another corpus without reading all of it."""
        digest = hashlib.sha256()
        for piece in pieces(len(self.sizes)):
            digest.update(self.sizes[piece].astype(np.int64))
        for start in np.linspace(0, max(0, self.tokens - 1024), 64).astype(np.int64).tolist():
            digest.update(self.read(start, min(start + 1024, self.tokens)))
        return digest.hexdigest()

    def sentence_at(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def check_tokens(self, tokens: np.ndarray, places: np.ndarray, dictionary: Dictionary):
        """Raise InputError, naming the sentence, if the tokens at these places of the run hold one that training cannot
        take: an id that the dictionary lacks, or `<mask>`."""
        wrong = (tokens < 0) | (tokens >= len(dictionary)) | (tokens == dictionary.mask_id)
        if not wrong.any():
            return
        i = int(wrong.argmax())
        token, sentence = int(tokens[i]), self.sentence_at(int(places[i]))
        where = f"{self.folder / self.split}: sentence {sentence}"
        if token == dictionary.mask_id:
            raise InputError(
                f"{where} holds <mask> (id {token}), which text must not hold; remove it and rebuild the dataset"
            )
        raise InputError(
            f"{where} holds token id {token}, but dict.txt has {len(dictionary)} symbols; wrong dictionary?"
        )

    def checked(self, dictionary: Dictionary):
        """Yield the tokens of the whole split a piece at a time, each after check_tokens."""
        for piece in pieces(self.tokens):
            places = np.arange(piece.start, min(piece.stop, self.tokens))
            tokens = self.take(places)
            self.check_tokens(tokens, places, dictionary)
            yield tokens

    def counts(self, dictionary: Dictionary) -> np.ndarray:
        """How often each token id occurs, int64 (len(dictionary),). Reads the whole split, once."""
        if self._counts is None:
            self._counts = np.zeros(len(dictionary), np.int64)
            for tokens in self.checked(dictionary):
                self._counts += np.bincount(tokens.astype(np.int64), minlength=len(dictionary))
        return self._counts

    def check_all(self, dictionary: Dictionary):
        """check_tokens for the whole split."""
        for _ in self.checked(dictionary):
            pass


# ---------------------------------------------------------------------------------------------- writing


def token_type(vocabulary_size: int) -> np.dtype:
    """The integer type of a .bin: uint16 below 65,500 symbols (without a <mask> that dict.txt does not list), else
    uint32."""
    return np.dtype("<u2" if vocabulary_size < 65500 else "<u4")


def write_parts(prefix, chunks, dtype: np.dtype) -> tuple[int, int]:
    """Write chunks to PREFIX.bin.tmp and PREFIX.idx.tmp, byte for byte as fairseq's mmap writer does.

    A chunk is (the tokens of some sentences as bytes of `dtype`, the sentences' sizes). Returns (sentences, tokens).
    Memory does not grow with their number. `publish` renames the files.
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
    """Rename each PATH.tmp to PATH.

    The last path marks the set as complete: its old version is deleted first, its new one renamed last.
    """
    Path(paths[-1]).unlink(missing_ok=True)
    for path in paths:
        os.replace(f"{path}.tmp", path)
    folder = os.open(Path(paths[-1]).parent, os.O_RDONLY)
    os.fsync(folder)  # so that the names outlive a power cut, too
    os.close(folder)


def write_dataset(prefix, sentences, vocabulary_size: int) -> tuple[int, int]:
    """Write an iterable of integer sequences to PREFIX.bin and PREFIX.idx, which appear complete or not at all.

    Returns (sentences, tokens). A sentence should end with EOS (2); a sentence [2] separates documents.
    """
    dtype = token_type(vocabulary_size)
    counts = write_parts(
        prefix, ((np.asarray(s, dtype).tobytes(), [len(s)]) for s in sentences), dtype
    )
    publish([f"{prefix}.bin", f"{prefix}.idx"])
    return counts
