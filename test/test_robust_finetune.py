"""Hostile input to fine-tuning is refused in one line, and nothing of a user's is lost."""

import errno
import shutil
from unittest.mock import Mock

import finetune
from config import InputError, RunError
from run import checkpoint
from test.helpers import call
from test.test_finetune import flags, predicted

import pytest
import torch

TOKENS, POSITIONS = "encoder.embed_tokens.weight", "encoder.embed_positions.weight"
FC1 = "encoder.layers.0.fc1.weight"


@pytest.fixture(scope="module")
def tuned(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    call(finetune.main, *flags(place, out, max_epoch=1))
    return out / "checkpoint_best.pt"


def changed(path, out, entry, key, value):
    """A copy of the checkpoint in which one value of an entry is another."""
    content = torch.load(path, weights_only=True)
    content[entry][key] = value
    torch.save(content, out)
    return out


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "lines").write_text("w1\n")
    return tmp_path / "lines"


@pytest.mark.parametrize(
    "entry, key, value, message",
    [
        ("config", "attention_heads", "two", "--attention_heads two: must be of type int"),
        ("config", "attention_heads", -2, "--attention_heads -2: must be at least 1"),
        ("config", "activation_fn", 7, "--activation_fn 7: must be of type str"),
        ("config", "data_path", 5, "no dict.txt in"),
        ("student", TOKENS, torch.zeros(0, 16), "0 tokens"),
        ("student", TOKENS, torch.zeros(40, 0), "--embed_dim 0: must be at least 1"),
        ("student", TOKENS, torch.zeros(40, 16).to(torch.complex64), "not an ordinary tensor of"),
        ("student", POSITIONS, torch.zeros(1, 16), "1 positions"),
        ("student", FC1, torch.zeros(()), "not the weights of an encoder"),
        ("classifier", "labels", [], "classifier"),
        ("classifier", "labels", [1, 2], "classifier"),
        ("classifier", "label_scale", float("nan"), "classifier"),
        ("classifier", "label_scale", 0, "classifier"),
        ("classifier", "head", {}, "head has no out_proj.weight"),
    ],
)
def test_a_checkpoint_with_one_wrong_value_is_refused_in_one_line(
    entry, key, value, message, place, tuned, tmp_path, lines
):
    path = changed(tuned, tmp_path / "x.pt", entry, key, value)
    with pytest.raises(InputError, match=message):
        predicted(path, lines)
    if entry != "classifier":
        with pytest.raises(InputError, match=message):
            finetune.main(flags(place, tmp_path / "out", ckpt=path))


def test_names_of_classes_print_no_escape_sequence(tuned, tmp_path, lines):
    names = ["\x1b[2J\n", "\ud800"]
    path = changed(tuned, tmp_path / "x.pt", "classifier", "labels", names)
    assert predicted(path, lines)[0] == ["label", "\\x1b[2J", "\\ud800"]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ckpt=None), "--ckpt"),
        (dict(ckpt="none.pt"), "no such checkpoint file"),
        (dict(save_dir=None), "--save_dir"),
        (dict(predict="x"), "not fine-tuned"),
        (dict(data_path="x"), "--data_path DIR, or --train"),
        (dict(train=None, valid=None, text=None, label=None, data_path="."), "no folder input0"),
        (dict(train=None), "--train F needs --valid F"),
        (dict(train=None, valid=None, test="x", data_path="."), "--data_path DIR, or --train"),
        (dict(train=None, valid=None, data_path="."), "--text and --label go with --train"),
        (dict(attention_heads=1), "its --attention_heads is 2, and here 1"),
        (dict(lr="1e-2,0.01"), "one learning rate twice"),
        (dict(task="rte"), "--task rte needs --data_path"),
        (dict(metric="pearson"), "--metric pearson: choose from accuracy"),
        (dict(max_epoch=0), "--max_update 0 --max_epoch 0"),
        (dict(seeds=2 * 10**9), "must be at most 1000"),
        (dict(config_name="tiny"), "pretraining"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(options, message, place, tmp_path):
    with pytest.raises(InputError, match=message):
        finetune.main(flags(place, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_dictionary_of_something_else_is_refused(place, tmp_path):
    (tmp_path / "dict.txt").write_text("w1 1\n")
    for name, message in ((place / "train.tsv", "train.tsv"), (tmp_path / "dict.txt", "symbols")):
        with pytest.raises(InputError, match=message):
            finetune.main(flags(place, tmp_path / "out", dict=name))


# ----------------------------------------------------------------------------- what is there stays


def test_nothing_is_lost_unasked(tuned, place, tmp_path):
    one = tmp_path / "lr_0.1_seed_1"  # of several
    shutil.copytree(tuned.parent, one)
    (one / "dict.txt").unlink()
    for folder, options, message in (
        (tuned.parent, {}, "finetune.jsonl; add --overwrite"),
        (tuned.parent, dict(ckpt=tuned, overwrite=True), "holds the run to start from"),
        (tmp_path, dict(ckpt=one / tuned.name, overwrite=True), "holds the run to start from"),
    ):
        with pytest.raises(InputError, match=message):
            finetune.main(flags(place, folder, **options))


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
def test_an_older_fine_tuning_stays_until_the_new_one_is_saved(lr, place, tmp_path, monkeypatch):
    folder, other = tmp_path / "out", tmp_path / "dict.txt"
    call(finetune.main, *flags(place, folder, lr=lr, max_epoch=1))
    older = contents(folder)
    assert {"checkpoint_best.pt", "results.json", "dict.txt"} < {path.name for path in older}
    # another dictionary, which must change with the checkpoint
    other.write_text((place / "data" / "dict.txt").read_text().replace("w30 1", "v30 1"))
    argv = flags(place, folder, lr=lr, max_epoch=1, overwrite=True, dict=other)
    for name, failure in FAILURES.items():
        with monkeypatch.context() as patch:
            patch.setattr(name, Mock(side_effect=failure))
            with pytest.raises(type(failure)):
                finetune.main(argv)
        assert contents(folder) == older, name
    notes = [path.parent / "notes.txt" for path in folder.rglob("finetune.jsonl")]
    for path in notes:
        path.write_text("mine")
    call(finetune.main, *argv)
    assert (folder / "dict.txt").read_bytes() == other.read_bytes()
    assert not set(older.values()) & set(contents(folder).values())
    assert all(path.read_text() == "mine" for path in notes)
    assert not list(folder.rglob("*.new.jsonl"))


@pytest.mark.parametrize("name", ["dict.txt", "encoder.json", "vocab.bpe"])
def test_a_dictionary_and_a_bpe_of_the_users_stay(name, place, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds another {name}"):
        finetune.main(flags(place, tmp_path, max_epoch=1))
    assert (tmp_path / name).read_text() == "mine"


def test_predictions_do_not_replace_what_they_read(tuned, tmp_path, lines):
    (tmp_path / "link").symlink_to(lines)
    for path in (lines, tmp_path / "link", tuned):
        with pytest.raises(InputError, match="is a file that this reads"):
            predicted(tuned, lines, "--out", path)
    assert lines.read_text() == "w1\n" and checkpoint.load(tuned)
