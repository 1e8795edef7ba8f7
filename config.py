"""How settings become command-line flags; presets; errors, and how a program ends.

    python train.py --data_path DIR --config_name tiny --lr 3e-4

Each file that has settings keeps them in a frozen dataclass whose fields are made with `option`. `parse` turns several
of these classes into one command line. Of two sources the later one wins: defaults, the preset (`--config_name`) or
fairseq's YAML (`--config_dir`), a checkpoint's settings, what `--fairseq_exact` implies, flags. fairseq's spellings of
the flags are in compat/fairseq_config.py.
"""

import argparse
import dataclasses
import difflib
import math
import operator
import os
import re
import sys
from pathlib import Path

VERSION = "0.2.0"  # docs/changelog.md begins with it

# The defaults in the dataclasses are those of fairseq's examples/data2vec/config/text/pretraining/base.yaml; a preset
# holds what differs.
PRESETS = {
    "base": {},
    "npu_1p": dict(tokens_per_sample=64, max_tokens=1280),  # the Ascend ModelZoo's run on one device
    "tiny": dict(  # learns something visible in a minute or two on a laptop's CPU
        tokens_per_sample=128,
        max_tokens=2048,
        embed_dim=128,
        ffn_embed_dim=512,
        layers=4,
        attention_heads=4,
        average_top_k_layers=3,
        dropout=0.0,
        attention_dropout=0.0,
        lr=1e-3,
        warmup_updates=40,
        max_update=400,
        ema_anneal_end_step=200,
        ema_decay=0.99,
        ema_end_decay=0.999,
        log_interval=20,
        validate_interval_updates=200,
        validate_interval=0,
        save_interval=0,
    ),
}

# What the released code does where it differs from the paper or loses text.
FAIRSEQ_EXACT = dict(
    teacher_input="masked", long_sentences="skip", drop_remainder=True, min_target_var=0.0, min_pred_var=0.0
)


class InputError(ValueError):
    """The user's input is wrong. The text is one line that says what, where, and what to do."""


class RunError(RuntimeError):
    """A run cannot continue. The text is one line that says why and what to do."""


def printable(text: str) -> str:
    """The text on one line, with control characters escaped: symbols and paths may contain anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def read_text(path, errors: str = "strict", encoding: str = "utf-8") -> str:
    """The text of an ordinary file; a pipe or a device could be endless. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        return path.read_text(encoding=encoding, errors=errors)
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 at byte {e.start}") from None
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None


def option(default, help, low=None, high=None, above=None, below=None, choices=None):
    """A dataclass field that becomes a command-line flag. low and high are allowed values, above and below are not."""
    if type(default) is int and high is None:
        high = 2**31 - 1
    bounds = {"at least": low, "at most": high, "above": above, "below": below}
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, bounds=bounds))


def check_ranges(config):
    """Raise InputError for the first field of the dataclass `config` that is outside its range."""
    inside = {"at least": operator.ge, "at most": operator.le, "above": operator.gt, "below": operator.lt}
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata["choices"]
        if not isinstance(value, (int, float) if field.type is float else field.type):  # out of a checkpoint
            raise InputError(f"--{field.name} {str(value)[:100]}: must be of type {field.type.__name__}")
        if isinstance(value, str) and not re.fullmatch("[^\0\ud800-\udc7f\udd00-\udfff]*", value):
            raise InputError(f"--{field.name} {value[:100]}: holds a character that no path can hold")
        if choices and value not in choices:
            raise InputError(f"--{field.name} {value}: choose from {', '.join(map(str, choices))}")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, float) and not math.isfinite(part):
                raise InputError(f"--{field.name} {value}: must be a finite number")
            for bound, limit in field.metadata["bounds"].items():
                if limit is not None and not inside[bound](part, limit):
                    raise InputError(f"--{field.name} {value}: must be {bound} {limit}")


def boolean(text: str) -> bool:
    try:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def whole_number(text: str) -> int:
    text = text.strip("[] ")  # fairseq writes update_freq=[1]
    if text.lstrip("+-").isdigit():
        return int(text)
    value = float(text)  # 1e6 is a whole number, too
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def number(text: str) -> float:
    return float(text.strip("[] "))  # fairseq writes lr=[0.0002]


def numbers(text: str) -> tuple:
    return tuple(float(part) for part in text.strip("()[] ").split(",") if part.strip())


READERS = {bool: boolean, int: whole_number, float: number, str: str, tuple: numbers}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors; each flag --a_b is --a-b, too."""

    def __init__(self, **options):
        plain = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        super().__init__(**(plain | options))
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own takes -1e-3 for a flag
        self.add_argument("--version", action="version", version=f"data2vec-text {VERSION}")

    def add_argument(self, *names, **options):
        action = super().add_argument(*names, **options)
        self.also(action, *names)
        return action

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
            word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            names = [name[2:] for action in shown for name in action.option_strings]
            near = difflib.get_close_matches(word.lstrip("-").split(".")[-1].replace("-", "_"), names, 1, 0.7)
            hint = f"; did you mean --{near[0]}?" if near else ""
            if Path(word).is_dir() and self.flag("--data_path"):
                hint = "; the folder of a dataset is --data_path"
            self.error(f"{word}: no option of that name here{hint}")
        return found

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def parse(configs: list, doc: str, argv: list | None = None, extra=None, base: dict | None = None):
    """Read a command line into one instance of each dataclass in `configs` (no two share a field name).

    extra(parser) adds a program's own flags. base: values, such as a checkpoint's settings, that override the preset
    and are overridden by flags. Returns (instances, namespace of the program's own flags). Raises InputError.
    """
    from compat import fairseq_config

    # --fairseq_exact is a field of train.py's, but a flag of every program
    fields = {f.name: f for config in configs for f in dataclasses.fields(config) if f.name != "fairseq_exact"}
    parser = Parser(description=doc)
    if extra:
        extra(parser)
    parser.add_argument("--config_name", help=f"preset: {', '.join(PRESETS)}; with --config_dir the name of a YAML")
    parser.add_argument("--config_dir", help="folder of the fairseq YAML that --config_name names")
    implied = ", ".join(f"{name}={value}" for name, value in FAIRSEQ_EXACT.items())
    switch = dict(nargs="?", const=True, type=boolean, metavar="true|false")
    text = f"the released code bug for bug: {implied}, and a teacher one update behind at validation"
    parser.add_argument("--fairseq_exact", help=text, **switch)
    for name, field in fields.items():
        text, choices = field.metadata["help"].replace("%", "%%"), field.metadata["choices"]
        text += f" ({'|'.join(map(str, choices))})" if choices else ""
        text += f" [{field.default if field.default != '' else 'none'}]"
        flag = switch if field.type is bool else dict(type=READERS[field.type], metavar=field.type.__name__)
        parser.add_argument(f"--{name}", help=text, **flag)
    fairseq_config.add_spellings(parser)
    argv = fairseq_config.as_flags(sys.argv[1:] if argv is None else argv, parser)
    given = vars(parser.parse_args(argv))  # None: not given

    values = {}
    config_dir, config_name, exact = given.pop("config_dir"), given.pop("config_name"), given.pop("fairseq_exact")
    if config_dir:
        if not config_name:
            raise InputError("--config_dir needs --config_name, the YAML's name without .yaml")
        path = Path(config_dir) / f"{config_name.removesuffix('.yaml')}.yaml"
        values.update(fairseq_config.read_yaml(path, fields, explain=len(configs) > 1))
    elif config_name:
        if config_name not in PRESETS:
            raise InputError(f"--config_name {config_name}: no such preset; choose from {', '.join(PRESETS)}")
        values.update(PRESETS[config_name])
    values.update(base or {})
    if exact is not None:
        plain = {name: fields[name].default for name in FAIRSEQ_EXACT if name in fields}
        values.update(FAIRSEQ_EXACT if exact else plain, fairseq_exact=exact)
    values.update({name: given.pop(name) for name in fields if given.get(name) is not None})
    names = [{field.name for field in dataclasses.fields(config)} & set(values) for config in configs]
    instances = [config(**{name: values[name] for name in part}) for config, part in zip(configs, names)]
    for instance in instances:
        check_ranges(instance)
    return instances, argparse.Namespace(**{name: value for name, value in given.items() if name not in fields})


def program(main):
    """Run a program's main() and exit. An InputError becomes one line on stderr and exit code 2, a RunError 1."""
    try:
        sys.exit(main())
    except BrokenPipeError:  # `... | head`
        sys.stderr.close()
        sys.exit(141)
    except InputError as e:
        code, text = 2, f"error: {e}"
    except RunError as e:
        code, text = 1, f"stopped: {e}"
    except (MemoryError, RuntimeError) as e:  # torch's own kind for a CPU is a plain RuntimeError
        if isinstance(e, RuntimeError) and not re.search("can't allocate memory|out of memory", str(e)):
            raise
        code, text = 1, f"stopped: out of memory: {str(e)[:300]}"
    except OSError as e:
        code, text = 2, f"error: {e.filename}: {e.strerror or e}" if e.filename else f"error: {e.strerror or e}"
    print(f"{Path(sys.argv[0]).name}: {printable(text)}", file=sys.stderr)
    if "MASTER_ADDR" in os.environ:  # torch's threads sometimes abort at a worker's exit after another one has ended
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
