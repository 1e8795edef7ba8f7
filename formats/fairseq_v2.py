"""fairseq's data2vec 2.0 (`data2vec_multi`, text alone): its names of the weights and ours, and its
optimizer.

    ours                                  fairseq's
    encoder.embed_tokens and the like     modality_encoders.TEXT.local_encoder.NAME
    encoder.layers.N.PART                 blocks.N.PART, the parts as in PARTS
    decoder.NAME                          modality_encoders.TEXT.decoder.NAME
    the teacher's layers.N.PART           N.PART in the dict `_ema`; its embeddings are the
                                          student's
"""

import re

TEXT = "modality_encoders.TEXT."
TEACHER = "_ema"
# Beginnings of names, fairseq's -> ours, in the order in which its optimizer counts the weights.
BEGINNINGS = {
    f"{TEXT}local_encoder.": "encoder.",
    f"{TEXT}decoder.": "decoder.",
    "blocks.": "encoder.layers.",
    "norm.": "encoder.layer_norm.",
}
PARTS = {  # of a layer: fairseq's -> ours, in fairseq's order
    ".norm1.": ".self_attn_layer_norm.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.out_proj.",
    ".norm2.": ".final_layer_norm.",
    ".mlp.fc1.": ".fc1.",
    ".mlp.fc2.": ".fc2.",
}
# its optimizer's: matrices and convolutions, and biases and norms
GROUPS = ("default", "c34292026c238657737ef782d45f6878")
ENCODERS = (f"{TEXT}local_encoder.", f"model.{TEXT}local_encoder.")  # the second: fine-tuned


def holds(state: dict) -> bool:
    """Whether a state dict of fairseq's is of version 2."""
    return any(str(name).startswith(ENCODERS) for name in state)


def our_name(name: str) -> str | None:
    """Our name of a student's weight; None if it is none of a text model's."""
    for theirs, ours in BEGINNINGS.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            for part in PARTS:
                name = name.replace(part, PARTS[part])
            # a decoder's only projection has no number
            return re.sub(r"^decoder\.proj\.(?=[a-z])", "decoder.proj.0.", name)
    return None


def their_name(name: str) -> str:
    """The reverse of `our_name`, of a projection with its number."""
    # a short beginning of ours is that of a longer one, too
    theirs, ours = next(pair for pair in reversed(BEGINNINGS.items()) if name.startswith(pair[1]))
    name = theirs + name.removeprefix(ours)
    for part in PARTS:
        name = name.replace(PARTS[part], part)
    return name


def place_of(name: str) -> tuple:
    """What to sort fairseq's names by for its own order; equal ones keep theirs."""
    whole = [name.startswith(beginning) for beginning in BEGINNINGS].index(True)
    if block := re.match(r"blocks\.(\d+)(\..+\.)", name):
        return whole, int(block[1]), list(PARTS).index(block[2])
    return whole, 0, 0


def from_reference(state: dict) -> tuple[dict, dict | None]:
    """fairseq's model state dict -> (student, teacher or None) under our names."""
    student = {our_name(str(name).removeprefix("model.")): value for name, value in state.items()}
    student.pop(None, None)
    if TEACHER not in state:
        return student, None
    # its embeddings are the student's, its layers come from the average
    average = {our_name(f"blocks.{name}"): value for name, value in state[TEACHER].items()}
    both = {k: v for k, v in {**student, **average}.items() if k.startswith("encoder.")}
    return student, {name.removeprefix("encoder."): value for name, value in both.items()}


def to_reference(student: dict, teacher: dict) -> dict:
    """The reverse: a model state dict under fairseq's names, with `_ema`."""
    state = {their_name(name): value for name, value in student.items()}
    if f"{TEXT}decoder.proj.2.weight" not in state:  # one projection, which has no number
        state = {name.replace(".proj.0.", ".proj."): value for name, value in state.items()}
    state = dict(sorted(state.items(), key=lambda item: place_of(item[0])))
    layers = {f"encoder.{k}": v for k, v in teacher.items() if k.startswith("layers.")}
    state[TEACHER] = {their_name(k).removeprefix("blocks."): v for k, v in layers.items()}
    return state


# -------------------------------------------------------------------------------------- optimizer


def numbers_of(weights: list) -> list[list[int]]:
    """The places of each group's weights among all."""
    # by its rule for groups: weights of one dimension are in the second
    is_flat = [weight.dim() == 1 for weight in weights]
    return [[i for i, flat in enumerate(is_flat) if flat == kind] for kind in (False, True)]


def split_optimizer(last: dict, weights: list) -> dict:
    """One Adam's state as those of two groups, each with numbers of its own.

    weights: of the model, in the order of the numbers.
    """
    groups = {}
    for name, numbers in zip(GROUPS, numbers_of(weights)):
        state = {i: last["state"][old] for i, old in enumerate(numbers) if old in last["state"]}
        # both groups have the same settings, by a slip also the same decay
        group = {**last["param_groups"][0], "params": list(range(len(numbers)))}
        groups[name] = dict(state=state, param_groups=[group])
    return groups


def join_optimizer(last: dict, weights: list) -> dict:
    """The reverse of `split_optimizer`; a loss scale beside the groups stays."""
    state = {}
    for name, numbers in zip(GROUPS, numbers_of(weights)):
        state |= {numbers[i]: moments for i, moments in last[name]["state"].items()}
    rest = {name: value for name, value in last.items() if name not in GROUPS}
    groups = last[GROUPS[0]]["param_groups"]
    return {**rest, "state": dict(sorted(state.items())), "param_groups": groups}
