"""What the tokens of a text tell without an encoder: TF-IDF and a linear classifier, beside every fine-tuning."""

from tasks.classifier import figures_of
from tasks.data import Data
from tasks.linear_probe import minimize
from text.binarized import SPECIAL

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = (0.1, 1, 10, 100)  # of the fit, of which valid chooses: scikit-learn's C


def count(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct tokens of each row but the special ones: their row, token and number, each (T,)."""
    tokens = np.concatenate(rows).astype(np.int64)
    pairs = np.repeat(np.arange(len(rows)), [len(row) for row in rows]) << 32 | tokens
    pairs, numbers = np.unique(pairs[tokens >= len(SPECIAL)], return_counts=True)
    return pairs >> 32, pairs & 0xFFFFFFFF, numbers


class Bags:
    """A sparse matrix (N, V) with a row of length 1 for each example: (1 + log count) * rarity of its tokens."""

    def __init__(self, counted: tuple, examples: int, rarity: np.ndarray):
        """counted: by `count`; rarity (V,): log((1 + examples) / (1 + those with the token)) + 1, of train."""
        row, token, numbers = counted
        weight = (1 + np.log(numbers)) * rarity[token]
        weight /= np.sqrt(np.bincount(row, weight * weight, examples))[row]
        self.by_row = grouped(row, token, weight, examples)
        self.by_token = grouped(token, row, weight, len(rarity))


def grouped(
    keys: np.ndarray, values: np.ndarray, weights: np.ndarray, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and weights in the order of their keys, and where each of the keys 0 to size - 1 begins."""
    order = np.argsort(keys, kind="stable")
    first = np.searchsorted(keys[order], np.arange(size))
    arrays = values[order], first, weights[order].astype(np.float32)
    return tuple(map(torch.from_numpy, arrays))


def product(part: tuple, table: Tensor) -> Tensor:
    values, first, weights = part
    return F.embedding_bag(values, table, first, mode="sum", per_sample_weights=weights)


class Product(torch.autograd.Function):
    """Bags (N, V) times weights (V, K), with a gradient that is as fast; embedding_bag's own takes 20 times as long."""

    @staticmethod
    def forward(ctx, weight: Tensor, bags: Bags) -> Tensor:
        ctx.bags = bags
        return product(bags.by_row, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return product(ctx.bags.by_token, grad.contiguous()), None


def fit(data: Data, vocabulary: int, metric: str) -> dict:
    """The figures of each split, as a fine-tuning's, at the strength that is best by `metric` on valid."""
    examples, counted, best = len(data.train.rows), count(data.train.rows), None
    rarity = np.log((1 + examples) / (1 + np.bincount(counted[1], minlength=vocabulary))) + 1
    splits = {**data.valid, **({"test": data.test} if data.test else {})}
    train = Bags(counted, examples, rarity)
    bags = {
        name: Bags(count(split.rows), len(split.rows), rarity) for name, split in splits.items()
    }
    for strength in STRENGTHS:
        weight, bias = torch.zeros(vocabulary, data.outputs), torch.zeros(data.outputs)
        decay, what = 1 / (strength * examples), "the loss of a bag of the tokens"
        minimize(
            weight,
            bias,
            lambda: Product.apply(weight, train) + bias,
            data.train.labels,
            decay,
            what,
        )
        with torch.no_grad():
            outputs = {name: Product.apply(weight, bag) + bias for name, bag in bags.items()}
        found = {
            name: figures_of(outputs[name], split, data.names) for name, split in splits.items()
        }
        if best is None or found["valid"][metric] > best["valid"][metric]:
            best = dict(strength=strength, **found)
    return best
