"""data2vec 2.0: equal to recordings of the reference, and by formula."""

import json
import math
import shutil
from dataclasses import replace

import config
import train
from data import Batch, Corpus
from data2vec2 import Data2Vec2, masked_copies, targets_of_copies
from formats import fairseq_v2
from test.helpers import (
    COPIES,
    CPU,
    GOLDEN,
    SMALL,
    call,
    compare_checkpoints,
    config_of,
    few,
    flags_of,
    golden,
    make_run,
    rows_of,
    torchrun,
)
from text.binarized import BOS, PAD

import numpy as np
import pytest
import torch

FOLDER = GOLDEN / "data2vec2"
LAST = "checkpoint_last.pt"
NAMES = dict(depth="layers", num_heads="attention_heads")


def recorded(name: str) -> list:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def argv_of(name: str, **options) -> list:
    """train.py's arguments for the recorded run `name`."""
    theirs = json.loads((FOLDER / name / "config.json").read_text())
    parts = (theirs, theirs["optimizer"], theirs["model"], theirs["text"], theirs["decoder"])
    known = {field for part in config.PARTS for field in part.__dataclass_fields__}
    values = {"data_path": GOLDEN / "corpora" / theirs["data"]}
    for part in parts:
        values |= {NAMES.get(k, k): v for k, v in part.items() if NAMES.get(k, k) in known}
    values["adam_betas"] = "0.9,0.98"
    values |= dict(ffn_embed_dim=4 * values["embed_dim"], head_layers=2, save_dir="x")
    values |= dict(fairseq_exact=True, objective="data2vec2", min_target_var=0, min_pred_var=0)
    values |= options
    return flags_of(values)


@golden
@pytest.mark.parametrize("name", ["small", "groups1"])
def test_a_run_equals_the_recorded_one(name):
    cfg = config_of(*argv_of(name))
    corpus = Corpus(cfg.data)
    run = train.Run(cfg, CPU, len(corpus.dictionary))
    first = torch.load(FOLDER / name / "init.pt", weights_only=True)
    student, _ = fairseq_v2.from_reference(first)
    for key, value in run.student.state_dict().items():
        assert torch.equal(value, student[key]), key
    inputs = np.load(FOLDER / name / "inputs.npz")
    read = []  # by the decoder
    run.student.decoder.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    dataset = corpus.split("train")
    batches = dataset.batches(dataset.epoch_batches(1), 1)
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
        noise = read[-1].detach().numpy()[hidden]
        assert np.array_equal(noise, inputs["noise"][i].reshape(noise.shape))
        assert int(done.step.counts[0]) == row["sample_size"]
        assert float(done.step.loss) == pytest.approx(row["loss"] * row["sample_size"], rel=1e-6)
        assert float(done.step.gnorm) == pytest.approx(row["gnorm"], rel=1e-6)
        assert done.lr == pytest.approx(row["lr"], rel=1e-12)
    last = torch.load(FOLDER / name / "final.pt", weights_only=True)
    final, teacher = fairseq_v2.from_reference(last)
    layers = {f"layers.{key}": value for key, value in run.teacher.layers.state_dict().items()}
    for ours, theirs in ((run.student.state_dict(), final), (layers, teacher)):
        for key, value in ours.items():
            assert (value - theirs[key]).norm() <= 1e-5 * theirs[key].norm(), key


@golden
def test_the_resumed_run_and_two_batches_an_update_equal_the_recorded_ones(tmp_path):
    def argv(folder, **options):
        options |= dict(save_dir=tmp_path / folder, disable_validation=True, log_interval=1)
        return argv_of("small", **options, device="cpu")

    call(train.main, *argv("two", update_freq=2, max_update=8))
    call(train.main, *argv("whole", save_interval_updates=8, keep_interval_updates=-1))
    (tmp_path / "rest").mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint_1_8.pt", tmp_path / "rest" / LAST)
    call(train.main, *argv("rest"))
    for folder, name in (("whole", "trajectory"), ("two", "accumulated"), ("rest", "resumed")):
        ours, theirs = rows_of(tmp_path / folder), recorded(f"small/{name}.jsonl")
        for key in ("loss", "gnorm"):
            expected = pytest.approx([row[key] for row in theirs], rel=1e-6)
            assert [row[key] for row in ours] == expected, folder


# ------------------------------------------------------------------------- by default, without it


def few2(corpus_dir, folder, *argv) -> list[str]:
    copies = flags_of(COPIES | dict(decoder_layers=2, mask_prob=0.48))
    return few(corpus_dir, folder, *copies, *argv)


def test_two_workers_equal_one(corpus_dir, tmp_path):
    argv = ["--max_update", 6, "--mask_noise_std", 0]
    result = torchrun(2, *few2(corpus_dir, tmp_path / "two", *argv))
    assert result.returncode == 0, result.stderr
    call(train.main, *few2(corpus_dir, tmp_path / "one", *argv, "--update_freq", 2))
    for a, b in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        assert all(a[k] == b[k] for k in ("sample_size", "nsentences", "ntokens", "num_updates"))
        assert all(a[k] == pytest.approx(b[k], rel=2e-5) for k in ("loss", "gnorm"))
    compare_checkpoints(tmp_path / "one" / LAST, tmp_path / "two" / LAST, exactly=False)


def blocks_of(*lengths: int) -> Batch:
    """Whole blocks of these lengths, padded."""
    rng = np.random.default_rng(0)
    tokens = np.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(tokens, lengths):
        row[:length] = [BOS, *rng.integers(4, 60, length - 1)]
    none = np.zeros(0, np.int64)
    padded = bool((tokens == PAD).any())
    ids = np.arange(7, 7 + len(lengths))
    return Batch(tokens, tokens, none, none, none, ids, sum(lengths), padded, padded)


def settings(**options) -> config.Config:
    values = SMALL | COPIES | dict(data_path="x", tokens_per_sample=64, head_layers=3)
    values |= dict(decoder_kernel=4, decoder_layers=3, mask_noise_std=0.5)
    return config_of(*flags_of(values | options))


@pytest.mark.parametrize("lengths", [(20, 20), (20, 19, 7, 2, 1), (1, 1), (3, 40)])
@pytest.mark.parametrize("mask_prob", [0.48, 0.1, 0.95])
def test_each_copy_hides_its_share_of_the_text_and_no_pad(lengths, mask_prob):
    cfg, batch, T = settings(mask_prob=mask_prob), blocks_of(*lengths), max(lengths)
    copies = masked_copies(batch, 3, cfg, 4)
    hidden = np.zeros((4 * len(lengths), T), bool)
    hidden.ravel()[copies.masked] = True
    left = [max(1, int(n * (1 - mask_prob))) for n in lengths for _ in range(4)]
    is_text = (batch.target != PAD).repeat(4, 0)
    assert ((is_text & ~hidden).sum(1) == left).all() and not (hidden & ~is_text).any()
    assert np.array_equal(copies.source == PAD, hidden | ~is_text)
    for row, visible in enumerate(copies.visible - np.arange(len(hidden))[:, None] // 4 * T):
        assert set(np.flatnonzero(is_text[row] & ~hidden[row])) <= set(visible)
        assert len(set(visible)) == len(visible) and not hidden[row, visible].any()
    targets = copies.target.ravel()[copies.target_places]
    assert np.array_equal(targets, batch.target.repeat(4, 0)[hidden])
    # each update has masks of its own, and so has each set of blocks
    if len(copies.masked) > 20:
        others = replace(batch, ids=batch.ids + 1)
        for blocks, update in ((batch, 3), (batch, 4), (others, 3)):
            masked = masked_copies(blocks, update, cfg, 4).masked
            assert np.array_equal(copies.masked, masked) == (blocks is batch and update == 3)


def conv_by_formula(x, conv):
    """x (T, C) -> (T, D), zeros beyond both ends, an even kernel reaching further to the left."""
    T, k = len(x), conv.kernel_size[0]
    x = np.pad(x, ((k // 2, k // 2), (0, 0)))
    weight, bias = (p.detach().double().numpy() for p in (conv.weight, conv.bias))
    out = np.tile(bias, (T, 1))
    of_group = len(bias) // conv.groups
    for d in range(len(bias)):
        first = d // of_group * weight.shape[1]
        for j in range(k):
            out[:, d] += x[j : j + T, first : first + weight.shape[1]] @ weight[d, :, j]
    return out


def gelu(x):
    return x * np.vectorize(math.erf)(x / math.sqrt(2)) / 2 + x / 2


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, dict(decoder_residual=True, decoder_dim=16)])
def test_predictions_and_targets_follow_the_formula_row_by_row(options):
    cfg = settings(average_top_k_layers=1, **options)
    torch.manual_seed(0)
    student = Data2Vec2(cfg.model, 60)
    for p in student.parameters():
        torch.nn.init.normal_(p, 0.1, 0.4)
    host = masked_copies(blocks_of(20, 13, 3), 5, cfg, 3)
    copies, T, L = CPU.upload(host), 20, host.visible.shape[1]
    torch.manual_seed(3)
    prediction, features, real = student(copies)
    torch.manual_seed(3)  # torch's global generator, in the order of the hidden places' draw
    noise = torch.empty(9, T - L, 16).normal_(0, 0.5).double().numpy()
    expected, targets = [], []
    for row in range(9):
        block = host.target[row // 3]
        length = int((block != PAD).sum())
        x, _ = student.encoder.features(torch.from_numpy(block[None]), True)
        text = np.flatnonzero(host.source[row] != PAD)
        y, _ = student.encoder(None, embedded=(x[:, text], None))
        h = np.zeros((length, 16))
        h[text] = y[0]
        for place in np.setdiff1d(np.arange(length), text):
            h[place] = noise[row, host.restore[row, place] - row * T - L]
        for (conv,) in student.decoder.blocks:
            y = conv_by_formula(h, conv)
            y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
            h = gelu(y) + (h if cfg.model.decoder_residual else 0)
        for part in student.decoder.proj:
            if isinstance(part, torch.nn.Linear):
                h = h @ part.weight.double().numpy().T + part.bias.double().numpy()
            else:
                h = gelu(h)
        hidden = np.setdiff1d(np.arange(length), text)
        expected.append(h[hidden])
        # the last layer's target, with mean 0 and variance 1 over the tokens of the block
        _, (t,) = student.encoder(None, top_k=1, embedded=(x[:, :length], None))
        t = t[0].double().numpy()
        targets.append(((t - t.mean(0)) / np.sqrt(t.var(0) + 1e-5))[hidden])
    assert np.allclose(prediction, np.concatenate(expected), rtol=1e-4, atol=1e-4)
    target = targets_of_copies(student.encoder, features, real, copies, cfg.model)
    assert np.allclose(target, np.concatenate(targets), rtol=1e-4, atol=1e-4)


def test_biases_and_norms_do_not_decay_but_in_exact_mode(corpus_dir):
    for exact in (False, True):
        run, _ = make_run(corpus_dir, **COPIES, fairseq_exact=exact, weight_decay=0.5)
        before = {name: p.detach().clone() for name, p in run.student.named_parameters()}
        weights = run.optimizer.weights
        for p in run.student.parameters():
            p.grad = torch.zeros_like(p)
        run.optimizer.step(0.5, 0, torch.zeros(()), torch.ones(3, dtype=torch.int64))
        for name, p in run.student.named_parameters():
            factor = 0.75 if exact or p.ndim > 1 else 1.0
            assert torch.allclose(p, before[name] * factor), name
        numbers = [number for group in weights.groups for number in group]
        assert sorted(numbers) == list(range(len(before)))
