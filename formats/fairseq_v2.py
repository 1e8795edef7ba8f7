"""fairseq's data2vec 2.0 (`data2vec_multi`, text alone): its names of the weights and ours.

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
PARTS = {  # of a layer: fairseq's -> ours
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.out_proj",
    "norm1": "self_attn_layer_norm",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "norm2": "final_layer_norm",
}
OF_OURS = {ours: theirs for theirs, ours in PARTS.items()}


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


def from_reference(state: dict) -> tuple[dict, dict | None]:
    """fairseq's model state dict -> (student, teacher or None) under our names."""
    student = {our_name(name): value for name, value in state.items() if our_name(name)}
    if TEACHER not in state:
        return student, None
    teacher = {k: v for k, v in student.items() if k.startswith("encoder.")}
    for name, tensor in state[TEACHER].items():
        ours = our_name(f"blocks.{name}")
        if ours:
            teacher[ours] = tensor
    return student, {name.removeprefix("encoder."): value for name, value in teacher.items()}


def to_reference(student: dict, teacher: dict) -> dict:
    """The reverse: a model state dict under fairseq's names, with `_ema`."""
    projections = sum(bool(re.match(r"decoder\.proj\.\d+\.weight", name)) for name in student)
    state = {their_name(name, projections): value for name, value in student.items()}
    layers = {k: v for k, v in teacher.items() if k.startswith("layers.")}
    names = {their_name(f"encoder.{k}", projections): v for k, v in layers.items()}
    state[TEACHER] = {name.removeprefix("blocks."): value for name, value in names.items()}
    return state
