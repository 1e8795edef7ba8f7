"""Damaged, incomplete and foreign files: refused in one line, never run, and a good older file is
found.

`python -m test.soak fuzz` damages many more.
"""

import os
import pickle
import re
import shutil
from unittest.mock import Mock

import convert
import preprocess
import train
from config import InputError
from formats.load import load
from judge import plot
from run import checkpoint
from run import describe as dataset
from test import soak
from test.helpers import Payload, call, few, make_dataset, program, rows_of

import pytest
import torch


def test_resume_falls_back_to_the_next_older_good_file_and_says_so(saved, corpus_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (folder / "checkpoint_last.pt.tmp").write_text("a broken save")

    def spoil(*paths):
        for path in paths:
            raw = bytearray(path.read_bytes())
            middle = len(raw) // 2
            raw[middle : middle + 400] = bytes(400)  # one byte could be padding between two records
            path.write_bytes(raw)

    spoil(folder / "checkpoint_last.pt", folder / "checkpoint_1_4.pt")
    (folder / "checkpoint_best.pt").unlink()
    printed = call(train.main, *few(corpus_dir, folder, "--max_update", 5))
    assert re.search(r"checkpoint_last\.pt: damaged.*trying the next older", printed)
    assert re.search(r"resuming from .*checkpoint_1_3\.pt at update 3", printed)
    numbers = [row["num_updates"] for row in rows_of(folder)]
    assert numbers == [1, 2, 3, 4, 5] and not list(folder.glob("*.tmp"))

    spoil(*folder.glob("*.pt"))
    before = sorted(p.name for p in folder.glob("*.pt"))
    with pytest.raises(InputError, match=f"none of the {len(before)} checkpoints"):
        call(train.main, *few(corpus_dir, folder, "--max_update", 6))
    assert sorted(p.name for p in folder.glob("*.pt")) == before


@pytest.mark.parametrize("owner, name", [(torch, "load"), (checkpoint, "checked_moments")])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("unable to mmap 9 bytes from file: Cannot allocate memory (12)"),
    ],
)
def test_memory_that_runs_out_in_a_resume_is_no_damage(
    saved, corpus_dir, tmp_path, monkeypatch, owner, name, error
):
    shutil.copytree(saved, tmp_path / "run")
    monkeypatch.setattr(owner, name, Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        train.main(few(corpus_dir, tmp_path / "run", "--max_update", 5))
    assert raised.value is error


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_pipes_and_devices_in_place_of_files_are_refused_at_once(saved, tmp_path, kind):
    def put(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
        return path

    folder, _ = make_dataset(tmp_path / "data")
    shutil.copytree(saved, tmp_path / "run")
    put(tmp_path / "run" / "train.jsonl")
    text, odd = tmp_path / "text", put(tmp_path / "odd")
    text.write_text("w1 w2\n")
    prepare = ["--bpe", "none", "--workers", 1, "--dest", tmp_path / "out", "--train"]
    hf = put(tmp_path / "config.json").parent
    for main, *argv in (
        (train.main, *few(folder, tmp_path / "run", "--max_update", 5)),
        (plot.main, odd),
        (preprocess.main, *prepare, odd),
        (preprocess.main, *prepare, text, "--dict", odd),
        (preprocess.main, *prepare, text, "--dict", put(folder / "dict.txt")),
        (dataset.main, "--data_path", folder),
        (convert.main, "--ckpt", hf, "--to", "native", tmp_path / "x"),
    ):
        with pytest.raises(InputError, match="not a file|a folder without a checkpoint"):
            main([str(word) for word in argv])


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile warns of what a mutation asks for
def test_damaged_files_of_every_kind_load_or_are_refused_in_one_line(tmp_path):
    for package in ("safetensors", "tokenizers", "yaml"):
        pytest.importorskip(package)
    figures = soak.fuzz(25, tmp_path, seed=1)
    assert figures["other"] == []
    assert figures["files"] == 17 * 25 and figures["refused"] > 200


def test_loading_never_runs_code_from_a_file(tmp_path):
    for name, options in (("zip", {}), ("old", {"_use_new_zipfile_serialization": False})):
        mark = tmp_path / f"ran_{name}"
        weights = {"encoder.sentence_encoder.layernorm_embedding.bias": torch.ones(2)}
        content = {"model": weights, "args": Payload(mark)}
        torch.save(content, tmp_path / f"{name}.pt", **options)
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content))
        for reader in (load, checkpoint.load):
            for file in (f"{name}.pt", f"{name}.pkl"):
                with pytest.raises(InputError):
                    reader(tmp_path / file)
        assert not mark.exists()
        torch.load(tmp_path / f"{name}.pt", weights_only=False)
        assert mark.exists()  # the payload works


def test_odd_characters_break_no_line_and_write_nothing_outside_the_save_directory(tmp_path):
    folder, _ = make_dataset(tmp_path / "a\nb \x1b[31mc")
    words = (folder / "dict.txt").read_text().replace("w0 100", "\x1b[2J\x07../../x 9")
    (folder / "dict.txt").write_text(words)
    printed = call(dataset.main, "--data_path", folder)
    where = tmp_path / "o\nut" / "run"
    printed += call(train.main, *few(folder, where, "--max_update", 1))
    assert "\x1b" not in printed and "\x07" not in printed
    assert all(path.parent == where for path in tmp_path.rglob("*.pt"))
    result = program("data.py", "--data_path", f"{folder}\nx")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "\x1b" not in result.stderr
