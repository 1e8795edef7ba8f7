"""Damaged files of every kind that the project reads: each must load or be refused in one line.

Some have random bytes; in others one field, record, opcode or value is wrong, and the rest is
whole. `python -m test.soak fuzz N` makes N files of each kind.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import pickletools
import random
import re
import time
import zipfile
from pathlib import Path

import config
import convert
from config import InputError, RunError
from formats.load import load
from judge import plot
from run import flags
from run.log import Log
from test.converting import write_bpe
from test.helpers import dataset_of, make_run
from text import files
from text.binarized import HEADER
from text.tokens import read_bpe

import torch

# values in JSON and YAML
ODD = """null true NaN 1e999 -1e308 0 -1 1.5 2147483648 9223372036854775808 [] {} [1,2,3] [null]
1e-320 2026-13-45 "" "\\ud800" "\\u001b[2J\\u0000" """.split()
ODD += ["9" * 5000, "[" * 3000 + "]" * 3000, '{"a": ' * 300 + "1" + "}" * 300]
VALUE = re.compile(r'"(?:[^"\\\n]|\\.)*"|(?<![\w.])-?\d[\w.+-]*|true|false|null')
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
OPCODES = [bytes([code]) for code in b"(}])012NeusRbtQ"]
OPCODES += [b"h\0", b"j\0\0\0\x7f", b"F1e999\n", b"I-1\n", b"K\xff", b"J\xff\xff\xff\xff"]
OPCODES += [b"\x8a\xff" + b"\x7f" * 255, b"X\1\0\0\0\x1b"]
EXTREME = [0, 1, -1, 77, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63)]


class Attempts:
    """Counts what becomes of damaged files, and collects every outcome that must not be."""

    def __init__(self):
        self.files, self.refused, self.other = 0, 0, []

    def __call__(self, what: str, read):
        begin, printed = time.process_time(), io.StringIO()
        self.files += 1
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                read()
        except (InputError, RunError) as e:
            self.refused += 1
            if "\n" in str(e) or len(str(e)) > 1500:
                self.other.append(f"{what}: not one short line: {e}"[:300])
        except (Exception, SystemExit) as e:  # these are what fuzzing is for
            if not config.is_out_of_memory(e):  # a small file may ask for much (docs/promises.md)
                self.other.append(f"{what}: {type(e).__name__}: {e}"[:300])
        if "\x1b" in printed.getvalue():
            self.other.append(f"{what}: printed an escape sequence")
        if time.process_time() > begin + 20:
            self.other.append(f"{what}: took over 20 s")


# -------------------------------------------------------------------------------------- mutations


def scramble(raw: bytes, rng: random.Random) -> bytes:
    """One to three places where bytes or numbers are others, are missing, or are new."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(rng.choice([len(raw), min(len(raw), 80)]) + 1)
        few = rng.randint(1, 16)
        number = rng.choice(EXTREME).to_bytes(8, "little", signed=True)
        new, gone = rng.choice(
            [(b"", len(raw)), (b"", few), (rng.randbytes(few), 0), (rng.randbytes(1), 1)]
            + [(number[:4], 4), (number, 8)]
        )
        raw = raw[:at] + new + raw[at + gone :]
    return raw


def field(raw: bytes, at: int, width: int, rng: random.Random) -> bytes:
    """Another number in `width` bytes at `at`: a near one, or an extreme one."""
    old = int.from_bytes(raw[at : at + width], "little")
    near = [old + 1, old - 1, 2 * old, 1 << 8 * width - 1, rng.getrandbits(64)]
    new = rng.choice(near + EXTREME) % (1 << 8 * width)
    return raw[:at] + new.to_bytes(width, "little") + raw[at + width :]


def index(raw: bytes, rng: random.Random) -> bytes:
    count = (len(raw) - HEADER) // 12
    i = rng.randrange(count)
    sizes, places = HEADER + 4 * i, HEADER + 4 * count + 8 * i
    at, width = rng.choice([(9, 8), (17, 1), (18, 8), (sizes, 4), (places, 8)])
    return field(raw, at, width, rng)


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
        i, other = rng.randrange(len(parts)), rng.choice(OPCODES)
        news = [b"", parts[i] * 2, rng.choice(parts), other, parts[i] + other]
        if len(parts[i]) > 1:
            news.append(field(parts[i], rng.randrange(1, len(parts[i])), 1, rng))
        parts[i] = rng.choice(news)
    return b"".join(parts)


def records(raw: bytes, rng: random.Random) -> bytes:
    """A checkpoint's archive in which one record is another, with checksums that fit."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in held if name.endswith("data.pkl"))
    name, method = rng.choice([pickled, *held]), rng.choice(METHODS[:1] * 5 + METHODS)
    content = held.pop(name)
    other = rng.choice(list(held))
    if name == pickled:
        content = opcodes(content, rng)
    else:
        half, longer = content[: len(content) // 2], content + bytes(4096)
        filled = [byte * len(content) for byte in (b"\xff", b"\0", b"\x7f")]  # such as NaN
        content = rng.choice([held[other], half, longer, *filled])
    if rng.random() < 0.2:
        name = rng.choice([other, f"{name}x", f"{name}/../x", f"{name}\x1b[2J"])
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for key, value in held.items():
            archive.writestr(key, value)
        if rng.random() < 0.9:
            archive.writestr(name, content, method)
    return made.getvalue()


def packed_zip(raw: bytes, rng: random.Random) -> bytes:
    """A field of one of the archive's headers is another number."""
    at = rng.choice([match.start() for match in re.finditer(b"PK(\1\2|\3\4|\5\6)", raw)])
    length = {1: 46, 3: 30, 5: 22}[raw[at + 2]]
    return field(raw, at + rng.randrange(4, length, 2), 2, rng)


# --------------------------------------------------------------------------------- what reads them


def read_dataset(path: Path):
    dataset = dataset_of(path.parent)
    for ids in dataset.epoch_batches(1):
        dataset.batch(ids, 1)
    dataset.stream.counts(dataset.dictionary)  # checks every token


def convert_it(path: Path):
    out = path.parent / "out"
    out.unlink(missing_ok=True)
    ckpt = path.parent if path.parent.name == "hf" else path
    convert.main(["--ckpt", str(ckpt), "--to", "native", str(out)])


def read_rows(path: Path):
    run, _ = make_run(path.parent.parent / "corpus", save_dir=path.parent)
    run.num_updates = 1
    log = Log(run)
    log.open(10)
    log.close()  # its thread would tell of the run into other tests' output
    plot.read_run(str(path))


def read_members(path: Path):
    """A packed text, or all members of a zip archive."""
    members = [f":{method}.txt" for method in METHODS] if path.suffix == ".zip" else [""]
    for member in members:
        list(files.read_chunks(f"{path}{member}"))


def write_originals(folder: Path, last: Path):
    """A whole file of each kind that is neither a dataset's nor a run's."""
    with contextlib.redirect_stdout(io.StringIO()):
        convert.main(["--ckpt", str(last), "--to", "fairseq", str(folder / "fairseq.pt")])
        convert.main(["--ckpt", str(last), "--to", "hf", str(folder / "hf")])
    content = torch.load(folder / "fairseq.pt", weights_only=True)
    torch.save(content, folder / "old.pt", _use_new_zipfile_serialization=False)
    write_bpe(folder)
    tree = {"model": {"layers": 1, "x": 1}, "task": {"seed": 1, "data": 1}}
    (folder / "base.yaml").write_text(json.dumps(tree, indent=1))
    text = b"some words\n\nof a text, \xc3\xa9\n" * 20
    for kind in (bz2, gzip, lzma):
        (folder / f"text.{kind.__name__}").write_bytes(kind.compress(text))
    with zipfile.ZipFile(folder / "text.zip", "w") as archive:
        for method in METHODS:
            archive.writestr(f"{method}.txt", text, method)


def fuzz(count: int, folder: Path, corpus: Path, run: Path, seed: int = 0) -> Attempts:
    """Damage `count` files of each kind. corpus: a dataset; run: the save_dir of a run on it."""
    last, hf = run / "checkpoint_last.pt", folder / "hf"
    yaml = ["--config_dir", str(folder), "--config_name", "base"]
    write_originals(folder, last)
    kinds = [  # what is damaged, how, who reads it
        (corpus / "train.idx", index, read_dataset),
        (corpus / "train.idx", scramble, read_dataset),
        (corpus / "train.bin", scramble, read_dataset),
        (corpus / "dict.txt", scramble, read_dataset),
        (last, records, convert_it),
        (last, scramble, load),
        (folder / "fairseq.pt", records, convert_it),
        (folder / "old.pt", scramble, load),
        (hf / "model.safetensors", safetensors, convert_it),
        (hf / "config.json", values, convert_it),
        (run / "train.jsonl", values, read_rows),
        (folder / "base.yaml", values, lambda path: flags.parse(config.PARTS, "", yaml)),
        (folder / "encoder.json", values, lambda path: read_bpe(path, folder / "vocab.bpe")),
        (folder / "text.zip", packed_zip, read_members),
        (folder / "text.gzip", scramble, read_members),
        (folder / "text.bz2", scramble, read_members),
        (folder / "text.lzma", scramble, read_members),
    ]
    rng, attempts = random.Random(seed), Attempts()
    for path, mutate, read in kinds:
        raw, whole = path.read_bytes(), Attempts()
        whole(path.name, lambda: read(path))
        attempts.other += [f"{path.name}: refused when whole"] * whole.refused + whole.other
        for i in range(count):
            path.write_bytes(mutate(raw, rng))
            attempts(f"{path.name} {mutate.__name__} {i}", lambda: read(path))
        path.write_bytes(raw)
    return attempts
