"""Checkpoints: names, fairseq's files, what is refused, what is kept."""

import json

# must be first: device.py sets TORCH_DEVICE_BACKEND_AUTOLOAD, which torch reads on import
import pytest
import torch

import ema
import eval as evaluation
import train
from config import InputError
from runtime import checkpoint
from tests.helpers import (
    FEW,
    GOLDEN,
    call,
    golden,
    make_dataset,
    random_encoder,
    rows_of,
)


def test_names_map_one_to_one_to_the_reference_s():
    student, cfg = random_encoder(1, normalize_before=True)
    teacher = ema.make_teacher(random_encoder(2, normalize_before=True)[0].encoder)
    theirs = checkpoint.to_reference(student.state_dict(), teacher.state_dict())
    assert (
        "encoder.sentence_encoder.layers.1.self_attn.k_proj.bias" in theirs
        and "encoder.regression_head.2.weight" in theirs
    )
    back_student, back_teacher = checkpoint.from_reference(theirs)
    for back, module in ((back_student, student), (back_teacher, teacher)):
        assert set(back) == set(module.state_dict())
        assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())


@golden
def test_the_reference_s_names_are_all_known_and_none_is_made_up():
    theirs = torch.load(GOLDEN / "checkpoint" / "fairseq_doc128.pt", weights_only=True)["model"]
    made = checkpoint.to_reference(*checkpoint.from_reference(theirs))
    assert set(made) == set(theirs) and set(made["encoder._ema"]) == set(theirs["encoder._ema"])
    assert all(torch.equal(made[k], v) for k, v in theirs.items() if k != "encoder._ema")
    assert all(torch.equal(made["encoder._ema"][k], v) for k, v in theirs["encoder._ema"].items())


@golden
def test_a_fairseq_checkpoint_evaluates_to_its_own_validation_loss(tmp_path):
    recorded = json.loads((GOLDEN / "train" / "doc128" / "config.json").read_text())["final_valid"]
    file, words = GOLDEN / "checkpoint" / "fairseq_doc128.pt", GOLDEN / "corpora" / "words-bin"
    for flag in ("--ckpt", "--init_from"):
        result = json.loads(call(evaluation.main, flag, file, "--data_path", words, "--device", "cpu", "--json"))
        assert result["loss"] == pytest.approx(recorded["loss"], rel=5e-6)
        assert (result["sample_size"], result["batches"]) == (recorded["sample_size"], recorded["batches"])
    argv = [
        "--init_from",
        file,
        "--data_path",
        words,
        "--save_dir",
        tmp_path,
        "--embed_dim",
        64,
        "--ffn_embed_dim",
        256,
        "--layers",
        4,
        "--attention_heads",
        4,
        "--tokens_per_sample",
        128,
        "--average_top_k_layers",
        3,
        "--max_tokens",
        1024,
        "--max_update",
        2,
        "--device",
        "cpu",
        "--log_interval",
        1,
        "--disable_validation",
        "--dropout",
        0,
        "--attention_dropout",
        0,
    ]
    call(train.main, *argv, "--fairseq_exact")
    assert rows_of(tmp_path)[0]["loss"] < 2.2  # an untrained model begins at 2.6 here


def test_foreign_and_misfitting_checkpoints_are_refused(tmp_path, corpus_dir):
    good = tmp_path / "run"
    call(train.main, *FEW, "--max_update", 2, "--data_path", corpus_dir, "--save_dir", good)
    file = good / "checkpoint_last.pt"
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:5000])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    for name, message in (
        ("text", "cannot be read"),
        ("cut", "cannot be read"),
        ("other", "neither"),
        ("list", "holds a list"),
    ):
        with pytest.raises(InputError, match=message):
            checkpoint.load(tmp_path / f"{name}.pt")
    bigger = make_dataset(tmp_path / "bigger", words=80)[0]
    start = [*FEW, "--max_update", "2", "--save_dir", str(tmp_path / "new"), "--init_from", str(file)]
    with pytest.raises(InputError, match="another dictionary"):
        call(train.main, *start, "--data_path", bigger)
    with pytest.raises(InputError, match=r"is \(.*this model's is"):
        call(train.main, *start, "--data_path", corpus_dir, "--embed_dim", "32")
    with pytest.raises(InputError, match="has no encoder.layers.2"):
        call(train.main, *start, "--data_path", corpus_dir, "--layers", "3")
    with pytest.raises(InputError, match="layers was 2, is 3"):
        call(train.main, *FEW, "--max_update", "4", "--save_dir", good, "--data_path", corpus_dir, "--layers", "3")
    with pytest.raises(InputError, match="another dictionary"):
        call(evaluation.main, "--ckpt", file, "--data_path", bigger)


def test_interval_checkpoints_are_pruned_and_share_the_bytes_of_the_last(tmp_path, corpus_dir):
    call(
        train.main,
        *FEW,
        "--max_update",
        6,
        "--data_path",
        corpus_dir,
        "--save_dir",
        tmp_path,
        "--save_interval_updates",
        2,
        "--keep_interval_updates",
        2,
    )
    names = sorted(p.name for p in tmp_path.glob("*.pt*"))
    assert names == ["checkpoint_1_4.pt", "checkpoint_1_6.pt", "checkpoint_best.pt", "checkpoint_last.pt"]
    assert checkpoint.load(tmp_path / "checkpoint_1_4.pt").content["progress"]["num_updates"] == 4
