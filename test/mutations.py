"""Damage that knows the structure of a file: one field, record, opcode or value is wrong, and the
rest is whole.

`python -m test.soak fuzz` makes such files by the thousand. Each must load or be refused in one
line.
"""

import contextlib
import gzip
import io
import json
import pickletools
import random
import re
import resource
import time
import zipfile
from pathlib import Path

import config
import convert
from config import DataConfig, InputError, RunError
from data import Corpus
from hardware.device import Device
from judge import plot
from run import flags
from run.log import Log
from text import files
from text.binarized import HEADER
from text.tokens import need_tokenizers, read_bpe

import torch

ODD = (  # values in JSON and YAML
    "null true NaN 1e999 -1e308 0 -1 1.5 2147483648 9223372036854775808 [] {} [1,2,3] [null] 1e-320 2026-13-45".split()
    + [
        "9" * 5000,
        "[" * 3000 + "]" * 3000,
        '{"a": ' * 300 + "1" + "}" * 300,
        '""',
        '"\\ud800"',
        '"\\u001b[2J\\u0000"',
    ]
)
VALUE = re.compile(r'"(?:[^"\\\n]|\\.)*"|(?<![\w.])-?\d[\w.+-]*|true|false|null')
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
OPCODES = [
    b"(",
    b"}",
    b"]",
    b")",
    b"0",
    b"1",
    b"2",
    b"N",
    b"e",
    b"u",
    b"s",
    b"R",
    b"b",
    b"t",
    b"Q",
    b"h\0",
    b"j\0\0\0\x7f",
]
OPCODES += [
    b"F1e999\n",
    b"I-1\n",
    b"K\xff",
    b"J\xff\xff\xff\xff",
    b"\x8a\xff" + b"\x7f" * 255,
    b"X\1\0\0\0\x1b",
]


class Attempts:
    """Counts what becomes of damaged files, and collects every outcome that must not be."""

    def __init__(self):
        self.files, self.refused, self.other, self.slowest, self.grown = 0, 0, [], (0.0, ""), 0.0

    def __call__(self, what: str, load):
        begin, before, printed = time.perf_counter(), peak_mib(), io.StringIO()
        self.files += 1
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                load()
        except (InputError, RunError) as e:
            self.refused += 1
            if "\n" in str(e) or len(str(e)) > 1500:
                self.other.append(f"{what}: not one short line: {e}"[:300])
        except (Exception, SystemExit) as e:  # these are what fuzzing is for
            self.other.append(f"{what}: {type(e).__name__}: {e}"[:300])
        if "\x1b" in printed.getvalue():
            self.other.append(f"{what}: printed an escape sequence")
        seconds = time.perf_counter() - begin
        self.slowest = max(self.slowest, (round(seconds, 3), what))
        self.grown += peak_mib() - before
        if peak_mib() > before + 50:  # every file here is much smaller than 1 MB
            self.other.append(f"{what}: took {peak_mib() - before:.0f} MiB")
        if seconds > 20:
            self.other.append(f"{what}: took {seconds:.0f} s")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---------------------------------------------------------------------------------------------- mutations


def field(raw: bytes, at: int, width: int, rng: random.Random) -> bytes:
    """Another number in `width` bytes at `at`: a near one, or an extreme one."""
    old = int.from_bytes(raw[at : at + width], "little")
    new = rng.choice(
        [old + 1, old - 1, 2 * old, 0, 1, 2**31, 2**62, -1, 1 << 8 * width - 1, rng.getrandbits(64)]
    )
    return raw[:at] + (new % (1 << 8 * width)).to_bytes(width, "little") + raw[at + width :]


def index(raw: bytes, rng: random.Random) -> bytes:
    count = (len(raw) - HEADER) // 12
    i = rng.randrange(count)
    return field(
        raw,
        *rng.choice(
            [(9, 8), (17, 1), (18, 8), (HEADER + 4 * i, 4), (HEADER + 4 * count + 8 * i, 8)]
        ),
        rng,
    )


def values(raw: bytes, rng: random.Random) -> bytes:
    """JSON, YAML or lines of JSON with one value replaced, or a line repeated or moved."""
    text = raw.decode()
    place = rng.choice(list(VALUE.finditer(text)))
    text = text[: place.start()] + rng.choice(ODD) + text[place.end() :]
    lines = text.splitlines(keepends=True)
    if rng.random() < 0.2:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return "".join(lines).encode()


def safetensors(raw: bytes, rng: random.Random) -> bytes:
    end = 8 + int.from_bytes(raw[:8], "little")
    header = values(raw[8:end], rng)
    return len(header).to_bytes(8, "little") + header + raw[end:]


def opcodes(raw: bytes, rng: random.Random) -> bytes:
    """A pickle in which some opcodes are left out, repeated, exchanged, or replaced by others."""
    starts = [at for _, _, at in pickletools.genops(raw)]
    parts = [raw[a:b] for a, b in zip(starts, [*starts[1:], len(raw)])]
    for _ in range(rng.randint(1, 3)):
        i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
        new = rng.choice(
            [b"", parts[i] * 2, parts[j], rng.choice(OPCODES), parts[i] + rng.choice(OPCODES)]
        )
        if len(parts[i]) > 1 and rng.random() < 0.3:
            new = field(parts[i], rng.randrange(1, len(parts[i])), 1, rng)
        parts[i] = new
    return b"".join(parts)


def records(raw: bytes, rng: random.Random) -> bytes:
    """A checkpoint's archive in which one record is another, with checksums that fit."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        held = [(name, archive.read(name)) for name in archive.namelist()]
    i, j = rng.randrange(len(held)), rng.randrange(len(held))
    if rng.random() < 0.6:
        i = next(i for i, (name, _) in enumerate(held) if name.endswith("data.pkl"))
    (name, content), method = held[i], zipfile.ZIP_STORED
    kind = rng.randrange(7)
    if name.endswith("data.pkl") and kind < 6:
        content = opcodes(content, rng)
    elif kind == 0:
        content = held[j][1]
    elif kind == 1:
        content = content[: len(content) // 2]
    elif kind == 2:
        content += bytes(rng.choice([1, 8, 4096]))
    elif kind == 3:
        content = rng.choice([b"\xff", b"\0", b"\x7f"]) * len(content)  # NaN, zeros, huge numbers
    elif kind == 4:
        name = held[j][0]
    elif kind == 5:
        name = name + rng.choice(["x", "/../x", "\x1b[2J"])
    else:
        method = zipfile.ZIP_DEFLATED
    held[i] = (name, content)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for other, content in held if rng.random() < 0.9 else held[:j] + held[j + 1 :]:
            archive.writestr(other, content, method if other == name else zipfile.ZIP_STORED)
    return made.getvalue()


def packed_zip(raw: bytes, rng: random.Random) -> bytes:
    """A field of one of the archive's headers is another number."""
    at = rng.choice([match.start() for match in re.finditer(b"PK(\1\2|\3\4|\5\6)", raw)])
    return field(
        raw,
        at + rng.randrange(4, 46 if raw[at + 2] == 1 else 30 if raw[at + 2] == 3 else 22, 2),
        2,
        rng,
    )


def packed_gz(raw: bytes, rng: random.Random) -> bytes:
    made = rng.choice([raw, raw + raw, raw + b"\0" * 9, raw + b"text", raw[:-8]])
    return field(
        made,
        rng.choice([rng.randrange(12), rng.randrange(len(made) - 8)]),
        rng.choice([1, 2, 4]),
        rng,
    )


# ---------------------------------------------------------------------------------------------- what reads them


def fuzz(count: int, folder: Path, corpus: Path, run: Path, seed: int = 0) -> Attempts:
    """Damage `count` files of each kind. corpus: a dataset; run: the save_dir of a short run on it."""
    cpu, last, hf, out = (
        Device(torch.device("cpu"), "cpu", None),
        run / "checkpoint_last.pt",
        folder / "hf",
        folder / "out",
    )
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet):
        convert.main(["--ckpt", str(last), "--to", "fairseq", str(folder / "fairseq.pt")])
        convert.main(["--ckpt", str(last), "--to", "hf", str(hf)])
    alphabet = sorted(need_tokenizers().pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.bpe").write_text("#version: 0.2\na b\n", encoding="utf-8")
    vocab = json.dumps({token: i for i, token in enumerate([*alphabet, "ab"])}).encode()
    tree = {
        group: dict.fromkeys(names.split(), 1)
        for group, names in (("model", "layers x"), ("task", "seed data"))
    }
    text, packed = b"some words\n\nof a text, \xc3\xa9\n" * 20, io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for method in METHODS:
            archive.writestr(f"{method}.txt", text, method)

    def read_dataset(path):
        dataset = Corpus(
            DataConfig(data_path=str(path.parent), tokens_per_sample=32, max_tokens=256)
        ).split("train")
        for ids in dataset.epoch_batches(1):
            dataset.batch(ids, 1)

    def to_native(path):
        out.unlink(missing_ok=True)
        convert.main(
            ["--ckpt", str(path.parent if path.parent == hf else path), "--to", "native", str(out)]
        )

    def rows(path):
        log = Log(cpu, path)
        log.open(1, 10)
        log.close()  # its thread would tell of the run into other tests' output
        plot.read_run(str(path))

    def yaml(path):
        flags.parse(
            config.PARTS, "", ["--config_dir", str(path.parent), "--config_name", path.name]
        )

    def members(path):
        for method in METHODS:
            list(files.read_chunks(f"{path}:{method}.txt"))

    kinds = {  # what is mutated, how, where it is written, who reads it
        "index": ((corpus / "train.idx").read_bytes(), index, corpus / "train.idx", read_dataset),
        "checkpoint": (last.read_bytes(), records, folder / "x.pt", to_native),
        "fairseq": ((folder / "fairseq.pt").read_bytes(), records, folder / "x.pt", to_native),
        "safetensors": (
            (hf / "model.safetensors").read_bytes(),
            safetensors,
            hf / "model.safetensors",
            to_native,
        ),
        "hf config": ((hf / "config.json").read_bytes(), values, hf / "config.json", to_native),
        "rows": ((run / "train.jsonl").read_bytes(), values, folder / "train.jsonl", rows),
        "yaml": (json.dumps(tree, indent=1).encode(), values, folder / "x.yaml", yaml),
        "vocabulary": (
            vocab,
            values,
            folder / "e.json",
            lambda path: read_bpe(path, folder / "vocab.bpe"),
        ),
        "zip": (packed.getvalue(), packed_zip, folder / "x.zip", members),
        "gz": (
            gzip.compress(text),
            packed_gz,
            folder / "x.gz",
            lambda path: list(files.read_chunks(str(path))),
        ),
    }
    rng, attempts = random.Random(seed), Attempts()
    for kind, (raw, mutate, path, read) in kinds.items():
        before, whole = path.read_bytes() if path.exists() else raw, Attempts()
        path.write_bytes(raw)
        whole(kind, lambda: read(path))  # takes the memory of a first use
        attempts.other += [f"{kind}: refused when whole"] * whole.refused + whole.other
        for i in range(count):
            path.write_bytes(mutate(raw, rng))
            attempts(f"{kind} {i}", lambda: read(path))
        path.write_bytes(before)
    return attempts
