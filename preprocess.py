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
from data import EOS, HEADER, UNK, Dictionary, build_dictionary, publish, token_type, write_parts
from guard import Lock

SPLITS = ("test", "valid", "train")  # train last, since nothing takes a folder without it for a dataset
BPE_FILES = ("encoder.json", "vocab.bpe")
CHUNK = 1 << 20  # bytes of text that one worker takes at a time
MEMO, MEMO_PIECE = 1 << 18, 32  # pieces of text whose tokens are remembered, and the longest of these


# ---------------------------------------------------------------------------------------------- text to tokens


def lines_of(chunk: bytes) -> list[str]:
    """The lines of a chunk as Python's text files give them: "\\n", "\\r" and "\\r\\n" end one, nothing else does."""
    text = chunk.decode("utf-8")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
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
        words = line.split()
        if self.bpe is None or not words:
            return b"".join(map(self.later.__getitem__, words)) + self.eos
        line = line.strip()
        # GPT-2's pattern always cuts before a space between two characters that are no white space, and looks at
        # nothing beyond it; so words parted by single spaces can be encoded, and remembered, one by one.
        if " ".join(words) != line:
            return self._encode(line) + self.eos
        return self.first[words[0]] + b"".join(map(self.later.__getitem__, words[1:])) + self.eos

    def __call__(self, lines: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(self._row(line), self.dtype).astype(np.int64) for line in lines]

    def encode(self, chunk: bytes):
        """A chunk of text -> (its tokens as bytes, sizes int32 (sentences,), number of UNK)."""
        rows = [self._row(line) for line in lines_of(chunk)]
        tokens = b"".join(rows)
        sizes = np.fromiter(map(len, rows), np.int32, len(rows)) // self.dtype.itemsize
        return tokens, sizes, int(np.count_nonzero(np.frombuffer(tokens, self.dtype) == UNK))

    def count(self, chunk: bytes) -> tuple[int, Counter]:
        """A chunk of text -> (its number of lines, how often each symbol occurs)."""
        lines = lines_of(chunk)
        if self.bpe is None:
            return len(lines), Counter(word for line in lines for word in line.split())
        counts = np.bincount(np.frombuffer(b"".join(map(self._row, lines)), self.dtype))
        return len(lines), Counter({i: counts[i] for i in np.flatnonzero(counts).tolist()})


def load_tokenizer(folder, dictionary: Dictionary, encoder_json=None, vocab_bpe=None) -> Tokenizer:
    """The tokenizer of a data folder: BPE if encoder.json and vocab.bpe are in it or given here, else words.

    Raises InputError for what is missing.
    """
    given = dict(zip(BPE_FILES, (encoder_json, vocab_bpe)))
    paths = {name: Path(path or Path(folder) / name) for name, path in given.items()}
    there = [name for name in BPE_FILES if given[name] or paths[name].exists()]
    if not there and all(symbol.isdigit() for symbol in dictionary.symbols[4:104]):
        raise InputError(
            f"{folder}: its dict.txt holds the ids of a BPE, but encoder.json and vocab.bpe are not beside it; put them"
            " there, or name them (--encoder_json F --vocab_bpe F)"
        )
    if len(there) == 1:
        missing = next(name for name in BPE_FILES if name not in there)
        raise InputError(f"no {missing} in {folder}, which belongs to {paths[there[0]]}")
    return Tokenizer(
        text_ids(dictionary), token_type(dictionary.rows), read_bpe(*paths.values()) if there else None
    )


def text_ids(dictionary: Dictionary) -> dict:
    """{symbol: id} of what a text may hold. <mask> is none of it: training would refuse it."""
    return {symbol: i for symbol, i in dictionary.ids.items() if i != dictionary.mask_id}
