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

from config import InputError, read_text, reading, refuse_pointer
from text.files import note

import numpy as np

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")

MAGIC = b"MMIDIDX\0\0"
HEADER = len(MAGIC) + 8 + 1 + 8  # magic, version u64, dtype code u8, sentence count u64
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
        lines = read_text(path, encoding="utf-8-sig").split("\n")
        if not lines[-1]:
            lines.pop()
        for number, line in enumerate(lines, 1):
            symbol, _, count = line.rstrip().rpartition(" ")
            overwrite = count == "#fairseq:overwrite"
            if overwrite:
                symbol, _, count = symbol.rpartition(" ")
            where = f"{path}, line {number}"
            if not symbol or not count.lstrip("+-").isdigit():
                raise InputError(f"{where}: expected '<symbol> <count>', not {line[:80]!r}")
            if symbol in self.ids and not overwrite:
                raise InputError(f"{where}: {symbol!r} is listed twice")
            self._add(symbol)
        self.rows = len(self.symbols)  # without an unlisted <mask>: the type of the .bin needs it
        if "<mask>" not in self.ids:
            self._add("<mask>")
        self.mask_id = self.ids["<mask>"]

    def _add(self, symbol: str):
        self.ids[symbol] = len(self.symbols)
        self.symbols.append(symbol)

    def __len__(self):
        return len(self.symbols)

    def digest(self) -> str:
        """sha256 of the symbols in order: equal if every token has the same id."""
        return hashlib.sha256("\n".join(self.symbols).encode()).hexdigest()

    def check_same(self, path):
        """Raise InputError if there is another dict.txt at `path` that gives a token another id."""
        if not Path(path).is_file():
            return
        other = Dictionary(path)
        if other.digest() == self.digest():
            return
        pairs = itertools.zip_longest(self.symbols, other.symbols)
        id_, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        how = f"--dict {self.path}"
        if (self.path.parent / "vocab.bpe").is_file():
            bpe = [self.path.parent / name for name in ("encoder.json", "vocab.bpe")]
            how = "--bpe gpt2 --encoder_json {} --vocab_bpe {} {}".format(*bpe, how)
        what = f"token {id_} is {theirs!r} instead of {ours!r}"
        raise InputError(f"{path} is not {self.path}: {what}; binarize that text with {how}")

    def check_checkpoint(self, saved: dict | None, path):
        """Raise InputError if the checkpoint at `path` was trained with another dictionary.

        saved: what it says of its own. fairseq's say nothing: then a dict.txt beside one is its.
        """
        if not saved or "digest" not in saved:
            beside = Path(path).parent / "dict.txt"
            if Path(path).is_file() and beside.is_file():
                Dictionary(beside).check_same(self.path)
        elif saved["digest"] != self.digest():
            order = " in another order" if saved["size"] == len(self) else ""
            sizes = f"{saved['size']} symbols; {self.path} has {len(self)}"
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


def no_folder(folder: Path) -> str:
    what = "no such folder"
    if folder.is_file():
        what = "a file, not a dataset's folder; preprocess.py makes one of text"
    return f"{folder}: {what} (--data_path)"


def missing(path: Path) -> str:
    """What to say of a file of a dataset that is not there: what its folder holds instead."""
    folder = path.parent
    if not folder.is_dir():
        return no_folder(folder)
    names = sorted(os.listdir(folder))
    parts = [f"no {path.name} in {folder}", f"it holds {', '.join(names[:8]) or 'nothing'}"]
    below = [name for name in names if (folder / name / path.name).is_file()]
    if below:
        parts.append(f"is {folder / below[0]} meant?")
    # fairseq-preprocess with a language, as for translation: dict.en.txt and train.en-None.en.idx
    if any(name.startswith(f"{path.stem}.") and name.endswith(path.suffix) for name in names):
        parts.append("fairseq-preprocess writes names without a language with --only-source")
    return "; ".join(parts)


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped: uint8. Raises InputError."""
    if not path.exists():
        raise InputError(missing(path))
    if not path.is_file():
        raise InputError(f"{path}: not a file")
    with reading(f"{path}: cannot be read"):
        refuse_pointer(path)
        if path.stat().st_size == 0:  # which cannot be mapped
            return np.zeros(0, np.uint8)
        return np.asarray(np.memmap(path, np.uint8, "r"))


class TokenFile:
    """The sentences of one PREFIX.idx and PREFIX.bin as a flat run of tokens, memory-mapped.

    `sizes`, int32 (N,), is a view of the index: the number of tokens in each sentence; `tokens` is
    their sum. Every field of the index is checked against the sizes of both files, so no later read
    can leave them. Raises InputError.
    """

    def __init__(self, prefix):
        # the sizes and offsets are views of the index, the tokens one of the .bin
        idx = Path(f"{prefix}.idx")
        raw = map_file(idx)
        items = map_file(Path(f"{prefix}.bin"))
        dtype, count = self._read_header(idx, raw)
        self.sizes = raw[HEADER : HEADER + 4 * count].view("<i4")
        offsets = raw[HEADER + 4 * count :].view("<i8")
        self._items = items[: len(items) // dtype.itemsize * dtype.itemsize].view(dtype)
        self.tokens = 0
        for part in pieces(count):
            # the sentences must lie back to back, in order, within the .bin
            size = self.sizes[part].astype(np.int64)
            start = self.tokens + np.cumsum(size) - size
            moved = offsets[part] != start * dtype.itemsize
            wrong = moved | (size < 0) | (start + size > len(self._items))
            if wrong.any():
                i = int(wrong.argmax())
                where = f"sentence {part.start + i} has {size[i]} tokens at byte {offsets[part][i]}"
                why = "not right after the sentence before it"
                if not moved[i]:
                    why = f"outside the .bin ({len(items)} bytes): one of the two files is cut"
                raise InputError(f"{idx}: {where}, {why}; {REBUILD}")
            self.tokens += int(size.sum())

    @staticmethod
    def _read_header(idx: Path, raw: np.ndarray) -> tuple[np.dtype, int]:
        """The type of the tokens and the number of sentences; checks the length of the index."""
        head = raw[:HEADER].tobytes()
        version = int.from_bytes(head[9:17], "little")
        code = head[17] if len(head) == HEADER else 0
        count = int.from_bytes(head[18:26], "little")
        expected = HEADER + 12 * count  # an int32 and an int64 for each sentence
        wrong = ""
        # fairseq's older formats and Megatron's variant of this one end here, too
        if not head.startswith(MAGIC):
            wrong = "not an mmap index (wrong magic)"
        elif len(head) < HEADER:
            wrong = f"cut off after {len(head)} bytes"
        elif version != 1:
            wrong = f"version {version}, expected 1"
        elif code not in DTYPES:
            wrong = f"dtype code {code}, expected an integer type"
        elif len(raw) != expected:
            wrong = f"{len(raw)} bytes, but {count} sentences need {expected}"
        if wrong:
            raise InputError(f"{idx}: {wrong}; {REBUILD}")
        return np.dtype(DTYPES[code]).newbyteorder("<"), count

    def take(self, places: np.ndarray) -> np.ndarray:
        """The tokens at these places of the run, in the file's own integer type."""
        return self._items[places]


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
        self._counts = None

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where each sentence begins in the run, and the end: int64 (N + 1,)."""
        return np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])

    def take(self, places: np.ndarray) -> np.ndarray:
        """The tokens at these places of the run, in the file's own integer type.

        int64 if there are several files.
        """
        if len(self._files) == 1:
            return self._files[0].take(places)
        # each place belongs to the first file that ends after it
        tokens = np.empty(len(places), np.int64)
        file_of = np.searchsorted(self._file_ends, places, side="right")
        for i, file in enumerate(self._files):
            mine = file_of == i
            tokens[mine] = file.take(places[mine] - (self._file_ends[i] - file.tokens))
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

    def sentence_at(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def check_tokens(self, tokens: np.ndarray, places: np.ndarray, dictionary: Dictionary):
        """Raise InputError, naming the sentence, for a token that training cannot take.

        That is an id that the dictionary lacks, or `<mask>`. places: where the tokens are.
        """
        wrong = (tokens < 0) | (tokens >= len(dictionary)) | (tokens == dictionary.mask_id)
        if not wrong.any():
            return
        i = int(wrong.argmax())
        token = int(tokens[i])
        where = f"{self.folder / self.split}: sentence {self.sentence_at(int(places[i]))}"
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


def write_parts(prefix, chunks, dtype: np.dtype) -> tuple[int, int]:
    """Write chunks to PREFIX.bin.tmp and PREFIX.idx.tmp, byte for byte as fairseq's mmap writer.

    A chunk is (the tokens of some sentences as bytes of `dtype`, the sentences' sizes). Returns
    (sentences, tokens). Memory does not grow with their number. `publish` renames the files.
    """
    codes = {np.dtype(kind): code for code, kind in DTYPES.items()}
    count = tokens = 0
    with open(f"{prefix}.bin.tmp", "wb") as bin_, open(f"{prefix}.idx.tmp", "w+b") as idx:
        idx.write(bytes(HEADER))
        for blob, sizes in chunks:
            bin_.write(blob)
            idx.write(np.asarray(sizes, "<i4").tobytes())
            count += len(sizes)
        # where each sentence begins, from the sizes just written
        for part in pieces(count):
            idx.seek(HEADER + 4 * part.start)
            sizes = np.frombuffer(idx.read(4 * (min(part.stop, count) - part.start)), "<i4")
            ends = tokens + np.cumsum(sizes, dtype=np.int64)
            idx.seek(0, os.SEEK_END)
            idx.write(((ends - sizes) * dtype.itemsize).astype("<i8").tobytes())
            tokens = int(ends[-1])
        # the header last: without it a half-written index is refused
        idx.seek(0)
        idx.write(MAGIC + (1).to_bytes(8, "little") + bytes([codes[np.dtype(dtype)]]))
        idx.write(count.to_bytes(8, "little"))
        for file in (bin_, idx):
            file.flush()
            os.fsync(file.fileno())
    return count, tokens


def publish(paths: list):
    """Rename each PATH.tmp to PATH.

    The last path marks the set as complete: its old version is deleted first, its new one renamed
    last.
    """
    Path(paths[-1]).unlink(missing_ok=True)
    for path in paths:
        os.replace(f"{path}.tmp", path)
    folder = os.open(Path(paths[-1]).parent, os.O_RDONLY)
    os.fsync(folder)  # so that the names outlive a power cut, too
    os.close(folder)


def write_dataset(prefix, sentences, vocabulary_size: int) -> tuple[int, int]:
    """Write an iterable of integer sequences to PREFIX.bin and PREFIX.idx.

    They appear complete or not at all. Returns (sentences, tokens). A sentence should end with EOS
    (2); a sentence [2] separates documents.
    """
    dtype = token_type(vocabulary_size)
    chunks = ((np.asarray(sentence, dtype).tobytes(), [len(sentence)]) for sentence in sentences)
    counts = write_parts(prefix, chunks, dtype)
    publish([f"{prefix}.bin", f"{prefix}.idx"])
    return counts
