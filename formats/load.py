"""Any kind of checkpoint, read into one form.

    loaded = load(path)     # ours, fairseq's of any age, bare weights, a folder of transformers

Tensors may be the file itself, mapped: copy what is to be kept. No code of a file is run.
"""

from pathlib import Path

from config import reading
from formats import fairseq_files, fairseq_names, hf
from run import checkpoint
from run.checkpoint import Loaded


def load(path) -> Loaded:
    """Read a file or a folder, whose kind shows by itself. Raises InputError."""
    path = Path(path)
    if hf.is_folder(path):
        return hf.load(path)
    content = checkpoint.read(path, fairseq_files.load)
    if "format" in content:
        return checkpoint.ours(content, path)
    with reading(f"{path}: not a complete checkpoint"):
        return fairseq_names.loaded(content, path)
