"""What survives: one file with everything a resume needs, and the reader of the reference's files.

The file is a dict: `format`, `config` (every setting, flat), `dictionary` (size, digest, mask_id), `student` and `teacher`
(state dicts under this project's names), `optimizer`, `scaler`, `rng`, and `progress` (num_updates, teacher_updates, epoch,
batches done in it, world_size, best_loss, data fingerprint). It holds tensors and plain Python values only, so it is loaded
with `weights_only=True`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from config import InputError

FORMAT = "data2vec-text 1"

# The one table of names: ours on the left, fairseq's on the right; everything else is called the same. The teacher's are
# the encoder's without the first part, in the dict `encoder._ema`.
PREFIXES = {"encoder.": "encoder.sentence_encoder.", "regression_head.": "encoder.regression_head."}
QKV = {"self_attn.qkv.": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")}
TEACHER = "encoder._ema"


@dataclass
class Loaded:
    """A checkpoint file read. kind: 'ours', 'fairseq' (a checkpoint of the reference) or 'state_dict' (weights alone)."""

    kind: str
    config: dict  # our field names; empty for weights alone
    student: dict  # state dict under our names
    teacher: dict | None
    content: dict  # the whole file, for a resume


def save(content: dict, path, *also):
    """Write the file so that a crash at any moment leaves the old one or the new one; `also`: further names for it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    with open(part, "wb") as f:
        torch.save({"format": FORMAT, **content}, f)
        f.flush()
        os.fsync(f.fileno())
    for other in map(Path, also):
        link = other.with_name(other.name + ".tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(part, link)  # the same bytes under another name: no second write
        except OSError:  # a file system without hard links
            link.write_bytes(part.read_bytes())
        os.replace(link, other)
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renames themselves
    finally:
        os.close(folder)


def write_text(path, text: str):
    """Replace a small text file in one step."""
    part = Path(f"{path}.tmp")
    part.write_text(text)
    os.replace(part, path)


def prune(folder, keep: int):
    """Remove all but the newest `keep` of checkpoint_{epoch}_{updates}.pt in `folder`; keep < 0 keeps all."""
    found = [(int(m[1]), p) for p in Path(folder).iterdir() if (m := re.fullmatch(r"checkpoint_\d+_(\d+)\.pt", p.name))]
    for _, path in sorted(found, reverse=True)[keep:] if keep >= 0 else []:
        path.unlink()


def load(path) -> Loaded:
    """Read a checkpoint of this project or of fairseq, or a bare state dict under fairseq's names. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for a damaged or foreign file
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"{path}: cannot be read as a checkpoint: {first[:200]}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    if "format" in content:
        if content["format"] != FORMAT:
            raise InputError(f"{path}: format {content['format']!r}; this version reads {FORMAT!r}")
        return Loaded("ours", content["config"], content["student"], content["teacher"], content)
    state = content.get("model", content)
    if not isinstance(state, dict) or not any(str(k).startswith("encoder.sentence_encoder.") for k in state):
        raise InputError(f"{path}: neither a checkpoint of this project nor one of fairseq's data2vec_text")
    student, teacher = from_reference(state, path)
    kind, settings = "state_dict", {}
    if "model" in content:
        kind, tree = "fairseq", content.get("cfg")
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
            raise InputError(f"{path}: has weights but no config; give its shape by flags and the weights as a bare state dict")
        settings = {group: tree[group] for group in ("task", "dataset", "model", "common") if isinstance(tree.get(group), dict)}
    return Loaded(kind, settings, student, teacher, content)


def reference_settings(settings: dict, fields, path) -> dict:
    """Our settings of a fairseq checkpoint's config: the released code's behaviour, on its data options and model."""
    values, _ = config.from_reference(settings, fields, str(path))
    values.pop("data_path", None)  # a path of the machine that trained it
    return {**values, "fairseq_exact": True, **config.FAIRSEQ_EXACT}


def from_reference(state: dict, path="") -> tuple[dict, dict | None]:
    """fairseq's model state dict -> (student, teacher or None), state dicts under our names."""
    teacher = state.get(TEACHER)
    student = {}
    for name, tensor in state.items():
        for ours, theirs in PREFIXES.items():
            if name.startswith(theirs):
                student[ours + name[len(theirs) :]] = tensor
    student = _merge_qkv(student, path)
    return student, None if teacher is None else _merge_qkv(dict(teacher), path)


def to_reference(student: dict, teacher: dict) -> dict:
    """The reverse: a model state dict under fairseq's names, `encoder._ema` and `version` included."""
    version = torch.tensor([3.0])
    state = {"encoder.sentence_encoder.version": version}
    for name, tensor in _split_qkv(student).items():
        prefix = next(p for p in PREFIXES if name.startswith(p))
        state[PREFIXES[prefix] + name[len(prefix) :]] = tensor
    state[TEACHER] = {"version": version, **_split_qkv(teacher)}
    return state


def _merge_qkv(state: dict, path) -> dict:
    merged = {}
    for name, tensor in state.items():
        for ours, (q, *rest) in QKV.items():
            if q in name:
                parts = [tensor, *(state.get(name.replace(q, other)) for other in rest)]
                if not all(isinstance(part, torch.Tensor) for part in parts):
                    raise InputError(f"{path}: {name} has no k_proj or v_proj beside it")
                merged[name.replace(q, ours)] = torch.cat(parts)
            elif not any(other in name for other in rest) and name.rpartition(".")[2] != "version":
                merged[name] = tensor
    return merged


def _split_qkv(state: dict) -> dict:
    split = {}
    for name, tensor in state.items():
        ours = next((part for part in QKV if part in name), None)
        if ours is None:
            split[name] = tensor
        else:
            split.update((name.replace(ours, theirs), part) for theirs, part in zip(QKV[ours], tensor.chunk(3)))
    return split


def put(state: dict, module: torch.nn.Module, what: str, path):
    """Load a state dict strictly; raises InputError that names the first missing, unknown or misshapen entry."""
    expected = module.state_dict()
    for name, tensor in expected.items():
        if not isinstance(state.get(name), torch.Tensor):
            raise InputError(f"{path}: {what} has no {name}; was it trained with other --layers or another architecture?")
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{path}: {what} {name} is {tuple(state[name].shape)}, this model's is {tuple(tensor.shape)};"
                " another architecture or dictionary"
            )
    extra = sorted(set(state) - set(expected))
    if extra:
        raise InputError(f"{path}: {what} has {extra[0]}, which this model has not; another architecture")
    module.load_state_dict(state)
