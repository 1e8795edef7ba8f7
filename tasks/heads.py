"""The classification head that a file brings along: found, and put in the order of our classes."""

import json
from dataclasses import dataclass
from pathlib import Path

from config import InputError, printable, read_text, reading
from run import checkpoint
from run.checkpoint import Loaded
from tasks.tables import score_of

import torch
from torch import nn

FAIRSEQ = "classification_heads."
SENTENCE_HEAD = {f"{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}
# the other weights of a folder of transformers; what is left belongs to a head
NO_HEADS = ("embeddings.", "encoder.", "LayerNorm.", "lm_head.", "pooler.")
SCORE = "a score"  # the only row of a head for scores, whatever the file calls it


@dataclass
class Head:
    """The classification head of a file."""

    weights: dict  # its state dict
    classes: list | None = None  # the names of its rows, where the file has them
    scale: float = 0.0  # scores are its outputs times this (0: the file does not say)
    is_sorted: bool = False  # rows without names are in the order of the names


def find(loaded: Loaded, entry: dict | None, path: Path) -> Head | None:
    """The head of a fine-tuned model: of ours, of fairseq's or of transformers.

    entry: that of our fine-tuning. Another kind of head is left out with a note.
    """
    if entry:
        return Head(entry["head"], entry["labels"], entry["label_scale"])
    if loaded.kind == "hf":
        return of_transformers(loaded.content, path)
    state = loaded.content.get("model", loaded.content)
    names = {str(name).split(".")[1] for name in state if str(name).startswith(FAIRSEQ)}
    if len(names) > 1:
        say(f"{path} has several classification heads; none is taken: {', '.join(sorted(names))}")
    return Head(stripped(state, f"{FAIRSEQ}{names.pop()}.")) if len(names) == 1 else None


def of_transformers(state: dict, folder: Path) -> Head | None:
    """The head of a ...ForSequenceClassification, with the names in config.json."""
    heads = sorted({name.split(".")[0] for name in state if not name.startswith(NO_HEADS)})
    weights = stripped(state, "classifier.")
    if set(weights) != SENTENCE_HEAD:
        if heads:
            say(f"{folder} has no head for sequences; what it has is not taken: {', '.join(heads)}")
        return None
    with reading(f"{folder / 'config.json'}: id2label"):
        names = json.loads(read_text(folder / "config.json")).get("id2label") or {}
        names = [str(names[str(i)]) for i in range(len(names))]
    # what transformers calls classes that nobody named
    if names == [f"LABEL_{i}" for i in range(len(names))]:
        names = None
    return Head(weights, names, scale=1.0, is_sorted=True)


def fit(head: Head, new: nn.Module, names: list | None, scale: float, path: Path) -> dict:
    """The head as a state dict of `new`, its rows in the order of `names`; {} if it cannot be one.

    names: of the classes of the labelled text; None: scores, which are learned divided by `scale`.
    Raises InputError, in words of classes, if it is a head for others.
    """
    if set(head.weights) != set(new.state_dict()):
        is_first = "dense.weight" in head.weights
        form = "<s> (--pool cls)" if is_first else "the mean over the text (--pool mean)"
        say(f"the head of {path} is not taken: it reads {form}")
        return {}
    # a row for each of its own classes, in its own order
    ours = names or [SCORE]
    theirs = classes_of(head, ours, path)
    expected = type(new)(new.out_proj.in_features, len(theirs))
    state = checkpoint.own_state(head.weights, expected, "the classification head", path)
    order = [theirs.index(name) for name in ours]
    for name in ("out_proj.weight", "out_proj.bias"):
        state[name] = state[name][order]
        if names is None and head.scale:
            state[name] *= head.scale / scale
    return state


def classes_of(head: Head, ours: list, path: Path) -> list:
    """The names of the head's rows. Raises InputError unless they are those of `ours`."""
    advice = "--new_head draws another head"
    bias = head.weights["out_proj.bias"]
    rows = len(bias) if isinstance(bias, torch.Tensor) and bias.ndim else 0
    theirs = [SCORE] if rows == 1 else head.classes
    if theirs is None and head.is_sorted and rows == len(ours):
        theirs = sorted(ours, key=lambda name: (score_of(name) or 0.0, name))
        order = shown(theirs)
        say(f"{path} does not name the classes of its head, taken for {order} in this order")
    if theirs is None:
        raise InputError(f"{path}: the {rows} classes of its head have no names; {advice}")
    if set(theirs) != set(ours):
        new = shown([name for name in ours if name not in theirs])
        missing = shown([name for name in theirs if name not in ours])
        what = f"its head is for other classes: new are {new}; missing are {missing}"
        raise InputError(f"{path}: {what}; {advice}")
    return theirs


def shown(names: list) -> str:
    return ", ".join(name[:80] for name in names[:10]) or "none"


def stripped(state: dict, prefix: str) -> dict:
    """The entries whose names begin with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if str(k).startswith(prefix)}


def say(text: str):
    print(printable(f"note: {text}"))
