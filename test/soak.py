"""Stress tests that take minutes. Each prints its figures as one JSON object.

    python -m test.soak kills     SIGKILL a run that saves every update, at random times
    python -m test.soak fuzz      damaged files must load or give a one-line error
    python -m test.soak memory    resident memory early in a run and at its end

Run them from the project's root.
"""

import argparse
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

import config
import convert
import data
import train
from config import InputError
from hardware.device import Device
from run import checkpoint, flags
from test import mutations
from text.binarized import EOS, write_dataset

import numpy as np
import torch

HERE = Path(__file__).parent.parent  # the project
TINY = (
    "--config_name tiny --device cpu --layers 2 --embed_dim 16 --ffn_embed_dim 32 --attention_heads 2"
    " --average_top_k_layers 2 --tokens_per_sample 32 --max_tokens 256 --max_source_positions 64"
    " --validate_interval_updates 0 --min_target_var 0 --min_pred_var 0"
).split()


def small_corpus(folder: Path) -> Path:
    """Write 200 sentences of random words, the same for training and validation; returns the
    folder."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid"):
        sentences = [
            [EOS] if i % 6 == 5 else [*rng.integers(4, 60, rng.integers(1, 40)), EOS]
            for i in range(200)
        ]
        write_dataset(folder / split, sentences, 60)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(56)))
    return folder


def last_update(folder: Path) -> int:
    return checkpoint.load(folder / "checkpoint_last.pt").content["progress"]["num_updates"]


def kills(count: int, folder: Path, corpus: Path | None = None) -> dict:
    """Start a run, kill it, check its files, and repeat. After each kill, checkpoint_last.pt must
    load and be at most two updates older than the log."""
    corpus, save_dir = corpus or small_corpus(folder / "corpus"), folder / "killed"
    flags = (
        "--max_update 1000000 --save_interval_updates 1 --keep_interval_updates 2 --disable_validation --log_interval 1"
    ).split()
    command = [
        sys.executable,
        HERE / "train.py",
        *TINY,
        "--data_path",
        corpus,
        "--save_dir",
        save_dir,
        *flags,
    ]
    rng = random.Random(0)
    lost = leftovers = 0
    repeated, reached = [], 0
    for i in range(count):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        logged = 0
        for line in process.stdout:
            if match := re.match(r"update (\d+) \| loss", line):
                logged = int(match[1])
                if logged >= reached + 3:
                    break
        else:
            raise RuntimeError(f"the run ended by itself before kill {i}")
        if i % 2:  # half of the kills come during a save
            deadline = time.monotonic() + 5
            while not list(save_dir.glob("*.tmp")) and time.monotonic() < deadline:
                pass
        time.sleep(rng.random() * (0.002 if i % 2 else 0.05))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        logged = max([logged, *map(int, re.findall(r"update (\d+) \| loss", rest))])
        process.wait()
        leftovers += bool(list(save_dir.glob("*.tmp")))
        try:
            at = last_update(save_dir)
        except InputError as e:
            lost += 1
            print(f"kill {i}: {e}", file=sys.stderr)
            continue
        lost += (
            at < logged - 2
        )  # an update is logged before its save begins, when the save before it may still be running
        repeated.append(logged - at)
        reached = at
    numbers = [
        json.loads(line)["num_updates"]
        for line in (save_dir / "train.jsonl").read_text().splitlines()[:-1]
    ]
    return dict(
        kills=count,
        lost=lost,
        found_mid_save=leftovers,
        updates=reached,
        most_updates_repeated=max(repeated, default=0),
        rows_in_order=numbers == sorted(set(numbers)),
    )


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """Damage one to three random places: flip a bit, cut, insert, delete, or overwrite with an
    extreme number."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = (
            rng.randrange(len(raw) + 1)
            if rng.random() < 0.5
            else rng.randrange(min(len(raw), 80) + 1)
        )
        kind = rng.randrange(6)
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            raw[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == 3:
            del raw[at : at + rng.randint(1, 16)]
        else:
            number = rng.choice(
                [
                    0,
                    1,
                    -1,
                    2**31 - 1,
                    -(2**31),
                    2**62,
                    2**63 - 1,
                    -(2**63),
                    rng.randrange(2**40),
                    77,
                ]
            )
            raw[at : at + (8 if kind == 4 else 4)] = struct.pack("<q", number)[
                : 8 if kind == 4 else 4
            ]
    return bytes(raw)


def fuzz(datasets: int, checkpoints: int, folder: Path, seed: int = 0, structured: int = 0) -> dict:
    """Every damaged file must load or raise a one-line InputError, without allocating much memory.
    structured: how many of each kind get the damage of test/mutations.py."""
    rng = random.Random(seed)
    source, target = small_corpus(folder / "source"), folder / "mutated"
    shutil.copytree(source, target, dirs_exist_ok=True)
    originals = {
        name: (source / name).read_bytes() for name in ("train.idx", "train.bin", "dict.txt")
    }
    cfg = data.DataConfig(data_path=str(target), tokens_per_sample=32, max_tokens=256)

    def read_all():
        dataset = data.Corpus(cfg).split("train")
        for ids in dataset.epoch_batches(1):
            dataset.batch(ids, 1)
        dataset.stream.counts(dataset.dictionary)  # checks every token

    read_all()  # so that memory which libraries allocate at first use is not counted
    of_datasets, of_checkpoints, others = (mutations.Attempts() for _ in range(3))
    for i in range(datasets):
        name = rng.choice(["train.idx"] * 3 + ["train.bin", "dict.txt"])
        (target / name).write_bytes(mutate(originals[name], rng))
        of_datasets(f"dataset {i} ({name})", read_all)
        (target / name).write_bytes(originals[name])

    state = {
        f"encoder.sentence_encoder.layers.0.self_attn.{p}_proj.weight": torch.randn(8, 8)
        for p in "qkv"
    }
    fairseq = {
        "model": {**state, "encoder._ema": {}},
        "cfg": {"model": {"layers": 1}},
        "extra_state": {"loss": 1.0},
    }
    checkpoint.save(
        {**convert.beginning(1), "config": {}, "student": state, "teacher": state},
        folder / "ours.pt",
    )
    torch.save(fairseq, folder / "fairseq.pt")
    torch.save(fairseq, folder / "old.pt", _use_new_zipfile_serialization=False)
    files = [(folder / name).read_bytes() for name in ("ours.pt", "fairseq.pt", "old.pt")]
    checkpoint.load(folder / "ours.pt")
    for i in range(checkpoints):
        (folder / "mutated.pt").write_bytes(mutate(files[i % 3], rng))
        of_checkpoints(f"checkpoint {i}", lambda: checkpoint.load(folder / "mutated.pt"))

    if structured:
        run = folder / "run"
        flags = [
            "--data_path",
            str(target),
            "--save_dir",
            str(run),
            "--max_update",
            "3",
            "--log_interval",
            "1",
        ]
        mutations.Attempts()("a short run", lambda: train.main([*TINY, *flags]))
        (folder / "structured").mkdir()
        others = mutations.fuzz(structured, folder / "structured", target, run, seed)
    all_three = (of_datasets, of_checkpoints, others)
    return dict(
        datasets=datasets,
        dataset_errors=of_datasets.refused,
        checkpoints=checkpoints,
        checkpoint_errors=of_checkpoints.refused,
        structured=others.files,
        structured_errors=others.refused,
        other_errors=sum((part.other for part in all_three), []),
        slowest=max(part.slowest for part in all_three),
        memory_grown_mib=round(sum(part.grown for part in all_three)),
    )


def memory(updates: int, folder: Path) -> dict:
    """Resident memory of a run after a tenth of its updates and at its end, with a checkpoint every
    100 updates."""
    corpus = small_corpus(folder / "corpus")
    saves = [
        "--save_dir",
        str(folder / "run"),
        "--save_interval_updates",
        "100",
        "--log_interval",
        "50",
    ]
    flags = [*TINY, "--data_path", str(corpus), "--max_update", str(updates), *saves]
    parts, _ = flags.parse(config.PARTS, "", flags)
    seen, update = {}, train.update

    def watched(run, *rest):
        if run.num_updates in (updates // 10, updates - 1):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen[run.num_updates] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        return update(run, *rest)

    train.update = watched
    args = argparse.Namespace(no_resume=False, overwrite=False, reset_data_position=False)
    with open(os.devnull, "w") as nothing:
        out, sys.stdout = sys.stdout, nothing
        try:
            train.train(config.Config(*parts), Device(torch.device("cpu"), "cpu", None), args)
        finally:
            sys.stdout, train.update = out, update
    early, late = seen[updates // 10], seen[updates - 1]
    files = sum(p.stat().st_size for p in (folder / "run").iterdir())
    return dict(
        updates=updates,
        early_mib=round(early, 1),
        late_mib=round(late, 1),
        grown_percent=round(100 * (late / early - 1), 2),
        save_dir_mib=round(files / 2**20, 2),
    )


def main():
    parser = flags.Parser(description=__doc__)
    parser.add_argument("what", choices=("kills", "fuzz", "memory"))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--datasets", type=int, default=20000)
    parser.add_argument("--checkpoints", type=int, default=5000)
    parser.add_argument(
        "--structured", type=int, default=500, help="files of each kind in test/mutations.py"
    )
    parser.add_argument("--updates", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        result = {
            "kills": lambda: kills(args.kills, folder),
            "fuzz": lambda: fuzz(
                args.datasets, args.checkpoints, folder, structured=args.structured
            ),
            "memory": lambda: memory(args.updates, folder),
        }[args.what]()
    print(json.dumps(result))
    if result.get("lost") or result.get("other_errors"):
        sys.exit(1)


if __name__ == "__main__":
    flags.program(main)
