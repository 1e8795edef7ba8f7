"""Checkpoints: one file with everything that a resume needs.

The file is a dict: `format`, `config` (every setting, flat), `dictionary` (size, digest, mask_id),
`student` and `teacher` (state dicts), `optimizer`, `scaler`, `rng`, `progress` (counts, position in
the data, best figures, the data's fingerprint) and `log` (the log interval so far). It holds
tensors and plain Python values only, in the zip archive that torch.save writes. Each record of the
archive has a CRC32, which every load checks.
"""

import contextlib
import errno
import math
import os
import pickle
import re
import secrets
import shutil
import sys
import tarfile
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from config import InputError, check_file, printable, reading
from hardware.vectors import MOMENTS

import torch

FORMAT = "data2vec-text 1"
ENTRIES = "config dictionary student teacher optimizer scaler rng progress log".split()
COUNTS = "num_updates teacher_updates skipped epoch batches world_size".split()  # of progress
FIGURES = "best_loss best_gain first_target_var hours".split()  # of progress; older files lack some
NUMBERS = (int, float, type(None))
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what weights may be
FOREIGN = "weights of other programs are for --init_from"
COUNTED = re.compile(r"checkpoint_\d+_(\d+)\.pt")  # checkpoint_{epoch}_{updates}.pt


def _rebuild_npu_tensor(storage, offset, size, stride, requires_grad, hooks, *layout):
    """A tensor that torch_npu's pickles call so, by torch's function; its layout on an NPU is left.

    The storage holds the plain values, as on the host.
    """
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)


class Format(int):
    """torch_npu's name of such a layout."""


# Pickles know both by these names. torch before 2.4 has no list of what else may be loaded.
_rebuild_npu_tensor.__module__ = "torch_npu.utils.storage"
Format.__module__ = "torch_npu.npu._format"
NPU = [_rebuild_npu_tensor, Format]
if hasattr(torch.serialization, "add_safe_globals"):
    torch.serialization.add_safe_globals(NPU)


@dataclass
class Loaded:
    """A checkpoint in memory."""

    kind: str  # 'ours', 'fairseq', 'state_dict' (weights alone) or 'hf' (of transformers)
    config: dict  # its settings under our names, as far as it has them
    student: dict  # state dict under our names
    teacher: dict | None
    content: dict  # the whole file
    dictionary: dict = field(default_factory=dict)  # Dictionary.entry of its own, if it has that

    def check_settings(self, here: dict, path):
        """Raise InputError for other settings, of those that no weight's shape shows."""
        for name in ("attention_heads", "activation_fn"):
            saved = str(self.config.get(name, here[name]))[:100]
            if saved != str(here[name]):
                raise InputError(f"{path}: its --{name} is {saved}, and here {here[name]}")
        if "attention_heads" not in self.config:
            what = f"{path} does not say its --attention_heads; taking {here['attention_heads']}"
            print(f"note: {printable(what)}", file=sys.stderr)


# ---------------------------------------------------------------------------------------- writing


def save(content: dict, path, *also):
    """Write the checkpoint to `path`, then copies of it to `also`.

    A crash at any moment leaves each file old or new. Raises OSError if a file cannot be written;
    the files before it are then new, and it and those after it are old.
    """
    write({"format": FORMAT, **content}, path)
    # neither links nor shared blocks of the disk: damage to one file leaves the others
    for copy in also:
        with whole(copy) as part:
            shutil.copyfile(path, part)


def write(content: dict, path):
    """torch.save in one step. Raises OSError."""
    with whole(path) as part, open(part, "xb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as e:  # torch's writer turns a full disk into one
            if isinstance(e.__context__, OSError):
                raise e.__context__ from None
            raise OSError(errno.EIO, str(e).splitlines()[0]) from None


@contextlib.contextmanager
def whole(path):
    """Yields a fresh name next to `path`, for a file or a folder.

    What is made there replaces `path` when the block ends, and is removed if the block fails.
    """
    path = Path(os.path.abspath(path))
    # /dev/null would become a file, and so would the link /dev/stdout
    is_other = path.exists() and not (path.is_file() or path.is_dir())
    if is_other or path.parent == Path("/dev"):
        raise OSError(errno.EEXIST, "is neither a file nor a folder", str(path))
    part = path.with_name(f"{path.stem}.{secrets.token_hex(4)}{path.suffix}.tmp")
    try:
        yield part
        for inner in part.iterdir() if part.is_dir() else ():
            _sync(inner)
        _sync(part)
        os.replace(part, path)
        with contextlib.suppress(OSError):  # not every file system can
            _sync(path.parent)  # the rename itself
    except BaseException as e:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
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
    """Remove all but the newest `keep` of checkpoint_{epoch}_{updates}.pt; keep < 0 keeps all."""
    paths = [path for path in Path(folder).iterdir() if COUNTED.fullmatch(path.name)]
    paths.sort(key=_updates_in, reverse=True)
    for path in paths[keep:] if keep >= 0 else []:
        path.unlink()


# ---------------------------------------------------------------------------------------- reading


def candidates(folder) -> list[Path]:
    """The checkpoints of a save directory in the order in which a resume tries them.

    That is checkpoint_last.pt, then from the most updates to the fewest. Modification times do not
    count, because copies and clocks change them.
    """
    return sorted(sorted(Path(folder).glob("checkpoint_*.pt")), key=_updates_in, reverse=True)


def _updates_in(path: Path) -> float:
    """A file's updates by its name or content; infinity for the last, -1 if unknown."""
    if path.name == "checkpoint_last.pt":
        return math.inf
    if match := COUNTED.fullmatch(path.name):
        return int(match[1])
    with contextlib.suppress(Exception):  # `load` says what is wrong with it, if its turn comes
        if path.is_file():  # a pipe would be waited for
            return int(load_plain(path, mmap=True)["progress"]["num_updates"])
    return -1


def load(path) -> Loaded:
    """Read a checkpoint of this project. Raises InputError for any other file."""
    content = read(path)
    if "format" not in content:
        raise InputError(f"{path}: not a checkpoint of this project; {FOREIGN}")
    return ours(content, path)


def ours(content: dict, path) -> Loaded:
    """The content of a file of ours; raises InputError for what a run would stumble over later."""
    if content["format"] != FORMAT:
        name = str(content["format"])[:100]
        raise InputError(f"{path}: format {name!r}; this version reads {FORMAT!r}")
    with reading(f"{path}: damaged"):
        wrong = [name for name in ENTRIES if not isinstance(content.get(name), dict)]
        progress = content["progress"]
        for name in COUNTS:
            if type(progress[name]) is not int or not 0 <= progress[name] < 2**62:
                wrong.append(name)
        wrong += [name for name in FIGURES if not isinstance(progress.get(name), NUMBERS)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: of a wrong type or size")
    parts = (content[name] for name in ("config", "student", "teacher"))
    return Loaded("ours", *parts, content, content["dictionary"])


def load_plain(path, mmap: bool):
    """torch.load of tensors and plain Python values; mmap: tensors are the file itself, mapped."""
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as e:  # torch's text is a page of advice
        name = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(e))
        what = "damaged, or with objects of classes"
        if name:
            what = f"holds a {name[1][:100]}, which is not loaded"
        raise pickle.UnpicklingError(f"{what}; {FOREIGN}") from None


def read(path, load=load_plain) -> dict:
    """The dict that torch.save wrote at `path`. No code runs from the file. Raises InputError.

    Tensors of an archive are the file itself, mapped: copy what is to be kept. Unmapped, an older
    torch (such as 2.1) reads beyond a record that is shorter than the pickle says.
    """
    path = Path(path)
    if path.is_dir():
        paths = candidates(path)
        what = f"a folder; give {paths[0]}" if paths else "a folder without a checkpoint"
        raise InputError(f"{path}: {what}")
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    with reading(f"{path}: cannot be read as a checkpoint"):
        check_file(path)
        with open(path, "rb") as file:
            start = file.read(4)
        # torch before 2.6 would unpack a tar
        if start[:1] not in (b"P", b"\x80") or tarfile.is_tarfile(path):
            raise ValueError("torch.save has not written it")
        is_archive = start == b"PK\3\4"  # the test by which torch decides, too
        if is_archive:
            check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what becomes an error
            content = load(path, mmap=is_archive)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    if "format" in content and not is_archive:
        raise InputError(f"{path}: damaged: not the archive with checksums that a run writes")
    return content


def check_archive(path):
    """Raise InputError unless a zip archive's records are stored, and fit it and their checksums.

    torch checks none of this, and unpacks compressed records of any size.
    """
    with reading(f"{path}: damaged"), zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("a compressed record, which torch never writes")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("records larger than the file")
        if name := archive.testzip():
            raise ValueError(f"the record {name} does not fit its checksum")


# ----------------------------------------------------------------------------------- into a model


def is_ordinary(tensor) -> bool:
    """Whether it is a dense tensor of floats, with memory for all its elements.

    A stride of 0 lets one element pass for any number, which torch's fused kernels don't check.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.dtype not in FLOATS:
        return False
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def stripped(state: dict, prefix: str) -> dict:
    """The entries whose names begin with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if str(k).startswith(prefix)}


def check_fits(state: dict, expected: dict, what: str, path):
    """Raise InputError that names the first tensor of another shape, or that is not ordinary."""
    for name, ours in expected.items():
        if name not in state:
            raise InputError(f"{path}: {what} has no {name}; other --layers, or another model?")
        tensor = state[name]
        if not is_ordinary(tensor):
            kind = "an ordinary tensor of floating-point numbers"
            if not isinstance(tensor, torch.Tensor):
                kind += f", but a {type(tensor).__name__}"
            raise InputError(f"{path}: {what} {name} is not {kind}")
        if tensor.shape != ours.shape:
            sizes = f"{tuple(tensor.shape)}, this model's is {tuple(ours.shape)}"
            raise InputError(
                f"{path}: {what} {name} is {sizes}; another architecture or dictionary"
            )
    for name in sorted(map(str, set(state) - set(expected))):
        raise InputError(f"{path}: {what} has {name[:200]}, which this model has not")


def own(state: dict, expected: dict, what: str, path) -> dict:
    """The tensors of a dict in memory of our own, as float32. Raises InputError (`check_fits`)."""
    check_fits(state, expected, what, path)
    return {k: torch.empty(ours.shape).copy_(state[k].detach()) for k, ours in expected.items()}


def put(state: dict, module: torch.nn.Module, what: str, path):
    """Copy a state dict into the module. Raises InputError, as `check_fits`."""
    check_fits(state, module.state_dict(), what, path)
    module.load_state_dict(state)


def checked_moments(state: dict, weights: list, path) -> dict:
    """Adam's state of parameters like these: {number: step, exp_avg, exp_avg_sq}, copied.

    An empty state, of an optimizer that has made no step, stays empty. Raises InputError. torch's
    fused kernels trust shapes and strides: a moment that is too small would have them write outside
    of it.
    """
    expected = dict(enumerate(weights)) if state else {}
    checked = {i: {} for i in expected}
    for name in MOMENTS:
        what = f"the optimizer's {name} of parameter"
        tensors = {i: entry.get(name) for i, entry in state.items()}
        for i, tensor in own(tensors, expected, what, path).items():
            if not tensor.isfinite().all():
                raise InputError(f"{path}: {what} {i} is not finite")
            checked[i][name] = tensor
    for i, tensors in checked.items():
        with reading(f"{path}: the optimizer's step of parameter {i}"):
            step = float(state[i]["step"])
            if not 0 <= step < math.inf:
                raise ValueError(f"{step} is not a count")
        checked[i] = {"step": torch.tensor(step), **tensors}
    return checked
