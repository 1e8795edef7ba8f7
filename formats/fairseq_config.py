"""fairseq's spellings of our settings: its command lines, its YAML files and the config in its
checkpoints.

    train.py --config-dir D --config-name base task.data=DIR --optimization.max_update 5000

GROUPS says where fairseq keeps each setting that we have. `as_flags` turns fairseq's names, with
a group (`--optimization.max_update`) or without one, and hydra's words (`group.name=value`) into
our flags. BUILT_IN and IGNORED answer whatever else fairseq has.
"""

import importlib.util
import re
import sys
from pathlib import Path

from config import InputError, printable, read_text, reading
from formats import fairseq_v2_config as version_2

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

# What fairseq has and we have not, by the one value that is built in; at it, an option is taken
# without a word.
ONE_VALUE = {
    "none": "task.shorten_method",
    "-1": "lr_scheduler.lr_period_updates lr_scheduler.warmup_init_lr",
    "0": """dataset.curriculum lr_scheduler.min_lr
        model.transformer.encoder.layerdrop""",
    "1": "dataset.num_shards lr_scheduler.t_mult task.required_seq_len_multiple",
    "True": """model.transformer.layernorm_embedding model.transformer.no_scale_embedding
        model.transformer.encoder.learned_pos task.include_target_tokens""",
    "False": """model.transformer.checkpoint_activations model.transformer.share_all_embeddings
        model.transformer.no_token_positional_embeddings optimization.sentence_avg
        task.d2v2_multi task.freq_weighted_replacement task.mask_whole_words task.skip_masking""",
}
# In any group these change no number here, and are ignored with a line.
NO_NUMBER = """ddp_backend device_id distributed_init_method distributed_no_spawn distributed_port
    find_unused_parameters fp16_scale_tolerance fp16_scale_window ignore_unused_valid_subsets
    log_format min_loss_scale no_epoch_checkpoints nprocs_per_node num_workers
    skip_invalid_size_inputs_valid_test store_ema threshold_loss_scale user_dir
    wandb_project""".split()
# The rest, in any group: {names: (value, sentence)}. An option is ignored with the sentence at that
# value, and refused with it at others; in a YAML it is always ignored.
REST = {
    "amp bf16 fp16 memory_efficient_fp16": (False, "the precision is --amp auto|off|fp16|bf16"),
    "batch_size_valid": ("null", "--batch_size applies to validation too"),
    "cpu": (False, "use --device cpu"),
    "finetune_from_model": ("null", "use --init_from FILE"),
    "fp16_init_scale": (128, "the loss scale begins at 128 and finds its own way"),
    "keep_best_checkpoints": (-1, "checkpoint_best.pt is the only one of its kind"),
    "keep_last_epochs": (-1, "use --save_interval_updates and --keep_interval_updates"),
    "max_tokens_valid": ("null", "--max_tokens applies to validation too"),
    "no_save": (False, "use --save_interval_updates 0; the end of a run is always saved"),
    "patience stop_min_lr": (-1, "--max_update or --max_epoch ends a run"),
    "reset_dataloader": (False, "use --reset_data_position"),
    "reset_lr_scheduler reset_meters reset_optimizer": (False, "--init_from FILE starts afresh"),
    "restore_file": ("checkpoint_last.pt", "a run continues by itself; else --init_from FILE"),
    "skip_remainder_batch": (False, "an epoch's last batches are always trained on"),
    "stop_time_hours": (0, "--max_hours H saves and ends a run"),
    "total_num_update": ("null", "--max_update is where the schedule ends"),
    "train_subset": ("train", "training always reads the split named train"),
    "valid_subset": ("valid", "training validates on valid; eval.py has --split"),
}
# What the release's base.yaml sets, and fairseq's code has other defaults for.
SILENT = """sample_break_mode tokens_per_sample mask_prob mask_multiple_length random_token_prob
    leave_unmasked_prob head_layers average_top_k_layers layer_norm_target_layer loss_beta
    loss_scale ema_anneal_end_step adam_betas adam_eps weight_decay clip_norm lr max_update
    warmup_updates activation_fn attention_dropout max_source_positions layers embed_dim
    ffn_embed_dim attention_heads"""


# ----------------------------------------------------------- the text of a value becomes a setting


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


AROUND = "[]'\" "  # what stands around a number: fairseq writes lr=[0.0002], PyYAML quotes 2e-4


def number(text: str) -> float:
    return float(text.strip(AROUND))


def whole_number(text: str) -> int:
    text = text.strip(AROUND)
    if text.lstrip("+-").isdigit():  # a float would round large ones, such as a seed
        return int(text)
    value = number(text)  # 1e6 is a whole number, too
    if not value.is_integer():
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def numbers(text: str) -> tuple:
    return tuple(number(part) for part in text.strip("()[] ").split(",") if part.strip())


# by the type of the setting
READERS = {bool: boolean, int: whole_number, float: number, str: str, tuple: numbers}


# ---------------------------------------------------------------------------------- the spellings


def _spelled(group: str, name: str, entry) -> dict:
    """`model.transformer.encoder.layers` can be `model.layers`, and is in old checkpoints."""
    return {f"{group}.{name}": entry, f"{group.partition('.')[0]}.{name}": entry}


# Every spelling -> our setting, or the value that is built in.
OURS = dict(FLAT)
for group, names in GROUPS.items():
    for name in names.split():
        OURS |= _spelled(group, name, RENAMED.get(name, name))
OURS |= version_2.OURS
BUILT_IN = {"arch": CLASSES["model"], "encoder_layerdrop": "0"}
for group, name in CLASSES.items():
    BUILT_IN |= {group: name, f"{group}._name": name}
for value, names in ONE_VALUE.items():
    for name in names.split():
        group, _, name = name.rpartition(".")
        BUILT_IN |= _spelled(group, name, value)
IGNORED = {name: entry for names, entry in REST.items() for name in names.split()}


# ----------------------------------------------------------------------------- the command line


# hydra's null, where it is a value of ours.
NULL = {"tensorboard_logdir": "", "batch_size": "0", "loss_scale": "0"}
HYDRA = re.compile(r"[+]{0,2}(hydra[./].+|run_config)=.*", re.S)  # hydra's own settings
# hydra's word: `group.name=value`, or `+group.name=value` to add it; the value may be quoted twice
WORD = re.compile(r"\+{0,2}([A-Za-z_]\w*(?:\.\w+)*)=(['\"]?)(.*)\2", re.S)
VALUE = re.compile(r"(?!-[^\d.]).*", re.S)  # of an option that can be without one


def _flat(name: str) -> str:
    """A name without its groups."""
    return name.rpartition(".")[2]


# on the command line, most have a name without a group, too
OUR_FLAGS = {_flat(name): ours for name, ours in OURS.items()} | OURS
BUILT_IN_FLAGS = {_flat(name): value for name, value in BUILT_IN.items()} | BUILT_IN


def as_flags(argv: list, parser) -> list:
    """The command line under our names; what fairseq has and we have not is answered here.

    Raises InputError.
    """
    flags, words = [], list(argv)
    while words:
        word = words.pop(0)
        if word in ("-m", "--multirun"):  # hydra's switch for several runs
            continue
        if HYDRA.fullmatch(word):
            why = "it is for hydra; output goes to --save_dir"
            print(f"{printable(word)} ignored: {why}", file=sys.stderr)
            continue
        if word.startswith("~"):
            why = "hydra's way to drop a setting; give the value that you want instead"
            raise InputError(f"{printable(word)}: {why}")
        if match := WORD.fullmatch(word):
            word = f"--{match[1]}={match[3]}"
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--"):
            flags.append(word)
        elif action := parser.flag(f"--{name}") or parser.flag(f"--{OUR_FLAGS.get(name)}"):
            if value == "null" and name in OUR_FLAGS:
                # no value: for some settings 0 means that, others have a default
                value = NULL.get(OUR_FLAGS[name])
                if value is None:
                    raise InputError(f"{name}=null: give a value, or leave it out for the default")
            flags.append(f"{action.option_strings[0]}{equals}{value}")
            # its value may look like one of hydra's words, such as a path called run.1=a/b
            if not equals and action.nargs is None:
                flags += words[:1]
                del words[:1]
        elif name in BUILT_IN_FLAGS or _flat(name) in (*IGNORED, *NO_NUMBER):
            if not equals:
                has_value = words and VALUE.fullmatch(words[0]) and not WORD.fullmatch(words[0])
                value = words.pop(0) if has_value else "true"
            _answer(flag, name, value)
        else:
            flags.append(word)
    return flags


def _answer(flag: str, name: str, value: str):
    """Take, ignore or refuse an option that fairseq has and we have not. Raises InputError."""
    if name in BUILT_IN_FLAGS:
        return _check_built_in(flag, value, BUILT_IN_FLAGS[name])
    harmless, why = IGNORED.get(_flat(name), (value, "it has no meaning here"))
    if not _same(value, harmless):
        raise InputError(f"{flag}: no option of that name here; {why}")
    print(f"{flag}={printable(value)} ignored: {why}", file=sys.stderr)


def _same(value, built_in) -> bool:
    """Whether fairseq's value, which may be text, is the one that is built in here."""
    if str(value).lower() == str(built_in).lower():
        return True
    try:
        return float(value) == float(built_in)
    except (ValueError, TypeError, OverflowError):
        return False


def _check_built_in(name: str, value, built_in):
    """Raise InputError unless the value for fairseq's option `name` is the built-in one."""
    if not _same(value, built_in):
        text = f"{name}={str(value)[:100]} is not supported: only {name}={built_in} is built in"
        if "masked_lm" in str(value):
            text += "; for masked language modelling there is --objective mlm"
        raise InputError(text)


# ------------------------------------------------------------------------------- config trees


def read_yaml(path: Path, fields: dict, explain: bool) -> dict:
    """Values of our fields in a fairseq YAML; explain: print a line for each ignored entry."""
    if not path.is_file():
        raise InputError(f"{path}: no such file (from --config_dir and --config_name)")
    values, others = from_reference(_tree_of(path), fields, str(path))
    notes = ["without --fairseq_exact this trains the paper's way, not the released code's"]
    silent = [name for name in SILENT.split() if name not in values]
    if silent and values.get("objective") != "data2vec2":
        what = "base.yaml's values are taken, where fairseq's code has others"
        notes.append(f"it says nothing of {', '.join(silent)}: {what}")
    # base.yaml asks for it, and most machines have no such package
    if values.get("tensorboard_logdir") and not importlib.util.find_spec("tensorboard"):
        folder = values.pop("tensorboard_logdir")
        why = "the tensorboard package is missing: pip install tensorboard"
        notes.append(f"common.tensorboard_logdir={printable(folder)[:100]} ignored: {why}")
    for name, text in others.items():
        why = IGNORED.get(_flat(name), ("", "it has no meaning here"))[1]
        if _flat(name) == "distributed_world_size" and re.fullmatch(r"[1-9]\d{0,8}", text):
            freq = int(text) * values.get("update_freq", 1)
            why = f"torchrun starts the workers; with one, --update_freq {freq} keeps the batch"
        notes.append(f"{printable(name)[:100]}={printable(text)[:100]} ignored: {why}")
    for note in notes if explain else ():
        print(f"{path.name}: {note}", file=sys.stderr)
    return values


def _tree_of(path: Path) -> dict:
    """What a YAML holds. Raises InputError."""
    with reading("reading a YAML config needs the PyYAML package: pip install pyyaml"):
        import yaml
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
    model = tree.get("model")
    is_2 = isinstance(model, dict) and model.get("_name") == "data2vec_multi"
    built_in = BUILT_IN | version_2.BUILT_IN if is_2 else BUILT_IN
    for name, (value, text) in flat.items():
        ours = None if is_2 and name in version_2.UNREAD else OURS.get(name)
        if value is None or text == "???":  # OmegaConf's 'must be given'
            continue
        if is_2 and name in version_2.READ_TOGETHER and ours is None:
            continue
        ours = ours or name  # in no group our own names count, too
        if ours in fields:
            # OmegaConf's link to another entry
            if link := re.fullmatch(r"\$\{([\w.]+)\}", text):
                _, text = flat.get(link[1], (None, text))
            what = f"{where}: {name}={text[:100]}"
            if text.startswith("${"):
                raise InputError(f"{what} cannot be resolved; write the value")
            with reading(what):
                values[ours] = READERS[fields[ours].type](text)
        # what is built in here must have that value; anything else changes no number
        elif name in built_in:
            _check_built_in(name, value, built_in[name])
        else:
            others[name] = text
    batch_size = values.get("batch_size")
    if batch_size and "max_tokens" not in values:  # no such limit there
        length = values.get("tokens_per_sample", fields["tokens_per_sample"].default)
        values["max_tokens"] = max(fields["max_tokens"].default, batch_size * length)
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
