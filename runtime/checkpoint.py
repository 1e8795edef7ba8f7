"""What survives: one file with everything a resume needs, and the reader of the reference's files.

The file is a dict: `format`, `config` (every setting, flat), `dictionary` (size, digest, mask_id), `student` and
`teacher` (state dicts under this project's names), `optimizer`, `scaler`, `rng`, `progress` (num_updates,
teacher_updates, epoch, batches done in it, world_size, best_loss, data fingerprint) and `log` (the log interval so
far). It holds tensors and plain Python values only, so it is loaded with `weights_only=True`. It is a zip file, as
torch writes them, whose comment is a sha256 of all that stands before.
"""

import collections
import contextlib
import errno
import hashlib
import os
import pickle
import re
import shutil
import threading
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from compat import fairseq_config
from config import InputError
from device import Device

FORMAT = "data2vec-text 1"

# The one table of names: ours on the left, fairseq's on the right; everything else is called the same. The teacher's
# are the encoder's without the first part, in the dict `encoder._ema`.
PREFIXES = {"encoder.": "encoder.sentence_encoder.", "regression_head.": "encoder.regression_head."}
QKV = {"self_attn.qkv.": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")}
REFERENCE_ORDER = (1, 2, 0)  # its modules, and so the parameters that its optimizer counts, are k, v, q
TEACHER = "encoder._ema"


@dataclass
class Loaded:
    """A checkpoint read. kind: 'ours', 'fairseq' (one of the reference's), 'state_dict' (weights alone) or 'hf'."""

    kind: str
    config: dict  # our field names; empty for weights alone
    student: dict  # state dict under our names
    teacher: dict | None
    content: dict  # the whole file, for a resume


REQUIRED = dict.fromkeys(
    ("config", "dictionary", "student", "teacher", "optimizer", "scaler", "rng", "progress", "log"), dict
)
SEAL = b"data2vec-text sha256 "
SEAL_BYTES = len(SEAL) + hashlib.sha256().digest_size


class _Sealed:
    """A file for torch.save that ends in the zip comment SEAL + sha256 of everything before it."""

    def __init__(self, path):
        self.file, self.hash, self.kept = open(path, "wb"), hashlib.sha256(), b""

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        size = len(data)
        # the last two bytes of a zip file are the length of its comment: they wait until more comes or `seal`
        if size < 2:
            data = memoryview(self.kept + bytes(data))
        else:
            self._put(self.kept)
        self._put(data, keep=2)
        return size

    def _put(self, data, keep: int = 0):
        body = data[: max(0, len(data) - keep)]
        self.kept = bytes(data[len(body) :])
        self.file.write(body)
        self.hash.update(body)

    def flush(self):
        self.file.flush()

    def seal(self):
        if self.kept != b"\0\0":
            raise OSError(errno.EIO, "torch.save wrote no plain zip file")
        self._put(SEAL_BYTES.to_bytes(2, "little"))
        self.file.write(SEAL + self.hash.digest())
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()


def save(content: dict, path, *also):
    """Write the file so that a crash at any moment leaves the old one or the new one; `also`: further files like it.

    Raises OSError if it cannot be written; then nothing has changed.
    """
    paths = [Path(path), *map(Path, also)]
    parts = [p.with_name(p.name + ".tmp") for p in paths]
    try:
        file = _Sealed(parts[0])
        try:
            torch.save({"format": FORMAT, **content}, file)
            file.seal()
        finally:
            file.close()
        for part in parts[1:]:  # copies, not links: damage to one file leaves the others
            shutil.copyfile(parts[0], part)
            with open(part, "rb") as f:
                os.fsync(f.fileno())
        for part, final in zip(reversed(parts), reversed(paths)):  # `path` last: it is the one that counts
            os.replace(part, final)
    except (OSError, RuntimeError) as e:  # torch's writer turns a full disk into a RuntimeError
        for part in parts:
            part.unlink(missing_ok=True)
        cause = e if isinstance(e, OSError) else e.__context__
        raise cause if isinstance(cause, OSError) else OSError(errno.EIO, str(e).splitlines()[0]) from None
    folder = os.open(paths[0].parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renames themselves
    finally:
        os.close(folder)


class Saver:
    """Saves in a thread of its own while training goes on, one at a time.

    Training waits only while the content is copied, to host memory that is kept for the next save: fresh memory would
    cost several times the copy.
    """

    def __init__(self, device: Device):
        self.device, self._kept, self._thread, self._error = device, {}, None, None

    def start(self, content: dict, path, *also):
        """Begin to `save`; the content may change as soon as this returns. `finish` the one before first."""
        content = self._copy(content, ())
        self.device.synchronize()

        def write():
            try:
                save(content, path, *also)
            except Exception as e:  # raised where it is waited for
                self._error = e

        self._thread = threading.Thread(target=write, name="save")
        self._thread.start()

    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> bool:
        """Wait for the save that was begun; returns whether there was one. Raises OSError if it failed."""
        if self._thread is None:
            return False
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error:
            raise error
        return True

    def _copy(self, value, key: tuple):
        if isinstance(value, torch.Tensor):
            buffer = self._kept.get(key)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                buffer = torch.empty(value.shape, dtype=value.dtype)
                buffer = self._kept[key] = buffer if value.device.type == "cpu" else buffer.pin_memory()
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {k: self._copy(v, (*key, k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(v, (*key, i)) for i, v in enumerate(value))
        return value


def candidates(folder) -> list[Path]:
    """The checkpoints in a save directory in the order in which a resume tries them: the last, then from new to old."""
    found = sorted(Path(folder).glob("checkpoint_*.pt"), key=lambda p: -p.stat().st_mtime_ns)
    return sorted(found, key=lambda p: p.name != "checkpoint_last.pt")


def write_text(path, text: str):
    """Replace a small text file in one step."""
    part = Path(f"{path}.tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@contextlib.contextmanager
def whole(path):
    """The name under which to write a file or a folder that takes the place of `path` when the block ends, and leaves
    nothing behind if the block fails."""
    part = Path(f"{path}.tmp")

    def remove():
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)

    remove()  # of a run that was killed
    try:
        yield part
        for written in part.iterdir() if part.is_dir() else (part,):
            with open(written, "rb") as f:
                os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException as e:
        remove()
        if isinstance(e, RuntimeError) and isinstance(e.__context__, OSError):  # so torch's writer tells of a full disk
            raise e.__context__ from None
        raise


def prune(folder, keep: int):
    """Remove all but the newest `keep` of checkpoint_{epoch}_{updates}.pt in `folder`; keep < 0 keeps all."""
    found = [(int(m[1]), p) for p in Path(folder).iterdir() if (m := re.fullmatch(r"checkpoint_\d+_(\d+)\.pt", p.name))]
    for _, path in sorted(found, reverse=True)[keep:] if keep >= 0 else []:
        path.unlink()


def load(path) -> Loaded:
    """Read a checkpoint of this project or of fairseq, or a bare state dict under its names. Raises InputError."""
    path = Path(path)
    content, sealed = read(path)
    try:
        return _interpret(path, content, sealed)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as e:
        raise InputError(
            f"{path}: not a complete checkpoint: {type(e).__name__} {' '.join(str(e).split())[:200]}"
        ) from None


def read(path: Path) -> tuple[dict, bool]:
    """The dict in a file that torch.save wrote, without running code from it, and whether a checksum vouches for it.

    What is neither tensor nor plain Python is None, but for the settings of old fairseq files. Raises InputError.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        sealed = _check_seal(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what becomes an error below
            content = _read(path)
    except InputError:
        raise
    except Exception as e:  # torch raises many kinds for a damaged or foreign file
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        first = "a pickle, but not torch's" if isinstance(e, pickle.UnpicklingError) else first[:200]
        raise InputError(f"{path}: cannot be read as a checkpoint: {first}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content, sealed


def _interpret(path: Path, content: dict, sealed: bool) -> Loaded:
    if "format" in content:
        if content["format"] != FORMAT:
            raise InputError(f"{path}: format {content['format']!r}; this version reads {FORMAT!r}")
        if not sealed:
            raise InputError(f"{path}: damaged: its checksum is gone")
        for key, kind in REQUIRED.items():
            if not isinstance(content.get(key), kind):
                raise InputError(f"{path}: not a complete checkpoint: no {key} in it")
        return Loaded("ours", content["config"], content["student"], content["teacher"], content)
    state = content.get("model", content)
    if not isinstance(state, dict) or not any(str(k).startswith("encoder.sentence_encoder.") for k in state):
        raise InputError(f"{path}: neither a checkpoint of this project nor one of fairseq's data2vec_text")
    student, teacher = from_reference(state, path)
    kind, settings = "state_dict", {}
    if "model" in content:
        kind, tree = "fairseq", content.get("cfg") or _args_tree(content.get("args"), state)
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
            raise InputError(
                f"{path}: has weights but no config; give its shape by flags and the weights as a bare state dict"
            )
        settings = {
            group: tree[group] for group in ("task", "dataset", "model", "common") if isinstance(tree.get(group), dict)
        }
    return Loaded(kind, settings, student, teacher, content)


def _check_seal(path: Path) -> bool:
    """True if the file ends in its checksum, False if it has none. Raises InputError if it does not fit."""
    left = path.stat().st_size - SEAL_BYTES
    with open(path, "rb") as f:
        f.seek(max(0, left))
        seal = f.read()
        if left < 0 or not seal.startswith(SEAL):
            return False
        f.seek(0)
        digest = hashlib.sha256()
        while left:
            part = f.read(min(left, 1 << 22))
            if not part:
                break
            digest.update(part)
            left -= len(part)
    if digest.digest() != seal[len(SEAL) :]:
        raise InputError(f"{path}: damaged: its content does not fit its checksum")
    return True


def _read(path: Path):
    """torch.load that never runs code from the file: first as weights only, then, for files of older fairseq releases,
    with every class but tensors and containers replaced by an inert one."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return _plain(torch.load(path, map_location="cpu", weights_only=False, pickle_module=_INERT_PICKLE), {})


class _Inert:
    """Stands for an object of a class that is not to be run: keeps its state, swallows all else a pickle does to it."""

    state = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def append(self, value):
        pass

    def extend(self, values):
        pass

    def add(self, value):
        pass


class _InertUnpickler(pickle._Unpickler):  # the one in C allocates whatever a damaged file asks for
    ALLOWED = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        **{
            ("torch", f"{kind}Storage"): getattr(torch, f"{kind}Storage")
            for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
        },
    }

    def find_class(self, module, name):
        return self.ALLOWED.get((module, name)) or type(name.rpartition(".")[2] or "Inert", (_Inert,), {})


_INERT_PICKLE = types.SimpleNamespace(
    __name__="inert_pickle",
    Unpickler=_InertUnpickler,
    load=lambda file, **options: _InertUnpickler(file, **options).load(),
)


def _plain(node, seen: dict):
    """`node` with inert objects replaced: OmegaConf's containers and nodes and a Namespace by what they hold, others by
    None. seen: id -> result, so that shared parts stay shared."""
    if id(node) in seen:
        return seen[id(node)]
    if isinstance(node, _Inert):
        inner = node.state if isinstance(node.state, dict) else None
        if inner and type(node).__name__ != "Namespace":
            inner = next((inner[key] for key in ("_content", "_val") if key in inner), None)
        seen[id(node)] = _plain(inner, seen)
    elif isinstance(node, dict):
        seen[id(node)] = made = collections.OrderedDict() if isinstance(node, collections.OrderedDict) else {}
        made.update((key, _plain(value, seen)) for key, value in node.items() if not isinstance(key, _Inert))
    elif isinstance(node, list):
        seen[id(node)] = made = []
        made.extend(_plain(value, seen) for value in node)
    elif isinstance(node, tuple):
        seen[id(node)] = tuple(_plain(value, seen) for value in node)
    else:
        return None if isinstance(node, type) else node
    return seen[id(node)]


def _args_tree(args: dict | None, state: dict) -> dict | None:
    """The model's settings from the flat `args` of fairseq before 2021, shaped as its later config."""
    if not isinstance(args, dict):
        return None
    model = {k.removeprefix("encoder_"): v for k, v in args.items() if k.startswith(("encoder_", "activation_"))}
    model.update({k: args[k] for k in ("dropout", "attention_dropout") if k in args})
    model["max_source_positions"] = len(state["encoder.sentence_encoder.embed_positions.weight"]) - 2
    return {"model": model}


def reference_settings(settings: dict, fields, path) -> dict:
    """Our settings of a fairseq checkpoint's config: the released code's behaviour, on its data options and model."""
    values, _ = fairseq_config.from_reference(settings, fields, str(path))
    values.pop("data_path", None)  # a path of the machine that trained it
    return {**values, "fairseq_exact": True, **config.FAIRSEQ_EXACT}


def from_reference(state: dict, path="") -> tuple[dict, dict | None]:
    """fairseq's model state dict -> (student, teacher or None), state dicts under our names."""
    teacher = state.get(TEACHER)
    student = {}
    for name, tensor in state.items():
        name = re.sub(r"^encoder\.lm_head\.(?=\d)", "encoder.regression_head.", name)  # its name in the first releases
        for ours, theirs in PREFIXES.items():
            if name.startswith(theirs):
                student[ours + name[len(theirs) :]] = tensor
    student = merge_qkv(student, path)
    return student, None if teacher is None else merge_qkv(dict(teacher), path)


def to_reference(student: dict, teacher: dict) -> dict:
    """The reverse: a model state dict under fairseq's names, `encoder._ema` and `version` included."""
    version = torch.tensor([3.0])
    state = {"encoder.sentence_encoder.version": version}
    for name, tensor in split_qkv(student).items():
        prefix = next(p for p in PREFIXES if name.startswith(p))
        state[PREFIXES[prefix] + name[len(prefix) :]] = tensor
    state[TEACHER] = {"version": version, **split_qkv(teacher)}
    return state


def merge_qkv(state: dict, path) -> dict:
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


def split_qkv(state: dict) -> dict:
    split = {}
    for name, tensor in state.items():
        ours = next((part for part in QKV if part in name), None)
        if ours is None:
            split[name] = tensor
        else:
            parts = [(name.replace(ours, theirs), part.clone()) for theirs, part in zip(QKV[ours], tensor.chunk(3))]
            split.update(parts[i] for i in REFERENCE_ORDER)
    return split


def check_fits(state: dict, module: torch.nn.Module, what: str, path):
    """Raise InputError that names the first missing, unknown or misshapen entry of a state dict for the module."""
    expected = module.state_dict()
    for name, tensor in expected.items():
        if not isinstance(state.get(name), torch.Tensor):
            raise InputError(
                f"{path}: {what} has no {name}; was it trained with other --layers or another architecture?"
            )
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{path}: {what} {name} is {tuple(state[name].shape)}, this model's is {tuple(tensor.shape)};"
                " another architecture or dictionary"
            )
    extra = sorted(set(state) - set(expected))
    if extra:
        raise InputError(f"{path}: {what} has {extra[0]}, which this model has not; another architecture")


def put(state: dict, module: torch.nn.Module, what: str, path):
    """Load a state dict strictly. Raises InputError, as `check_fits`."""
    check_fits(state, module, what, path)
    module.load_state_dict(state)
