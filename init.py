"""How the weights start.

`bert` is the reference's start. From it a small model that only names hidden words stays on a plateau for millions of
tokens, until its attention has found the places nearby; data2vec's loss helps it there. With `local` attention looks at
them from the first update, so that a model of width 256 learns words in minutes on one CPU core (docs/results.md).

Sources: Trockman and Kolter 2023, 'Mimetic initialization of self-attention layers' (arXiv 2305.09828), for keys like
queries; Vaswani et al. 2017, 'Attention is all you need' (arXiv 1706.03762), for sinusoids.
"""

import math

import torch
from torch import nn

PAD = 1


def start(model: nn.Module, how: str):
    """Give a `model.Data2VecText` or an `Encoder` its first weights; how: `bert` or `local`."""
    model.apply(init_bert)
    if how == "local":
        init_local(model)


@torch.no_grad()
def init_bert(module: nn.Module):
    """N(0, 0.02) for Linear and Embedding weights, zero for biases and PAD's row."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        module.weight[module.padding_idx].zero_()


@torch.no_grad()
def init_local(model: nn.Module):
    encoder, head = getattr(model, "encoder", model), getattr(model, "lm_head", None)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, module.in_features**-0.5)
    for layer in encoder.layers:  # a place attends to places like it
        queries, keys, _ = layer.self_attn.qkv.weight.chunk(3)
        keys.copy_(queries.mul_(0.7))
    positions = sinusoids(*encoder.embed_positions.weight.shape)  # and places near it are like it
    encoder.embed_positions.weight.copy_(0.2 * positions)[PAD].zero_()
    encoder.embed_tokens.weight.mul_(10)  # to 0.2: Adam's steps are small beside it
    if head is not None:
        head.layer_norm.weight.fill_(0.1)  # so the logits are as small as before


def sinusoids(count: int, width: int) -> torch.Tensor:
    """(count, width) float32 of root mean square 1: sines, then cosines, of wavelengths from 2 pi to 20,000 pi."""
    half = (width + 1) // 2
    angles = torch.arange(count)[:, None] * 10000 ** (-torch.arange(half) / half)  # (count, half)
    return math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], 1)[:, :width]
