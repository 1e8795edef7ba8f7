"""Features: raw lines of text to vectors, by `python eval.py --ckpt FILE --features TEXT --out
F.npy`.

Each row is float32: the mean over a line's tokens of the encoder's last hidden states. As in
training a line begins with `<s>` and ends with `</s>`, and both count as tokens.
"""

import contextlib
import sys
import time
from pathlib import Path

from config import InputError
from hardware.device import Device
from model import Encoder
from run import checkpoint
from run.progress import Bar
from text.binarized import BOS, EOS, PAD, UNK
from text.files import LONGEST
from text.tokens import warn_of_unknown

import numpy as np
import torch

CHUNK = 1 << 18  # bytes of text that are read, sorted by length, and written at a time


def read_lines(source: str):
    """Yield lists of lines of a file, or of standard input for '-'. Raises InputError."""
    path, name = Path(source), "standard input" if source == "-" else source
    if source != "-" and not path.is_file():  # a pipe that nobody writes to would be waited for
        why = "not a file (- reads standard input)" if path.exists() else "no such file"
        raise InputError(f"--features {source}: {why}")
    lines, size, number = [], 0, 0
    with contextlib.nullcontext(sys.stdin.buffer) if source == "-" else open(path, "rb") as file:
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise InputError(f"{name}, line {number}: longer than {LONGEST >> 20} MiB")
            try:
                lines.append(line.decode("utf-8").removesuffix("\n"))
            except UnicodeDecodeError as e:
                where = f"{name}, line {number}"
                raise InputError(f"{where}: not UTF-8 at byte {e.start} of the line") from None
            size += len(line)
            if size >= CHUNK:
                yield lines
                lines, size = [], 0
    if lines:
        yield lines


@torch.no_grad()
def mean_vectors(encoder: Encoder, device: Device, rows: list, max_tokens: int) -> np.ndarray:
    """rows: N int64 arrays of tokens -> (N, C) float32, the mean of each row's hidden states.

    max_tokens: most tokens of a batch, padding included; rows of similar length share a batch.
    """
    lengths = np.array([len(row) for row in rows])
    order = np.argsort(-lengths, kind="stable")  # longest first: memory runs out at once or never
    vectors = np.empty((len(rows), encoder.embed_tokens.embedding_dim), np.float32)
    begin = 0
    while begin < len(order):
        longest = lengths[order[begin]]
        batch = order[begin : begin + max(1, max_tokens // longest)]
        begin += len(batch)
        tokens = np.full((len(batch), longest), PAD, np.int64)
        for place, i in zip(tokens, batch):
            place[: lengths[i]] = rows[i]
        # fairseq's dictionary of words may find <pad> in the text, too
        is_padded = bool((tokens == PAD).any())
        tokens = device.tensor(tokens)  # (B, T)
        with device.autocast():
            states, _ = encoder(tokens, is_padded)  # (B, T, C)
        real = tokens != PAD
        sums = (states.float() * real[:, :, None]).sum(1)
        vectors[batch] = (sums / real.sum(1, keepdim=True)).cpu().numpy()
    return vectors


def check_names(source: str, out: str):
    """Raise InputError unless `out` can be written."""
    if not out.endswith(".npy"):
        raise InputError(f"--out {out}: the name must end in .npy")
    if not Path(out).absolute().parent.is_dir():
        raise InputError(f"--out {out}: no such folder")
    if Path(out).resolve() == Path(source).resolve():
        raise InputError(f"--out {out} is the text itself; choose another name")


def write_header(file, count: int, width: int):
    """The beginning of a .npy file of float32 rows (count, width).

    numpy pads it, so its length does not depend on the number of rows.
    """
    file.seek(0)
    shape = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(file, shape)


def write(encoder: Encoder, device: Device, tokenize, source: str, out: str, cfg) -> dict:
    """Write a vector for each line of `source` to `out`, a .npy file; returns what was done.

    tokenize: a text.tokens.Tokenizer; cfg: DataConfig. A line longer than the training blocks is
    cut, since positions beyond them are untrained. Raises InputError.
    """
    check_names(source, out)
    encoder.eval()
    begin = time.perf_counter()
    width = encoder.embed_tokens.embedding_dim
    lines = tokens = cut = unknown = 0
    with checkpoint.whole(out) as part, open(part, "wb") as file:
        write_header(file, 0, width)  # once more when the number of lines is known
        for chunk in Bar(read_lines(source), what="vectors", unit="part"):
            rows = []
            for row in tokenize(chunk):
                if 1 + len(row) > cfg.tokens_per_sample:
                    row = np.append(row[: cfg.tokens_per_sample - 2], EOS)
                    cut += 1
                unknown += int((row == UNK).sum())
                rows.append(np.insert(row, 0, BOS))
            file.write(mean_vectors(encoder, device, rows, cfg.max_tokens).tobytes())
            lines += len(rows)
            tokens += sum(map(len, rows))
        if not lines:
            raise InputError(f"--features {source}: it has no lines")
        write_header(file, lines, width)

    # what the reader should know of the vectors
    if cut:
        longer = f"longer than {cfg.tokens_per_sample} tokens and were cut there"
        print(f"warning: {cut:,} of {lines:,} lines were {longer}", file=sys.stderr)
    share = warn_of_unknown(unknown, tokens - 2 * lines)
    seconds = time.perf_counter() - begin
    facts = dict(cut=cut, unknown=share, width=width, seconds=seconds)
    return dict(out=out, lines=lines, tokens=tokens, **facts)
