"""fairseq's spellings of our settings: its command lines, its YAML files and the config in its
checkpoints.

    train.py --config-dir D --config-name base task.data=DIR --optimization.max_update 5000

GROUPS says where fairseq keeps each setting that we have too. `add_spellings` gives argparse
fairseq's names for our flags, with a group (`--optimization.max_update`) or without one; `as_flags`
turns hydra's words (`group.name=value`) into flags. Whatever else fairseq has is accepted at the
built-in value, ignored with a message, or refused with the name of our flag.
"""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

from config import READERS, InputError, printable, read_text

# fairseq's groups and those of our settings that are in them, under its names.
GROUPS = {
    "common": "seed log_interval tensorboard_logdir",
    "dataset": "max_tokens batch_size required_batch_size_multiple validate_interval validate_interval_updates"
    " disable_validation",
    "distributed_training": "distributed_world_size",
    "optimization": "max_epoch max_update clip_norm update_freq lr",
    "checkpoint": "save_dir save_interval save_interval_updates keep_interval_updates",
    "model": "head_layers average_top_k_layers batch_norm_target_layer instance_norm_target_layer"
    " layer_norm_target_layer layer_norm_targets instance_norm_targets loss_beta loss_scale ema_decay ema_end_decay"
    " ema_anneal_end_step ema_transformer_layers_only",
    "model.transformer": "activation_fn dropout attention_dropout activation_dropout max_source_positions",
    "model.transformer.encoder": "embed_dim ffn_embed_dim layers attention_heads normalize_before",
    "task": "data sample_break_mode tokens_per_sample mask_prob mask_multiple_length mask_stdev random_token_prob"
    " leave_unmasked_prob seed",
    "optimizer": "adam_betas adam_eps weight_decay lr",
    "lr_scheduler": "warmup_updates lr max_update",
}
RENAMED = {"data": "data_path"}  # fairseq's name -> ours
FLAT = dict(  # names that fairseq-train has and its groups do not
    encoder_layers="layers",
    encoder_embed_dim="embed_dim",
    encoder_ffn_embed_dim="ffn_embed_dim",
    encoder_attention_heads="attention_heads",
    encoder_normalize_before="normalize_before",
    max_positions="max_source_positions",
    max_sentences="batch_size",
)

# The classes that fairseq's groups choose; any other would be another model or method.
BUILT_IN_NAMES = dict(
    task="masked_lm",
    criterion="model",
    optimizer="adam",
    lr_scheduler="cosine",
    model="data2vec_text",
)

# What fairseq can switch and we cannot: accepted at this value, refused at others.
BUILT_IN = {
    "dataset": dict(curriculum=0, num_shards=1),
    "lr_scheduler": dict(min_lr=0, t_mult=1, warmup_init_lr=-1, lr_period_updates=-1),
    "model.transformer": dict(
        layernorm_embedding=True,
        no_scale_embedding=True,
        no_token_positional_embeddings=False,
        checkpoint_activations=False,
        share_all_embeddings=False,
    ),
    "model.transformer.encoder": dict(layerdrop=0, learned_pos=True),
    "optimization": dict(sentence_avg=False),
    "task": dict(
        freq_weighted_replacement=False,
        mask_whole_words=False,
        shorten_method="none",
        include_target_tokens=True,
        skip_masking=False,
        d2v2_multi=False,
        required_seq_len_multiple=1,
    ),
}

# Accepted at any value, with a message: they change no number here.
IGNORED = {
    "checkpoint.no_epoch_checkpoints": "there is no checkpoint for each epoch",
    "common.log_format": "all figures are in train.jsonl in --save_dir",
    "common.user_dir": "no code is loaded from there",
    "common.wandb_project": "all figures are in train.jsonl in --save_dir; --tensorboard_logdir shows them",
    "dataset.ignore_unused_valid_subsets": "the only validation split is valid",
    "dataset.num_workers": "one background thread prepares the batches",
    "dataset.skip_invalid_size_inputs_valid_test": "sentences that are too long follow --long_sentences",
    "distributed_training.ddp_backend": "gradients are summed in one way only",
    "distributed_training.find_unused_parameters": "gradients are summed in one way only",
    "distributed_training.distributed_init_method": "torchrun connects the workers",
    "distributed_training.distributed_no_spawn": "torchrun starts the workers",
    "distributed_training.distributed_port": "torchrun connects the workers",
    "distributed_training.nprocs_per_node": "torchrun starts the workers",
    "ema.store_ema": "the teacher is always stored",
}
HYDRA = re.compile(r"[+]{0,2}(hydra[./].+|run_config)=.*", re.S)  # hydra's own settings

# What we have instead of an option, and the value at which that option changes nothing. At this
# value it is ignored with a message, at others refused; in a YAML it is always ignored.
AMP = (False, "the precision is --amp auto|off|fp16|bf16")
INSTEAD = {
    "checkpoint.finetune_from_model": ("null", "use --init_from FILE"),
    "checkpoint.keep_best_checkpoints": (-1, "checkpoint_best.pt is the only one of its kind"),
    "checkpoint.keep_last_epochs": (-1, "use --save_interval_updates and --keep_interval_updates"),
    "checkpoint.no_save": (
        False,
        "use --save_interval 0 --save_interval_updates 0; the end of a run is always saved",
    ),
    "checkpoint.patience": (-1, "--max_update or --max_epoch ends a run"),
    "checkpoint.reset_dataloader": (False, "use --reset_data_position"),
    "checkpoint.reset_lr_scheduler": (False, "--init_from FILE starts a new schedule"),
    "checkpoint.reset_meters": (False, "--init_from FILE starts new figures"),
    "checkpoint.reset_optimizer": (False, "--init_from FILE starts with a fresh optimizer"),
    "checkpoint.restore_file": (
        "checkpoint_last.pt",
        "the same command continues its own run; --init_from FILE starts from other weights",
    ),
    "common.amp": AMP,
    "common.bf16": AMP,
    "common.cpu": (False, "use --device cpu"),
    "common.fp16": AMP,
    "common.fp16_init_scale": (128, "the loss scale begins at 128 and finds its own way"),
    "common.memory_efficient_fp16": AMP,
    "dataset.batch_size_valid": ("null", "--batch_size applies to validation too"),
    "dataset.max_tokens_valid": ("null", "--max_tokens applies to validation too"),
    "dataset.train_subset": ("train", "training always reads the split named train"),
    "dataset.valid_subset": (
        "valid",
        "validation in training always reads the split named valid; eval.py has --split",
    ),
    "lr_scheduler.total_num_update": ("null", "--max_update is where the schedule ends"),
    "optimization.skip_remainder_batch": (False, "an epoch's last batches are always trained on"),
    "optimization.stop_min_lr": (-1, "--max_update or --max_epoch ends a run"),
    "optimization.stop_time_hours": (0, "--max_hours H saves and ends a run"),
}

LARGEST = 200_000  # characters of a YAML

# hydra's null, where it is a value of ours.
NULL = {"tensorboard_logdir": "", "batch_size": "0", "loss_scale": "0"}

# hydra's word: `group.name=value`, or `+group.name=value` to add it; the value may be quoted once
# more.
WORD = re.compile(r"\+{0,2}([A-Za-z_]\w*(?:\.\w+)*)=(['\"]?)(.*)\2", re.S)


def _spellings(group: str, name: str) -> list[str]:
    """`model.transformer.encoder.layers` can be given as `model.layers`, and is in old checkpoints."""
    return list(dict.fromkeys([f"{group}.{name}", f"{group.split('.')[0]}.{name}"]))


OURS = {
    spelling: RENAMED.get(name, name)
    for group, names in GROUPS.items()
    for name in names.split()
    for spelling in _spellings(group, name)
} | FLAT
ONLY = {
    spelling: value
    for group, values in BUILT_IN.items()
    for name, value in values.items()
    for spelling in _spellings(group, name)
}
ONLY |= {
    name: value for group, value in BUILT_IN_NAMES.items() for name in (group, f"{group}._name")
}
ONLY |= {"arch": BUILT_IN_NAMES["model"], "encoder_layerdrop": 0}


class Answer(argparse.Action):
    """A hidden flag, for what fairseq has and we do not: its `dest` is fairseq's name with the
    group."""

    def __call__(self, parser, namespace, value, option_string=None):
        why = IGNORED.get(self.dest)
        if self.dest in ONLY:
            _check_built_in(option_string, value, ONLY[self.dest])
        elif self.dest in INSTEAD:
            harmless, why = INSTEAD[self.dest]
            if not _same(value, harmless):
                raise InputError(f"{option_string}: no option of that name here; {why}")
        if why:
            print(f"{option_string}={printable(value)} ignored: {why}", file=sys.stderr)


def _same(value, built_in) -> bool:
    """Whether fairseq's value, which may be text, is the one that is built in here."""
    if not isinstance(built_in, (bool, str)):
        try:
            return float(value) == built_in
        except (ValueError, TypeError):
            return False
    return str(value).lower() == str(built_in).lower()


def _check_built_in(name: str, value, built_in):
    """Raise InputError if the value that is given for fairseq's option `name` is not the built-in
    one."""
    if not _same(value, built_in):
        why = (
            "; for masked language modelling there is --objective mlm"
            if "masked_lm" in str(value)
            else ""
        )
        raise InputError(
            f"{name}={str(value)[:100]} is not supported: only {name}={built_in} is built in{why}"
        )


def add_spellings(parser):
    """Let the Parser accept fairseq's names for the flags that it has, and answer fairseq's other
    flags."""
    for spelling, name in OURS.items():
        if action := parser.flag(f"--{name}"):
            parser.also(action, f"--{spelling}", f"--{spelling.split('.')[-1]}")
    for name in (*ONLY, *IGNORED, *INSTEAD):
        if parser.flag(f"--{name}"):  # finetune.py has a --task of its own
            continue
        action = parser.add_argument(
            f"--{name}",
            action=Answer,
            nargs="?",
            const="true",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
        parser.also(action, f"--{name.split('.')[-1]}")


def as_flags(argv: list, parser) -> list:
    """The command line with hydra's words as flags, and without its switch for several runs."""
    out = []
    for before, word in zip(["", *argv], argv):
        flag = parser.flag(before)
        takes_this = flag is not None and flag.nargs is None  # such as a path called run.1=a/b
        if not takes_this and HYDRA.fullmatch(word):
            print(
                f"{printable(word)} ignored: it is for hydra; output goes to --save_dir",
                file=sys.stderr,
            )
        elif match := None if takes_this else WORD.fullmatch(word):
            name, _, value = match.groups()
            if value == "null" and name in OURS:
                if OURS[name] not in NULL:
                    raise InputError(f"{name}=null: give a value, or leave it out for the default")
                value = NULL[OURS[name]]
            out.append(f"--{name}={value}")
        elif not takes_this and word.startswith("~"):
            raise InputError(
                f"{printable(word)}: hydra's way to drop a setting; give the value that you want instead"
            )
        elif word not in ("-m", "--multirun"):
            out.append(word)
    return out


def read_yaml(path: Path, fields: dict, explain: bool) -> dict:
    """Values of our fields in a fairseq YAML; `explain` prints a line for each entry that is
    ignored."""
    if not path.is_file():
        raise InputError(f"{path}: no such file (from --config_dir and --config_name)")
    try:
        import yaml
    except ImportError:
        raise InputError(
            "reading a YAML config needs the PyYAML package: pip install pyyaml"
        ) from None
    text = read_text(path)
    if len(text) > LARGEST:  # PyYAML reads it at 40 to 200 kB/s
        raise InputError(f"{path}: over {LARGEST:,} characters, which no fairseq config has")
    try:
        depth = 0
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            # a few aliases can stand for a billion values, or for one that holds itself
            if depth > 50 or isinstance(event, yaml.AliasEvent):
                where = f"{path}, line {event.start_mark.line + 1}"
                raise InputError(
                    f"{where}: an alias (*NAME) or a 51st level, which no fairseq config needs"
                )
        tree = yaml.safe_load(text) or {}
    except InputError:
        raise
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as e:  # such as a date that is none
        raise InputError(f"{path}: not YAML: {' '.join(str(e).split())[:300]}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a fairseq config: the top level is not a mapping")

    values, others = from_reference(tree, fields, str(path))
    if values.get("tensorboard_logdir") and not importlib.util.find_spec("tensorboard"):
        others["common.tensorboard_logdir"] = values.pop("tensorboard_logdir")
    if explain:
        print(
            f"{path.name}: without --fairseq_exact this trains the paper's way, not the released code's",
            file=sys.stderr,
        )
    for name, text in others.items() if explain else ():
        why = IGNORED.get(name) or INSTEAD.get(name, (None, "it has no meaning here"))[1]
        if name == "common.tensorboard_logdir":
            why = "the tensorboard package is missing: pip install tensorboard"
        if name == "distributed_training.distributed_world_size":
            why = "torchrun sets the number of workers"
            if text.isdecimal() and len(text) < 10 and int(text) > 1:
                why += (
                    f"; with one worker the batch is {text} times smaller than with {text}, and"
                    f" --update_freq {int(text) * values.get('update_freq', 1)} keeps it"
                )
        print(
            f"{path.name}: {printable(name)[:100]}={printable(text)[:100]} ignored: {why}",
            file=sys.stderr,
        )
    return values


def from_reference(tree: dict, fields, where: str) -> tuple[dict, dict]:
    """A fairseq config tree -> (values of our `fields` (name -> dataclass field), the other entries
    by fairseq's name).

    Raises InputError for a value that cannot be read, or that is not the built-in one.
    """

    def leaves(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    values, others = {}, {}
    try:
        flat = {name: (value, str(value)) for name, value in leaves(tree)}
    except (
        ValueError,
        RecursionError,
    ) as e:  # Python does not print an integer of thousands of digits
        raise InputError(f"{where}: not a fairseq config: {e}") from None
    for name, (value, text) in flat.items():
        ours = OURS.get(name)
        if value is None or text == "???":  # OmegaConf's 'must be given'
            continue
        if ours in fields:
            if link := re.fullmatch(r"\$\{([\w.]+)\}", text):
                text = flat[link[1]][1] if link[1] in flat else text
            if text.startswith("${"):
                raise InputError(
                    f"{where}: {name}={text[:100]} cannot be resolved; write the value"
                )
            try:
                values[ours] = READERS[fields[ours].type](text)
            except (ValueError, argparse.ArgumentTypeError) as e:
                raise InputError(f"{where}: {name}={text[:100]}: {str(e)[:100]}") from None
        elif name in ONLY:
            _check_built_in(name, value, ONLY[name])
        else:
            others[name] = text
    return values, others
