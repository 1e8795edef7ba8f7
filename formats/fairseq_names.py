"""fairseq's names of the weights and ours, and what its checkpoints hold.

    ours                                  fairseq's
    encoder.NAME                          encoder.sentence_encoder.NAME
    regression_head.NAME                  encoder.regression_head.NAME (encoder.lm_head.NAME in its first releases)
    LAYER.self_attn.qkv                   LAYER.self_attn.{q,k,v}_proj, three matrices instead of one
    the teacher's NAME, a dict apart      NAME in the dict `encoder._ema`

All other names are equal.
"""

import re

from config import FAIRSEQ_EXACT, InputError
from formats import fairseq_config

import torch

PREFIXES = {"encoder.": "encoder.sentence_encoder.", "regression_head.": "encoder.regression_head."}
QKV = {"self_attn.qkv.": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")}
REFERENCE_ORDER = (
    1,
    2,
    0,
)  # fairseq defines k, v, q in this order, so its optimizer counts them so
TEACHER = "encoder._ema"
# fairseq 0.12.2 has these in every layer, for a fast path that training does not take
UNUSED = {
    f"{part}_{kind}"
    for part in ("in_proj", "out_proj", "fc1", "fc2")
    for kind in ("weight", "bias")
}


def from_reference(state: dict, path="") -> tuple[dict, dict | None]:
    """fairseq's model state dict -> (student, teacher or None), state dicts under our names. Raises
    InputError."""
    teacher = state.get(TEACHER)
    student = {}
    for name, tensor in state.items():
        name = re.sub(r"^encoder\.lm_head\.(?=\d)", "encoder.regression_head.", name)
        for ours, theirs in PREFIXES.items():
            if name.startswith(theirs):
                student[ours + name[len(theirs) :]] = tensor
    student = merge_qkv(student, path)
    return student, None if teacher is None else merge_qkv(dict(teacher), path)


def to_reference(student: dict, teacher: dict) -> dict:
    """The reverse: a model state dict under fairseq's names, with `encoder._ema` and `version`."""
    version = torch.tensor([3.0])
    state = {"encoder.sentence_encoder.version": version}
    for name, tensor in split_qkv(student).items():
        prefix = next(p for p in PREFIXES if name.startswith(p))
        state[PREFIXES[prefix] + name[len(prefix) :]] = tensor
    state[TEACHER] = {"version": version, **split_qkv(teacher)}
    return state


def merge_qkv(state: dict, path) -> dict:
    """The state dict with each q, k and v matrix joined into one. Raises InputError if one of the
    three is missing."""
    merged = {}
    for name, tensor in state.items():
        for ours, (q, *rest) in QKV.items():
            if q in name:
                parts = [tensor, *(state.get(name.replace(q, other)) for other in rest)]
                if not all(isinstance(part, torch.Tensor) for part in parts):
                    raise InputError(f"{path}: {name} has no k_proj or v_proj beside it")
                merged[name.replace(q, ours)] = torch.cat(parts)
            elif not any(other in name for other in rest) and name.rpartition(".")[2] not in {
                "version",
                *UNUSED,
            }:
                merged[name] = tensor
    return merged


def split_qkv(state: dict) -> dict:
    """The reverse of `merge_qkv`; the parts are copies, in fairseq's order."""
    split = {}
    for name, tensor in state.items():
        ours = next((part for part in QKV if part in name), None)
        if ours is None:
            split[name] = tensor
        else:
            parts = [
                (name.replace(ours, theirs), part.clone())
                for theirs, part in zip(QKV[ours], tensor.chunk(3))
            ]
            split.update(parts[i] for i in REFERENCE_ORDER)
    return split


def parts_of(content: dict, path) -> tuple[str, dict, dict, dict | None]:
    """What a file of fairseq's holds: ('fairseq' or 'state_dict' for weights alone, groups of its
    config, student, teacher or None), the weights under our names. Raises InputError if it is no
    data2vec_text model's."""
    state = content.get("model", content)
    if not isinstance(state, dict) or not any(
        str(k).startswith("encoder.sentence_encoder.") for k in state
    ):
        raise InputError(
            f"{path}: neither a checkpoint of this project nor one of fairseq's data2vec_text"
        )
    student, teacher = from_reference(state, path)
    if "model" not in content:
        return "state_dict", {}, student, teacher
    tree = content.get("cfg") or _args_tree(content.get("args"), state)
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise InputError(
            f"{path}: has weights but no config; save its `model` entry alone and give its shape by flags"
        )
    groups = ("task", "dataset", "model", "common")
    return (
        "fairseq",
        {group: tree[group] for group in groups if isinstance(tree.get(group), dict)},
        student,
        teacher,
    )


def reference_settings(settings: dict, fields, path) -> dict:
    """Our settings for a fairseq checkpoint whose config groups are `settings`: its model and data
    options, and the behaviour of the released code."""
    values, _ = fairseq_config.from_reference(settings, fields, str(path))
    values.pop("data_path", None)  # a path on the machine that trained it
    return {**values, "fairseq_exact": True, **FAIRSEQ_EXACT}


def _args_tree(args: dict | None, state: dict) -> dict | None:
    """The model's settings from the flat `args` of fairseq before 2021, in the form of its later
    config."""
    if not isinstance(args, dict):
        return None
    model = {
        k.removeprefix("encoder_"): v
        for k, v in args.items()
        if k.startswith(("encoder_", "activation_"))
    }
    model.update({k: args[k] for k in ("dropout", "attention_dropout") if k in args})
    model["max_source_positions"] = (
        len(state["encoder.sentence_encoder.embed_positions.weight"]) - 2
    )
    return {"model": model}
