"""Any kind of checkpoint, read into one form.

    loaded = load(path)     # ours, fairseq's of any age, bare weights, a folder of transformers

Tensors may be the file itself, mapped: copy what is to be kept. No code of a file is run. What is
neither a tensor nor a plain Python value is a fairseq_files.Inert in `content`.
"""

from pathlib import Path

from config import InputError, reading
from formats import fairseq_files, fairseq_names, hf
from run import checkpoint
from run.checkpoint import Loaded


def load(path) -> Loaded:
    """Read a file or a folder, whose kind shows by itself. Raises InputError."""
    path = Path(path)
    # a folder of transformers, if only in part
    if any((path / name).is_file() for name in ("config.json", hf.SAFE, hf.PICKLED)):
        loaded = hf.load(path)
    else:
        content = checkpoint.read(path, fairseq_files.load)
        with reading(f"{path}: not a complete checkpoint"):
            what = checkpoint.ours if "format" in content else fairseq_names.loaded
            loaded = what(content, path)
    for name, tensor in [*loaded.student.items(), *(loaded.teacher or {}).items()]:
        if isinstance(tensor, fairseq_files.Inert):
            raise InputError(f"{path}: {name} is a {type(tensor).__name__}, which is not loaded")
    return loaded
