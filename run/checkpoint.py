"""Checkpoints: one file with everything that a resume needs.

The file is a dict: `format`, `config` (every setting, flat), `dictionary` (size, digest, mask_id),
`student` and `teacher` (state dicts), `optimizer`, `scaler`, `rng`, `progress` (num_updates,
teacher_updates, skipped, epoch, batches done in it, world_size, best_loss, data fingerprint) and
`log` (the log interval so far). It holds tensors and plain Python values only, so
torch.load(weights_only=True) reads it. It is the zip archive that torch.save writes. Each record
has a CRC32, which every load checks. Version 0.1.0 also wrote a digest as the archive's comment; it
is ignored.
"""

import contextlib
import errno
import math
import os
import pickle
import re
import secrets
import shutil
import tarfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from config import InputError
from formats import fairseq_files, fairseq_names, integrity

import torch

FORMAT = "data2vec-text 1"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
KEPT = re.compile(r"checkpoint_\d+_(\d+)\.pt")  # checkpoint_{epoch}_{updates}.pt


@dataclass
class Loaded:
    """A checkpoint in memory. kind: 'ours', 'fairseq', 'state_dict' (weights alone) or 'hf' (of
    transformers)."""

    kind: str
    config: dict  # our settings, or groups of fairseq's config; empty for weights alone
    student: dict  # state dict under our names
    teacher: dict | None
    content: dict  # the whole file, for a resume


# ---------------------------------------------------------------------------------------------- writing


def save(content: dict, path, *also):
    """Write the checkpoint to `path`, then copies of it to `also`.

    A crash at any moment leaves each file old or new. Raises OSError if a file cannot be written:
    those before it are then new, and it and those after it are old.
    """
    write({"format": FORMAT, **content}, path)
    for copy in also:  # no links, no shared blocks: damage to one file leaves the others
        with whole(copy) as part:
            shutil.copyfile(path, part)


def write(content: dict, path):
    """torch.save in one step. Raises OSError."""
    with whole(path) as part, open(part, "xb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as e:  # torch's writer turns a full disk into one
            cause = e.__context__
            if not isinstance(cause, OSError):
                cause = OSError(errno.EIO, str(e).splitlines()[0])
            raise cause from None


@contextlib.contextmanager
def whole(path):
    """Yields a fresh name next to `path`. The file or folder made there replaces `path` when the
    block ends, and is removed if the block fails."""
    path = Path(os.path.abspath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):  # /dev/null would become a file
        raise OSError(errno.EEXIST, "is neither a file nor a folder", str(path))
    part = path.with_name(f"{path.stem}.{secrets.token_hex(4)}{path.suffix}.tmp")
    try:
        yield part
        for written in (*part.iterdir(), part) if part.is_dir() else (part,):
            _sync(written)
        os.replace(part, path)
        _sync(path.parent)  # the rename itself
    except BaseException as e:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename in (None, str(part)):
            e.filename = str(path)  # on a full disk Python names no file
        raise


def _sync(path: Path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path, text: str):
    """Replace a small text file in one step."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def prune(folder, keep: int):
    """Remove all but the newest `keep` of checkpoint_{epoch}_{updates}.pt in `folder`; keep < 0
    keeps all."""
    found = [
        (int(match[1]), path)
        for path in Path(folder).iterdir()
        if (match := KEPT.fullmatch(path.name))
    ]
    for _, path in sorted(found, reverse=True)[keep:] if keep >= 0 else []:
        path.unlink()


# ---------------------------------------------------------------------------------------------- reading


def candidates(folder) -> list[Path]:
    """The checkpoints in a save directory in the order in which a resume tries them:
    checkpoint_last.pt, then from the most updates to the fewest. Modification times do not count,
    because copies and clocks change them."""
    return sorted(sorted(Path(folder).glob("checkpoint_*.pt")), key=_updates_in, reverse=True)


def _updates_in(path: Path) -> float:
    """How many updates a checkpoint has, by its name or else by its content; infinity for the last,
    -1 if unknown."""
    if path.name == "checkpoint_last.pt":
        return math.inf
    if match := KEPT.fullmatch(path.name):
        return int(match[1])
    try:
        if not path.is_file():  # a pipe would be waited for
            return -1
        integrity.check_archive(path, checksums=False)
        # mapped, so that no weight is read
        return int(
            torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)["progress"][
                "num_updates"
            ]
        )
    except Exception:  # `load` says what is wrong with it, if its turn comes
        return -1


def load(path) -> Loaded:
    """Read a checkpoint of ours or of fairseq, or a bare state dict under fairseq's names. Raises
    InputError."""
    path = Path(path)
    content = read(path)
    if "format" in content:
        if content["format"] != FORMAT:
            raise InputError(
                f"{path}: format {str(content['format'])[:100]!r}; this version reads {FORMAT!r}"
            )
        if not integrity.is_archive(path):
            raise InputError(f"{path}: damaged: it is not the archive that this project writes")
        integrity.check_entries(content, path)
        return Loaded("ours", content["config"], content["student"], content["teacher"], content)
    try:
        return Loaded(*fairseq_names.parts_of(content, path), content)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as e:
        raise InputError(
            f"{path}: not a complete checkpoint: {type(e).__name__} {' '.join(str(e).split())[:200]}"
        ) from None


def read(path) -> dict:
    """The dict that torch.save wrote at `path`. No code runs from the file, and every tensor is an
    ordinary one on the CPU, mapped from the file where it is an archive: copy what is to be kept.
    Raises InputError."""
    path = Path(path)
    if path.is_dir():
        what = "a folder without a checkpoint; a run's --save_dir holds checkpoint_last.pt"
        if (path / "config.json").is_file():
            what = f"a Hugging Face folder; convert it: python convert.py --from hf --ckpt {path} --to native FILE.pt"
        if found := candidates(path):
            what = f"a folder; it holds {found[0].name}: give {found[0]}"
        raise InputError(f"{path}: {what}")
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        if is_archive := integrity.is_archive(path):
            integrity.check_archive(path)
        elif tarfile.is_tarfile(path):  # torch before 2.6 would unpack it
            raise InputError(f"{path}: cannot be read as a checkpoint: a tar archive")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what becomes an error below
            content = fairseq_files.load(path, is_archive)
    except InputError:
        raise
    except Exception as e:  # torch raises many kinds for a damaged or foreign file
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        first = (
            "a pickle, but not torch's" if isinstance(e, pickle.UnpicklingError) else first[:200]
        )
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(1) not in (b"P", b"\x80"):  # of a zip, of a pickle
                first = "torch.save has not written it"
        raise InputError(f"{path}: cannot be read as a checkpoint: {first}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    integrity.check_values(content, path)
    return content


# ---------------------------------------------------------------------------------------------- into a model


def _check_tensor(tensor, shape, what: str, path):
    if not (
        isinstance(tensor, torch.Tensor)
        and integrity.is_ordinary(tensor)
        and tensor.dtype in integrity.FLOATS
    ):
        raise InputError(f"{path}: {what} is not an ordinary tensor of floating-point numbers")
    if tensor.shape != shape:
        raise InputError(
            f"{path}: {what} is {tuple(tensor.shape)}, this model's is {tuple(shape)}; another architecture or"
            " dictionary"
        )


def check_fits(state: dict, module: torch.nn.Module, what: str, path):
    """Raise InputError that names the first missing, unknown or unsuitable entry of a state dict
    for the module."""
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise InputError(
                f"{path}: {what} has no {name}; was it trained with other --layers or another architecture?"
            )
        _check_tensor(state[name], tensor.shape, f"{what} {name}", path)
    extra = sorted(map(str, set(state) - set(expected)))
    if extra:
        raise InputError(
            f"{path}: {what} has {extra[0][:200]}, which this model has not; another architecture"
        )


def own_state(state: dict, module: torch.nn.Module, what: str, path) -> dict:
    """The module's entries in a state dict, as float32 in memory of our own. Raises InputError, as
    `check_fits`."""
    check_fits(state, module, what, path)
    return {name: _own(state[name]) for name in module.state_dict()}


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape).copy_(tensor.detach())


def put(state: dict, module: torch.nn.Module, what: str, path):
    """Copy a state dict into the module. Raises InputError, as `check_fits`."""
    check_fits(state, module, what, path)
    module.load_state_dict(state)


def checked_moments(state: dict, shapes: list, path) -> dict:
    """Adam's state of parameters with these shapes, copied into memory of its own: {number: step,
    exp_avg, exp_avg_sq}.

    An empty state, of an optimizer that has made no step, stays empty. Raises InputError. torch's
    fused kernels trust shapes and strides: a moment that is too small would have them write outside
    of it.
    """
    if state and set(state) != set(range(len(shapes))):
        raise InputError(
            f"{path}: the optimizer has {len(state)} parameters, this model has {len(shapes)}"
        )
    checked = {}
    for i, shape in enumerate(shapes if state else ()):
        entry = state[i] if isinstance(state[i], dict) else {}
        try:
            step = float(entry.get("step"))
        except (TypeError, ValueError, OverflowError, RuntimeError):
            step = math.nan
        if not 0 <= step < math.inf:
            raise InputError(
                f"{path}: the optimizer's step of parameter {i} is not one number >= 0"
            )
        checked[i] = {"step": torch.tensor(step)}
        for name in MOMENTS:
            _check_tensor(entry.get(name), shape, f"the optimizer's {name} of parameter {i}", path)
            checked[i][name] = _own(entry[name])
            if not checked[i][name].isfinite().all():
                raise InputError(f"{path}: the optimizer's {name} of parameter {i} is not finite")
    return checked
