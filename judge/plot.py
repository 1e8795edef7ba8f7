"""Draw the curves of one run, or of several runs over each other, as a picture.

    python -m judge.plot RUN [RUN ...] --out curves.png

RUN is a --save_dir or a train.jsonl; the run may still be going. A panel of which no run has a
figure is left out. The suffix of --out chooses the format (png, svg, pdf). Needs matplotlib.
"""

import math
import os
from pathlib import Path

from config import InputError, printable
from run import checkpoint, flags
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


def names_of(runs: list[str]) -> list[str]:
    """The runs' folders without the leading ones that all share: a legend has little room."""
    paths = [Path(os.path.abspath(run)) for run in runs]
    folders = [path.parent if path.name == "train.jsonl" else path for path in paths]
    shared = os.path.commonpath([folder.parent for folder in folders])
    return [printable(os.path.relpath(folder, shared)) for folder in folders]


def load_pyplot(path: Path):
    """matplotlib's pyplot, if it can write `path`. Raises InputError."""
    try:
        import matplotlib
    except ImportError:
        why = "judge.plot needs the matplotlib package: pip install matplotlib"
        raise InputError(why) from None
    matplotlib.use("Agg")  # needs no screen
    from matplotlib import pyplot

    if not path.parent.is_dir():
        raise InputError(f"--out {path}: {path.parent}: no such folder")
    known = pyplot.gcf().canvas.get_supported_filetypes().keys() - {"pgf"}  # which needs LaTeX
    pyplot.close()
    if path.suffix[1:].lower() not in known:
        names = ", ".join(sorted(known))
        raise InputError(f"--out {path}: the suffix chooses the format; use one of {names}")
    small = {"font.size": 8, "axes.titlesize": 9}
    pyplot.rcParams.update({**small, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def draw(runs: dict, path: Path):
    """Draw {name: series from `read_run`} into one picture. Raises InputError."""
    pyplot = load_pyplot(path)
    keys = set().union(*runs.values())
    panels = [panel for panel in PANELS if any(key in keys for key, _ in panel[-1])]
    columns = 3 if len(panels) <= 6 or len(panels) == 9 else 4
    rows = -(-len(panels) // columns)
    form = dict(figsize=(3 * columns, 2.4 * rows), dpi=100, layout="constrained", squeeze=False)
    figure, axes = pyplot.subplots(rows, columns, **form)
    for axis in axes.flat[len(panels) :]:  # the last row may be short
        axis.remove()

    # one run: a colour for each line of a panel; several: a colour for each run, however many
    colours = COLOURS
    if len(runs) > len(COLOURS):
        colours = pyplot.cm.viridis([i / len(runs) for i in range(len(runs))])
    for i, (axis, panel) in enumerate(zip(axes.flat, panels)):
        draw_panel(axis, panel, list(runs.values()), colours)
        if i + columns >= len(panels):
            axis.set_xlabel("updates")
    draw_names(figure, list(runs), colours)
    with checkpoint.whole(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower())
    pyplot.close(figure)


def draw_panel(axis, panel: tuple, runs: list, colours):
    """One panel, with the lines of all runs."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator

    title, unit, keys = panel
    is_alone = len(runs) == 1
    # the legend explains lines; which run has which colour stands above the panels
    lines = {}
    for (key, name), style, own in zip(keys, STYLES, COLOURS):
        look = dict(linestyle=style, linewidth=1.2)
        for series, colour in zip(runs, [own] if is_alone else colours):
            if key in series:
                updates, values = series[key]
                marker = "o" if len(updates) < 6 else ""  # too few to be seen as a line
                axis.plot(updates, values, color=colour, marker=marker, markersize=3, **look)
                lines[name] = Line2D([], [], color=own if is_alone else "0.3", **look)
    if len(keys) > 1:
        axis.legend(lines.values(), lines, frameon=False)

    # a thousand updates is 1k; a variance near 0 is what the panel is for
    axis.set_title(f"{title} ({unit})" if unit else title)
    axis.grid(color="0.9", linewidth=0.6)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    last = max(max(updates) for series in runs for updates, _ in series.values())
    axis.set_xlim(0, 1.02 * last)  # room for the last marker
    if title == "variance":
        axis.set_yscale("log", nonpositive="mask")
    else:
        axis.yaxis.set_major_formatter(EngFormatter(sep="") if title == "throughput" else "{x:g}")
    if title == "throughput":
        axis.set_ylim(bottom=0)
    if title == "probe's gain":  # so that noise does not fill the panel
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, -0.01), max(high, 0.05))


def draw_names(figure, names: list, colours):
    """Which run is which; a $ in a name is a $."""
    from matplotlib.lines import Line2D

    if len(names) == 1:
        figure.suptitle(*names, parse_math=False)
        return
    handles = [Line2D([], [], color=colour, linewidth=2) for colour in colours[: len(names)]]
    form = dict(loc="outside upper center", ncols=min(4, len(names)), frameon=False)
    legend = figure.legend(handles, names, **form)
    for text in legend.get_texts():
        text.set_parse_math(False)


def main(argv: list | None = None) -> int:
    parser = flags.Parser(description=__doc__)
    flag = parser.add_argument
    flag("runs", nargs="+", metavar="RUN", help="a --save_dir of train.py, or its train.jsonl")
    flag("--out", default="curves.png", metavar="FILE", help="the picture [curves.png]")
    args = parser.parse_args(argv)
    series = [read_run(run) for run in args.runs]
    draw(dict(zip(names_of(args.runs), series)), Path(args.out))
    print(printable(args.out))
    return 0


if __name__ == "__main__":
    flags.program(main)
