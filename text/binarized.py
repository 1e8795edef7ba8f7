"""The dataset format of fairseq-preprocess: dict.txt, and each split in PREFIX.bin and PREFIX.idx.

A *sentence* is one row of the dataset. The sentences of a split are read as one flat run of tokens.
PREFIX.bin holds the tokens; PREFIX.idx holds the magic, the version, the integer type, then the
number of tokens and the first byte of each sentence. Rules and bytes are those of fairseq's
Dictionary and MMapIndexedDataset at commit 3f6ba43f.
"""

import functools
import hashlib
import itertools
import os
from pathlib import Path

from config import InputError, check_file, read_text, reading
from text.files import lines_of, note

import numpy as np

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")

MAGIC = b"MMIDIDX\0\0"
FIELDS = ((9, 17), (17, 18), (18, 26))  # bytes of the version, the dtype's code, the sentences
HEADER = 26
# the code of each integer type; 6 and 7 are floating point
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64}
DTYPES |= {8: np.uint16, 9: np.uint32, 10: np.uint64}
REBUILD = "rebuild it with: fairseq-preprocess --dataset-impl mmap"
PIECE = 1 << 17  # sentences or tokens handled at once; more are no faster and take more memory


def pieces(count: int):
    """Slices of at most PIECE items that cover range(count), for arrays as long as a corpus."""
    return (slice(begin, begin + PIECE) for begin in range(0, count, PIECE))


# -------------------------------------------------------------------------------------- dictionary


class Dictionary:
    """Symbols and their ids from a fairseq dict.txt.

    The four special ones come first, then one for each line, then `<mask>` unless it is listed.
    Raises InputError, with the line number, for a malformed line, or a duplicate that is not
    marked as an overwrite.
    """

    def __init__(self, path):
        self.path = path = Path(path)
        if not path.exists():
            raise InputError(missing(path))
        self.symbols = list(SPECIAL)
        self.ids = {symbol: i for i, symbol in enumerate(SPECIAL)}
        lines = lines_of(read_text(path, encoding="utf-8-sig"))
        for number, line in enumerate(lines, 1):
            symbol, _, count = line.rstrip().rpartition(" ")
            overwrite = count == "#fairseq:overwrite"
            if overwrite:
                symbol, _, count = symbol.rpartition(" ")
            if not symbol or not count.lstrip("+-").isdigit():
                what = f"expected '<symbol> <count>', not {line[:80]!r}"
                raise InputError(f"{path}, line {number}: {what}")
            if symbol in self.ids and not overwrite:
                raise InputError(f"{path}, line {number}: {symbol!r} is listed twice")
            self.ids[symbol] = len(self.symbols)  # an overwrite's id is that of its own line
            self.symbols.append(symbol)
        self.rows = len(self.symbols)  # without an unlisted <mask>: the type of the .bin needs it
        if "<mask>" not in self.ids:
            self.ids["<mask>"] = len(self.symbols)
            self.symbols.append("<mask>")
        self.mask_id = self.ids["<mask>"]

    def __len__(self):
        return len(self.symbols)

    def digest(self) -> str:
        """sha256 of the symbols in order: equal if every token has the same id."""
        return hashlib.sha256("\n".join(self.symbols).encode()).hexdigest()

    def entry(self) -> dict:
        """What a checkpoint says of the dictionary that it was trained with."""
        return dict(size=len(self), digest=self.digest(), mask_id=self.mask_id)

    def check_same(self, path):
        """Raise InputError if there is another dict.txt at `path` that gives a token another id."""
        if not Path(path).is_file():
            return
        pairs = itertools.zip_longest(self.symbols, Dictionary(path).symbols)
        for i, (ours, theirs) in enumerate(pairs):
            if ours != theirs:
                what = f"token {i} is {theirs!r} instead of {ours!r}"
                how = f"binarize that text with --dict {self.path}"
                raise InputError(f"{path} is not {self.path}: {what}; {how}")

    def check_checkpoint(self, saved: dict | None, path):
        """Raise InputError if the checkpoint at `path` was trained with another dictionary.

        saved: what it says of its own. fairseq's say nothing: then a dict.txt beside one is its.
        """
        if not saved or "digest" not in saved:
            beside = Path(path).parent / "dict.txt"
            if Path(path).is_file() and beside.is_file():
                Dictionary(beside).check_same(self.path)
            else:
                note(f"{path} does not say its dictionary; it must be the one of {self.path}")
        elif saved["digest"] != self.digest():
            size = str(saved.get("size"))[:100]  # of a damaged file it may be anything, or missing
            order = " in another order" if size == str(len(self)) else ""
            sizes = f"{size} symbols; {self.path} has {len(self)}"
            raise InputError(f"{path}: trained with another dictionary ({sizes}){order}")

    def holds_bpe_ids(self) -> bool:
        """Whether the symbols are ids of a BPE: the first 100 that the file lists are numbers."""
        return all(symbol.isdigit() for symbol in self.symbols[4 : min(104, self.rows)])

    def decode(self, tokens) -> str:
        return " ".join(self.symbols[t] for t in tokens)


def build_dictionary(counts: dict, nwords: int = 0, threshold: int = 0) -> str:
    """The dict.txt that fairseq-preprocess builds from {word: count}.

    The most frequent word is first; ties are in the order of code points. nwords limits the number
    of symbols, the four special ones included (0: no limit). Words rarer than threshold are left
    out. Unused symbols pad the number to a multiple of 8.
    """
    # differs from fairseq: a <mask> in the text is not listed and becomes <unk>, since no training
    # takes it as a token
    words = [word for word in counts.keys() - {*SPECIAL, "<mask>"} if counts[word] >= threshold]
    words.sort(key=lambda word: (-counts[word], word))
    if nwords > 0:
        words = words[: nwords - len(SPECIAL)]
    taken = set(words)
    names = (f"madeupword{i:04d}" for i in itertools.count())
    unused = (name for name in names if name not in taken)
    padding = itertools.islice(unused, -(len(words) + len(SPECIAL)) % 8)
    rows = [f"{word} {counts[word]}\n" for word in words] + [f"{word} 0\n" for word in padding]
    return "".join(rows)


# ----------------------------------------------------------------------------------------- reading


def missing(path: Path) -> str:
    """What to say of a file of a dataset that is not there: what its folder holds instead."""
    folder = path.parent
    if folder.is_file():
        what = "a file, not a dataset's folder; preprocess.py makes one of text"
        return f"{folder}: {what} (--data_path)"
    if not folder.is_dir():
        return f"{folder}: no such folder (--data_path)"
    names = sorted(os.listdir(folder))
    text = f"no {path.name} in {folder}; it holds {', '.join(names[:8]) or 'nothing'}"
    # fairseq-preprocess with a language, as for translation: dict.en.txt and train.en-None.en.idx
    if any(name.startswith(f"{path.stem}.") and name.endswith(path.suffix) for name in names):
        text += "; fairseq-preprocess writes names without a language with --only-source"
    return text


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped: uint8. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path}: not a file" if path.exists() else missing(path))
    with reading(f"{path}: cannot be read"):
        check_file(path)
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.zeros(0, np.uint8)
        return np.asarray(np.memmap(path, np.uint8, "r"))


class TokenFile:
    """The sentences of one PREFIX.idx and PREFIX.bin as a flat run of tokens, memory-mapped.

    `items` are the tokens in the file's own integer type. `sizes`, int32 (N,), is a view of the
    index: the number of tokens in each sentence; `tokens` is their sum. Every field of the index is
    checked against the sizes of both files, so no later read can leave them. Raises InputError.
    """

    def __init__(self, prefix):
        idx = Path(f"{prefix}.idx")
        raw = map_file(idx)
        items = map_file(Path(f"{prefix}.bin"))
        head = raw[:HEADER].tobytes()
        # fairseq's older formats and Megatron's variant of this one end here
        if not head.startswith(MAGIC):
            raise InputError(f"{idx}: not an mmap index (wrong magic); {REBUILD}")
        version, code, count = (int.from_bytes(head[a:b], "little") for a, b in FIELDS)
        # after the header an int32 and an int64 for each sentence
        if version != 1 or code not in DTYPES or len(raw) != HEADER + 12 * count:
            what = f"version {version}, dtype code {code}, {count} sentences in {len(raw)} bytes"
            expected = "expected version 1, integers, 12 bytes a sentence"
            raise InputError(f"{idx}: {what}; {expected}; {REBUILD}")
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        self.items = items[: len(items) // dtype.itemsize * dtype.itemsize].view(dtype)
        self.sizes = raw[HEADER : HEADER + 4 * count].view("<i4")
        offsets = raw[HEADER + 4 * count :].view("<i8")
        self.tokens = 0
        for part in pieces(count):
            # the sentences must lie back to back, in order, within the .bin
            size = self.sizes[part].astype(np.int64)
            start = self.tokens + np.cumsum(size) - size
            wrong = (offsets[part] != start * dtype.itemsize) | (size < 0)
            wrong |= start + size > len(self.items)
            if wrong.any():
                i = int(wrong.argmax())
                where = f"sentence {part.start + i} has {size[i]} tokens at byte {offsets[part][i]}"
                right = f"expected byte {start[i] * dtype.itemsize} of a .bin of {len(items)} bytes"
                raise InputError(f"{idx}: {where}; {right}; {REBUILD}")
            self.tokens += int(size.sum())
        if self.tokens * dtype.itemsize != len(items):
            what = f"{self.tokens} tokens, and a .bin of {len(items)} bytes"
            raise InputError(f"{idx}: {what}; they do not belong together; {REBUILD}")


class TokenStream:
    """The sentences of one split as one flat run of tokens: those of train, then train1, ...

    `sizes`, int32 (N,): the number of tokens in each sentence.
    """

    def __init__(self, folder, split: str):
        self.folder = Path(folder)
        self.split = split
        # a large training text may lie in several files
        self._files = [TokenFile(self.folder / split)]
        while split == "train" and (self.folder / f"{split}{len(self._files)}.idx").exists():
            self._files.append(TokenFile(self.folder / f"{split}{len(self._files)}"))
        more = [path for path in self.folder.glob("train[1-9]*.idx") if path.stem[5:].isdecimal()]
        if split == "train" and len(more) >= len(self._files):  # as in fairseq, not read
            where = f"{self.folder}: there is no train{len(self._files)}"
            note(f"{where}, so none of train's files with a higher number is read")
        self.sizes = self._files[0].sizes  # not copied if there are no others
        if len(self._files) > 1:
            self.sizes = np.concatenate([file.sizes for file in self._files])
        self._file_ends = np.cumsum([file.tokens for file in self._files])
        self.tokens = int(self._file_ends[-1])
        self._counts = None  # of each token id, once they are asked for

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where each sentence begins in the run, and the end: int64 (N + 1,)."""
        return np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])

    def take(self, places: np.ndarray) -> np.ndarray:
        """The tokens at these places of the run, in the file's own integer type.

        int64 if there are several files.
        """
        if len(self._files) == 1:
            return self._files[0].items[places]
        # each place belongs to the first file that ends after it
        tokens = np.empty(len(places), np.int64)
        file_of = np.searchsorted(self._file_ends, places, side="right")
        for i, file in enumerate(self._files):
            mine = file_of == i
            tokens[mine] = file.items[places[mine] - (self._file_ends[i] - file.tokens)]
        return tokens

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of the run, int64."""
        return self.take(np.arange(start, end)).astype(np.int64)

    def digest(self) -> str:
        """sha256 of all sizes and 64 samples of the tokens: tells another corpus from this one."""
        digest = hashlib.sha256()
        for piece in pieces(len(self.sizes)):
            digest.update(self.sizes[piece].astype(np.int64))
        for start in np.linspace(0, max(0, self.tokens - 1024), 64).astype(np.int64).tolist():
            digest.update(self.read(start, min(start + 1024, self.tokens)))
        return digest.hexdigest()

    def check_tokens(self, tokens: np.ndarray, places: np.ndarray, dictionary: Dictionary):
        """Raise InputError, naming the sentence, for a token that training cannot take.

        That is an id that the dictionary lacks, or `<mask>`. places: where the tokens are.
        """
        wrong = (tokens < 0) | (tokens >= len(dictionary)) | (tokens == dictionary.mask_id)
        if not wrong.any():
            return
        i = int(wrong.argmax())
        token = int(tokens[i])
        sentence = np.searchsorted(self.starts, places[i], side="right") - 1
        where = f"{self.folder / self.split}: sentence {sentence}"
        if token == dictionary.mask_id:
            raise InputError(f"{where} holds <mask> (id {token}); remove it from the text")
        symbols = f"dict.txt has {len(dictionary)} symbols"
        raise InputError(f"{where} holds token id {token}, but {symbols}; wrong dictionary?")

    def counts(self, dictionary: Dictionary) -> np.ndarray:
        """How often each token id occurs, int64 (len(dictionary),), after check_tokens of all.

        Reads the whole split, once.
        """
        if self._counts is None:
            counts = np.zeros(len(dictionary), np.int64)
            for piece in pieces(self.tokens):
                places = np.arange(piece.start, min(piece.stop, self.tokens))
                tokens = self.take(places)
                self.check_tokens(tokens, places, dictionary)
                counts += np.bincount(tokens.astype(np.int64), minlength=len(dictionary))
            self._counts = counts
        return self._counts


# ----------------------------------------------------------------------------------------- writing


def token_type(vocabulary_size: int) -> np.dtype:
    """The integer type of a .bin, for this number of symbols without an unlisted <mask>."""
    return np.dtype("<u2" if vocabulary_size < 65500 else "<u4")


def write_parts(prefix, chunks, dtype: np.dtype) -> np.ndarray:
    """Write chunks to PREFIX.bin.tmp and PREFIX.idx.tmp, byte for byte as fairseq's mmap writer.

    A chunk is (the tokens of some sentences as bytes of `dtype`, the sentences' sizes). Returns
    all sizes, int32 (N,). Memory: 4 bytes a sentence. `publish` renames the files.
    """
    code = next(code for code, kind in DTYPES.items() if kind == dtype)
    sizes = [np.zeros(0, "<i4")]
    with open(f"{prefix}.bin.tmp", "wb") as bin_, open(f"{prefix}.idx.tmp", "wb") as idx:
        for blob, lengths in chunks:
            bin_.write(blob)
            sizes.append(np.asarray(lengths, "<i4"))
        sizes = np.concatenate(sizes)
        idx.write(MAGIC + (1).to_bytes(8, "little") + bytes([code]))
        idx.write(len(sizes).to_bytes(8, "little"))
        idx.write(sizes)
        # then where each sentence begins
        at = 0
        for part in pieces(len(sizes)):
            ends = at + np.cumsum(sizes[part], dtype=np.int64)
            idx.write(((ends - sizes[part]) * dtype.itemsize).astype("<i8"))
            at = ends[-1]
        for file in (bin_, idx):  # whole on the disk before they get their names
            file.flush()
            os.fsync(file.fileno())
    return sizes


def publish(prefix):
    """Rename PREFIX.bin.tmp and PREFIX.idx.tmp: once there is an index, its .bin is there, too."""
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    for kind in ("bin", "idx"):
        os.replace(f"{prefix}.{kind}.tmp", f"{prefix}.{kind}")
    folder = os.open(Path(prefix).parent, os.O_RDONLY)
    os.fsync(folder)  # so that the names outlive a power cut, too
    os.close(folder)


def write_dataset(prefix, sentences, vocabulary_size: int) -> tuple[int, int]:
    """Write an iterable of integer sequences to PREFIX.bin and PREFIX.idx.

    They appear complete or not at all. Returns (sentences, tokens). A sentence should end with EOS
    (2); a sentence [2] separates documents.
    """
    dtype = token_type(vocabulary_size)
    chunks = ((np.asarray(sentence, dtype).tobytes(), [len(sentence)]) for sentence in sentences)
    sizes = write_parts(prefix, chunks, dtype)
    publish(prefix)
    return len(sizes), int(sizes.sum())
