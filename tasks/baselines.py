"""What a bag of the tokens reaches without an encoder, by scikit-learn.

It stands beside every fine-tuning: an encoder that is not above it adds nothing to its tokenizer.
"""

import importlib.util

from tasks.classifier import figures_of
from tasks.data import Data
from text.binarized import SPECIAL

import numpy as np
import torch

STRENGTHS = (0.1, 1, 10, 100)  # of the fit, of which valid chooses: scikit-learn's C


def is_installed() -> bool:
    return importlib.util.find_spec("sklearn") is not None


def bag_of_tokens(data: Data, vocabulary: int, metric: str) -> dict | None:
    """What TF-IDF and a linear classifier reach: the figures of each split, as a fine-tuning's.

    A token's weight is (1 + log count) * (log((1 + examples) / (1 + those with it)) + 1), and rows
    have length 1. The strength of the fit is the best by `metric` on valid. None: not installed.
    """
    if not is_installed():
        print("note: without scikit-learn no bag of the tokens; pip install scikit-learn")
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer

    tokens = range(vocabulary)
    bags = TfidfVectorizer(analyzer=words_of, vocabulary=tokens, sublinear_tf=True, lowercase=False)
    train = bags.fit_transform(data.train.rows)  # (N, V), sparse
    splits = {**data.valid, "test": data.test} if data.test else data.valid
    features = {name: bags.transform(split.rows) for name, split in splits.items()}
    best = None
    for strength in STRENGTHS:
        model = fit(train, data.train.labels, strength)
        figures = {}
        for name, split in splits.items():
            outputs = outputs_of(model, features[name], data.outputs)
            figures[name] = figures_of(outputs, split, data.names)
        if best is None or figures["valid"][metric] > best["valid"][metric]:
            best = dict(strength=strength, **figures)
    return best


def words_of(row: np.ndarray) -> list[int]:
    """The tokens of an example but the special ones."""
    return row[row >= len(SPECIAL)].tolist()


def fit(features, labels: np.ndarray, strength: float):
    """The linear model with the least loss: strength * (its sum over the rows) + |weight|^2 / 2.

    features (N, V), sparse; labels: class numbers or scores (N,), for cross-entropy or squared
    error.
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    if labels.dtype.kind == "f":
        return Ridge(alpha=1 / (2 * strength), tol=1e-6).fit(features, labels)
    # of two classes scikit-learn has the difference of their weights, whose square counts twice
    C = 2 * strength if len(np.unique(labels)) == 2 else strength
    return LogisticRegression(C=C, max_iter=2000, tol=1e-6).fit(features, labels)


def outputs_of(model, features, outputs: int) -> torch.Tensor:
    """Scores (N, 1), or the logarithms of the classes' probabilities (N, outputs), float32."""
    if outputs == 1:
        return torch.from_numpy(model.predict(features)).float()[:, None]
    logs = np.full((features.shape[0], outputs), -20.0)  # of a class that training does not have
    logs[:, model.classes_] = model.predict_log_proba(features)
    return torch.from_numpy(logs).float()
