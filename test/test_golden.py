"""What a release of fairseq did with the corpus in test/golden, and what is done here.

Every clone can run this. docs/golden.md says how it was recorded.
"""

import json

import convert
import data
import train
from run import checkpoint, describe
from test.golden import rule
from test.helpers import (
    HERE,
    call,
    compare_checkpoints,
    dataset_files,
    flags_of,
    preprocess_words,
    rows_of,
    same_figures,
    tensors_of,
)

import numpy as np
import pytest
import torch

FOLDER = HERE / "test" / "golden"
CHECKPOINT = FOLDER / "checkpoint_2_40.pt"
RECORDED = json.loads((FOLDER / "numbers.json").read_text())


@pytest.fixture(params=["released", "changed"])
def batches(request, monkeypatch):
    """Whose batches: those of fairseq's release, or of its repository, which are the ones here."""
    if request.param == "released":  # its masks come from numpy's older generator
        monkeypatch.setattr(np.random, "default_rng", np.random.RandomState)
        monkeypatch.setattr(data, "hide_blocks_is_exact", lambda _: False)
    return request.param


def flags(batches: str, settings: dict) -> list:
    last = ["--drop_remainder", batches == "changed"]  # the release keeps the last batch
    corpus = ["--data_path", FOLDER / "corpus", "--fairseq_exact", *last]
    return corpus + flags_of(settings)


def test_the_text_of_the_rule_gives_the_files_that_fairseq_wrote(tmp_path):
    for split in rule.LINES:
        (tmp_path / f"{split}.txt").write_text(rule.text(split))
    texts = {split: [tmp_path / f"{split}.txt"] for split in rule.LINES}
    preprocess_words(tmp_path / "bin", "--nwords", 200, **texts)
    assert dataset_files(tmp_path / "bin") == dataset_files(FOLDER / "corpus")


@pytest.mark.parametrize("name", RECORDED["settings"]["batches"])
def test_batches_equal_those_that_fairseq_made(batches, name):
    recorded = RECORDED["batches"][batches][name]
    assert len(recorded) >= 3
    for key, theirs in recorded.items():
        split, _, epoch, _, rank, _, workers = key.split()  # train epoch 1 worker 0 of 2
        which = dict(split=split, epoch=epoch, rank=rank, world_size=workers)
        argv = flags(batches, RECORDED["settings"]["batches"][name] | which)
        facts = json.loads(call(describe.main, *argv, "--json"))
        ours = dict(empty="empty_batches", sentences="sentences_used", tokens="tokens_used")
        assert {k: facts[ours.get(k, k)] for k in theirs} == theirs, key


def test_a_run_equals_the_one_of_fairseq_and_continues_from_its_checkpoint(tmp_path, batches):
    model = torch.load(CHECKPOINT, weights_only=True)["model"]
    shapes = {name: model[name].shape for name in model if name.endswith((".weight", ".bias"))}
    weights = {name: torch.from_numpy(value) for name, value in rule.weights(shapes).items()}
    torch.save(weights, tmp_path / "first.pt")
    argv = [*flags(batches, RECORDED["settings"]["run"]), "--device", "cpu", "--log_interval", 1]
    call(train.main, *argv, "--init_from", tmp_path / "first.pt", "--save_dir", tmp_path / "run")
    recorded = RECORDED["run"][batches]
    same_figures(rows_of(tmp_path / "run"), recorded["updates"])
    losses = [row["valid_loss"] for row in rows_of(tmp_path / "run", "valid_loss")]
    assert losses == pytest.approx([row["loss"] for row in recorded["validations"]], rel=5e-6)
    if batches == "released":  # the checkpoint is of that run
        (tmp_path / "rest").mkdir()
        to = ["--to", "native", tmp_path / "rest" / "checkpoint_last.pt"]
        call(convert.main, "--ckpt", CHECKPOINT, *to, "--drop_remainder", "false")
        ours, theirs = tmp_path / "run" / CHECKPOINT.name, tmp_path / "rest" / "checkpoint_last.pt"
        for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=2e-6)
        call(train.main, *argv, "--save_dir", tmp_path / "rest")
        same_figures(rows_of(tmp_path / "rest"), recorded["updates"][40:])
        compare_checkpoints(tmp_path / "run" / theirs.name, theirs, exactly=False)


def test_the_one_vector_of_fairseqs_fp16_optimizer_gives_the_same_moments(tmp_path):
    content = torch.load(CHECKPOINT, weights_only=True)
    names = [name for name in content["model"] if not name.endswith(("version", "_ema"))]
    last = content["last_optimizer_state"]
    weights = [content["model"][name] for name in names]
    assert last["param_groups"][0]["params"] == list(range(len(names)))
    assert len(last["state"]) < len(names)
    flat = {}
    for moment in checkpoint.MOMENTS:
        parts = [last["state"].get(i, {moment: 0 * p})[moment] for i, p in enumerate(weights)]
        flat[moment] = torch.cat([part.flatten() for part in parts])
    last.update(state={0: {"step": 40, **flat}}, loss_scale=128.0)
    torch.save(content, tmp_path / "fp16.pt")
    for path in (CHECKPOINT, tmp_path / "fp16.pt"):
        call(convert.main, "--ckpt", path, "--to", "native", tmp_path / f"from_{path.name}")
    both = [tensors_of(tmp_path / f"from_{name}") for name in (CHECKPOINT.name, "fp16.pt")]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True)) and len(both[0]) > 100
