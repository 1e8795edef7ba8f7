"""A table of fine-tunings: each task's score of a bag of the tokens, untrained and pretrained.

    python finetune.py --ckpt FILE ... --untrained --seeds 3 --save_dir DIR/word_order
    python -m tasks.table DIR/word_order DIR/sentences

Scores are those of the test split, or of valid where there is none, times 100: the mean and the
standard deviation over the seeds of the learning rate that is best on valid. The difference of
pretrained and untrained is paired by seed, with its standard error.
"""

import json
import math
import statistics
from pathlib import Path

from config import printable, read_text, reading
from run import flags

COLUMNS = ("task", "scored by", "a bag of tokens", "untrained", "pretrained", "difference")


def best_runs(runs: list[dict], metric: str) -> dict[int, dict]:
    """Of fine-tunings at several learning rates those at the best on valid, by seed."""
    groups = {}
    for run in runs:
        groups.setdefault(run["lr"], {})[run["seed"]] = run
    # one seed alone would choose by chance
    means = {}
    for lr, group in groups.items():
        means[lr] = statistics.fmean(run["valid"][metric] for run in group.values())
    return groups[max(means, key=means.get)] if groups else {}


def spread(values: list[float], error: bool = False) -> str:
    """Mean and standard deviation, or standard error of the mean."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.1f}"
    if len(values) > 1:
        deviation = statistics.stdev(values)
        text += f" +- {deviation / math.sqrt(len(values)) if error else deviation:.1f}"
    return text


def row_of(folder: str) -> tuple[str, ...]:
    """A task's row of the table, from the results.json in the folder. Raises InputError."""
    path = Path(folder) / "results.json"
    with reading(f"{path}: not the results of finetune.py"):
        results = json.loads(read_text(path))
        metric, runs, bag = results["metric"], results["runs"], results["bag"]
        split = "test" if "test" in runs[0] else "valid"
        scores = []
        for untrained in (True, False):
            group = best_runs([run for run in runs if run["untrained"] is untrained], metric)
            scores.append({seed: 100 * run[split][metric] for seed, run in group.items()})
        guess = [100 * bag[split][metric]] if bag else []
    untrained, pretrained = scores
    # the same seed draws the same batches for both
    both = [pretrained[seed] - untrained[seed] for seed in pretrained if seed in untrained]
    name = Path(folder).resolve().name
    lists = [spread(guess), spread([*untrained.values()]), spread([*pretrained.values()])]
    return (name, f"{metric}, {split}", *lists, spread(both, error=True))


def main(argv: list | None = None) -> int:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a --save_dir of finetune.py")
    folders = parser.parse_args(argv).folders
    rows = [COLUMNS, *map(row_of, folders)]
    if len({task for task, *_ in rows}) < len(rows):  # the folders above them tell them apart
        rows[1:] = [(folder, *cells) for folder, (_, *cells) in zip(folders, rows[1:])]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(printable("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip()))
    return 0


if __name__ == "__main__":
    flags.program(main)
