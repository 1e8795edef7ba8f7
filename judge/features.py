"""Features: raw lines of text to vectors, by `python eval.py --ckpt FILE --features TEXT --out
F.npy`.

Each row is float32: the mean over a line's tokens of the encoder's last hidden states. As in
training a line begins with `<s>` and ends with `</s>`, and both count as tokens. The only file of
this room that stands above train.py.
"""

import dataclasses
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from config import InputError, reading
from run import checkpoint
from run.progress import Bar
from tasks.classifier import Classifier, outputs_of
from tasks.labelled import Split
from text.binarized import BOS, EOS, UNK
from text.files import LONGEST, lines_of, open_file, seen
from text.tokens import warn_of_unknown

import numpy as np

CHUNK = 1 << 18  # bytes of text that are read, sorted by length, and written at a time


def read_lines(source: str):
    """Yield lists of lines of a file, or of standard input for '-'. Raises InputError."""
    lines, size, is_first = [], 0, True
    opened = nullcontext((sys.stdin.buffer, None)) if source == "-" else open_file(source)
    with opened as (file, _):
        for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
            where = f"--features {source}, line {number}"
            if len(line) > LONGEST:
                raise InputError(f"{where}: longer than {LONGEST >> 20} MiB")
            with reading(where):
                lines.append(line.decode("utf-8"))
            size += len(line)
            if size >= CHUNK:
                yield lines_of(seen("".join(lines), source, is_first))
                lines, size, is_first = [], 0, False
    if lines:
        yield lines_of(seen("".join(lines), source, is_first))


def write_header(file, count: int, width: int):
    """The beginning of a .npy file of float32 rows (count, width).

    numpy pads it, so its length does not depend on the number of rows.
    """
    file.seek(0)
    shape = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(file, shape)


def write(run, tokenize, source: str, out: str) -> dict:
    """Write a vector for each line of `source` to `out`, a .npy file; returns what was done.

    run: a train.Run; tokenize: a text.tokens.Tokenizer. A line longer than the training blocks is
    cut, since positions beyond them are untrained. Raises InputError.
    """
    if not out.endswith(".npy") or Path(out).resolve() == Path(source).resolve():
        raise InputError(f"--out {out}: name a .npy file for the vectors, and not the text itself")
    begin = time.perf_counter()
    width = run.cfg.model.embed_dim
    model = Classifier(run.student.encoder, None).eval()
    lines = tokens = cut = unknown = 0
    # max_tokens alone limits a batch, and a block, too
    limits = dataclasses.replace(run.cfg.data, batch_size=CHUNK)
    longest = min(limits.tokens_per_sample, limits.max_tokens)
    with checkpoint.whole(out) as part, open(part, "wb") as file:
        write_header(file, 0, width)  # once more when the number of lines is known
        for chunk in Bar(read_lines(source), what="vectors", unit="part"):
            rows = []
            for row in tokenize(chunk):
                if 1 + len(row) > longest:
                    row = np.append(row[: longest - 2], EOS)  # and room for <s>
                    cut += 1
                unknown += int((row == UNK).sum())
                rows.append(np.insert(row, 0, BOS))
            vectors = outputs_of(model.features, run.device, Split(rows, None), limits, sort=True)
            file.write(vectors.numpy().tobytes())
            lines += len(rows)
            tokens += sum(map(len, rows))  # <s> and </s> among them
        if not lines:
            raise InputError(f"--features {source}: it has no lines")
        write_header(file, lines, width)

    # what the reader should know of the vectors
    if cut:
        longer = f"longer than {longest} tokens and were cut there"
        print(f"warning: {cut:,} of {lines:,} lines were {longer}", file=sys.stderr)
    share = warn_of_unknown(unknown, tokens - 2 * lines)
    facts = dict(out=out, lines=lines, tokens=tokens, cut=cut, unknown=share, width=width)
    return facts | dict(seconds=time.perf_counter() - begin)
