"""Stress tests that take minutes. Each prints its figures as one JSON object.

    python -m test.soak kills [N]     SIGKILL a run that saves every update, N times at random
    python -m test.soak fuzz [N]      N damaged files of each kind must load or give one line
    python -m test.soak memory [N]    resident memory early in a run of N updates and at its end

Run them from the project's root.
"""

import json
import os
import random
import re
import tempfile
import time
from pathlib import Path

import train
from config import InputError
from run import checkpoint, flags
from test import mutations
from test.helpers import call, few, make_dataset, start_training

NO_GUARD = "--min_target_var=0 --min_pred_var=0".split()


def kills(count: int, folder: Path, corpus: Path | None = None) -> dict:
    """Start a run, kill it, check its files, and repeat.

    After each kill, checkpoint_last.pt must load and be at most one update older than the log.
    """
    corpus, save_dir = corpus or make_dataset(folder / "corpus")[0], folder / "killed"
    argv = few(corpus, save_dir, "--max_update", 10**6, "--disable_validation", *NO_GUARD)
    argv += "--save_interval_updates 1 --keep_interval_updates 2".split()
    rng = random.Random(0)
    lost = mid_save = reached = 0
    repeated = []
    for i in range(count):
        process = start_training(*argv)
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
        process.kill()
        logged = updates_in(line + process.stdout.read())
        process.wait()

        mid_save += bool(list(save_dir.glob("*.tmp")))
        try:
            loaded = checkpoint.load(save_dir / "checkpoint_last.pt")
        except InputError:
            lost += 1
            continue
        reached = loaded.content["progress"]["num_updates"]
        repeated.append(logged - reached)
        lost += repeated[-1] > 1  # an update is logged before it is saved
    most = max(repeated, default=0)
    return dict(kills=count, lost=lost, found_mid_save=mid_save, most_updates_repeated=most)


def updates_in(text: str) -> int:
    """The last update whose row is in the text, or 0."""
    return max(map(int, re.findall(r"^update (\d+) \| loss", text, re.M)), default=0)


def fuzz(count: int, folder: Path, seed: int = 0) -> dict:
    """Damage `count` files of each kind: each must load or raise a one-line InputError."""
    corpus, save_dir = make_dataset(folder / "corpus")[0], folder / "run"
    call(train.main, *few(corpus, save_dir, "--max_update", 3))
    (folder / "files").mkdir()
    return vars(mutations.fuzz(count, folder / "files", corpus, save_dir, seed))


def memory(updates: int, folder: Path) -> dict:
    """Resident MiB of a run after a tenth of its updates and at its end, with many checkpoints."""
    corpus, often = make_dataset(folder / "corpus")[0], ["--save_interval_updates", 100]
    argv = few(corpus, folder / "run", "--max_update", updates, *often, *NO_GUARD)
    seen, update = {}, train.update

    def watched(run, batches):
        if run.num_updates in (updates // 10, updates - 1):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen[run.num_updates] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        return update(run, batches)

    train.update = watched  # to the end of this process
    call(train.main, *argv)
    early, late = seen.values()
    percent = round(100 * (late / early - 1), 2)
    return dict(updates=updates, early=round(early), late=round(late), grown_percent=percent)


WORK = {"kills": (kills, 30), "fuzz": (fuzz, 500), "memory": (memory, 2000)}


def main() -> int:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("what", choices=WORK)
    parser.add_argument("number", type=int, nargs="?", help="of kills, files or updates")
    args = parser.parse_args()
    work, number = WORK[args.what]
    with tempfile.TemporaryDirectory() as folder:
        figures = work(args.number or number, Path(folder))
    print(json.dumps(figures))
    return 1 if figures.get("lost") or figures.get("other") else 0


if __name__ == "__main__":
    flags.program(main)
