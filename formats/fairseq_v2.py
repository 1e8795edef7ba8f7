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
PARTS = {  # of a layer: fairseq's -> ours, in fairseq's order
    "norm1": "self_attn_layer_norm",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.out_proj",
    "norm2": "final_layer_norm",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
# the parts of the model, in the order in which its optimizer counts them
ORDER = ("local_encoder.", "decoder.", "blocks.", "norm.")
# its optimizer's: matrices and convolutions, and biases and norms
GROUPS = ("default", "c34292026c238657737ef782d45f6878")
ENCODERS = (f"{TEXT}local_encoder.", f"model.{TEXT}local_encoder.")  # the second: fine-tuned
OF_OURS = {ours: theirs for theirs, ours in PARTS.items()}


def holds(state: dict) -> bool:
    """Whether a state dict of fairseq's is of version 2."""
    return any(str(name).startswith(ENCODERS) for name in state)


def is_ours(student: dict) -> bool:
    """Whether a student of ours is one of version 2."""
    return any(name.startswith("decoder.") for name in student)


def our_name(name: str) -> str | None:
    """Our name of a student's weight; None if it is none of a text model's."""
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
        number, part, kind = block.groups()
        return f"encoder.layers.{number}.{PARTS[part]}.{kind}" if part in PARTS else None
    if name.startswith(f"{TEXT}local_encoder."):
        return "encoder." + name.removeprefix(f"{TEXT}local_encoder.")
    if name.startswith(f"{TEXT}decoder."):
        # a projection of one layer has no number
        name = re.sub(r"\.proj\.(weight|bias)$", r".proj.0.\1", name)
        return name.removeprefix(TEXT)
    return f"encoder.layer_{name}" if name in ("norm.weight", "norm.bias") else None


def their_name(name: str, projections: int) -> str:
    """The reverse of `our_name`; projections: of the decoder."""
    if layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        number, part, kind = layer.groups()
        return f"blocks.{number}.{OF_OURS[part]}.{kind}"
    if name.startswith("encoder.layer_norm."):
        return name.removeprefix("encoder.layer_")
    if projections == 1:
        name = name.replace("decoder.proj.0.", "decoder.proj.")
    return TEXT + re.sub("^encoder", "local_encoder", name)


def place_of(name: str) -> tuple:
    """What to sort the reference's names by for its own order; equal ones keep theirs."""
    whole = next(i for i, part in enumerate(ORDER) if part in name)
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
        return whole, int(block[1]), list(PARTS).index(block[2])
    return whole, 0, 0


def from_reference(state: dict) -> tuple[dict, dict | None]:
    """fairseq's model state dict -> (student, teacher or None) under our names."""
    student = {}
    for name, value in state.items():
        ours = our_name(str(name).removeprefix("model."))
        if ours:
            student[ours] = value
    if TEACHER not in state:
        return student, None
    # its embeddings are the student's, its layers come from the average
    teacher = {k: v for k, v in student.items() if k.startswith("encoder.")}
    for name, tensor in state[TEACHER].items():
        ours = our_name(f"blocks.{name}")
        if ours:
            teacher[ours] = tensor
    return student, {name.removeprefix("encoder."): value for name, value in teacher.items()}


def to_reference(student: dict, teacher: dict) -> dict:
    """The reverse: a model state dict under fairseq's names, with `_ema`."""
    # how many Linears the decoder ends with: one alone has another name
    projections = sum(bool(re.match(r"decoder\.proj\.\d+\.weight", name)) for name in student)
    state = {their_name(name, projections): value for name, value in student.items()}
    state = dict(sorted(state.items(), key=lambda item: place_of(item[0])))
    layers = {k: v for k, v in teacher.items() if k.startswith("layers.")}
    names = {their_name(f"encoder.{k}", projections): v for k, v in layers.items()}
    state[TEACHER] = {name.removeprefix("blocks."): value for name, value in names.items()}
    return state


def pretraining(tree: dict) -> dict:
    """The config of the pretraining, which a fine-tuned model has inside of its own."""
    model = tree.get("model")
    inner = model.get("pretrained_model_args") if isinstance(model, dict) else None
    return inner if isinstance(inner, dict) else tree


# -------------------------------------------------------------------------------------- optimizer


def numbers_of(weights: list) -> list[list[int]]:
    """The places of each group's weights among all."""
    # by its rule for groups: weights of one dimension are in the second
    flat = [i for i, weight in enumerate(weights) if weight.dim() == 1]
    return [[i for i in range(len(weights)) if i not in set(flat)], flat]


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
