"""Stress tests that take minutes. Each prints its figures as one JSON object.

    python -m test.soak kills [N]     SIGKILL a run that saves every update, N times at random
    python -m test.soak fuzz [N]      N damaged files of each kind must load or give one line
    python -m test.soak memory [N]    resident memory early in a run of N updates and at its end

Run them from the project's root.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import config
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


def fuzz(count: int, folder: Path, seed: int = 0) -> dict:
    """Damage `count` files of each kind: each must load or raise a one-line InputError."""
    corpus, save_dir = small_corpus(folder / "corpus"), folder / "run"
    words = f"--data_path {corpus} --save_dir {save_dir} --max_update 3 --log_interval 1".split()
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*TINY, *words])
    (folder / "files").mkdir()
    attempts = mutations.fuzz(count, folder / "files", corpus, save_dir, seed)
    return dict(
        files=attempts.files,
        refused=attempts.refused,
        other_errors=attempts.other,
        slowest=attempts.slowest,
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
    parser.add_argument("number", type=int, nargs="?", help="of kills, files or updates")
    args = parser.parse_args()
    # what makes the figures, and how often: kills, damaged files of each kind, updates
    work, number = {"kills": (kills, 30), "fuzz": (fuzz, 500), "memory": (memory, 2000)}[args.what]
    with tempfile.TemporaryDirectory() as folder:
        result = work(args.number or number, Path(folder))
    print(json.dumps(result))
    if result.get("lost") or result.get("other_errors"):
        sys.exit(1)


if __name__ == "__main__":
    flags.program(main)
