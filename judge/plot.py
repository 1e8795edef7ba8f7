"""Draw the curves of one run, or of several runs over each other, as a picture.

    python -m judge.plot RUN [RUN ...] --out curves.png

RUN is a --save_dir or a train.jsonl; the run may still be going. A panel of which no run has a
figure is left out. The suffix of --out chooses the format (png, svg, pdf). Needs matplotlib.
"""

import math
from pathlib import Path

from config import InputError, printable, reading
from run import flags

if __name__ == "__main__":
    flags.start()

from run import checkpoint
from text.files import json_rows

# Okabe and Ito's palette for colour-blind readers, without yellow (faint on white) and black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

GUESSES = (("", "student"), ("_position", "position"), ("_block", "block"))
CONSTANT = ("valid_cosine_constant", "constant")
COUNTS = (("", "student"), ("_neighbours", "left and right counted"))
FREQUENCY = ("valid_mlm_loss_frequency", "frequencies")


def beside(key: str, guesses: tuple) -> tuple:
    """The student's figure and those of guesses: ((key in train.jsonl, name), ...)."""
    return tuple((f"{key}{guess}", name) for guess, name in guesses)


# (title, unit, ((key in train.jsonl, name in the panel's own legend) of each line))
PANELS = (
    ("loss", "per masked token", (("loss", "training"), ("valid_loss", "validation"))),
    ("cosine", "validation", (*beside("valid_cosine", GUESSES), CONSTANT)),
    ("R2", "validation", beside("valid_r2", GUESSES)),
    ("probe's gain", "nats per word", beside("valid_probe_gain", COUNTS)),
    ("words", "nats", (*beside("valid_mlm_loss", COUNTS), FREQUENCY)),
    ("variance", "0: collapse", (("target_var", "target"), ("pred_var", "prediction"))),
    ("gradient norm", "before clipping", (("gnorm", ""),)),
    ("learning rate", "", (("lr", ""),)),
    ("EMA decay of the teacher", "", (("ema_decay", ""),)),
    ("throughput", "tokens/s", (("wps", ""),)),
)
STYLES = ("-", "--", ":", "-.")  # for the lines of a panel, in order
COLUMNS = 4


def read_run(run: str) -> dict:
    """{key: (updates, values)} of the figures that a run has; damaged lines are left out.

    Raises InputError if there are none.
    """
    path = Path(run) / "train.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        why = "not a file" if path.exists() else "no such file"
        raise InputError(f"{path}: {why}; RUN is a --save_dir of train.py, or its train.jsonl")
    series = {key: ([], []) for *_, keys in PANELS for key, _ in keys}
    for row in json_rows(path):
        update = drawable(row.get("num_updates"))
        if not math.isnan(update):
            for key in series.keys() & row.keys():
                updates, values = series[key]
                updates.append(update)
                values.append(drawable(row[key]))
    drawn = {key: curve for key, curve in series.items() if not all(map(math.isnan, curve[1]))}
    if not drawn:
        raise InputError(f"{path}: no row of a log interval or a validation in it yet")
    return drawn


def drawable(value) -> float:
    """NaN, which makes a gap, for null and for what matplotlib cannot put on an axis."""
    is_number = isinstance(value, (int, float)) and (value == 0 or 1e-30 < abs(value) < 1e30)
    return float(value) if is_number else math.nan


def draw(runs: dict, path: Path):
    """Draw {name: series from `read_run`} into one picture. Raises InputError."""
    with reading("judge.plot needs matplotlib (pip install matplotlib)"):
        from matplotlib import rc_context
        from matplotlib.figure import Figure  # draws into a file, whatever screen there is
    keys = set().union(*runs.values())
    panels = [panel for panel in PANELS if any(key in keys for key, _ in panel[-1])]
    rows = -(-len(panels) // COLUMNS)
    with rc_context({"font.size": 8, "axes.titlesize": 9}):
        figure = Figure(figsize=(3 * COLUMNS, 2.4 * rows), dpi=100, layout="constrained")
        for place, panel in enumerate(panels, 1):
            draw_panel(figure.add_subplot(rows, COLUMNS, place), panel, list(runs.values()))
        # which run is which: by colour if there are several
        if len(runs) == 1:
            figure.suptitle(*runs, parse_math=False)  # a $ in a name is a $
        else:
            lines = [figure.axes[0].plot([], [], color=colour(i))[0] for i in range(len(runs))]
            place = dict(loc="outside upper center", ncols=4, frameon=False)
            for text in figure.legend(lines, runs, **place).get_texts():
                text.set_parse_math(False)
        with checkpoint.whole(path) as part, reading(f"--out {path}"):
            figure.savefig(part, format=path.suffix[1:].lower())


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def draw_panel(axis, panel: tuple, runs: list):
    """One panel: a style for each figure; a colour for each run, or for each figure of one run."""
    title, unit, keys = panel
    lines = {}  # one of each name, for the legend
    for number, (key, name) in enumerate(keys):
        for run, series in enumerate(runs):
            if key not in series:
                continue
            updates, values = series[key]
            look = dict(linestyle=STYLES[number], linewidth=1.2, markersize=3)
            look["color"] = colour(run if len(runs) > 1 else number)
            look["marker"] = "o" if len(updates) < 6 else ""  # too few to be seen as a line
            (lines[name],) = axis.plot(updates, values, **look)
    if len(keys) > 1:
        legend = axis.legend(lines.values(), lines, frameon=False)
        if len(runs) > 1:  # there colours are the runs'
            for line in legend.get_lines():
                line.set_color("0.3")
    # the same frame for all, but for two panels where the scale says something
    axis.set_title(f"{title} ({unit})" if unit else title)
    axis.set_xlabel("updates")
    axis.grid(color="0.9", linewidth=0.6)
    axis.locator_params(axis="x", nbins=5)
    if title == "variance":
        axis.set_yscale("log", nonpositive="mask")
    else:
        axis.ticklabel_format(useOffset=False)
    if title == "probe's gain":  # so that noise does not fill the panel
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, -0.01), max(high, 0.05))


def main(argv: list | None = None) -> int:
    parser = flags.Parser(description=__doc__)
    flag = parser.add_argument
    flag("runs", nargs="+", metavar="RUN", help="a --save_dir of train.py, or its train.jsonl")
    flag("--out", default="curves.png", metavar="FILE", help="the picture [curves.png]")
    args = parser.parse_args(argv)
    draw({printable(run): read_run(run) for run in args.runs}, Path(args.out))
    print(printable(args.out))
    return 0


if __name__ == "__main__":
    flags.program(main)
