"""The command line of every program: settings become flags, mistakes one line; how a program ends.

    python train.py --data_path DIR --config_name tiny --lr 3e-4

`parse` turns classes of settings (config.py) into one command line. Of two sources the later one
wins: defaults, the preset (`--config_name`) or fairseq's YAML (`--config_dir`), a checkpoint's
settings, what `--fairseq_exact` implies, flags. fairseq's spellings are in
formats/fairseq_config.py.
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

import config
from config import InputError, RunError, printable
from formats import fairseq_config

# The groups of --help, in its order; a class of settings that is named nowhere is in the last.
TITLES = dict(Data="data", Model="model", Ema="teacher", Finetune="fine-tuning", Device="device")
FORMS = {bool: "yes|no", int: "N", float: "X", str: "TEXT", tuple: "X,Y"}  # of values, in --help
# --help shows these settings of a run, --help_all the others, too.
OFTEN = (
    "data_path tokens_per_sample max_tokens layers embed_dim ema_decay device amp lr"
    " warmup_updates max_update max_hours update_freq save_dir"
).split()
# What others call a flag of ours, where the names are not alike; the last five are fairseq's.
MEANT = dict(learning_rate="lr", max_steps="max_update", warmup_steps="warmup_updates")
MEANT |= dict(num_layers="layers", trainpref="train", validpref="valid", testpref="test")
MEANT |= dict(destdir="dest", srcdict="dict")
OPPOSITES = ("--no_", "--un")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM)  # a disk or the memory
# Options that a program had until 0.3.0, and what to do instead.
GONE = {
    "train.py": {
        "schedule_by": "schedules go by updates; --max_hours ends a run, validated and saved",
        "init": "weights start from N(0, 0.02), as the reference's",
    },
    "eval.py": {
        "layer": "--features gives the last layer's",
        "pool": "--features gives the mean over a line's tokens",
    },
    "finetune.py": {
        "teacher": "convert.py --to hf --teacher writes a folder for --ckpt",
        "patience": "--max_epoch or --max_update ends it",
        "warmup_share": "--warmup_updates",
        "attention_dropout": "--dropout is that of attention, too",
        "init_from": "--ckpt takes the head, too, where it has these classes",
        "num_classes": "there are as many classes as the training split has",
    },
}


# ------------------------------------------------------------------------------------- the parser


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Fills paragraphs to the width of the terminal, and leaves indented commands as they are."""

    def _fill_text(self, text, width, indent):
        parts = text.strip().split("\n\n")
        return "\n\n".join(p if p.startswith(" ") else textwrap.fill(p, width) for p in parts)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors; each flag --a_b may be written --a-b."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's takes -1e-3 for a flag
        self.add_argument("--version", action="version", version=f"data2vec-text {config.VERSION}")

    def flag(self, name: str):
        """The action of the flag that is spelled like this, or None."""
        return self._option_string_actions.get(name)

    def with_underscores(self, word: str) -> str:
        """--a-b=c-d as --a_b=c-d; a word that is no flag of ours stays as it is."""
        flag, equals, value = word.partition("=")
        ours = flag.replace("-", "_").replace("__", "--", 1)
        return f"{ours}{equals}{value}" if self.flag(ours) else word

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        arguments, unknown = self.parse_known_args(map(self.with_underscores, words), namespace)
        # argparse would list all unknown words; one is enough, with what may have been meant
        if unknown:
            flags = [word for word in unknown if word.startswith("-")]
            word = (flags or unknown)[0].partition("=")[0]
            self.error(f"{word}: no option of that name here{self.hint(word)}")
        # a shell leaves the ~ of --save_dir=~/run as it is
        for name, value in vars(arguments).items():
            at = [at_home(part) for part in value] if isinstance(value, list) else at_home(value)
            setattr(arguments, name, at)
        return arguments

    def hint(self, word: str) -> str:
        """What may have been meant by an option that does not exist."""
        asked = word.lstrip("-").split(".")[-1].replace("-", "_")
        if instead := GONE.get(self.prog, {}).get(asked):
            return f" since 0.4.0; {instead}"
        if Path(word).is_dir() and self.flag("--data_path"):
            return "; the folder of a dataset is --data_path"
        names = [
            name[2:]
            for action in self._actions
            for name in action.option_strings
            # --no_resume is the opposite of --resume, and --untrained of --pretrained
            if name.startswith(OPPOSITES) == f"--{asked}".startswith(OPPOSITES)
        ]
        near = difflib.get_close_matches(MEANT.get(asked, asked), names, 1, 0.77)
        return f"; did you mean --{near[0]}?" if near else ""

    def _print_message(self, message, file=None):
        with contextlib.suppress(OSError):  # `--help | head`
            super()._print_message(message, file)

    def exit(self, status=0, message=None):  # after --help
        leave(status)

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def at_home(value):
    """A path, or some joined by ':', with ~ as the user's folder."""
    if not isinstance(value, str) or "~" not in value:
        return value
    return ":".join(os.path.expanduser(part) for part in value.split(":"))


def make_parser(configs: list, doc: str, extra, everything: bool) -> Parser:
    """A Parser with a flag for each setting of these classes. everything: help explains all."""
    parser = Parser(description=doc, usage="%(prog)s [--NAME VALUE ...]")
    if extra:
        extra(parser)
    parser.add_argument("--help_all", action="help", help="the same with all settings, and exit")
    parser.add_argument("--config_name", metavar="NAME", help="a preset, or a YAML's name")
    parser.add_argument("--config_dir", metavar="DIR", help="the folder of fairseq's YAML")
    switch = dict(nargs="?", const=True, type=fairseq_config.boolean, metavar="yes|no")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fairseq_exact", help="the released code bug for bug", **switch)
    groups = {title: parser.add_argument_group(title) for title in (*TITLES.values(), "training")}
    for kind in configs:
        title = TITLES.get(kind.__name__.removesuffix("Config"), "training")
        for field in dataclasses.fields(kind):
            if field.name == "fairseq_exact":
                continue
            read = fairseq_config.READERS[field.type]
            value = switch if field.type is bool else dict(type=read, metavar=form_of(field))
            is_shown = everything or title == "fine-tuning" or field.name in OFTEN
            text = help_of(field) if is_shown else argparse.SUPPRESS
            groups[title].add_argument(f"--{field.name}", help=text, **value)
    if config.ModelConfig in configs:
        parser.epilog = presets_text(everything)
    return parser


def form_of(field) -> str:
    """What a flag's value looks like, in --help."""
    choices = "|".join(field.metadata["choices"] or ())
    if len(choices) > 40:
        return "NAME"
    return choices or FORMS[field.type]


def help_of(field) -> str:
    text = field.metadata["help"].replace("%", "%%")
    if form_of(field) == "NAME":
        text += f": {', '.join(field.metadata['choices'])}"
    return text if field.default == "" else f"{text} [{words_of(field.default)}]"


def presets_text(everything: bool) -> str:
    """What each preset sets: everything, or what --help explains."""
    lines = ["presets of --config_name, and --fairseq_exact:"]
    for title, preset in {**config.PRESETS, "--fairseq_exact": config.FAIRSEQ_EXACT}.items():
        names = [name for name in preset if everything or len(preset) < 6 or name in OFTEN]
        shown = [f"{name}={words_of(preset[name])}" for name in names]
        if len(shown) < len(preset):
            shown.append(f"{len(preset) - len(shown)} more (--help_all)")
        if shown:
            text = f"  {title}: {', '.join(shown)}"
            lines.append(textwrap.fill(text, 78, subsequent_indent="    "))
    return "\n\n".join(lines)


# ------------------------------------------------------------------------- from flags to settings


def words_of(value) -> str:
    """A setting as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def flags_of(parts: list) -> str:
    """The shortest command line that gives the settings in these instances."""
    values = {name: value for part in parts for name, value in vars(part).items()}
    plain = {field.name: field.default for part in parts for field in dataclasses.fields(part)}
    implied = {}
    if values.get("fairseq_exact"):
        implied = {**exact_settings(values["objective"]), "fairseq_exact": None}
    # relative to each preset: the one that leaves the fewest flags
    lines = []
    for name, preset in config.PRESETS.items():
        # without a name version 2 takes base_v2
        is_named = preset or values.get("objective") == "data2vec2"
        words = [f"--config_name {name}"] if is_named else []
        expected = plain | preset | implied
        for setting, value in values.items():
            if value != expected[setting]:
                words.append(f"--{setting} {shlex.quote(words_of(value))}")
        lines.append(words)
    return " ".join(min(lines, key=len))


def exact_settings(objective: str | None) -> dict:
    """What --fairseq_exact implies for an objective."""
    # version 2's teacher reads the whole block there, too
    own = dict(teacher_input="full") if objective == "data2vec2" else {}
    return config.FAIRSEQ_EXACT | own


def parse(configs: list, doc: str, argv: list | None = None, extra=None, base: dict | None = None):
    """Read a command line into one instance of each class in `configs`, which share no field name.

    extra(parser) adds a program's own flags. base: values, such as a checkpoint's settings, that
    override the preset and are overridden by flags. Returns (instances, namespace of the program's
    own flags). Raises InputError.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(configs, doc, extra, everything="--help_all" in argv)
    fields = {field.name: field for kind in configs for field in dataclasses.fields(kind)}
    # every flag has the default None: not given
    given = vars(parser.parse_args(fairseq_config.as_flags(argv, parser)))
    exact = given.pop("fairseq_exact")
    # torchrun says it in the environment, python -m torch.distributed.launch here, too
    local_rank = given.pop("local_rank")
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(max(0, local_rank)))
    # from the weakest source to the strongest
    folder, name = given.pop("config_dir"), given.pop("config_name")
    if given.get("objective") == "data2vec2" and not (folder or name or base):
        name = "base_v2"  # the defaults are version 1's
    # no shell has seen the ~ of a YAML
    values = {k: at_home(v) for k, v in starting_values(folder, name, fields).items()}
    values.update(base or {})
    if exact is not None:
        implied = exact_settings(given.get("objective") or values.get("objective"))
        plain = {name: fields[name].default for name in implied if name in fields}
        values.update(implied if exact else plain, fairseq_exact=exact)
    values.update({k: v for k, v in given.items() if k in fields and v is not None})
    instances = []
    for kind in configs:
        names = [field.name for field in dataclasses.fields(kind) if field.name in values]
        instances.append(config.check_ranges(kind(**{name: values[name] for name in names})))
    own = {name: value for name, value in given.items() if name not in fields}
    return instances, argparse.Namespace(**own)


def starting_values(config_dir: str | None, config_name: str | None, fields: dict) -> dict:
    """The settings of a preset or of fairseq's YAML."""
    if config_dir:
        if not config_name:
            raise InputError("--config_dir needs --config_name, the YAML's name without .yaml")
        path = Path(config_dir) / f"{config_name.removesuffix('.yaml')}.yaml"
        return fairseq_config.read_yaml(path, fields, explain="lr" in fields)
    if config_name and config_name not in config.PRESETS:
        names = ", ".join(config.PRESETS)
        raise InputError(f"--config_name {config_name}: no such preset; choose from {names}")
    return dict(config.PRESETS[config_name]) if config_name else {}


def answer_early(configs: list, doc: str, extra=None, check=None):
    """Answer --help and refuse a wrong command line, before the program imports torch.

    check(*instances) refuses settings that do not fit together, where none can come from elsewhere.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # notes: main() prints them again
            instances, _ = parse(configs, doc, extra=extra)
        if check:
            check(*instances)
    except InputError as e:
        end(2, f"error: {e}")
    start()


def start():
    """What a program does before it imports packages, which may lack and can take seconds."""
    for name in ("numpy", "torch", "tqdm"):
        if not importlib.util.find_spec(name):
            end(2, f"error: this Python has no {name}: pip install -r requirements.txt")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background: ignored
        # while modules are imported nothing is to be kept
        signal.signal(signal.SIGINT, signal.SIG_DFL)


# --------------------------------------------------------------------------- how a program ends


def program(main):
    """Run a program's main() and exit.

    An InputError becomes one line on stderr and exit code 2, a RunError or a full disk 1, Ctrl-C
    130, a reader that is gone (`| head`) 141.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by `start`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # so that what is half written is removed; a SIGHUP that nohup has ignored stays so
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    # a terminal may have no character for a text, a class or a path; and a log shows each line
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        code = main()
        sys.stdout.flush()  # what cannot be written is an error of the program
        leave(code)
    except BrokenPipeError:  # `... | head`
        leave(141)
    except KeyboardInterrupt:
        end(130, "interrupted")
    except InputError as e:
        end(2, f"error: {e}")
    except RunError as e:
        end(1, f"stopped: {e}")
    except (MemoryError, RuntimeError) as e:
        if not config.is_out_of_memory(e):
            raise
        end(1, f"stopped: out of memory: {str(e)[:300]}")
    except OSError as e:
        text = f"{e.filename}: {e.strerror or e}" if e.filename else f"{e.strerror or e}"
        if e.errno in FULL:  # no mistake in the command
            end(1, f"stopped: {text}")
        end(2, f"error: {text}")


def end(code: int, text: str):
    """Exit with one line on stderr."""
    with contextlib.suppress(OSError):  # its terminal may be gone
        print(f"{Path(sys.argv[0]).name}: {printable(text)}", file=sys.stderr)
    leave(code)


def leave(code: int):
    """Exit, as a worker at once.

    A thread of torch.distributed that asks for Python's lock while Python ends aborts the process
    (SIGABRT), now and then and also after a good run.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again at its end, and make the code 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if "MASTER_ADDR" in os.environ:
        os._exit(code)
    sys.exit(code)
