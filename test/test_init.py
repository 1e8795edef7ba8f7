"""How the weights start."""

import dataclasses
import math

from config import ModelConfig
from data import PAD
from init import sinusoids, start
from model import Data2VecText, Encoder

import pytest
import torch

CFG = ModelConfig(
    layers=2,
    embed_dim=256,
    ffn_embed_dim=512,
    attention_heads=4,
    average_top_k_layers=2,
    init="local",
)
TOKENS = 500


def model(**changes) -> Data2VecText:
    torch.manual_seed(0)
    return Data2VecText(dataclasses.replace(CFG, **changes), TOKENS).eval()


def attention_of_a_hidden_word(student) -> torch.Tensor:
    """(T,) weights with which the first layer's heads read from place 10 of blocks that hide it; the heads' mean."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, TOKENS, (64, 21), generator=generator)
    tokens[:, 10] = 4
    x, _ = student.encoder.embed(tokens, padded=False)
    layer, heads = student.encoder.layers[0], CFG.attention_heads
    x = layer.self_attn_layer_norm(x)
    q, k, _ = (
        layer.self_attn.qkv(x).view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    )  # (B, H, T, C / H)
    return (
        (q[:, :, 10:11] @ k.transpose(2, 3) / math.sqrt(q.shape[-1]))
        .softmax(-1)
        .mean((0, 1, 2))
        .detach()
    )


def test_from_the_local_start_a_hidden_word_reads_the_words_beside_it():
    near = attention_of_a_hidden_word(model(normalize_before=True))
    flat = attention_of_a_hidden_word(model(normalize_before=True, init="bert"))
    beside, far = [9, 11], [0, 1, 19, 20]
    assert near[beside].mean() > 1.5 * near[far].mean()
    assert flat[beside].mean() == pytest.approx(float(flat[far].mean()), rel=0.1)


def test_the_local_start_has_the_sizes_that_it_says():
    student = model(objective="mlm")
    encoder, layer = student.encoder, student.encoder.layers[0]
    assert (
        encoder.embed_tokens.weight[PAD].eq(0).all()
        and encoder.embed_positions.weight[PAD].eq(0).all()
    )
    for embedding in (encoder.embed_tokens, encoder.embed_positions):
        assert float(embedding.weight[2:].detach().square().mean().sqrt()) == pytest.approx(
            0.2, rel=0.02
        )
    queries, keys, values = layer.self_attn.qkv.weight.chunk(3)
    assert torch.equal(queries, keys) and float(queries.detach().std()) == pytest.approx(
        0.7 / 16, rel=0.05
    )
    assert float(values.detach().std()) == pytest.approx(1 / 16, rel=0.05)
    assert float(layer.fc2.weight.detach().std()) == pytest.approx(512**-0.5, rel=0.05)
    logits = student(torch.randint(4, TOKENS, (8, 20)), torch.arange(160), padded=False)
    assert float(logits.detach().std()) == pytest.approx(0.02 * 16, rel=0.15)  # as from `bert`


def test_the_start_depends_on_nothing_but_the_seed_and_an_encoder_alone_has_it_too():
    assert all(map(torch.equal, model().parameters(), model().parameters()))
    torch.manual_seed(0)
    encoder = Encoder(CFG, TOKENS)
    start(encoder, "local")
    assert torch.equal(encoder.embed_positions.weight, model().encoder.embed_positions.weight)


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoids_by_formula(width):
    half = math.ceil(width / 2)
    for place, row in enumerate(sinusoids(5, width).tolist()):
        angles = [place / 10000 ** (i / half) for i in range(half)]
        expected = [math.sqrt(2) * f(a) for f in (math.sin, math.cos) for a in angles][:width]
        assert row == pytest.approx(expected, abs=1e-6)
