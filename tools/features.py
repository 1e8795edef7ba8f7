"""Features: raw lines of text to vectors, through an encoder's hidden states. The command is `eval.py --features`.

A row is float32 and belongs to a line, or, not pooled, to a token; line i is then rows offsets[i] to offsets[i + 1].
`<s>` stands before and `</s>` behind a line's tokens, as in training, and count as tokens.
"""

import contextlib
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import InputError
from dataset.binarized import BOS, EOS, PAD
from device import Device
from model import Encoder
from runtime import checkpoint

POOLS = {
    "mean": lambda x, real: (x * real[:, :, None]).sum(1) / real.sum(1, keepdim=True),  # over the tokens
    "cls": lambda x, real: x[:, 0],  # at <s>
    "none": lambda x, real: x[real],
}
BYTES = 1 << 18  # of text that are read, sorted by length, and written at a time


class Rows:
    """A .npy file of float32 rows, written without knowing their number beforehand."""

    def __init__(self, file, width: int):
        self.file, self.width, self.count = file, width, 0
        self.header()

    def header(self):
        self.file.seek(0)  # its length does not depend on the number of rows: numpy pads it
        shape = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self.width)}
        np.lib.format.write_array_header_1_0(self.file, shape)

    def add(self, rows: np.ndarray):
        self.file.write(np.ascontiguousarray(rows, "<f4"))
        self.count += len(rows)


def read_lines(source: str):
    """The lines of a file, or of standard input for '-', some at a time. Raises InputError if it is not UTF-8."""
    try:
        file = sys.stdin.buffer if source == "-" else open(source, "rb")
    except OSError as e:
        raise InputError(f"--features {source}: {e.strerror}") from None
    lines, size = [], 0
    with file if source != "-" else contextlib.nullcontext():
        for number, line in enumerate(file, 1):
            try:
                lines.append(line.decode("utf-8").removesuffix("\n"))
            except UnicodeDecodeError as e:
                name = "standard input" if source == "-" else source
                raise InputError(f"{name}, line {number}: not UTF-8 at byte {e.start} of the line") from None
            size += len(line)
            if size >= BYTES:
                yield lines
                lines, size = [], 0
    if lines:
        yield lines


@torch.no_grad()
def encode(encoder: Encoder, device: Device, rows: list, layer: int, pool: str, max_tokens: int) -> list[np.ndarray]:
    """rows: int64 arrays of tokens -> for each, in their order, (C,) or, with pool 'none', (its tokens, C); float32.

    max_tokens: of a batch, padding included; rows of like length share one.
    """
    lengths = np.array([len(row) for row in rows])
    order, found = np.argsort(-lengths, kind="stable"), [None] * len(rows)  # the longest first: memory runs out early
    begin = 0
    while begin < len(order):
        longest = lengths[order[begin]]
        batch = order[begin : begin + max(1, max_tokens // longest)]
        begin += len(batch)
        tokens = np.full((len(batch), longest), PAD, np.int64)
        for place, i in zip(tokens, batch):
            place[: lengths[i]] = rows[i]
        tokens = device.tensor(tokens)
        with device.autocast():
            states: list[Tensor] = encoder.hidden_states(tokens, padded=bool(lengths[batch[-1]] < longest))
        vectors = POOLS[pool](states[layer].float(), tokens != PAD).cpu().numpy()
        parts = np.split(vectors, np.cumsum(lengths[batch])[:-1]) if pool == "none" else vectors
        for i, part in zip(batch, parts):
            found[i] = part
    return found


def write(encoder: Encoder, device: Device, tokenize, source: str, out: str, layer: int | None, pool: str, cfg) -> dict:
    """Features of the lines of `source` to `out`, a .npy file; with pool 'none' the offsets to OUT.offsets.npy.

    tokenize: lines to arrays of tokens that end in EOS; cfg: DataConfig. A line longer than the training blocks is cut,
    since no position behind them has been trained. Returns what was done. Raises InputError.
    """
    layers = len(encoder.layers)
    if layer is None:
        layer = layers
    if not -layers - 1 <= layer <= layers:
        raise InputError(f"--layer {layer}: the model has 0 (the embeddings) to {layers}")
    if not out.endswith(".npy"):
        raise InputError(f"--out {out}: a name that ends in .npy")
    if not Path(out).absolute().parent.is_dir():
        raise InputError(f"--out {out}: no such folder")
    encoder.eval()
    offsets, lines, cut, begin = [0], 0, 0, time.perf_counter()
    with contextlib.ExitStack() as stack:
        rows = Rows(open(stack.enter_context(checkpoint.whole(out)), "wb"), encoder.embed_tokens.embedding_dim)
        stack.callback(rows.file.close)
        with tqdm(unit=" lines", disable=None, file=sys.stderr) as bar:
            for chunk in read_lines(source):
                blocks = []
                for tokens in tokenize(chunk):
                    if 1 + len(tokens) > cfg.tokens_per_sample:
                        tokens, cut = np.append(tokens[: cfg.tokens_per_sample - 2], EOS), cut + 1
                    blocks.append(np.insert(tokens, 0, BOS))
                found = encode(encoder, device, blocks, layer, pool, cfg.max_tokens)
                rows.add(np.concatenate(found) if pool == "none" else np.stack(found))
                offsets.extend(offsets[-1] + np.cumsum([len(block) for block in blocks]))
                lines += len(chunk)
                bar.update(len(chunk))
        if not lines:
            raise InputError(f"--features {source}: it has no lines")
        rows.header()
        if pool == "none":
            name = out.removesuffix(".npy") + ".offsets.npy"
            with checkpoint.whole(name) as part, open(part, "wb") as file:
                np.save(file, np.array(offsets, np.int64))
    if cut:
        print(
            f"warning: {cut:,} of {lines:,} lines were longer than {cfg.tokens_per_sample} tokens, and cut there",
            file=sys.stderr,
        )
    seconds = time.perf_counter() - begin
    return dict(
        out=out,
        lines=lines,
        tokens=int(offsets[-1]),
        cut=cut,
        width=rows.width,
        pool=pool,
        layer=layer % (layers + 1),
        seconds=seconds,
    )
