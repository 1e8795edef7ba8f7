"""data2vec 2.0: equal to recordings of the reference, and by formula."""

import json

import config
import train
from data import Corpus
from data2vec2 import masked_copies
from formats import fairseq_v2
from run import flags
from test.helpers import CPU, GOLDEN, golden

import numpy as np
import pytest
import torch

FOLDER = GOLDEN / "data2vec2"
NAMES = dict(depth="layers", num_heads="attention_heads")


def recorded(name: str) -> list:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def flags_of(name: str, **options) -> list:
    """train.py's arguments for the recorded run `name`."""
    theirs = json.loads((FOLDER / name / "config.json").read_text())
    parts = (theirs, theirs["optimizer"], theirs["model"], theirs["text"], theirs["decoder"])
    known = {field for part in config.PARTS for field in part.__dataclass_fields__}
    values = {"data_path": GOLDEN / "corpora" / theirs["data"]}
    for part in parts:
        values |= {NAMES.get(k, k): v for k, v in part.items() if NAMES.get(k, k) in known}
    values["adam_betas"] = "0.9,0.98"
    values |= dict(ffn_embed_dim=4 * values["embed_dim"], head_layers=2, save_dir="x")
    values |= dict(fairseq_exact=True, objective="data2vec2")
    values |= options
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def start(name: str, **options) -> tuple:
    """The recorded run at its beginning, its first weights, and an iterator of its batches."""
    cfg = config.Config(*flags.parse(config.PARTS, "", flags_of(name, **options))[0])
    corpus = Corpus(cfg.data)
    run = train.Run(cfg, CPU, len(corpus.dictionary))
    state = torch.load(FOLDER / name / "init.pt", weights_only=True)
    student, _ = fairseq_v2.from_reference(state)
    dataset = corpus.split("train")
    return run, student, dataset.batches(dataset.epoch_batches(1), 1)


def same(step, row: dict):
    assert float(step.loss) / row["sample_size"] == pytest.approx(row["loss"], rel=1e-6)
    assert float(step.gnorm) == pytest.approx(row["gnorm"], rel=1e-6)
    assert int(step.counts[0]) == row["sample_size"]


@golden
@pytest.mark.parametrize("name", ["small", "groups1"])
def test_a_run_equals_the_recorded_one(name):
    run, student, batches = start(name)
    for key, value in run.student.state_dict().items():
        assert torch.equal(value, student[key]), key
    inputs = np.load(FOLDER / name / "inputs.npz")
    for i, row in enumerate(recorded(f"{name}/trajectory.jsonl")):
        batch = next(batches)
        copies = masked_copies(batch, i, run.cfg, run.cfg.model.clone_batch)
        rows, T = copies.restore.shape
        hidden = np.zeros((rows, T), bool)
        hidden.ravel()[copies.masked] = True
        assert np.array_equal(copies.target, inputs["source"][i])
        assert np.array_equal(copies.ids, inputs["ids"][i])
        assert np.array_equal(hidden, inputs["mask"][i])
        begins = np.arange(len(copies.visible))[:, None] // run.cfg.model.clone_batch * T
        assert np.array_equal(copies.visible - begins, inputs["keep"][i])
        done = train.update(run, [batch])
        same(done.step, row)
        assert done.lr == pytest.approx(row["lr"], rel=1e-12)
    final, teacher = fairseq_v2.from_reference(
        torch.load(FOLDER / name / "final.pt", weights_only=True)
    )
    for module, state in ((run.student, final), (run.teacher.layers, teacher)):
        for key, value in module.state_dict().items():
            theirs = state[key] if module is run.student else state[f"layers.{key}"]
            assert (value - theirs).norm() <= 1e-5 * theirs.norm(), key
