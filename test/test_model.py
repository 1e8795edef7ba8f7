"""Encoder, head, targets and dropout against the formula written out."""

import dataclasses
import math

from config import ModelConfig
from data import Batch
from hardware import kernels
from model import Data2VecText, RegressionHead, data2vec_loss, teacher_targets
from test.helpers import CPU, SMALL, random_encoder
from text.binarized import PAD

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def encoder_by_formula(encoder, cfg, tokens):
    """The encoder written out for one block without softmax kernels, dropout or batches; float64;
    pads anywhere."""
    w = {k: v.double() for k, v in encoder.state_dict().items()}
    real, C, H = tokens != PAD, cfg.embed_dim, cfg.attention_heads

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attention(x, name):
        q, k, v = linear(x, f"{name}.qkv").split(C, 1)
        heads = []
        for h in range(H):
            part = slice(h * C // H, (h + 1) * C // H)
            weights = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(C // H)) * real
            heads.append(weights @ v[:, part] / weights.sum(1, keepdim=True))
        return linear(torch.cat(heads, 1), f"{name}.out_proj")

    def feed_forward(x, name):
        x = linear(x, f"{name}.fc1")
        gelu = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return linear(torch.relu(x) if cfg.activation_fn == "relu" else gelu, f"{name}.fc2")

    positions, count = [], PAD
    for token in tokens.tolist():
        count += token != PAD
        positions.append(count if token != PAD else PAD)
    x = w["embed_tokens.weight"][tokens] + w["embed_positions.weight"][positions]
    x = norm(x, "layernorm_embedding") * real[:, None]
    targets = []
    for name in (f"layers.{i}" for i in range(cfg.layers)):
        first, last = f"{name}.self_attn_layer_norm", f"{name}.final_layer_norm"
        if cfg.normalize_before:
            x = x + attention(norm(x, first), f"{name}.self_attn")
            targets.append(feed_forward(norm(x, last), name))
            x = x + targets[-1]
        else:
            x = norm(x + attention(x, f"{name}.self_attn"), first)
            targets.append(feed_forward(x, name))
            x = norm(x + targets[-1], last)
    return (norm(x, "layer_norm") if cfg.normalize_before else x), targets, real


@pytest.mark.parametrize(
    "options", [{}, {"normalize_before": True}, {"activation_fn": "relu", "layers": 3}]
)
@torch.no_grad()
def test_the_encoder_equals_the_formula_also_with_pads_inside(options):
    model, cfg = random_encoder(**options)
    tokens = torch.randint(4, 40, (3, 11))
    tokens[0, 7:] = 1
    tokens[1, [2, 5]] = 1  # a corpus may hold the pad symbol itself
    got, targets = model.encoder(tokens, True, cfg.layers)
    for b in range(3):
        expected, expected_targets, real = encoder_by_formula(model.encoder, cfg, tokens[b])
        assert torch.allclose(got[b][real].double(), expected[real], atol=2e-5, rtol=1e-5)
        for mine, formula in zip(targets, expected_targets, strict=True):
            assert torch.allclose(mine[b][real].double(), formula[real], atol=2e-5, rtol=1e-5)
    plain, padded = (model.encoder(tokens[2:], flag)[0] for flag in (False, True))
    assert torch.allclose(plain, padded, atol=1e-6)


@pytest.mark.parametrize("before", [False, True])
def test_the_last_layer_at_the_wanted_places_alone_equals_the_whole_layer_there(before):
    model, cfg = random_encoder(normalize_before=before, layers=3)
    tokens = torch.randint(4, 40, (4, 11))
    tokens[1, 8:] = PAD
    places = torch.tensor([0, 3, 4, 10, 12, 33, 34, 43])  # none in the third block
    results = []
    for arguments in ({}, dict(places=places)):
        x, targets = model.encoder(tokens, True, 3, **arguments)
        x, *targets = [y if arguments else y.flatten(0, 1)[places] for y in (x, *targets)]
        model.zero_grad()
        (x.square().sum() + targets[1].square().sum()).backward()
        results.append([x, *targets, *(p.grad.clone() for p in model.encoder.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.detach().abs().max()))


def targets_as_the_reference_pads(teacher, cfg, padded_target, places):
    """The targets with torch's own norms over the padded form, (M, C)."""
    _, layers = teacher(padded_target, True, cfg.average_top_k_layers)
    layers = [y.transpose(1, 2) for y in layers]  # (B, C, T)
    if cfg.batch_norm_target_layer:
        layers = [F.batch_norm(y, None, None, training=True) for y in layers]
    if cfg.instance_norm_target_layer:
        layers = [F.instance_norm(y) for y in layers]
    layers = [y.transpose(1, 2) for y in layers]
    if cfg.layer_norm_target_layer:
        layers = [F.layer_norm(y, y.shape[-1:]) for y in layers]
    y = sum(layers) / len(layers)
    if cfg.layer_norm_targets:
        y = F.layer_norm(y, y.shape[-1:])
    if cfg.instance_norm_targets:
        y = F.instance_norm(y.transpose(1, 2)).transpose(1, 2)
    return y.flatten(0, 1)[places]


LAYER_NORMS = [f"{kind}_norm_target_layer" for kind in ("batch", "instance", "layer")]
NORMS = [*LAYER_NORMS, "layer_norm_targets", "instance_norm_targets"]


@pytest.mark.parametrize("on", [[], *[[name] for name in NORMS], NORMS, LAYER_NORMS])
@pytest.mark.parametrize("teacher_input", ["full", "masked"])
@torch.no_grad()
def test_all_target_normalizations_squeezed_or_padded(block_dataset, on, teacher_input):
    dataset = block_dataset(teacher_input=teacher_input)
    model, cfg = random_encoder(vocabulary=61, **{name: name in on for name in NORMS})
    for ids in [dataset.epoch_batches(1)[0], max(dataset.epoch_batches(1), key=len)]:
        tokens, _, hidden = dataset.mask(ids, 1)
        if teacher_input == "masked":
            tokens = np.where(hidden, tokens, PAD)
        batch, padded = CPU.upload(dataset.batch(ids, 1)), torch.from_numpy(tokens)
        got = teacher_targets(model.encoder, batch, cfg)
        expected = targets_as_the_reference_pads(model.encoder, cfg, padded, batch.masked)
        assert torch.allclose(got, expected, atol=3e-5, rtol=1e-4)


@torch.no_grad()
def test_a_block_with_nothing_masked_gives_no_nan():
    model, cfg = random_encoder(**{name: True for name in NORMS})
    source, places = torch.randint(4, 40, (2, 10)), torch.arange(3)
    target = torch.tensor([[5, 6, 7], [PAD, PAD, PAD]])
    batch = Batch(source, target, places, places, places, np.arange(2), 20, False, True)
    assert teacher_targets(model.encoder, batch, cfg).isfinite().all()
    none = dict(target=torch.full((2, 1), PAD), masked=places[:0], target_places=places[:0])
    y = teacher_targets(model.encoder, dataclasses.replace(batch, **none), cfg)
    assert float(data2vec_loss(model(source, places[:0]), y, cfg)) == 0


@pytest.mark.parametrize("widths", [(16, 16), (16, 32, 16), (16, 32, 32, 16)])
def test_the_head_has_the_references_widths_and_names(widths):
    head = RegressionHead(ModelConfig(**SMALL, head_layers=len(widths) - 1))
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters() if p.ndim == 2}
    pairs = enumerate(zip(widths[1:], widths))
    assert shapes == {f"{2 * i}.weight": shape for i, shape in pairs}
    x = y = torch.randn(5, 16)
    for i, part in enumerate(list(head)[::2]):
        y = part(F.gelu(y) if i else y)
    assert torch.allclose(head(x), y)


def test_initial_weights():
    model = Data2VecText(ModelConfig(**{**SMALL, "embed_dim": 64, "ffn_embed_dim": 256}), 500)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif p.ndim == 1:
            assert (p == 1).all()
        else:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.1)
            assert abs(float(p.detach().mean())) < 2e-3
    for embedding in (model.encoder.embed_tokens, model.encoder.embed_positions):
        assert (embedding.weight[PAD] == 0).all()
    assert model.encoder.embed_positions.num_embeddings == SMALL["max_source_positions"] + 2


@pytest.mark.parametrize("before", [False, True])
def test_dropout_is_where_the_reference_has_it(monkeypatch, before):
    rates = dict(dropout=0.25, attention_dropout=0.4, activation_dropout=0.125)
    model, cfg = random_encoder(**rates, normalize_before=before)
    encoder, events = model.encoder.train(), []
    plain, outputs = kernels.attention, {}

    def dropout(x, p):
        events.append((p, x.clone()))
        return x

    def attention(q, k, v, attend, p):
        events.append((p, None))
        return plain(q, k, v, attend, 0.0)

    monkeypatch.setattr(kernels, "dropout", dropout)
    monkeypatch.setattr(kernels, "attention", attention)
    for name, module in encoder.named_modules():
        module.register_forward_hook(lambda m, i, out, name=name: outputs.setdefault(name, out))
    tokens = torch.randint(4, 40, (2, 9))
    _, targets = encoder(tokens, False, cfg.layers)
    assert [p for p, _ in events] == [0.25] + [0.4, 0.25, 0.125, 0.25] * cfg.layers
    assert torch.equal(events[0][1], outputs["layernorm_embedding"])
    for i in range(cfg.layers):
        _, attention, activation, last = (x for _, x in events[1 + 4 * i : 5 + 4 * i])
        assert torch.equal(attention, outputs[f"layers.{i}.self_attn.out_proj"])
        assert torch.allclose(activation, F.gelu(outputs[f"layers.{i}.fc1"]))
        assert torch.equal(last, outputs[f"layers.{i}.fc2"])
        assert targets[i] is outputs[f"layers.{i}.fc2"]
    events.clear()
    encoder.eval()(tokens)
    assert all(p == 0 for p, _ in events)
