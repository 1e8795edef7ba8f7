"""fairseq's spellings of our settings: its command lines, its YAML files and the config in its
checkpoints.

    train.py --config-dir D --config-name base task.data=DIR --optimization.max_update 5000

GROUPS says where fairseq keeps each setting that we have too. `add_spellings` gives argparse
fairseq's names for our flags, with a group (`--optimization.max_update`) or without one; `as_flags`
turns hydra's words (`group.name=value`) into flags. OTHERS answers whatever else fairseq has.
"""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

from config import InputError, printable, read_text, reading
from formats import fairseq_v2_config as version_2
from formats import readers

# fairseq's groups and those of our settings that are in them, under its names.
GROUPS = {
    "common": "seed log_interval tensorboard_logdir",
    "dataset": """max_tokens batch_size required_batch_size_multiple validate_interval
        validate_interval_updates disable_validation""",
    "distributed_training": "distributed_world_size",
    "optimization": "max_epoch max_update clip_norm update_freq lr",
    "checkpoint": "save_dir save_interval save_interval_updates keep_interval_updates",
    "model": """head_layers average_top_k_layers batch_norm_target_layer instance_norm_target_layer
        layer_norm_target_layer layer_norm_targets instance_norm_targets loss_beta loss_scale
        ema_decay ema_end_decay ema_anneal_end_step ema_transformer_layers_only""",
    "model.transformer": """activation_fn dropout attention_dropout activation_dropout
        max_source_positions""",
    "model.transformer.encoder": """embed_dim ffn_embed_dim layers attention_heads
        normalize_before""",
    "task": """data sample_break_mode tokens_per_sample mask_prob mask_multiple_length mask_stdev
        random_token_prob leave_unmasked_prob seed""",
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
CLASSES = dict(
    task="masked_lm",
    criterion="model",
    optimizer="adam",
    lr_scheduler="cosine",
    model="data2vec_text",
)

# What fairseq has and we have not: by group {names: (value, sentence)}. An empty sentence: only the
# value is built in, at which the option is taken without a word. Else the option is ignored with
# the sentence at that value, or at ANY, and refused with it at others; in a YAML always ignored.
ANY = object()
OTHERS = {
    "checkpoint": {
        "finetune_from_model": ("null", "use --init_from FILE"),
        "keep_best_checkpoints": (-1, "checkpoint_best.pt is the only one of its kind"),
        "keep_last_epochs": (-1, "use --save_interval_updates and --keep_interval_updates"),
        "no_epoch_checkpoints": (ANY, "there is no checkpoint for each epoch"),
        "no_save": (False, "use --save_interval_updates 0; the end of a run is always saved"),
        "patience": (-1, "--max_update or --max_epoch ends a run"),
        "reset_dataloader": (False, "use --reset_data_position"),
        "reset_lr_scheduler reset_meters reset_optimizer": (
            False,
            "--init_from FILE starts afresh",
        ),
        "restore_file": ("checkpoint_last.pt", "a run continues by itself; else --init_from FILE"),
    },
    "common": {
        "amp bf16 fp16 memory_efficient_fp16": (False, "the precision is --amp auto|off|fp16|bf16"),
        "cpu": (False, "use --device cpu"),
        "fp16_init_scale": (128, "the loss scale begins at 128 and finds its own way"),
        "fp16_scale_tolerance fp16_scale_window min_loss_scale threshold_loss_scale": (
            ANY,
            "the loss scale finds its own way",
        ),
        "log_format wandb_project": (ANY, "see train.jsonl in --save_dir, or --tensorboard_logdir"),
        "user_dir": (ANY, "no code is loaded from there"),
    },
    "dataset": {
        "batch_size_valid": ("null", "--batch_size applies to validation too"),
        "curriculum": (0, ""),
        "ignore_unused_valid_subsets": (ANY, "the only validation split is valid"),
        "max_tokens_valid": ("null", "--max_tokens applies to validation too"),
        "num_shards": (1, ""),
        "num_workers": (ANY, "one background thread prepares the batches"),
        "skip_invalid_size_inputs_valid_test": (ANY, "long sentences follow --long_sentences"),
        "train_subset": ("train", "training always reads the split named train"),
        "valid_subset": ("valid", "training validates on valid; eval.py has --split"),
    },
    "distributed_training": {
        "ddp_backend find_unused_parameters": (ANY, "gradients are summed in one way only"),
        "device_id": (ANY, "torchrun gives each worker its card"),
        "distributed_init_method distributed_no_spawn": (ANY, "torchrun connects the workers"),
        "distributed_port nprocs_per_node": (ANY, "torchrun starts the workers"),
    },
    "ema": {"store_ema": (ANY, "the teacher is always stored")},
    "lr_scheduler": {
        "lr_period_updates warmup_init_lr": (-1, ""),
        "min_lr": (0, ""),
        "t_mult": (1, ""),
        "total_num_update": ("null", "--max_update is where the schedule ends"),
    },
    "model.transformer": {
        "checkpoint_activations no_token_positional_embeddings share_all_embeddings": (False, ""),
        "layernorm_embedding no_scale_embedding": (True, ""),
    },
    "model.transformer.encoder": {"layerdrop": (0, ""), "learned_pos": (True, "")},
    "optimization": {
        "sentence_avg": (False, ""),
        "skip_remainder_batch": (False, "an epoch's last batches are always trained on"),
        "stop_min_lr": (-1, "--max_update or --max_epoch ends a run"),
        "stop_time_hours": (0, "--max_hours H saves and ends a run"),
    },
    "task": {
        "d2v2_multi freq_weighted_replacement mask_whole_words skip_masking": (False, ""),
        "include_target_tokens": (True, ""),
        "required_seq_len_multiple": (1, ""),
        "shorten_method": ("none", ""),
    },
}

# hydra's null, where it is a value of ours.
NULL = {"tensorboard_logdir": "", "batch_size": "0", "loss_scale": "0"}
HYDRA = re.compile(r"[+]{0,2}(hydra[./].+|run_config)=.*", re.S)  # hydra's own settings
# hydra's word: `group.name=value`, or `+group.name=value` to add it; the value may be quoted twice
WORD = re.compile(r"\+{0,2}([A-Za-z_]\w*(?:\.\w+)*)=(['\"]?)(.*)\2", re.S)


def _spellings(group: str, name: str) -> list[str]:
    """`model.transformer.encoder.layers` can be `model.layers`, and is in old checkpoints."""
    return list(dict.fromkeys([f"{group}.{name}", f"{group.split('.')[0]}.{name}"]))


# Every spelling -> our setting, and every spelling of the others -> its entry in OTHERS.
OURS = dict(FLAT)
for group, names in GROUPS.items():
    for name in names.split():
        OURS |= dict.fromkeys(_spellings(group, name), RENAMED.get(name, name))
THEIRS = {"arch": (CLASSES["model"], ""), "encoder_layerdrop": (0, "")}
for group, name in CLASSES.items():
    THEIRS |= {group: (name, ""), f"{group}._name": (name, "")}
for group, options in OTHERS.items():
    for names, entry in options.items():
        for name in names.split():
            THEIRS |= dict.fromkeys(_spellings(group, name), entry)
OURS |= version_2.OURS


# ----------------------------------------------------------------------------- the command line


class Answer(argparse.Action):
    """A hidden flag, for what fairseq has and we do not: its `dest` is fairseq's name."""

    def __call__(self, parser, namespace, value, option_string=None):
        harmless, why = THEIRS[self.dest]
        if not why:
            _check_built_in(option_string, value, harmless)
            return
        if harmless is not ANY and not _same(value, harmless):
            raise InputError(f"{option_string}: no option of that name here; {why}")
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
    """Raise InputError unless the value for fairseq's option `name` is the built-in one."""
    if not _same(value, built_in):
        text = f"{name}={str(value)[:100]} is not supported: only {name}={built_in} is built in"
        if "masked_lm" in str(value):
            text += "; for masked language modelling there is --objective mlm"
        raise InputError(text)


def add_spellings(parser):
    """Let the Parser take fairseq's names for its flags, and answer fairseq's other flags."""
    for spelling, name in OURS.items():
        if action := parser.flag(f"--{name}"):
            parser.also(action, f"--{spelling}", f"--{spelling.split('.')[-1]}")
    hidden = dict(default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for name in THEIRS:
        if parser.flag(f"--{name}"):  # finetune.py has a --task of its own
            continue
        action = parser.add_argument(f"--{name}", action=Answer, nargs="?", const="true", **hidden)
        parser.also(action, f"--{name.split('.')[-1]}")


def as_flags(argv: list, parser) -> list:
    """The command line with hydra's words as flags, and without its switch for several runs."""
    out = []
    for before, word in zip(["", *argv], argv):
        flag = parser.flag(before)
        if flag is not None and flag.nargs is None:  # its value, such as a path called run.1=a/b
            out.append(word)
        elif HYDRA.fullmatch(word):
            why = "it is for hydra; output goes to --save_dir"
            print(f"{printable(word)} ignored: {why}", file=sys.stderr)
        elif match := WORD.fullmatch(word):
            name, _, value = match.groups()
            # no value: for some settings 0 means that, others have a default
            if value == "null" and name in OURS:
                value = NULL.get(OURS[name])
                if value is None:
                    raise InputError(f"{name}=null: give a value, or leave it out for the default")
            out.append(f"--{name}={value}")
        elif word.startswith("~"):
            why = "hydra's way to drop a setting; give the value that you want instead"
            raise InputError(f"{printable(word)}: {why}")
        elif word not in ("-m", "--multirun"):
            out.append(word)
    return out


# ------------------------------------------------------------------------------- config trees


def read_yaml(path: Path, fields: dict, explain: bool) -> dict:
    """Values of our fields in a fairseq YAML; explain: print a line for each ignored entry."""
    if not path.is_file():
        raise InputError(f"{path}: no such file (from --config_dir and --config_name)")
    values, others = from_reference(_tree_of(path), fields, str(path))
    tensorboard = values.get("tensorboard_logdir")
    # base.yaml asks for it, and most machines have no such package
    if tensorboard and not importlib.util.find_spec("tensorboard"):
        others["common.tensorboard_logdir"] = values.pop("tensorboard_logdir")
    if explain:
        notes = ["without --fairseq_exact this trains the paper's way, not the released code's"]
        for name, text in others.items():
            why = _why_ignored(name, text, values.get("update_freq", 1))
            notes.append(f"{printable(name)[:100]}={printable(text)[:100]} ignored: {why}")
        for note in notes:
            print(f"{path.name}: {note}", file=sys.stderr)
    return values


def _tree_of(path: Path) -> dict:
    """What a YAML holds. Raises InputError."""
    try:
        import yaml
    except ImportError:
        why = "reading a YAML config needs the PyYAML package: pip install pyyaml"
        raise InputError(why) from None
    text = read_text(path)
    with reading(f"{path}: not YAML"):
        for event in yaml.parse(text):
            # a few can stand for a billion values, or for one that holds itself
            if isinstance(event, yaml.AliasEvent):
                where = f"{path}, line {event.start_mark.line + 1}"
                raise InputError(f"{where}: an alias (*NAME), which no fairseq config needs")
        tree = yaml.safe_load(text) or {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a fairseq config: the top level is not a mapping")
    return tree


def _why_ignored(name: str, text: str, update_freq: int) -> str:
    if name == "common.tensorboard_logdir":
        return "the tensorboard package is missing: pip install tensorboard"
    if name == "distributed_training.distributed_world_size":
        why = "torchrun sets the number of workers"
        if re.fullmatch(r"[1-9]\d{0,8}", text) and text != "1":
            smaller = f"with one worker the batch is {text} times smaller than with {text}"
            why += f"; {smaller}, and --update_freq {int(text) * update_freq} keeps it"
        return why
    return THEIRS[name][1] if name in THEIRS else "it has no meaning here"


def from_reference(tree: dict, fields, where: str) -> tuple[dict, dict]:
    """A fairseq config tree -> (values of our fields, the other entries by fairseq's name).

    fields: {name: dataclass field}. Raises InputError for a value that cannot be read, or that is
    not the built-in one.
    """
    values, others = {}, {}
    with reading(f"{where}: not a fairseq config"):
        # Python does not print an integer of thousands of digits
        flat = {name: (value, str(value)) for name, value in _leaves(tree)}
    # of data2vec 2.0 some entries are read together, and some names mean something else
    is_2 = version_2.is_version_2(tree)
    answers = THEIRS | version_2.THEIRS if is_2 else THEIRS
    for name, (value, text) in flat.items():
        ours = None if is_2 and name in version_2.UNREAD else OURS.get(name)
        if value is None or text == "???":  # OmegaConf's 'must be given'
            continue
        if is_2 and name in version_2.READ_TOGETHER and ours is None:
            continue
        if ours in fields:
            # OmegaConf's link to another entry
            if link := re.fullmatch(r"\$\{([\w.]+)\}", text):
                _, text = flat.get(link[1], (None, text))
            what = f"{where}: {name}={text[:100]}"
            if text.startswith("${"):
                raise InputError(f"{what} cannot be resolved; write the value")
            with reading(what):
                values[ours] = readers.READERS[fields[ours].type](text)
        # what is built in here must have that value; anything else changes no number
        elif name in answers and not answers[name][1]:
            _check_built_in(name, value, answers[name][0])
        else:
            others[name] = text
    if is_2:
        with reading(f"{where}: not a config of data2vec_multi"):
            version_2.finish(values, flat, where)
    return values, others


def _leaves(tree: dict, prefix: str = ""):
    """(name with its groups, value) of each entry."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
