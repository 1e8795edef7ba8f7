"""Linear classifiers by scikit-learn: on a bag of the tokens, and on frozen features (--freeze).

The bag stands beside every fine-tuning: an encoder that is not above it adds nothing to its
tokenizer.
"""

import importlib.util

from config import InputError, RunError
from hardware.device import Device
from tasks.classifier import Classifier, figures_of, outputs_of
from tasks.labelled import Data
from text.binarized import SPECIAL

import numpy as np
import torch
from torch import Tensor

STRENGTHS = (0.1, 1, 10, 100)  # of the bag's fit, of which valid chooses: scikit-learn's C
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # weight decays of the probe, of which valid chooses


def is_installed() -> bool:
    return importlib.util.find_spec("sklearn") is not None


def fit(features, labels: np.ndarray, outputs: int, strength: float) -> tuple[Tensor, Tensor]:
    """The linear map with the least loss: strength * (its sum over the rows) + |weight|^2 / 2.

    features (N, C), dense or sparse; labels: class numbers or scores (N,), for cross-entropy or
    squared error. Returns float32 weight (outputs, C) and bias (outputs,).
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    weight = np.zeros((outputs, features.shape[1]))
    if labels.dtype.kind == "f":
        ridge = Ridge(alpha=1 / (2 * strength), tol=1e-6).fit(features, labels)
        weight[0] = ridge.coef_
        bias = np.array([ridge.intercept_])
    else:
        # scikit-learn has one row of weights for two classes, which is the difference of ours: of
        # both the squares are half of its square
        present = np.unique(labels)
        C = 2 * strength if len(present) == 2 else strength
        model = LogisticRegression(C=C, max_iter=2000, tol=1e-6).fit(features, labels)
        rows, offsets = model.coef_, model.intercept_
        if len(present) == 2:
            rows = np.concatenate([-rows, rows]) / 2
            offsets = np.concatenate([-offsets, offsets]) / 2
        bias = np.full(outputs, offsets.min() - 20)  # of a class that training does not have
        weight[present] = rows
        bias[present] = offsets
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


def bag_of_tokens(data: Data, vocabulary: int, metric: str) -> dict | None:
    """What TF-IDF and a linear classifier reach: the figures of each split, as a fine-tuning's.

    A token's weight is (1 + log count) * (log((1 + examples) / (1 + those with it)) + 1), and rows
    have length 1. The strength of the fit is the best by `metric` on valid. None: not installed.
    """
    if not is_installed():
        print("note: without scikit-learn no bag of the tokens; pip install scikit-learn")
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer

    options = dict(vocabulary=range(vocabulary), sublinear_tf=True, lowercase=False)
    bags = TfidfVectorizer(analyzer=lambda row: row[row >= len(SPECIAL)].tolist(), **options)
    train = bags.fit_transform(data.train.rows)  # (N, V), sparse
    splits = {**data.valid, "test": data.test} if data.test else data.valid
    best = None
    for strength in STRENGTHS:
        weight, bias = fit(train, data.train.labels, data.outputs, strength)
        figures = {}
        for name, split in splits.items():
            outputs = bags.transform(split.rows) @ weight.numpy().T + bias.numpy()
            figures[name] = figures_of(torch.from_numpy(outputs).float(), split, data.names)
        if best is None or figures["valid"][metric] > best["valid"][metric]:
            best = dict(strength=strength, **figures)
    return best


def probes(model: Classifier, device: Device, data: Data, cfg):
    """Fit model.head on features that are computed once, with one weight decay after the other.

    Yields (decay, figures of the valid splits) while model.head is the one that has them.
    """
    if not is_installed():
        raise InputError("--freeze needs scikit-learn: pip install scikit-learn")
    train, *valid = (
        outputs_of(model.features, device, split, cfg, sort=True)
        for split in (data.train, *data.valid.values())
    )
    if not train.isfinite().all():
        raise RunError("--freeze: the encoder's features are not finite")
    mean = train.mean(0)
    scale = train.std(0, correction=0).clamp(min=1e-6)
    for decay in DECAYS:
        strength = 1 / (decay * len(train))
        standard = ((train - mean) / scale).numpy()
        weight, bias = fit(standard, data.train.labels, data.outputs, strength)
        # the same function of features as they come
        weight = weight / scale
        bias = bias - weight @ mean
        model.head.out_proj.load_state_dict(dict(weight=weight, bias=bias))
        figures = {}
        for (name, split), features in zip(data.valid.items(), valid):
            figures[name] = figures_of(features @ weight.T + bias, split, data.names)
        yield decay, figures
