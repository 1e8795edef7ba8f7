"""The command line of every program: settings become flags, mistakes one line, and how a program ends.

    python train.py --data_path DIR --config_name tiny --lr 3e-4

`parse` turns classes of settings (config.py) into one command line. Of two sources the later one wins: defaults, the
preset (`--config_name`) or fairseq's YAML (`--config_dir`), a checkpoint's settings, what `--fairseq_exact` implies,
flags. fairseq's spellings of the flags are in formats/fairseq_config.py.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import io
import os
import re
import shlex
import signal
import sys
import textwrap
from pathlib import Path

from config import (
    FAIRSEQ_EXACT,
    PRESETS,
    READERS,
    VERSION,
    InputError,
    RunError,
    boolean,
    check_ranges,
    printable,
)
from formats import fairseq_config

TITLES = dict(Data="data", Model="model", Ema="teacher", Device="device", Finetune="fine-tuning")
HELP_LINES = 60  # of --help, which explains only these settings where not all fit
OFTEN = "data_path tokens_per_sample max_tokens layers embed_dim ema_decay device amp lr warmup_updates max_update"
OFTEN = f"{OFTEN} max_hours update_freq save_dir".split()
FORMS = {
    bool: "yes|no",
    int: "N",
    float: "X",
    str: "TEXT",
    tuple: "X,Y",
}  # of the values, in --help


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Fills the text to the width; an indented line, which is a command, is broken only where it is too long."""

    def _fill_text(self, text, width, indent):
        lines, text = [], re.sub(r"(?<=\S)\n(?=\S)", " ", text)
        for line in text.splitlines():
            start = re.match(" *", line)[0]
            if start and len(line) > width:  # a command and, after some spaces, what it does
                line = re.sub(r"(?<=\S) {2,}", f"\n{start}    ", line)
            for part in line.splitlines() or [""]:
                further = f"{start}    " if start else ""
                lines += textwrap.wrap(
                    part, width, subsequent_indent=further, break_on_hyphens=False
                ) or [""]
        return "\n".join(indent + line for line in lines)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors; each flag --a_b is --a-b, too."""

    def __init__(self, **options):
        plain = dict(
            allow_abbrev=False, formatter_class=lambda prog: Formatter(prog, max_help_position=30)
        )
        super().__init__(**(plain | options))
        self._negative_number_matcher = re.compile(
            r"-\.?\d"
        )  # argparse's own takes -1e-3 for a flag
        self.add_argument("--version", action="version", version=f"data2vec-text {VERSION}")

    def add_argument(self, *names, **options):
        action = super().add_argument(*names, **options)
        self.also(action, *names)
        return action

    def format_help(self) -> str:
        """As much as fits HELP_LINES lines."""
        for explained in (None, OFTEN, ()):
            text = self.help_on(explained)
            if len(text.splitlines()) <= HELP_LINES:
                break
        return text

    def help_on(self, explained=None) -> str:
        """The help that explains the program's own flags and, of the settings, only these (None: all)."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            actions = [
                action for action in group._group_actions if action.help != argparse.SUPPRESS
            ]
            own = explained is None or group in (self._optionals, self._positionals)
            shown = [action for action in actions if own or action.dest in explained]
            left = len(actions) - len(shown)
            formatter.start_section(
                f"{group.title} (--help_all shows {left} more)" if left else group.title
            )
            formatter.add_text(
                presets_on(group.names, explained)
                if group.title == "presets"
                else group.description
            )
            formatter.add_arguments(shown)
            formatter.end_section()
        return formatter.format_help()

    def flag(self, name: str):
        """The action of the flag that is spelled like this, or None."""
        return self._option_string_actions.get(name)

    def also(self, action, *spellings):
        """Accept these spellings of an action's flag, too. Help and errors show only those of add_argument."""
        for spelling in spellings:
            if spelling.startswith("--"):
                for text in (spelling, "--" + spelling[2:].replace("_", "-")):
                    self._option_string_actions.setdefault(text, action)

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition(
                "="
            )[0]
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            names = [name[2:] for action in shown for name in action.option_strings]
            asked = word.lstrip("-").split(".")[-1].replace("-", "_")
            initials = "".join(part[:1] for part in asked.split("_"))  # --learning_rate is --lr
            near = difflib.get_close_matches(asked, names, 1, 0.7) or [initials] * (
                initials in names
            )
            hint = f"; did you mean --{near[0]}?" if near else ""
            if Path(word).is_dir() and self.flag("--data_path"):
                hint = "; the folder of a dataset is --data_path"
            self.error(f"{word}: no option of that name here{hint}")
        return found

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def presets_on(names, explained=None) -> str:
    """What each preset sets of these settings, and of the others how many (explained None: all)."""
    lines = []
    for title, preset in {**PRESETS, "--fairseq_exact": FAIRSEQ_EXACT}.items():
        sets = {k: v for k, v in preset.items() if k in names}
        shown = [
            f"{k}={v}" for k, v in sets.items() if len(sets) < 6 or explained is None or k in OFTEN
        ]
        more = [f"{len(sets) - len(shown)} more"] if len(shown) < len(sets) else []
        lines.append(f" {title}: " + ", ".join(shown + more))
    return "\n".join(lines[1:])


class HelpAll(argparse.Action):
    def __call__(self, parser, *_):
        print(parser.help_on(), end="")
        parser.exit()


def words_of(value) -> str:
    """A setting as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def flags_of(parts: list) -> str:
    """The shortest command line that gives the settings in these instances."""
    values = {name: value for part in parts for name, value in vars(part).items()}
    plain = {field.name: field.default for part in parts for field in dataclasses.fields(part)}
    if values.get("fairseq_exact"):
        plain |= {**FAIRSEQ_EXACT, "fairseq_exact": None}
    ways = []
    for name, preset in PRESETS.items():
        way = [f"--config_name {name}"] if preset else []
        expected = plain | preset
        ways.append(
            way
            + [f"--{k} {shlex.quote(words_of(v))}" for k, v in values.items() if v != expected[k]]
        )
    return " ".join(min(ways, key=len))


def parse(configs: list, doc: str, argv: list | None = None, extra=None, base: dict | None = None):
    """Read a command line into one instance of each dataclass in `configs` (no two share a field name).

    extra(parser) adds a program's own flags. base: values, such as a checkpoint's settings, that override the preset
    and are overridden by flags. Returns (instances, namespace of the program's own flags). Raises InputError.
    """
    # --fairseq_exact is a field of train.py's, but a flag of every program
    fields = {
        f.name: f
        for config in configs
        for f in dataclasses.fields(config)
        if f.name != "fairseq_exact"
    }
    parser = Parser(description=doc, usage="%(prog)s [--NAME VALUE ...]")
    if extra:
        extra(parser)
    parser.add_argument(
        "--help_all", action=HelpAll, nargs=0, help="the same with all settings of a run, and exit"
    )
    parser.add_argument(
        "--config_name", metavar="NAME", help="a preset, or with --config_dir a YAML"
    )
    parser.add_argument(
        "--config_dir", metavar="DIR", help="the folder of that YAML, which is fairseq's"
    )
    switch = dict(nargs="?", const=True, type=boolean, metavar="yes|no")
    parser.add_argument("--fairseq_exact", help="the released code bug for bug", **switch)
    for config in sorted(
        configs, key=lambda config: config.__name__.removesuffix("Config") not in TITLES
    ):
        title = TITLES.get(config.__name__.removesuffix("Config"), "training")
        group = next(
            (g for g in parser._action_groups if g.title == title), None
        ) or parser.add_argument_group(title)
        for name in (field.name for field in dataclasses.fields(config) if field.name in fields):
            field, choices = fields[name], fields[name].metadata["choices"]
            text = field.metadata["help"].replace("%", "%%")
            text += f" [{words_of(field.default)}]" if field.default != "" else ""
            form = "|".join(choices) if choices else FORMS[field.type]
            flag = switch if field.type is bool else dict(type=READERS[field.type], metavar=form)
            parser.also(group.add_argument(f"--{name}", help=text, **flag), f"--{name}")
    if "mask_prob" in fields:  # of pretraining
        parser.add_argument_group("presets").names = fields
    fairseq_config.add_spellings(parser)
    argv = fairseq_config.as_flags(sys.argv[1:] if argv is None else argv, parser)
    given = vars(parser.parse_args(argv))  # None: not given

    values = {}
    config_dir, config_name, exact = (
        given.pop("config_dir"),
        given.pop("config_name"),
        given.pop("fairseq_exact"),
    )
    if config_dir:
        if not config_name:
            raise InputError("--config_dir needs --config_name, the YAML's name without .yaml")
        path = Path(config_dir) / f"{config_name.removesuffix('.yaml')}.yaml"
        values.update(fairseq_config.read_yaml(path, fields, explain=len(configs) > 1))
    elif config_name:
        if config_name not in PRESETS:
            raise InputError(
                f"--config_name {config_name}: no such preset; choose from {', '.join(PRESETS)}"
            )
        values.update(PRESETS[config_name])
    values.update(base or {})
    if exact is not None:
        plain = {name: fields[name].default for name in FAIRSEQ_EXACT if name in fields}
        values.update(FAIRSEQ_EXACT if exact else plain, fairseq_exact=exact)
    if given.get("max_hours") and given["schedule_by"] in (None, "auto"):
        given["schedule_by"] = "hours" if given["max_update"] is None else "updates"
    values.update({name: given.pop(name) for name in fields if given.get(name) is not None})
    names = [
        {field.name for field in dataclasses.fields(config)} & set(values) for config in configs
    ]
    instances = [
        check_ranges(config(**{name: values[name] for name in part}))
        for config, part in zip(configs, names)
    ]
    return instances, argparse.Namespace(
        **{name: value for name, value in given.items() if name not in fields}
    )


def answer_early(configs: list, doc: str, extra=None, check=None):
    """Answer --help and refuse a wrong command line, before the program imports torch: that takes seconds.

    check(instances) refuses settings that do not fit together, where none can come from elsewhere.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # notes: main() prints them again
            instances, _ = parse(configs, doc, extra=extra)
        if check:
            check(instances)
        missing = [
            name for name in ("numpy", "torch", "tqdm") if not importlib.util.find_spec(name)
        ]
        if missing:
            named = " and no ".join(missing)
            raise InputError(f"this Python has no {named}: pip install -r requirements.txt")
    except InputError as e:
        end(2, f"error: {e}")
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # a job in the background ignores it
        signal.signal(signal.SIGINT, interrupted)


def interrupted(*_):
    """Ctrl-C while modules are imported: nothing is to be kept."""
    os.write(2, f"\n{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(130)


def program(main):
    """Run a program's main() and exit. An InputError becomes one line on stderr and exit code 2, a RunError or a full
    disk 1, Ctrl-C 130."""
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        leave(main())
    except BrokenPipeError:  # `... | head`
        sys.stderr.close()
        sys.exit(141)
    except KeyboardInterrupt:
        end(130, "interrupted")
    except InputError as e:
        end(2, f"error: {e}")
    except RunError as e:
        end(1, f"stopped: {e}")
    except (MemoryError, RuntimeError) as e:  # torch's own kind for a CPU is a plain RuntimeError
        if isinstance(e, RuntimeError) and not re.search(
            "can't allocate memory|out of memory", str(e)
        ):
            raise
        end(1, f"stopped: out of memory: {str(e)[:300]}")
    except OSError as e:
        text = f"{e.filename}: {e.strerror or e}" if e.filename else f"{e.strerror or e}"
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # no mistake in the command
        end(1, f"stopped: {text}") if full else end(2, f"error: {text}")


def end(code: int, text: str):
    """Exit with one line on stderr."""
    print(f"{Path(sys.argv[0]).name}: {printable(text)}", file=sys.stderr)
    leave(code)


def leave(code: int):
    """Exit. A worker leaves at once, since a thread of torch.distributed that asks for Python's lock while Python ends
    aborts the process (SIGABRT), now and then and also after a good run."""
    if "MASTER_ADDR" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
