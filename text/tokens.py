"""Text to token ids: words, or a byte-level BPE in GPT-2's two files, by the tokenizers package.

Source: fairseq at commit 3f6ba43f, examples/roberta/multiprocessing_bpe_encoder.py (with
--keep-empty) and fairseq_cli/preprocess.py (with --only-source), whose ids these are.
"""

import functools
import itertools
import json
import re
import sys
import tempfile
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

from config import InputError, read_text, reading
from text.binarized import BOS, EOS, SPECIAL, UNK, Dictionary, token_type
from text.files import lines_of, read_all, text_size, visible

import numpy as np

BPE_FILES = ("encoder.json", "vocab.bpe")
TEXT_FILES = ("dict.txt", *BPE_FILES)
# GPT-2's pattern always cuts before a space between two characters that are not white space, and
# looks at nothing beyond that space. So the pieces can be encoded, and remembered, one by one.
CUT = re.compile(r"(?<=\S)(?= \S)")
MANY_UNKNOWN = 0.2  # share of <unk> above which a warning is due
MEMO = 1 << 17  # pieces of text that are remembered with their tokens
TRAINED_PIECE = 3000  # most bytes of a piece that a BPE is trained on; no text has longer words


def warn_of_unknown(unknown: int, tokens: int) -> float:
    """The share of `<unk>` among a text's tokens, with a warning where it is large."""
    share = unknown / max(1, tokens)
    if share > MANY_UNKNOWN:
        what = "the model does not know this text"
        print(f"warning: {share:.0%} of the tokens are <unk>: {what}", file=sys.stderr)
    return share


# --------------------------------------------------------------------------------------- BPE files


def need_tokenizers():
    with reading("BPE needs the tokenizers package: pip install tokenizers"):
        import tokenizers
    return tokenizers


def byte_level(bpe_model=None):
    """A `tokenizers` BPE that cuts text as GPT-2 does.

    It has no special tokens: "<s>" is three ordinary characters.
    """
    tokenizers = need_tokenizers()
    bpe = tokenizers.Tokenizer(bpe_model or tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return bpe


def read_bpe_files(encoder_json, vocab_bpe) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """GPT-2's two files: {token: id} and the merges. Raises InputError if they do not agree."""
    with reading(f"{encoder_json}: not GPT-2's encoder.json, an object of tokens and their ids"):
        vocab = json.loads(read_text(encoder_json))
        json.dumps(vocab, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        if not all(type(number) is int and 0 <= number < 1 << 24 for number in vocab.values()):
            raise ValueError("an id is no number, or too large")
    rows = read_text(vocab_bpe).split("\n")
    if rows[0].startswith("#version"):
        rows = rows[1:]
    merges = [tuple(row.split(" ")) for row in rows if row]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            what = f"{' '.join(merge)[:80]!r} does not merge two tokens of {encoder_json}"
            raise InputError(f"{vocab_bpe}: {what}")
    return vocab, merges


def read_bpe(encoder_json, vocab_bpe):
    """The `tokenizers` BPE of GPT-2's two files, which gives every text fairseq's ids.

    Raises InputError if a file is missing, cut, or belongs to something else.
    """
    tokenizers = need_tokenizers()
    vocab, merges = read_bpe_files(encoder_json, vocab_bpe)
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    if missing := alphabet - vocab.keys():
        what = f"{len(missing)} of the 256 single bytes have no token; not a byte-level BPE"
        raise InputError(f"{encoder_json}: {what}")
    bpe = byte_level(tokenizers.models.BPE(vocab, merges))
    # special tokens, such as <|endoftext|>, are cut before any merge; all others need a merge
    unmade = vocab.keys() - {"".join(merge) for merge in merges} - alphabet
    cut = bpe.pre_tokenizer.pre_tokenize_str
    words = sorted(token for token in unmade if len(cut(bpe.decoder.decode([token]))) < 2)
    if words:
        raise InputError(
            f"{vocab_bpe} has no merge for {len(words)} tokens of {encoder_json}, such as"
            f" {words[0]!r}: take it out if it is a special token, which no text becomes; else one"
            " of the files is cut, or they do not belong together"
        )
    return bpe


def train_bpe(names: list[str], vocab_size: int, sample_mb: int) -> list[bytes]:
    """Train a byte-level BPE on text files; returns the contents of GPT-2's two files.

    The trainer's memory grows with the number of different pieces of text, and in a language
    without spaces nearly all pieces differ: 100 MB for each MB of Chinese. So it sees at most
    sample_mb MB, spread evenly over the files.
    """
    tokenizers = need_tokenizers()
    size = sample_mb * 1_000_000
    share = min(1.0, size / max(1, text_size(names)))  # every 1 / share-th piece is taken
    sample = []
    for i, text in enumerate(read_all(names, "reading for the BPE")):
        if int((i + 1) * share) > int(i * share):
            sample += [line.strip() for line in lines_of(text)]
    if not sample:  # a piece is whole lines, and these are longer than the sample
        text = next(read_all(names, "reading for the BPE"), "")
        sample = lines_of(text[:size])
    if not any(sample):
        raise InputError(f"--train {' '.join(names)}: no text in it to train a BPE on")

    bpe = byte_level()
    # the trainer's time grows with the square of the longest piece: of DNA a whole line is one
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f".{{{TRAINED_PIECE}}}"), "isolated")
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([bpe.pre_tokenizer, cut])
    print(f"training a BPE of {vocab_size:,} tokens on {sum(map(len, sample)):,} characters")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair that occurs once is no part of the language
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    # in a thread, since the trainer does not return to Python, where Ctrl-C is answered
    with ThreadPool(1) as pool:
        pool.apply(bpe.train_from_iterator, (sample, trainer, len(sample)))
    with tempfile.TemporaryDirectory() as folder:
        _, merges = bpe.model.save(folder)
        merges = Path(merges).read_bytes()
    vocab = dict(sorted(bpe.get_vocab().items(), key=lambda item: item[1]))
    return [json.dumps(vocab).encode(), merges]


# --------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """Lines of text -> their token ids, each line ending in EOS, exactly as a dataset holds them.

    ids: {symbol: id}; what it lacks becomes UNK. bpe: a `tokenizers` BPE whose ids, as decimal
    numbers, are the symbols, or None if the symbols are words. dtype: the integer type of the .bin.
    Called with a list of lines it returns a list of int64 arrays; an empty line is [2].
    """

    def __init__(self, ids: dict, dtype, bpe=None):
        self.ids = ids
        self.dtype = np.dtype(dtype)
        self.bpe = bpe
        self.eos = np.array([EOS], dtype).tobytes()
        remember = functools.lru_cache(MEMO)
        if bpe is None:
            self.later = remember(lambda word: np.array([ids.get(word, UNK)], dtype).tobytes())
            return
        # table: id of the BPE -> id of the dictionary
        numbers = range(1 + max(bpe.get_vocab(with_added_tokens=False).values()))
        self.table = np.array([ids.get(str(i), UNK) for i in numbers], dtype)
        # a line's first word has no space before it
        self.first = remember(self._encode)
        self.later = remember(lambda word: self._encode(" " + word))

    def _encode(self, text: str) -> bytes:
        return self.table[self.bpe.encode(text, add_special_tokens=False).ids].tobytes()

    def _row(self, line: str) -> bytes:
        """The tokens of one line as bytes."""
        line = line.strip()
        words = line.split()
        if self.bpe is None or not words:
            return b"".join(map(self.later, words)) + self.eos
        if " ".join(words) != line:  # other white space than single spaces
            return b"".join(map(self.first, CUT.split(line))) + self.eos
        return self.first(words[0]) + b"".join(map(self.later, words[1:])) + self.eos

    def __call__(self, lines: list[str]) -> list[np.ndarray]:
        rows = [self._row(visible(line)) for line in lines]
        return [np.frombuffer(row, self.dtype).astype(np.int64) for row in rows]

    def decode(self, tokens, dictionary: Dictionary) -> str:
        """The text of token ids. What is no token of the BPE, such as <s>, is its symbol."""
        if self.bpe is None:
            return dictionary.decode(tokens)
        text = ""
        symbols = (dictionary.symbols[token] for token in tokens)
        for is_text, group in itertools.groupby(symbols, str.isdecimal):
            if is_text:
                text += self.bpe.decode([int(symbol) for symbol in group])
            else:
                text += "".join(group)
        return text

    def encode(self, chunk: str):
        """Some lines -> (their tokens as bytes, sizes int32 (lines,), number of UNK)."""
        rows = [self._row(line) for line in lines_of(chunk)]
        tokens = b"".join(rows)
        sizes = np.fromiter(map(len, rows), np.int32, len(rows)) // self.dtype.itemsize
        unknown = int(np.count_nonzero(np.frombuffer(tokens, self.dtype) == UNK))
        return tokens, sizes, unknown

    def count(self, chunk: str) -> Counter:
        """Some lines -> how often each word, or each id, occurs; EOS is not counted."""
        if self.bpe is None:
            return Counter(chunk.split())
        tokens, sizes, _ = self.encode(chunk)
        counts = np.bincount(np.frombuffer(tokens, self.dtype), minlength=EOS + 1)
        counts[EOS] -= len(sizes)  # one ends each line
        return Counter({str(i): int(counts[i]) for i in np.flatnonzero(counts).tolist()})


def tokenizer_of(dictionary: Dictionary, bpe) -> Tokenizer:
    """The tokenizer of a dataset: a text may hold any symbol but <mask>.

    Raises InputError for the vocab.json of transformers, whose ids are not those of encoder.json.
    """
    if bpe and bpe.token_to_id(SPECIAL[BOS]) is not None:
        if not {str(i) for i in bpe.get_vocab().values()} <= dictionary.ids.keys():
            what = "not of this BPE, which holds <s>: is it a vocab.json in place of encoder.json?"
            raise InputError(f"{dictionary.path}: {what}")
    ids = {symbol: i for symbol, i in dictionary.ids.items() if i != dictionary.mask_id}
    return Tokenizer(ids, token_type(dictionary.rows), bpe)


# ---------------------------------------------------------------------------- the files of a folder


def find_text_files(folder, named: dict) -> dict[str, Path]:
    """Where dict.txt and, if the tokens are a BPE's, encoder.json and vocab.bpe are.

    named: {name: path} of what the command line names; the others are looked for in `folder`, or
    not at all if that is None. Raises InputError for a named file that does not exist, and if only
    one of the BPE's two files does.
    """
    paths = {}
    for name in TEXT_FILES:
        if named.get(name):
            paths[name] = Path(named[name])
            if not paths[name].is_file():
                raise InputError(f"{paths[name]}: no such file, for {name}")
        elif folder and (Path(folder) / name).is_file():
            paths[name] = Path(folder) / name
    for name, other in (BPE_FILES, BPE_FILES[::-1]):
        if name in paths and other not in paths:
            raise InputError(f"no {other}, which belongs to {paths[name]}")
    return paths


def load_tokenizer(folder, dictionary: Dictionary, encoder_json=None, vocab_bpe=None) -> Tokenizer:
    """The tokenizer of a data folder: a BPE if its files are there or named here, else words.

    Raises InputError if one of the files is missing.
    """
    paths = find_text_files(folder, dict(zip(BPE_FILES, (encoder_json, vocab_bpe))))
    bpe = None
    if "vocab.bpe" in paths:
        bpe = read_bpe(paths["encoder.json"], paths["vocab.bpe"])
    elif dictionary.holds_bpe_ids():
        raise InputError(
            f"{folder}: its dict.txt holds the ids of a BPE, but encoder.json and vocab.bpe are not"
            " beside it; put them there, or name them (--encoder_json F --vocab_bpe F)"
        )
    return tokenizer_of(dictionary, bpe)
