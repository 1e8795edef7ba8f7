"""Hostile input to fine-tuning is refused in one line, and nothing of a user's is lost."""

import errno
import json
import os
import shutil
import signal

import finetune
from config import InputError, RunError
from run import checkpoint
from tasks import labelled
from test.helpers import call
from test.test_finetune import flags, place  # noqa: F401
from text.binarized import EOS, UNK

import numpy as np
import pytest
import torch

TOKENS, POSITIONS = "encoder.embed_tokens.weight", "encoder.embed_positions.weight"
FC1 = "encoder.layers.0.fc1.weight"


@pytest.fixture(scope="module")
def tuned(place, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("tuned")
    call(finetune.main, *flags(place, out, max_epoch=1))
    return out / "checkpoint_best.pt"


def changed(path, out, keys, value):
    """A copy of the checkpoint in which one value of its tree is another."""
    content = torch.load(path, weights_only=True)
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    torch.save(content, out)
    return out


def predict(path, folder, place) -> list[str]:  # noqa: F811
    """The arguments that classify one line in `folder`."""
    (folder / "lines").write_text("w1\n")
    named = dict(ckpt=path, predict=folder / "lines", dict=place / "data" / "dict.txt")
    return [f"--{name}={value}" for name, value in named.items()] + ["--device=cpu"]


@pytest.mark.parametrize(
    "keys, value, message",
    [
        (("config", "attention_heads"), "two", "--attention_heads two: must be of type int"),
        (("config", "attention_heads"), -2, "--attention_heads -2: must be at least 1"),
        (("config", "activation_fn"), 7, "--activation_fn 7: must be of type str"),
        (("student", TOKENS), torch.zeros(0, 16), "embed_tokens.weight has 0 rows"),
        (("student", TOKENS), torch.zeros(40, 0), "--embed_dim 0: must be at least 1"),
        (
            ("student", TOKENS),
            torch.zeros(40, 16, dtype=torch.complex64),
            "not an ordinary tensor of",
        ),
        (("student", POSITIONS), torch.zeros(1, 16), "--max_source_positions -1"),
        (("student", FC1), torch.zeros(()), "not the weights of an encoder"),
        (("classifier", "labels"), [], "classifier"),
        (("classifier", "labels"), [1, 2], "classifier"),
        (("classifier", "label_scale"), float("nan"), "classifier"),
        (("classifier", "label_scale"), 0, "classifier"),
        (("classifier", "head"), {}, "head has no out_proj.weight"),
    ],
)
def test_a_checkpoint_with_one_wrong_value_is_refused_in_one_line(
    keys, value, message, place, tuned, tmp_path
):  # noqa: F811
    path = changed(tuned, tmp_path / "x.pt", keys, value)
    with pytest.raises(InputError, match=message):
        finetune.main(predict(path, tmp_path, place))
    if keys[0] != "classifier":
        with pytest.raises(InputError, match=message):
            finetune.main(flags(place, tmp_path / "out", ckpt=path))


@pytest.mark.parametrize("value", [5, [1.0], None])
# noqa: F811
def test_a_folder_of_data_that_is_no_text_is_not_looked_for(value, tuned, tmp_path, place):
    path = changed(tuned, tmp_path / "x.pt", ("config", "data_path"), value)
    with pytest.raises(InputError, match="no dict.txt in"):
        finetune.main(flags(place, tmp_path / "out", ckpt=path))


def test_names_of_classes_print_no_escape_sequence(tuned, place, tmp_path):  # noqa: F811
    names = ["\x1b[2J\n", "\ud800"]
    path = changed(tuned, tmp_path / "x.pt", ("classifier", "labels"), names)
    rows = call(finetune.main, *predict(path, tmp_path, place)).splitlines()
    assert rows[0] == "label\t\\x1b[2J\t\\ud800"


def test_a_model_too_large_for_the_memory_is_refused(place, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("hardware.device.Device.memory", lambda self: 100_000)
    with pytest.raises(InputError, match="too large for this cpu"):
        finetune.main(flags(place, tmp_path / "out"))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ckpt=None), "--ckpt"),
        (dict(ckpt="none.pt"), "no such checkpoint file"),
        (dict(save_dir=None), "--save_dir"),
        (dict(predict="x"), "not fine-tuned"),
        (dict(data_path="x"), "--data_path DIR, or --train"),
        (dict(train=None, valid=None, data_path="."), "no folder input0 in it"),
        (dict(task="rte"), "--task rte needs --data_path"),
        (dict(metric="pearson"), "--metric pearson: choose from accuracy"),
        (dict(max_epoch=0), "--max_update 0 --max_epoch 0"),
        (dict(seeds=2 * 10**9), "must be at most 1000"),
        (dict(config_name="tiny"), "pretraining"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(options, message, place, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=message):
        finetune.main(flags(place, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_dictionary_of_something_else_is_refused(place, tmp_path):  # noqa: F811
    (tmp_path / "dict.txt").write_text("w1 1\n")
    for name, message in ((place / "train.tsv", "train.tsv"), (tmp_path / "dict.txt", "symbols")):
        with pytest.raises(InputError, match=message):
            finetune.main(flags(place, tmp_path / "out", dict=name))


# ----------------------------------------------------------------------------- what is there stays


def test_nothing_is_lost_unasked(place, tmp_path):  # noqa: F811
    call(finetune.main, *flags(place, tmp_path, max_epoch=1))
    best = tmp_path / "checkpoint_best.pt"
    for options, message in (
        ({}, "finetune.jsonl; add --overwrite"),
        (dict(ckpt=best, overwrite=True), "holds the run to start from"),
    ):
        with pytest.raises(InputError, match=message):
            finetune.main(flags(place, tmp_path, **options))
    call(finetune.main, *flags(place, tmp_path, max_epoch=1, overwrite=True))


def contents(folder) -> dict:
    """{path: bytes} of an older fine-tuning."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in paths if "new" not in path.name}


FAILURES = {
    "finetune.read_task": MemoryError(),
    "finetune.report.describe": UnicodeEncodeError("ascii", "é", 0, 1, "?"),
    "finetune.new_classifier": MemoryError(),
    "finetune.tuning_step": KeyboardInterrupt(),
    "finetune.validate": RunError("diverged"),
    "run.checkpoint.torch.save": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("lr", ["1e-3", "1e-3,2e-3"])
# noqa: F811
def test_an_older_fine_tuning_stays_until_the_new_one_is_saved(lr, place, tmp_path, monkeypatch):
    folder, other = tmp_path / "out", tmp_path / "dict.txt"
    call(finetune.main, *flags(place, folder, lr=lr, max_epoch=1))
    older = contents(folder)
    assert {"checkpoint_best.pt", "results.json", "dict.txt"} < {path.name for path in older}
    # another dictionary, which must change with the checkpoint
    other.write_text((place / "data" / "dict.txt").read_text().replace("w30 1", "v30 1"))
    argv = flags(place, folder, lr=lr, max_epoch=1, overwrite=True, dict=other)
    for name, failure in FAILURES.items():

        def fail(*_, failure=failure):
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(name, fail)
            with pytest.raises(type(failure)):
                finetune.main(argv)
        assert contents(folder) == older, name
    call(finetune.main, *argv)
    assert (folder / "dict.txt").read_bytes() == other.read_bytes()
    assert not set(older.values()) & set(contents(folder).values())
    assert not list(folder.rglob("*.new.jsonl"))


def test_a_signal_ends_a_fine_tuning_with_what_it_has(place, tmp_path, monkeypatch):  # noqa: F811
    step = finetune.tuning_step

    def interrupted(tuning, groups):
        if tuning.num_updates == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(tuning, groups)

    monkeypatch.setattr(finetune, "tuning_step", interrupted)
    argv = flags(place, tmp_path, lr="1e-3,2e-3", test=place / "test.tsv")
    assert finetune.main(argv) == 128 + signal.SIGTERM
    (log,) = tmp_path.rglob("finetune.jsonl")
    assert json.loads(log.read_text().splitlines()[-1])["num_updates"] == 3
    assert checkpoint.load(log.with_name("checkpoint_best.pt"))


@pytest.mark.parametrize("name", ["dict.txt", "encoder.json", "vocab.bpe"])
def test_a_dictionary_and_a_bpe_of_the_users_stay(name, place, tmp_path):  # noqa: F811
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds another {name}"):
        finetune.main(flags(place, tmp_path, max_epoch=1))
    assert (tmp_path / name).read_text() == "mine"


# noqa: F811
def test_predictions_replace_neither_what_they_read_nor_a_device(tuned, place, tmp_path):
    shutil.copytree(tuned.parent, tmp_path / "tuned")
    best = tmp_path / "tuned" / "checkpoint_best.pt"
    argv = predict(best, tmp_path, place)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "lines")
    for name in ("lines", "link", "tuned/checkpoint_best.pt"):
        with pytest.raises(InputError, match="is a file that this reads"):
            finetune.main([*argv, "--out", str(tmp_path / name)])
    with pytest.raises(OSError, match="neither a file nor a folder"):
        finetune.main([*argv, "--out", str(tmp_path / "pipe")])
    assert (tmp_path / "lines").read_text() == "w1\n" and (tmp_path / "pipe").is_fifo()
    assert checkpoint.load(best) and not list(tmp_path.glob("*.tmp"))


def test_text_that_the_dictionary_does_not_know_is_told(tmp_path, capsys):
    def tokenize(column):
        return [np.array([UNK, 4, EOS]) for _ in column]

    labelled.encode(tokenize, [["▁the ▁fil", "fil ##m"]], None, 64)
    assert "50% of the tokens are <unk>" in capsys.readouterr().err
