"""Draw the curves of one run, or of several runs over each other, as a picture.

    python -m judge.plot RUN [RUN ...] --out curves.png

RUN is a --save_dir or a train.jsonl; the run may still be going. A panel of which no run has a
figure is left out. The suffix of --out chooses the format (png, svg, pdf). Needs matplotlib.
"""

import json
import math
import os
from pathlib import Path

from config import InputError, printable, read_text
from run import checkpoint, flags

# Okabe and Ito's palette for colour-blind readers, without yellow (faint on white) and black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

GUESSES = (
    ("", "student"),
    ("_position", "position"),
    ("_block", "block"),
    ("_constant", "constant"),
)
COUNTS = (("", "student"), ("_neighbours", "left and right counted"))
FREQUENCY = ("valid_mlm_loss_frequency", "frequencies")
# (title, unit, log scale, ((key in train.jsonl, name in the panel's own legend) of each line))
PANELS = (
    ("loss", "per masked token", False, (("loss", "training"), ("valid_loss", "validation"))),
    (
        "cosine",
        "validation",
        False,
        tuple((f"valid_cosine{guess}", name) for guess, name in GUESSES),
    ),
    ("R2", "validation", False, tuple((f"valid_r2{guess}", name) for guess, name in GUESSES[:3])),
    (
        "probe's gain",
        "nats per word",
        False,
        tuple((f"valid_probe_gain{guess}", name) for guess, name in COUNTS),
    ),
    (
        "words",
        "nats",
        False,
        (*((f"valid_mlm_loss{guess}", name) for guess, name in COUNTS), FREQUENCY),
    ),
    ("variance", "0: collapse", True, (("target_var", "target"), ("pred_var", "prediction"))),
    ("gradient norm", "before clipping", False, (("gnorm", ""),)),
    ("learning rate", "", False, (("lr", ""),)),
    ("EMA decay of the teacher", "", False, (("ema_decay", ""),)),
    ("throughput", "tokens/s", False, (("wps", ""),)),
)
STYLES = ("-", "--", ":", "-.")  # for the lines of a panel, in order


def read_run(run: str) -> dict:
    """{key: (updates, values)} of a run's rows. null becomes NaN, which makes a gap; damaged lines
    are skipped.

    Raises InputError if there is nothing to draw.
    """
    path = Path(run) / "train.jsonl" if Path(run).is_dir() else Path(run)
    if not path.exists():
        raise InputError(
            f"{path}: no such file; RUN is a --save_dir of train.py, or its train.jsonl"
        )
    lines = read_text(path, "replace").splitlines()
    series = {key: ([], []) for *_, keys in PANELS for key, _ in keys}
    for line in lines:
        try:
            row = json.loads(line)
            update = float(row["num_updates"])
            found = {
                key: _drawable(row[key])
                for key in series
                if key in row and _drawable(update) == update
            }
        except (
            ValueError,
            KeyError,
            TypeError,
            OverflowError,
            RecursionError,
        ):  # cut short by a crash or a full disk
            continue
        for key, value in found.items():
            series[key][0].append(update)
            series[key][1].append(value)
    if not any(math.isfinite(value) for _, values in series.values() for value in values):
        raise InputError(
            f"{path}: no row of a log interval or a validation in it yet ({len(lines)} lines)"
        )
    return series


def _drawable(value) -> float:
    """NaN for null, and for what matplotlib cannot put on an axis."""
    return (
        float(value)
        if value is not None and 1e-30 < abs(float(value)) < 1e30 or value == 0
        else math.nan
    )


def names_of(runs: list[str]) -> list[str]:
    """The runs' paths without train.jsonl and without the leading folders that all share."""
    parts = [
        Path(run).parts[:-1] if Path(run).name == "train.jsonl" else Path(run).parts for run in runs
    ]
    shared = 0
    while all(shared < len(p) - 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [
        printable(os.path.join(*p[shared:]) if p[shared:] else run) for p, run in zip(parts, runs)
    ]


def draw(runs: dict, path: Path):
    """Draw {name: series from `read_run`} into one picture. Raises InputError if the file cannot be
    written."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "judge.plot needs the matplotlib package: pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if not path.parent.is_dir():
        raise InputError(f"--out {path}: {path.parent}: no such folder")
    known = plt.gcf().canvas.get_supported_filetypes().keys() - {"pgf"}  # which needs LaTeX
    plt.close()
    if path.suffix[1:].lower() not in known:
        raise InputError(
            f"--out {path}: the suffix chooses the format; use one of {', '.join(sorted(known))}"
        )
    colours = (
        COLOURS
        if len(runs) <= len(COLOURS)
        else plt.cm.viridis([i / len(runs) for i in range(len(runs))])
    )
    plt.rcParams.update(
        {"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    seen = {
        key
        for series in runs.values()
        for key, (_, values) in series.items()
        if any(map(math.isfinite, values))
    }
    panels = [panel for panel in PANELS if any(key in seen for key, _ in panel[-1])]
    columns = 3 if len(panels) <= 6 or len(panels) == 9 else 4
    last = max(
        max(updates, default=0) for series in runs.values() for updates, _ in series.values()
    )
    rows = -(-len(panels) // columns)
    size = (3 * columns, 2.4 * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, dpi=100, layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for i, (axis, (title, unit, log, keys)) in enumerate(zip(axes.flat, panels)):
        lines = {}  # one run: a colour for each line of a panel; several: a colour for each run
        for series, colour in zip(runs.values(), colours):
            for (key, name), style, own in zip(keys, STYLES, COLOURS):
                marker = "o" if len(series[key][0]) < 6 else ""  # too few to be seen as a line
                look = dict(color=own if len(runs) == 1 else colour, linestyle=style, linewidth=1.2)
                axis.plot(*series[key], **look, marker=marker, markersize=3)
                if key in seen:
                    lines[name] = Line2D(
                        [], [], **{**look, "color": own if len(runs) == 1 else "0.3"}
                    )
        axis.set_title(title + (f" ({unit})" if unit else ""))
        axis.grid(color="0.9", linewidth=0.6)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xlim(0, 1.02 * last)
        if i + columns >= len(panels):
            axis.set_xlabel("updates")
        if log:
            axis.set_yscale("log", nonpositive="mask")
        else:
            axis.yaxis.set_major_formatter(
                EngFormatter(sep="") if title == "throughput" else "{x:g}"
            )
        if title == "throughput":
            axis.set_ylim(bottom=0)
        if title == "probe's gain":
            low, high = axis.get_ylim()
            axis.set_ylim(min(low, -0.01), max(high, 0.05))  # so that noise does not fill the panel
        if len(keys) > 1:
            axis.legend(lines.values(), lines, frameon=False)
    if len(runs) == 1:
        figure.suptitle(*runs, parse_math=False)  # a $ in a name is a $
    else:
        handles = [Line2D([], [], color=colour, linewidth=2) for colour in colours[: len(runs)]]
        names = figure.legend(
            handles, list(runs), loc="outside upper center", ncols=min(4, len(runs)), frameon=False
        )
        for name in names.get_texts():
            name.set_parse_math(False)
    with checkpoint.whole(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower())
    plt.close(figure)


def main(argv: list | None = None) -> int:
    parser = flags.Parser(description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a --save_dir of train.py, or its train.jsonl"
    )
    parser.add_argument(
        "--out",
        default="curves.png",
        metavar="FILE",
        help="where the picture is written [curves.png]",
    )
    args = parser.parse_args(argv)
    series = [read_run(run) for run in args.runs]
    draw(dict(zip(names_of(args.runs), series)), Path(args.out))
    print(printable(args.out))
    return 0


if __name__ == "__main__":
    flags.program(main)
