"""How a run is set up: dataclass fields to command-line flags, presets, and the reference's spellings of them.

Every file that has settings keeps them in a frozen dataclass whose fields are made with `option`; `parse` turns some of
these classes into one command line. Later wins: default, preset (`--config_name`), a fairseq YAML (`--config-dir`),
what `--fairseq_exact` implies, flags. The reference's dotted names (`task.data=DIR`, `--optimization.max_update 5`)
are other spellings of the same flags.
"""

import argparse
import dataclasses
import math
import re
import sys
from pathlib import Path

VERSION = "0.2.0"  # docs/changelog.md begins with it

# Fields of the reference's text config, as examples/data2vec/config/text/pretraining/base.yaml sets them, are the
# defaults in the dataclasses; a preset holds what differs.
PRESETS = {
    "base": {},
    # the Ascend ModelZoo's one-device run of the same model
    "npu_1p": dict(tokens_per_sample=64, max_tokens=1280),
    # learns something visible on a laptop's CPU in a minute or two
    "tiny": dict(
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

# The released code's behaviour where it differs from the paper, or loses text.
FAIRSEQ_EXACT = dict(
    teacher_input="masked", long_sentences="skip", drop_remainder=True, min_target_var=0.0, min_pred_var=0.0
)

# The reference's leaf name -> ours, where they differ.
RENAMED = {"data": "data_path"}

# What the reference can switch and this project cannot: accepted at the one value that is built in, refused at others.
BUILT_IN = dict(
    layerdrop=0,
    learned_pos=True,
    layernorm_embedding=True,
    no_scale_embedding=True,
    no_token_positional_embeddings=False,
    checkpoint_activations=False,
    freq_weighted_replacement=False,
    mask_whole_words=False,
    shorten_method="none",
    include_target_tokens=True,
    skip_masking=False,
    d2v2_multi=False,
    share_all_embeddings=False,
    min_lr=0,
    t_mult=1,
    warmup_init_lr=-1,
    lr_period_updates=-1,
    sentence_avg=False,
    curriculum=0,
    num_shards=1,
)

# Flags whose values may look like a dotted spelling, such as run.1=a/b.
PATHS = ("data_path", "save_dir", "tensorboard_logdir", "init_from", "ckpt")

# Groups of the reference's YAML that say which class to build; anything else would be another model.
BUILT_IN_NAMES = dict(
    task="masked_lm", criterion="model", optimizer="adam", lr_scheduler="cosine", model="data2vec_text"
)


class InputError(ValueError):
    """What the user gave is wrong; the text is one line that says what, where, and what to do."""


class RunError(RuntimeError):
    """A run cannot go on; the text is one line that says why and what to do."""


def printable(text: str) -> str:
    """The text on one line, with control characters written out: symbols and paths may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def option(default, help, low=None, high=None, above=None, below=None, choices=None):
    """A dataclass field that is a command-line flag. low and high belong to the range, above and below do not."""
    if type(default) is int and high is None:
        high = 2**31 - 1
    bounds = dict(low=low, high=high, above=above, below=below)
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, bounds=bounds))


def check_ranges(config):
    """Raise InputError for the first field of the dataclass `config` that is outside its range."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata["choices"]
        if choices and value not in choices:
            raise InputError(f"--{field.name} {value}: choose from {', '.join(map(str, choices))}")
        bound = field.metadata["bounds"]
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str):
                continue
            if isinstance(part, float) and not math.isfinite(part):
                raise InputError(f"--{field.name} {value}: must be a finite number")
            for text, limit, outside in (
                ("at least", bound["low"], lambda limit: part < limit),
                ("at most", bound["high"], lambda limit: part > limit),
                ("above", bound["above"], lambda limit: part <= limit),
                ("below", bound["below"], lambda limit: part >= limit),
            ):
                if limit is not None and outside(limit):
                    raise InputError(f"--{field.name} {value}: must be {text} {limit}")


def boolean(text: str) -> bool:
    try:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def whole_number(text: str) -> int:
    text = text.strip("[] ")  # the reference writes update_freq=[1]
    if text.lstrip("+-").isdigit():
        return int(text)
    value = float(text)  # 1e6 is a million
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def number(text: str) -> float:
    return float(text.strip("[] "))  # the reference writes lr=[0.0002]


def numbers(text: str) -> tuple:
    return tuple(float(part) for part in text.strip("()[] ").split(",") if part.strip())


_READERS = {bool: boolean, int: whole_number, float: number, str: str, tuple: numbers}


class Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(**options)
        self.add_argument("--version", action="version", version=f"data2vec-text {VERSION}")

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def parse(configs: list, doc: str, argv: list | None = None, extra=None, base: dict | None = None):
    """Read a command line into one instance of each dataclass in `configs` (no two share a field name).

    extra(parser) adds a program's own flags. base holds values that stand below the flags and above the presets, such
    as the config saved in a checkpoint. Returns (list of instances, namespace of the extra flags). Raises InputError.
    """
    fields = {field.name: field for config in configs for field in dataclasses.fields(config)}
    parser = Parser(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    if extra:
        extra(parser)
    parser.add_argument("--config_name", help=f"preset: {', '.join(PRESETS)}; or with --config_dir a YAML's name")
    parser.add_argument("--config_dir", help="folder of a fairseq YAML that --config_name then names")
    parser.add_argument(
        "--fairseq_exact",
        nargs="?",
        const=True,
        default=None,
        type=boolean,
        metavar="true|false",
        help="the released code bug for bug: "
        + ", ".join(f"{k}={v}" for k, v in FAIRSEQ_EXACT.items())
        + ", and a teacher one update behind at validation",
    )
    for name, field in fields.items():
        if name == "fairseq_exact":
            continue
        flag = (
            dict(nargs="?", const=True, metavar="true|false")
            if field.type is bool
            else dict(metavar=field.type.__name__)
        )
        text = field.metadata["help"].replace("%", "%%")
        if field.metadata["choices"]:
            text += f" ({'|'.join(map(str, field.metadata['choices']))})"
        shown = field.default if field.default != "" else "none"
        parser.add_argument(
            f"--{name}", type=_READERS[field.type], default=None, help=f"{text} [{shown}]", **flag
        )  # None: not given
    argv = _plain_spelling(sys.argv[1:] if argv is None else argv, set(fields))
    given = vars(parser.parse_args(argv))

    values = {}
    config_dir, config_name, exact = given.pop("config_dir"), given.pop("config_name"), given.pop("fairseq_exact")
    if config_dir:
        if not config_name:
            raise InputError("--config_dir needs --config_name, the YAML's name without .yaml")
        values.update(
            _read_yaml(Path(config_dir) / f"{config_name.removesuffix('.yaml')}.yaml", fields, explain=len(configs) > 1)
        )
    elif config_name:
        if config_name not in PRESETS:
            raise InputError(f"--config_name {config_name}: no such preset; choose from {', '.join(PRESETS)}")
        values.update({k: v for k, v in PRESETS[config_name].items() if k in fields})
    values.update({k: v for k, v in (base or {}).items() if k in fields})
    if exact is not None:
        values["fairseq_exact"] = exact
        plain = {name: fields[name].default for name in FAIRSEQ_EXACT if name in fields}
        values.update({k: v for k, v in (FAIRSEQ_EXACT if exact else plain).items() if k in fields})
    values.update({k: given.pop(k) for k in list(given) if k in fields and given[k] is not None})
    instances = []
    for config in configs:
        names = {field.name for field in dataclasses.fields(config)}
        instance = config(**{k: v for k, v in values.items() if k in names})
        check_ranges(instance)
        instances.append(instance)
    return instances, argparse.Namespace(**{k: v for k, v in given.items() if k not in fields})


# Groups of the reference's config whose names mean another thing than ours.
OTHER_GROUPS = {"ema", "bmuf", "generation", "decoder", "eval_lm", "interactive", "common_eval"}


def _leaf(dotted: str) -> str:
    """Our name for the reference's option `group.name`, or the whole of it if its group means another thing."""
    *groups, leaf = dotted.split(".")
    if OTHER_GROUPS & set(groups) or dotted in ("common.amp", "common.device"):
        return dotted
    return RENAMED.get(leaf, leaf)


def _check_built_in(dotted: str, value) -> bool:
    """True if the reference's option `dotted` is built in with the value given; raises at another value."""
    if dotted in BUILT_IN_NAMES:  # `criterion: model` is short for `criterion: {_name: model}`
        dotted += "._name"
    leaf = _leaf(dotted)
    if leaf == "_name":
        built_in = BUILT_IN_NAMES.get(dotted.split(".", 1)[0])
        if built_in is None:
            return False
    elif leaf in BUILT_IN:
        built_in = BUILT_IN[leaf]
    else:
        return False
    text = str(value).lower()
    same = text == str(built_in).lower()
    if not isinstance(built_in, (bool, str)):
        try:
            same = float(text) == built_in
        except ValueError:
            same = False
    if not same:
        raise InputError(f"{dotted}={value} is not supported: only {dotted}={built_in} is built in")
    return True


def _plain_spelling(argv: list, names: set) -> list:
    """Rewrite the reference's dotted spellings, `group.name=value` and `--group.name value`, as our flags."""
    out, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        match = re.match(r"(--)?([A-Za-z_][\w-]*(?:\.[\w-]+)+)(?:=(.*))?$", word, re.S)
        if not match or (match[1] is None and match[3] is None):
            if word.startswith("--"):  # --max-tokens is --max_tokens
                flag, equals, value = word.partition("=")
                word = "--" + flag[2:].replace("-", "_") + equals + value
            out.append(word)
            # the value of a flag is no spelling of another one, unless the flag is a switch without a value
            if word.startswith("--") and "=" not in word and rest and not rest[0].startswith("--"):
                if word[2:] in PATHS or not re.match(r"[A-Za-z_]\w*(\.\w+)+=", rest[0]):
                    value = rest.pop(0)
                    negative = re.match(r"-\.?\d", value)  # argparse takes -1e-3 for a flag
                    out[-1:] = [f"{word}={value}"] if negative else [word, value]
            continue
        dotted, value = match[2].replace("-", "_"), match[3]
        if value is None:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        leaf = _leaf(dotted)
        if leaf == "distributed_world_size" or leaf in names:
            out.append(f"--{leaf}={value}")
        elif not _check_built_in(dotted, value):
            hint = "; the precision is --amp auto|off|fp16|bf16" if leaf in ("fp16", "bf16", "common.amp") else ""
            raise InputError(f"{dotted}: no option of that name here{hint}")
    return out


def _read_yaml(path: Path, fields: dict, explain: bool) -> dict:
    """Values of our fields in a fairseq YAML; with `explain` prints a line for each entry that has no meaning here."""
    if not path.is_file():
        raise InputError(f"{path}: no such file (from --config_dir and --config_name)")
    try:
        import yaml
    except ImportError:
        raise InputError("reading a YAML config needs the PyYAML package: pip install pyyaml") from None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a fairseq config: the top level is not a mapping")

    values, others = from_reference(tree, fields, str(path))
    for dotted, text in others.items() if explain else ():
        leaf = _leaf(dotted)
        why = {"distributed_world_size": "torchrun sets the number of workers"}.get(leaf, "it has no meaning here")
        why = "--amp sets the precision" if leaf in ("fp16", "bf16", "common.amp") else why
        print(f"{path.name}: {dotted}={text} ignored: {why}", file=sys.stderr)
    return values


def from_reference(tree: dict, fields, where: str) -> tuple[dict, dict]:
    """A fairseq config tree -> (values of our `fields` (name -> dataclass field), the other entries by dotted name).

    Raises InputError for a value that cannot be read, or that this project cannot do.
    """

    def leaves(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    values, others = {}, {}
    flat = dict(leaves(tree))
    for dotted, value in flat.items():
        leaf, text = _leaf(dotted), str(value)
        if value is None or text == "???":  # OmegaConf's 'must be given'
            continue
        if leaf in fields and (reference := re.fullmatch(r"\$\{([\w.]+)\}", text)):
            text = str(flat.get(reference[1], text))
        if leaf in fields and text.startswith("${"):
            raise InputError(f"{where}: {dotted}={text} cannot be resolved; write the value")
        if leaf in fields:
            try:
                values[leaf] = _READERS[fields[leaf].type](text)
            except (ValueError, argparse.ArgumentTypeError) as e:
                raise InputError(f"{where}: {dotted}={text}: {e}") from None
        elif not _check_built_in(dotted, value):
            others[dotted] = text
    return values, others


def program(main):
    """Run a program's main() and exit: an InputError becomes one line on stderr and exit code 2, a RunError 1."""
    try:
        code = main()
    except InputError as e:
        print(f"{Path(sys.argv[0]).name}: error: {printable(str(e))}", file=sys.stderr)
        code = 2
    except RunError as e:
        print(f"{Path(sys.argv[0]).name}: stopped: {printable(str(e))}", file=sys.stderr)
        code = 1
    except MemoryError as e:
        print(f"{Path(sys.argv[0]).name}: stopped: out of memory: {printable(str(e))[:300]}", file=sys.stderr)
        code = 1
    except BrokenPipeError:  # `... | head`
        sys.stderr.close()
        code = 141
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        print(f"{Path(sys.argv[0]).name}: error: {printable(where + (e.strerror or str(e)))}", file=sys.stderr)
        code = 2
    sys.exit(code)
