"""How do we know: the proofs of the core, against the formula written out and against numbers that
were recorded from the reference. Those are skipped where they are not beside the project.

CPU, no network: `bash run_1p.sh test`.
"""

import dataclasses
import json
import math
import re

import ema
import train
from config import DataConfig, EmaConfig, ModelConfig, TrainConfig
from data import mask_block
from formats import fairseq_names
from model import data2vec_loss, teacher_targets
from run import checkpoint, describe
from test.helpers import (  # noqa: F401
    COPIES,
    CPU,
    FEW,
    GOLDEN,
    SMALL,
    block_dataset,
    call,
    compare_checkpoints,
    corpus_dir,
    flags_of,
    golden,
    make_run,
    rows_of,
    same_figures,
    speed_aside,
)
from text.binarized import BOS, PAD, Dictionary

import numpy as np
import pytest
import torch

# ------------------------------------------------------------------------------------------- data

# what their names are here, where they differ
FACTS = dict(empty="empty_batches", sentences="sentences_used", tokens="tokens_used")
FACTS |= dict(sha_src="sha256_source", sha_tgt="sha256_target", sha_ids="sha256_ids")
BATCHES = ["base", "base_valid", "npu_1p", "complete_256", "none_128", "eos_512"]


@golden
@pytest.mark.parametrize("name", BATCHES)
def test_batches_equal_the_references_recorded_ones(name):
    recorded = json.loads((GOLDEN / "batches" / f"{name}.json").read_text())
    folder = GOLDEN / "corpora" / {"bin": "bpe-bin"}.get(recorded["data"], recorded["data"])
    argv = ["--data_path", folder, "--fairseq_exact", "--json", "--split", recorded["split"]]
    argv += ["--max_tokens", recorded["max_tokens"], *flags_of(recorded["config"])]
    for key, expected in recorded["epochs"].items():
        epoch, rank, world_size = re.match(r"epoch(\d+)_shard(\d+)of(\d+)", key).groups()
        which = flags_of(dict(epoch=epoch, rank=rank, world_size=world_size))
        facts = json.loads(call(describe.main, *argv, *which))
        assert {name: facts[FACTS.get(name, name)] for name in expected} == expected, key
        for ours in ("dictionary_size", "mask_id", "sentences", "tokens"):
            assert facts[ours] == recorded[ours]
        assert facts["blocks"] == recorded["n_blocks"]


@pytest.mark.parametrize("stdev", [0.0, 1.5])
@pytest.mark.parametrize(("random", "leave"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.2, 0.3)])
def test_masks_follow_the_rule_step_by_step(corpus_dir, stdev, random, leave):
    dictionary = Dictionary(corpus_dir / "dict.txt")
    cfg = DataConfig(mask_stdev=stdev, random_token_prob=random, leave_unmasked_prob=leave, seed=9)
    for index in range(40):
        n, epoch = 5 + index, index % 3 + 1
        rng = np.random.default_rng(int(hash((9, epoch, index)) % 1e6))
        starts = rng.choice(n, int(0.35 * n / 4 + rng.random()), replace=False).tolist()
        spans = [4] * len(starts)
        if stdev:
            spans = [max(0, int(round(x))) for x in rng.normal(4, stdev, size=len(starts))]
        expected = {p for a, span in zip(starts, spans) for p in range(a, a + span) if p < n}
        special = rng.random(n) < random + leave if random + leave else np.zeros(n, bool)
        left = special & (leave > 0)
        if random and leave:
            left = special & (rng.random(n) < leave / (random + leave))

        hidden, shows = mask_block(n, dictionary, cfg, epoch, index)
        assert set(np.flatnonzero(hidden).tolist()) == expected
        for place in range(n):
            if place not in expected or left[place]:
                assert shows[place] == -1
            elif special[place]:
                assert 4 <= shows[place] < len(dictionary)
            else:
                assert shows[place] == dictionary.mask_id


def test_a_batch_holds_blocks_padded_on_the_right_and_the_teachers_two_inputs(block_dataset):
    full, masked = block_dataset(teacher_input="full"), block_dataset(teacher_input="masked")
    mask_id = full.dictionary.mask_id
    assert any(full.batch(ids, 1).source_padded for ids in full.epoch_batches(1))
    for ids in full.epoch_batches(1):
        a, b = full.batch(ids, 1), masked.batch(ids, 1)
        blocks = [full.read_block(i) for i in ids.tolist()]
        assert all(block[0] == BOS for block in blocks) and a.ntokens == sum(map(len, blocks))
        for row, block in enumerate(blocks):
            n = len(block)
            assert np.array_equal(a.target[row, :n], block) and (a.target[row, n:] == PAD).all()
            hidden = block[b.source[row, :n] == mask_id]
            assert np.array_equal(b.target[row][b.target[row] != PAD], hidden)
        assert np.array_equal(a.source, b.source) and np.array_equal(a.target_places, a.masked)
        assert np.array_equal(a.target.ravel()[a.target_places], b.target.ravel()[b.target_places])
        assert np.array_equal(a.masked, np.flatnonzero(a.source == mask_id))


# ------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    ("beta", "scale"), [(4.0, 1.0), (0.5, 2.0), (0.0, 1.0), (0.0, -1.0), (1.0, 0.0)]
)
def test_the_loss_equals_its_formula(beta, scale):
    prediction, target = torch.randn(7, 16) * 3, torch.randn(7, 16)
    d = (prediction - target).abs().double()
    smooth = d**2 if beta == 0 else torch.where(d < beta, d**2 / (2 * beta), d - beta / 2)
    expected = smooth.sum() * (scale if scale > 0 else 1 / 4)
    cfg = ModelConfig(**SMALL, loss_beta=beta, loss_scale=scale)
    loss = data2vec_loss(prediction, target, cfg)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


# ------------------------------------------------------------------------------------ a whole run


@golden
@pytest.mark.parametrize("name", ["doc128", "doc128_full", "npu64", "npu64_one_worker"])
def test_a_whole_run_equals_the_references_recorded_one(tmp_path, name):
    folder = GOLDEN / "train" / name
    recorded = json.loads((folder / "config.json").read_text())
    options = dict(recorded["config"])
    options["data_path"] = GOLDEN / "corpora" / options.pop("data")
    argv = "--config_name base --fairseq_exact --device cpu --amp off --log_interval 1".split()
    paths = ["--save_dir", tmp_path, "--init_from", folder / "init.pt"]
    call(train.main, *argv, *flags_of(options), *paths)

    expected = [json.loads(line) for line in (folder / "trajectory.jsonl").read_text().splitlines()]
    same_figures(rows_of(tmp_path), expected)
    loss = rows_of(tmp_path, "valid_loss")[-1]["valid_loss"]
    assert loss == pytest.approx(recorded["final_valid"]["loss"], rel=5e-6)

    saved = checkpoint.load(tmp_path / "checkpoint_last.pt")
    mine = fairseq_names.to_reference(saved.student, saved.teacher)
    final = torch.load(folder / "final.pt", weights_only=True)
    for a, b in ((mine, final), (mine["encoder._ema"], final["encoder._ema"])):
        assert set(a) == set(b)
        assert all((a[k] - b[k]).abs().max() < 2e-5 for k in b if k != "encoder._ema")


# -------------------------------------------------------------------------------------- schedules


def test_the_decay_follows_the_references_line():
    cfg = EmaConfig(ema_decay=0.9, ema_end_decay=0.99, ema_anneal_end_step=10)
    decays = [ema.decay_at(update, cfg) for update in (0, 1, 5, 10, 11)]
    assert decays == pytest.approx([0.9, 0.909, 0.945, 0.99, 0.99])


def test_the_learning_rate_warms_up_and_falls_as_the_formula_says():
    cosine = [0.05 * (1 + math.cos(math.pi * i / 8)) for i in range(9)]
    for warmup, last, updates, expected in (
        (4, 12, range(13), [0, 0.025, 0.05, 0.075, *cosine]),
        (0, 5, [0], [0.1]),
        (200, 100, [99], [0.0495]),
    ):
        cfg = TrainConfig(lr=0.1, warmup_updates=warmup, max_update=last)
        assert [train.lr_at(update, cfg) for update in updates] == pytest.approx(expected)


# ------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_an_update_is_adam_with_eps_beside_the_uncorrected_root(corpus_dir, clip_norm):
    betas, eps, decay = (0.8, 0.9), 0.03, 0.1  # large, so that their places show
    rules = dict(adam_betas="0.8,0.9", adam_eps=eps, weight_decay=decay, clip_norm=clip_norm)
    run, dataset = make_run(corpus_dir, lr=0.01, **rules)
    state = {n: (p.detach().double().clone(), 0.0, 0.0) for n, p in run.student.named_parameters()}
    for t, ids in enumerate(dataset.epoch_batches(1)[:5], 1):
        batch = dataset.batch(ids, 1)
        here = CPU.upload(batch)
        target = teacher_targets(run.teacher, here, run.cfg.model)
        loss = data2vec_loss(run.student(here.source, here.masked), target, run.cfg.model)
        loss = loss / len(batch.masked)
        grads = dict(zip(state, torch.autograd.grad(loss, list(run.student.parameters()))))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        lr = train.lr_at(t - 1, run.cfg.train)
        done = train.update(run, [batch])
        assert float(done.step.gnorm) == pytest.approx(norm, rel=1e-5)
        assert norm > 0.05  # so that clipping to it shows

        factor = min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0
        weights = dict(run.student.named_parameters())
        for name, (p, m, v) in state.items():
            g = grads[name].double() * factor
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g * g
            p = p - lr * decay * p
            p = p - lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m / (v.sqrt() + eps)
            state[name] = p, m, v
            assert torch.allclose(weights[name].detach().double(), p, atol=2e-6), (t, name)


def test_update_freq_2_equals_one_batch_of_twice_the_size(corpus_dir):
    (whole, dataset), (parts, _) = make_run(corpus_dir), make_run(corpus_dir)
    for ids in [ids for ids in dataset.epoch_batches(1) if len(ids) >= 4][:4]:
        cut = len(ids) // 3
        one = train.update(whole, [dataset.batch(ids, 1)])
        two = train.update(parts, [dataset.batch(part, 1) for part in (ids[:cut], ids[cut:])])
        assert float(two.step.loss) == pytest.approx(float(one.step.loss), rel=1e-5)
        assert float(two.step.gnorm) == pytest.approx(float(one.step.gnorm), rel=1e-5)
        assert two.step.counts.tolist() == one.step.counts.tolist()
    for a, b in zip(whole.weights.parameters, parts.weights.parameters):
        assert torch.allclose(a, b, atol=2e-6)


def test_an_update_without_a_masked_token_or_without_a_batch_counts_as_zero(corpus_dir):
    run, dataset = make_run(corpus_dir)
    batch = dataset.batch(dataset.epoch_batches(1)[0], 1)
    none = np.zeros(0, np.int64)
    bare = dataclasses.replace(batch, source=batch.target, masked=none, target_places=none)
    for batches in ([bare], []):
        done = train.update(run, batches)
        assert [float(done.step.loss), float(done.step.gnorm), int(done.step.counts[0])] == [0] * 3
    assert all(p.isfinite().all() for p in run.weights.parameters) and run.num_updates == 2


@pytest.mark.parametrize("scale", [2.0**30, 2.0])
def test_an_fp16_overflow_skips_the_update_and_is_not_counted(corpus_dir, scale):
    run, dataset = make_run(corpus_dir, device=dataclasses.replace(CPU, amp=torch.float16))
    if scale == 2:  # the loss overflows, and its gradient does not
        run.student.regression_head[-1].bias.data[0] = 7e4
    before = [p.detach().clone() for p in run.weights.parameters]
    scaler = run.optimizer.scaler
    scaler.scale(torch.zeros(()))  # makes the scale, which the next line sets
    scaler.update(scale)
    run.optimizer.loss_scale = scaler.get_scale()
    batch = dataset.batch(dataset.epoch_batches(1)[0], 1)
    assert train.update(run, [batch]) is None
    assert run.num_updates == 0 and scaler.get_scale() == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(before, run.weights.parameters))


# ------------------------------------------------------------------------------------ the teacher


@pytest.mark.parametrize("layers_only", [True, False])
def test_the_teacher_is_a_copy_that_moves_by_the_formula_without_gradient(corpus_dir, layers_only):
    schedule = dict(ema_anneal_end_step=10, ema_decay=0.5, ema_end_decay=0.9)
    schedule |= dict(ema_transformer_layers_only=layers_only)
    run, dataset = make_run(corpus_dir, update_freq=3, **schedule)
    expected = {name: p.clone() for name, p in run.teacher.state_dict().items()}
    student = run.student.encoder.state_dict()  # views of the weights
    assert all(torch.equal(p, student[name]) for name, p in expected.items())
    batches = [dataset.batch(ids, 1) for ids in dataset.epoch_batches(1)[:6]]
    for number in (1, 2):
        done = train.update(run, batches[3 * number - 3 : 3 * number])
        assert done.ema_decay == pytest.approx(ema.decay_at(number - 1, run.cfg.ema))
        decay = ema.decay_at(number, run.cfg.ema)
        for name, new in run.teacher.state_dict().items():
            old = expected[name]
            expected[name] = student[name].clone()
            if name.startswith("layers.") or not layers_only:
                expected[name] = decay * old + (1 - decay) * student[name]
            assert torch.allclose(new, expected[name], atol=1e-6) and new.dtype == torch.float32
    assert all(p.grad is None and not p.requires_grad for p in run.teacher.parameters())
    assert not run.teacher.training


# ---------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "extra",
    ["", "--fairseq_exact", "--update_freq 3", "--amp bf16", "--log_interval 5", "--mlm_weight 1"]
    + [" ".join(flags_of(COPIES))],
)
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, corpus_dir, monkeypatch, extra):
    # about 20 batches an epoch (7 updates under update_freq 3): the interruptions are within epochs
    dropout = "--dropout 0.1 --attention_dropout 0.1"
    length = "--max_update 30 --save_interval_updates 4"
    argv = [*FEW, "--data_path", corpus_dir, *f"{length} {dropout} {extra}".split()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(train.main, *argv, "--save_dir", whole)
    real, calls = train.update, []

    def failing(run, batches):
        calls.append(run.num_updates)
        if run.num_updates in (6, 26) and calls.count(run.num_updates) == 1:
            raise KeyboardInterrupt
        return real(run, batches)

    monkeypatch.setattr(train, "update", failing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            call(train.main, *argv, "--save_dir", parts)
    call(train.main, *argv, "--save_dir", parts)
    assert 4 in calls and 24 in calls and calls.count(5) == 2  # it did go back to the checkpoint

    compare_checkpoints(whole / "checkpoint_last.pt", parts / "checkpoint_last.pt")
    for key in ("loss", "valid_loss"):
        assert speed_aside(rows_of(whole, key)) == speed_aside(rows_of(parts, key))
    step = 5 if "log_interval" in extra else 1
    assert [row["num_updates"] for row in rows_of(parts)] == list(range(step, 31, step))
