"""What a checkpoint file must be before its content is used: whole, bounded, and of the types that
a run writes."""

import math
import zipfile
from pathlib import Path

from config import InputError

import torch

# What each entry must be, as `fits` reads it.
COUNT, FROM_ONE, NUMBER, NONE = range(2**62), range(1, 2**62), (int, float), type(None)
SCALAR = (int, float, str, NONE)
EMPTY = {str: ()}  # no value fits an empty tuple of alternatives, so only an empty dict fits
ENTRIES = dict(
    config={str: (*SCALAR, [NUMBER])},
    dictionary=(EMPTY, dict(size=COUNT, digest=str, mask_id=COUNT)),
    student={str: torch.Tensor},
    teacher={str: torch.Tensor},
    optimizer=dict(state={int: dict}, param_groups=[dict]),
    scaler=(EMPTY, {"scale": NUMBER, str: NUMBER}),
    rng=dict(cpu=torch.Tensor),
    progress=dict(
        num_updates=COUNT,
        teacher_updates=COUNT,
        skipped=COUNT,
        epoch=FROM_ONE,
        batches=COUNT,
        world_size=FROM_ONE,
        best_loss=(*NUMBER, NONE),
        data={str: SCALAR},
        **{
            name: (*NUMBER, NONE) for name in ("best_gain?", "first_target_var?")
        },  # 0.1.0 saved neither
        **{"hours?": NUMBER},  # new in 0.3.0
    ),
    log=dict(
        updates=[dict(number=COUNT, loss=float, gnorm=float, counts=[COUNT] * 3)],
        skipped=[bool],
        seconds=NUMBER,
    ),
    # of a file that convert.py made from one of fairseq's: what only fairseq has a place for
    **{"fairseq?": {"param_group": dict, str: object}},
    # of a file that finetune.py wrote: texts is 2 for pairs, labels None for a regression
    **{
        "classifier?": dict(
            head={str: torch.Tensor}, labels=(NONE, [str]), texts=range(1, 3), label_scale=NUMBER
        )
    },
)
FLOATS = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)  # of weights; torch cannot compute with smaller
MOST_VALUES, DEEPEST = 1_000_000, 50  # of the dict in any file; the base model's has a few thousand


def is_archive(path: Path) -> bool:
    with open(path, "rb") as file:  # the test by which torch decides, too
        return file.read(4) == b"PK\3\4"


def check_archive(path: Path, checksums: bool = True):
    """Raise InputError unless the records of a zip archive are stored as they are, within the
    file's size, and fit their checksums. torch checks none of this, and unpacks compressed records
    of any size."""
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("its end is missing")
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if archive.start_dir != _directory_of(path):
                raise zipfile.BadZipFile("its directory is not where its end says")
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise zipfile.BadZipFile("a compressed record, which torch never writes")
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise zipfile.BadZipFile("records larger than the file")
            if checksums and (record := archive.testzip()):
                raise zipfile.BadZipFile(f"the record {record} does not fit its checksum")
    except Exception as e:  # zipfile raises many kinds for bad offsets, flags and the like
        raise InputError(
            f"{path}: damaged: {' '.join(str(e).split())[:200] or type(e).__name__}"
        ) from None


def _directory_of(path: Path) -> int:
    """The byte where an archive's directory begins, by the archive's own end. That is where torch
    reads it; zipfile reads what lies just before the end, so of two directories each would see
    another one."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16 - 98))  # a comment, and the end in both forms
        begin, tail = file.tell(), file.read()
    end = tail.rindex(b"PK\5\6")
    if tail[end - 20 : end - 16] != b"PK\6\7":
        return int.from_bytes(tail[end + 16 : end + 20], "little")
    larger = end - 76  # the end in 64 bits, and after it a pointer to it
    if int.from_bytes(tail[end - 12 : end - 4], "little") != begin + larger:
        return -1
    return int.from_bytes(tail[larger + 48 : larger + 56], "little")


def check_values(content: dict, path):
    """Raise InputError unless the tree is bounded in size and depth, and its tensors and integers
    are ordinary ones.

    A shared part counts each time, because whoever walks the tree visits it each time.
    """
    nodes, count, shown, held = [(content, 0)], 0, 0, {}
    while nodes:
        node, depth = nodes.pop()
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            raise InputError(
                f"{path}: holds over {MOST_VALUES:,} values, or some more than {DEEPEST} levels deep"
            )
        if isinstance(node, dict):
            nodes += [(part, depth + 1) for entry in node.items() for part in entry]
        elif isinstance(node, (list, tuple, set)):
            nodes += [(part, depth + 1) for part in node]
        elif isinstance(node, torch.Tensor):
            if not is_ordinary(node):
                raise InputError(f"{path}: holds a tensor that is not an ordinary one on the CPU")
            shown += node.numel() * node.element_size()
            held[node.untyped_storage().data_ptr()] = node.untyped_storage().nbytes()
        elif (
            isinstance(node, int) and node.bit_length() > 64
        ):  # Python refuses to print a very long one
            raise InputError(f"{path}: holds an integer of {node.bit_length()} bits")
    if shown > 4 * sum(
        held.values()
    ):  # tied weights are one thing, a small file that fills the memory another
        raise InputError(
            f"{path}: its tensors have {shown:,} bytes, but share {sum(held.values()):,}"
        )


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether it is dense, strided and on the CPU, with memory for all its elements; a stride of 0
    lets one element pass for any number of them, which torch's fused kernels don't check."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and not (tensor.is_quantized or tensor.is_nested)
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def check_entries(content: dict, path):
    """Raise InputError that names the first entry of a checkpoint of ours that is missing or not
    what it must be."""
    for name, form in ENTRIES.items():
        if not fits(content, {name: form}):
            name = name.strip("?")
            if name not in content:
                raise InputError(f"{path}: damaged: no {name} in it")
            raise InputError(f"{path}: damaged: its {name} is not what a run writes there")
    log, progress, made = content["log"], content["progress"], content.get("classifier", {})
    for entry, is_right in (
        ("log", len(log["skipped"]) == len(log["updates"])),  # a flag for each update
        (
            "progress",
            progress["skipped"] <= progress["num_updates"],
        ),  # a skipped update is one, too
        ("progress", 0 <= progress.get("hours", 0) < 1e6),
        ("classifier", made.get("labels") != [] and 0 < made.get("label_scale", 1) < math.inf),
    ):
        if not is_right:
            raise InputError(f"{path}: damaged: its {entry} is not what a run writes there")
    try:
        torch.Generator().set_state(content["rng"]["cpu"])
    except (TypeError, RuntimeError):
        raise InputError(f"{path}: damaged: its rng is not a state of torch's generator") from None


def fits(value, form) -> bool:
    """Whether the value has the form: a type, a range of integers, a tuple of alternatives, [form]
    for a list of any length, [form, ...] for one of that length, {type: form} for a dict, or {name:
    form, ...} for one with at least these entries, of which those with a "?" may be missing."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(
            all(isinstance(key, name) and fits(inner, part) for key, inner in value.items())
            if isinstance(name, type)
            else fits(value[name.strip("?")], part)
            if name.strip("?") in value
            else name.endswith("?")
            for name, part in form.items()
        )
    if isinstance(form, list):
        sized = isinstance(value, (list, tuple)) and len(form) in (1, len(value))
        return sized and all(fits(inner, form[0]) for inner in value)
    if isinstance(form, tuple):
        return any(fits(value, part) for part in form)
    return (
        type(value) is int and value in form if isinstance(form, range) else isinstance(value, form)
    )
