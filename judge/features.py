"""Features: raw lines of text to vectors, the hidden states of an encoder. The command is `eval.py --features`.

Rows are float32, one for each line, or without pooling one for each token; line i is then rows offsets[i] to
offsets[i + 1]. As in training a line begins with `<s>` and ends with `</s>`, and both count as tokens.
"""

import codecs
import contextlib
import sys
import time
from pathlib import Path

from config import InputError
from hardware.device import Device
from model import Encoder
from run import checkpoint
from text.binarized import BOS, EOS, PAD, UNK
from text.files import note, without_mark

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

POOLS = {
    "mean": lambda x, real: (
        (x * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)
    ),  # over the tokens
    "cls": lambda x, real: x[:, 0],  # at <s>
    "none": lambda x, real: x,
}
BYTES = (
    1 << 18
)  # of text that is read, sorted by length, and written at a time; a line that is longer is cut there
ENDLESS = 1 << 30  # bytes without a line end that are no text
MANY_UNKNOWN = 0.2  # share of <unk> above which a warning is due


class Rows:
    """A .npy file of float32 rows (count, width), written before their number is known."""

    def __init__(self, file, width: int):
        self.file, self.width, self.count = file, width, 0
        self.header()

    def header(self):
        self.file.seek(
            0
        )  # numpy pads the header, so its length does not depend on the number of rows
        shape = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self.width)}
        np.lib.format.write_array_header_1_0(self.file, shape)

    def add(self, rows: np.ndarray):
        self.file.write(np.ascontiguousarray(rows, "<f4"))
        self.count += len(rows)


def read_line(file, where: str) -> bytes:
    """The next line, of a longer one only the first BYTES; b"" at the end. Raises InputError if it does not end."""
    line = rest = file.readline(BYTES)
    skipped = 0
    while len(rest) == BYTES and not rest.endswith(b"\n"):
        rest = file.readline(BYTES)
        skipped += len(rest)
        if skipped > ENDLESS:
            raise InputError(f"{where}: longer than {ENDLESS >> 30} GiB; not a text")
    if skipped > 1:  # more than its line end
        note(f"{where}: longer than {BYTES >> 10} KiB; the rest of it is left out")
    return line


def read_lines(source: str):
    """Yield lists of lines of a file, or of standard input for '-'. Raises InputError if they are not UTF-8."""
    if (
        source != "-" and not Path(source).is_file()
    ):  # a pipe that nobody writes to would be waited for
        why = "not a file (- reads standard input)" if Path(source).exists() else "no such file"
        raise InputError(f"--features {source}: {why}")
    file, name = (
        (sys.stdin.buffer, "standard input") if source == "-" else (open(source, "rb"), source)
    )
    lines, size, number = [], 0, 1
    with file if source != "-" else contextlib.nullcontext():
        while line := read_line(file, f"{name}, line {number}"):
            try:  # where a line was cut, so may be its last character
                text = codecs.getincrementaldecoder("utf-8")().decode(line, final=len(line) < BYTES)
            except UnicodeDecodeError as e:
                raise InputError(
                    f"{name}, line {number}: not UTF-8 at byte {e.start} of the line"
                ) from None
            lines.append((without_mark(text, name) if number == 1 else text).removesuffix("\n"))
            size, number = size + len(line), number + 1
            if size >= BYTES:
                yield lines
                lines, size = [], 0
    if lines:
        yield lines


@torch.no_grad()
def encode(
    encoder: Encoder, device: Device, rows: list, layer: int, pool: str, max_tokens: int
) -> list[np.ndarray]:
    """rows: int64 arrays of tokens -> float32 vectors in the same order, (C,) each, or (tokens, C) with pool 'none'.

    max_tokens: most tokens of a batch, padding included; rows of similar length share a batch.
    """
    lengths = np.array([len(row) for row in rows])
    order = np.argsort(-lengths, kind="stable")  # longest first: memory runs out at once or never
    found = [None] * len(rows)
    begin = 0
    while begin < len(order):
        longest = lengths[order[begin]]
        batch = order[begin : begin + max(1, max_tokens // longest)]
        begin += len(batch)
        tokens = np.full((len(batch), longest), PAD, np.int64)
        for place, i in zip(tokens, batch):
            place[: lengths[i]] = rows[i]
        padded = bool(
            (tokens == PAD).any()
        )  # also where fairseq's dictionary of words found <pad> in the text
        tokens = device.tensor(tokens)
        with device.autocast():
            states: list[Tensor] = encoder.hidden_states(tokens, padded=padded)
        vectors = POOLS[pool](states[layer].float(), tokens != PAD).cpu().numpy()
        for i, vector in zip(batch, vectors):
            found[i] = vector[: lengths[i]] if pool == "none" else vector
    return found


def write(
    encoder: Encoder,
    device: Device,
    tokenize,
    source: str,
    out: str,
    layer: int | None,
    pool: str,
    cfg,
) -> dict:
    """Write the features of the lines of `source` to `out`, a .npy file; with pool 'none' also OUT.offsets.npy.

    tokenize: a text.tokens.Tokenizer; cfg: DataConfig. A line longer than the training blocks is cut, since positions
    beyond them are untrained. Returns what was done, as a dict. Raises InputError.
    """
    layers = len(encoder.layers)
    if layer is None:
        layer = layers
    if not -layers - 1 <= layer <= layers:
        raise InputError(f"--layer {layer}: the model has 0 (the embeddings) to {layers}")
    if not out.endswith(".npy"):
        raise InputError(f"--out {out}: the name must end in .npy")
    if not Path(out).absolute().parent.is_dir():
        raise InputError(f"--out {out}: no such folder")
    if Path(out).resolve() == Path(source).resolve():
        raise InputError(f"--out {out} is the text itself; choose another name")
    encoder.eval()
    offsets, lines, cut, unknown, begin = [0], 0, 0, 0, time.perf_counter()
    with contextlib.ExitStack() as stack:
        rows = Rows(
            open(stack.enter_context(checkpoint.whole(out)), "wb"),
            encoder.embed_tokens.embedding_dim,
        )
        stack.callback(rows.file.close)
        with tqdm(unit=" lines", disable=None, file=sys.stderr) as bar:
            for chunk in read_lines(source):
                blocks = []
                for tokens in tokenize(chunk):
                    if 1 + len(tokens) > cfg.tokens_per_sample:
                        tokens, cut = np.append(tokens[: cfg.tokens_per_sample - 2], EOS), cut + 1
                    blocks.append(np.insert(tokens, 0, BOS))
                    unknown += int((tokens == UNK).sum())
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
            f"warning: {cut:,} of {lines:,} lines were longer than {cfg.tokens_per_sample} tokens and were cut there",
            file=sys.stderr,
        )
    share = unknown / max(1, int(offsets[-1]) - 2 * lines)
    if share > MANY_UNKNOWN:
        print(
            f"warning: {share:.0%} of the tokens are <unk>: the model does not know this text",
            file=sys.stderr,
        )
    seconds = time.perf_counter() - begin
    return dict(
        out=out,
        lines=lines,
        tokens=int(offsets[-1]),
        cut=cut,
        unknown=share,
        width=rows.width,
        pool=pool,
        layer=layer % (layers + 1),
        seconds=seconds,
    )
