"""Stress tests that take minutes. Each prints its figures as one JSON object.

    python -m test.soak kills     SIGKILL a run that saves every update, at random times
    python -m test.soak fuzz      damaged files must load or give a one-line error
    python -m test.soak memory    resident memory early in a run and at its end

Run them from the project's root.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import convert
import data
import train
from config import InputError
from run import checkpoint, flags
from test import mutations
from text.binarized import EOS, write_dataset
from text.files import json_rows

import numpy as np
import torch

HERE = Path(__file__).parent.parent  # the project
TINY = (
    "--config_name tiny --device cpu --layers 2 --embed_dim 16 --ffn_embed_dim 32"
    " --attention_heads 2 --average_top_k_layers 2 --tokens_per_sample 32 --max_tokens 256"
    " --max_source_positions 64 --validate_interval_updates 0 --min_target_var 0 --min_pred_var 0"
).split()


def small_corpus(folder: Path) -> Path:
    """200 sentences of random words in a folder, the same for training and validation."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid"):
        sentences = [[*rng.integers(4, 60, rng.integers(1, 40)), EOS] for _ in range(200)]
        sentences[5::6] = [[EOS]] * len(sentences[5::6])
        write_dataset(folder / split, sentences, 60)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(56)))
    return folder


def kills(count: int, folder: Path, corpus: Path | None = None) -> dict:
    """Start a run, kill it, check its files, and repeat.

    After each kill, checkpoint_last.pt must load and be at most one update older than the log.
    """
    corpus, save_dir = corpus or small_corpus(folder / "corpus"), folder / "killed"
    flags = "--save_interval_updates 1 --keep_interval_updates 2 --disable_validation"
    command = [sys.executable, HERE / "train.py", *TINY, *flags.split(), "--log_interval", "1"]
    command += ["--max_update", "1000000", "--data_path", corpus, "--save_dir", save_dir]
    rng = random.Random(0)
    lost = mid_save = reached = 0
    repeated = []
    for i in range(count):
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        process = subprocess.Popen(command, **streams)
        for line in process.stdout:
            if updates_in(line) >= reached + 3:
                break
        else:
            raise RuntimeError(f"the run ended by itself before kill {i}")
        if i % 2:  # half of the kills come during a save
            deadline = time.monotonic() + 5
            while not list(save_dir.glob("*.tmp")) and time.monotonic() < deadline:
                pass
        time.sleep(rng.random() * (0.002 if i % 2 else 0.05))
        process.send_signal(signal.SIGKILL)
        logged = updates_in(line + process.stdout.read())
        process.wait()

        mid_save += bool(list(save_dir.glob("*.tmp")))
        try:
            loaded = checkpoint.load(save_dir / "checkpoint_last.pt")
        except InputError as e:
            lost += 1
            print(f"kill {i}: {e}", file=sys.stderr)
            continue
        reached = loaded.content["progress"]["num_updates"]
        repeated.append(logged - reached)
        lost += repeated[-1] > 1  # an update is logged before it is saved
    rows = json_rows(save_dir / "train.jsonl")
    numbers = [row["num_updates"] for row in rows]
    return dict(
        kills=count,
        lost=lost,
        found_mid_save=mid_save,
        updates=reached,
        most_updates_repeated=max(repeated, default=0),
        rows_in_order=numbers == sorted(set(numbers)),
    )


def updates_in(text: str) -> int:
    """The last update whose row is in the text, or 0."""
    return max(map(int, re.findall(r"^update (\d+) \| loss", text, re.M)), default=0)


EXTREME = [0, 1, -1, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63), 77]


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """Damage one to three random places.

    Flip a bit, cut, insert, delete, or overwrite with an extreme number.
    """
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        # half of the damage is in the header
        at = rng.randrange(len(raw) + 1)
        if rng.random() < 0.5:
            at = rng.randrange(min(len(raw), 80) + 1)
        kind = rng.choice(("flip", "cut", "insert", "delete", 4, 8))
        if kind == "flip" and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del raw[at:]
        elif kind == "insert":
            raw[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == "delete":
            del raw[at : at + rng.randint(1, 16)]
        elif kind != "flip":
            number = rng.choice([*EXTREME, rng.randrange(2**40)])
            raw[at : at + kind] = struct.pack("<q", number)[:kind]
    return bytes(raw)


def fuzz(datasets: int, checkpoints: int, folder: Path, seed: int = 0, structured: int = 0) -> dict:
    """Every damaged file must load or raise a one-line InputError.

    structured: how many files of each kind get the damage of test/mutations.py.
    """
    rng = random.Random(seed)
    source, target = small_corpus(folder / "source"), folder / "mutated"
    shutil.copytree(source, target, dirs_exist_ok=True)
    cfg = data.DataConfig(data_path=str(target), tokens_per_sample=32, max_tokens=256)

    def read_all():
        dataset = data.Corpus(cfg).split("train")
        for ids in dataset.epoch_batches(1):
            dataset.batch(ids, 1)
        dataset.stream.counts(dataset.dictionary)  # checks every token

    read_all()  # so that the time which libraries take at first use is not counted
    of_datasets, of_checkpoints, others = (mutations.Attempts() for _ in range(3))
    for i in range(datasets):
        name = rng.choice(["train.idx"] * 3 + ["train.bin", "dict.txt"])
        whole = (source / name).read_bytes()
        (target / name).write_bytes(mutate(whole, rng))
        of_datasets(f"dataset {i} ({name})", read_all)
        (target / name).write_bytes(whole)

    files = [path.read_bytes() for path in small_checkpoints(folder)]
    for i in range(checkpoints):
        (folder / "mutated.pt").write_bytes(mutate(files[i % 3], rng))
        of_checkpoints(f"checkpoint {i}", lambda: checkpoint.load(folder / "mutated.pt"))

    if structured:
        run = folder / "run"
        argv = [*TINY, "--data_path", str(target), "--save_dir", str(run), "--max_update", "3"]
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([*argv, "--log_interval", "1"])
        (folder / "structured").mkdir()
        others = mutations.fuzz(structured, folder / "structured", target, run, seed)
    parts = (of_datasets, of_checkpoints, others)
    return dict(
        datasets=datasets,
        dataset_errors=of_datasets.refused,
        checkpoints=checkpoints,
        checkpoint_errors=of_checkpoints.refused,
        structured=others.files,
        structured_errors=others.refused,
        other_errors=sum((part.other for part in parts), []),
        slowest=max(part.slowest for part in parts),
    )


def small_checkpoints(folder: Path) -> list[Path]:
    """One of ours, and two of fairseq's, with the archives of new and of old torch."""
    attention = "encoder.sentence_encoder.layers.0.self_attn"
    state = {f"{attention}.{p}_proj.weight": torch.randn(8, 8) for p in "qkv"}
    ours = {**convert.beginning(1), "config": {}, "student": state, "teacher": state}
    fairseq = {"model": {**state, "encoder._ema": {}}, "cfg": {"model": {"layers": 1}}}
    fairseq["extra_state"] = {"loss": 1.0}
    paths = [folder / name for name in ("ours.pt", "fairseq.pt", "old.pt")]
    checkpoint.save(ours, paths[0])
    torch.save(fairseq, paths[1])
    torch.save(fairseq, paths[2], _use_new_zipfile_serialization=False)
    checkpoint.load(paths[0])
    return paths


def memory(updates: int, folder: Path) -> dict:
    """Resident MiB of a run after a tenth of its updates and at its end, with many checkpoints."""
    argv = [*TINY, "--data_path", small_corpus(folder / "corpus"), "--save_dir", folder / "run"]
    argv += ["--max_update", updates, "--save_interval_updates", 100, "--log_interval", 50]
    seen, update = {}, train.update

    def watched(run, batches):
        if run.num_updates in (updates // 10, updates - 1):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen[run.num_updates] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        return update(run, batches)

    train.update = watched
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([str(word) for word in argv])
    finally:
        train.update = update
    early, late = seen.values()
    percent = round(100 * (late / early - 1), 2)
    return dict(updates=updates, early=round(early), late=round(late), grown_percent=percent)


def main() -> int:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("what", choices=("kills", "fuzz", "memory"))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--datasets", type=int, default=20000)
    parser.add_argument("--checkpoints", type=int, default=5000)
    parser.add_argument("--structured", type=int, default=500, help="files of each kind")
    parser.add_argument("--updates", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.what == "kills":
            figures = kills(args.kills, folder)
        elif args.what == "fuzz":
            figures = fuzz(args.datasets, args.checkpoints, folder, structured=args.structured)
        else:
            figures = memory(args.updates, folder)
    print(json.dumps(figures))
    return 1 if figures.get("lost") or figures.get("other_errors") else 0


if __name__ == "__main__":
    flags.program(main)
