"""fairseq's names of the weights and ours, and what its checkpoints hold.

    ours                                  fairseq's
    encoder.NAME                          encoder.sentence_encoder.NAME
    regression_head.NAME                  encoder.regression_head.NAME (first: encoder.lm_head.NAME)
    LAYER.self_attn.qkv                   LAYER.self_attn.{q,k,v}_proj, three matrices, not one
    the teacher's NAME, a dict apart      NAME in the dict `encoder._ema`

All other names are equal.
"""

import dataclasses
import re

from config import PARTS, InputError
from formats import fairseq_config, fairseq_files, fairseq_v2
from run.checkpoint import Loaded
from run.flags import exact_settings

import torch

PREFIXES = {"encoder.": "encoder.sentence_encoder.", "regression_head.": "encoder.regression_head."}
QKV = "self_attn.qkv."
Q, K, V = (f"self_attn.{part}_proj." for part in "qkv")
TEACHER = "encoder._ema"
OUR_ENTRY = "data2vec_text"  # in the extra_state of a file that we wrote
# fairseq 0.12.2 has these in every layer, for a fast path that training does not take
UNUSED = re.compile(r"(.*\.)?(version|(in_proj|out_proj|fc1|fc2)_(weight|bias))")
FIELDS = {field.name: field for part in PARTS for field in dataclasses.fields(part)}


# ------------------------------------------------------------------------------------------ names


def our_name(name: str) -> str | None:
    """Our name of a weight in fairseq's model, of a student's; None if our model lacks it."""
    # the first releases; lm_head.dense and the like are of another head
    name = re.sub(r"^encoder\.lm_head\.(?=\d)", "encoder.regression_head.", name)
    for ours, theirs in PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


def is_known(name: str) -> bool:
    """Whether an entry of fairseq's model is taken over, of either version."""
    if name in (TEACHER, fairseq_v2.TEACHER) or our_name(name):
        return True
    return fairseq_v2.our_name(name.removeprefix("model.")) is not None


def from_reference(state: dict, path="") -> tuple[dict, dict | None]:
    """fairseq's model state dict -> (student, teacher or None) under our names.

    Raises InputError.
    """
    if fairseq_v2.holds(state):
        return fairseq_v2.from_reference(state)
    student = {our_name(name): tensor for name, tensor in state.items()}
    student.pop(None, None)
    teacher = state.get(TEACHER)
    if teacher is not None:
        teacher = merge_qkv(dict(teacher), path)
    return merge_qkv(student, path), teacher


def to_reference(student: dict, teacher: dict) -> dict:
    """The reverse: a model state dict under fairseq's names, with `encoder._ema` and `version`."""
    if any(name.startswith("decoder.") for name in student):  # of version 2
        return fairseq_v2.to_reference(student, teacher)
    version = torch.tensor([3.0])
    state = {"encoder.sentence_encoder.version": version}
    for name, tensor in split_qkv(student).items():
        prefix = next(p for p in PREFIXES if name.startswith(p))
        state[PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    state[TEACHER] = {"version": version, **split_qkv(teacher)}
    return state


def merge_qkv(state: dict, path) -> dict:
    """The state dict with each q, k and v matrix joined into one. Raises InputError."""
    merged = {}
    for name, tensor in state.items():
        # the rows of ours are q, k, v; K and V come with their Q
        if Q in name:
            parts = [tensor, state.get(name.replace(Q, K)), state.get(name.replace(Q, V))]
            if any(part is None for part in parts):
                raise InputError(f"{path}: {name} has no k_proj or v_proj beside it")
            merged[name.replace(Q, QKV)] = torch.cat(parts)
            continue
        if not (UNUSED.fullmatch(name) or K in name or V in name):
            merged[name] = tensor
    return merged


def split_qkv(state: dict) -> dict:
    """The reverse of `merge_qkv`; the parts are copies."""
    split = {}
    for name, tensor in state.items():
        if QKV not in name:
            split[name] = tensor
            continue
        q, k, v = (part.clone() for part in tensor.chunk(3))
        # fairseq defines them in this order, so its optimizer counts them so
        for theirs, part in ((K, k), (V, v), (Q, q)):
            split[name.replace(QKV, theirs)] = part
    return split


# ------------------------------------------------------------------------------------------ files


def loaded(content: dict, path) -> Loaded:
    """What a file of fairseq's holds, or one of weights alone under its names.

    Raises InputError if it is no data2vec_text model's, and other errors for a damaged file.
    """
    state = content.get("model", content)
    encoders = ("encoder.sentence_encoder.", *fairseq_v2.ENCODERS)
    if not isinstance(state, dict) or not any(str(name).startswith(encoders) for name in state):
        what = "neither ours nor one of fairseq's data2vec_text"
        if isinstance(state, fairseq_files.Inert):
            what = f"its model is a {type(state).__name__}, which is not loaded, not a state dict"
        raise InputError(f"{path}: {what}")
    student, teacher = from_reference(state, path)
    if "model" not in content:  # weights alone, whose shape comes from flags
        return Loaded("state_dict", {}, student, teacher, content)
    # cfg since 2021, args before
    tree = content.get("cfg") or _args_tree(content.get("args"), state)
    model = tree.get("model") if isinstance(tree, dict) else None
    # a fine-tuned model has a config of its own; of version 2 the pretraining's is inside of it
    if isinstance(model, dict) and fairseq_v2.holds(state):
        tree = model.get("pretrained_model_args") or tree
    elif isinstance(model, dict) and str(model.get("_name")).startswith("roberta"):
        tree = _args_tree(model, state)
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        advice = "save its `model` entry alone and give its shape by flags"
        kind = "no config" if tree is None else f"a config that is a {type(tree).__name__}"
        raise InputError(f"{path}: has weights but {kind}; {advice}")
    dictionary = ours_in(content).get("dictionary")
    dictionary = dictionary if isinstance(dictionary, dict) else {}
    return Loaded("fairseq", settings(tree, path), student, teacher, content, dictionary)


def ours_in(content: dict) -> dict:
    """What a fairseq file that we wrote has of its run; {} in any other."""
    extra = content.get("extra_state")
    ours = extra.get(OUR_ENTRY) if isinstance(extra, dict) else None
    return ours if isinstance(ours, dict) else {}


def settings(tree: dict, path) -> dict:
    """The settings of the model and its data in fairseq's config, and how the released code is."""
    # the rest is of a run that is over
    groups = ("task", "dataset", "model", "common")
    tree = {group: tree[group] for group in groups if isinstance(tree.get(group), dict)}
    values, _ = fairseq_config.from_reference(tree, FIELDS, str(path))
    return {**values, "fairseq_exact": True, **exact_settings(values.get("objective"))}


def _args_tree(args: dict | None, state: dict) -> dict | None:
    """The model's settings from the flat `args` of fairseq before 2021, as its later config."""
    if not isinstance(args, dict):
        return None
    model = {}
    for name, value in args.items():
        if name.startswith(("encoder_", "activation_")):
            model[name.removeprefix("encoder_")] = value
        elif name in ("dropout", "attention_dropout"):
            model[name] = value
    # fairseq counts positions from its padding id, 1, upwards
    positions = state["encoder.sentence_encoder.embed_positions.weight"]
    return {"model": {**model, "max_source_positions": len(positions) - 2}}
