"""How good are predictions: the measures that GLUE's tasks are scored by, in numpy.

Predictions and labels are arrays (N,). All results are between -1 or 0 and 1; where a measure is
not defined, as the correlation with a constant, it is 0. Tested against scikit-learn and scipy.
"""

import numpy as np


def of_classes(predicted: np.ndarray, label: np.ndarray, positive: int | None) -> dict:
    """All measures of a classification.

    positive: the class whose F1 counts; None: the mean of all classes'.
    """
    accuracy = float(np.mean(predicted == label))
    classes = np.union1d(predicted, label) if positive is None else [positive]
    f1 = float(np.mean([f1_of(predicted == c, label == c) for c in classes]))
    mean = (accuracy + f1) / 2
    measures = dict(accuracy=accuracy, f1=f1, matthews=matthews(predicted, label))
    return measures | dict(accuracy_and_f1=mean)


def of_scores(predicted: np.ndarray, label: np.ndarray) -> dict:
    """All measures of a regression."""
    linear = pearson(predicted, label)
    ranked = pearson(ranks(predicted), ranks(label))
    return dict(pearson=linear, spearman=ranked, pearson_and_spearman=(linear + ranked) / 2)


def f1_of(predicted: np.ndarray, label: np.ndarray) -> float:
    """Harmonic mean of precision and recall, of booleans."""
    either = np.sum(predicted) + np.sum(label)
    return 2 * np.sum(predicted & label) / either if either else 0.0


def matthews(predicted: np.ndarray, label: np.ndarray) -> float:
    """Matthews correlation; for more than two classes Gorodkin's R_K, the same for two."""
    classes = np.union1d(predicted, label)
    p = (predicted[:, None] == classes).astype(np.float64)  # (N, K), one 1 in each row
    y = (label[:, None] == classes).astype(np.float64)
    p, y = p - p.mean(0), y - y.mean(0)
    spread = np.sum(p * p) * np.sum(y * y)
    return float(np.sum(p * y) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(predicted: np.ndarray, label: np.ndarray) -> float:
    x, y = np.asarray(predicted, np.float64), np.asarray(label, np.float64)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(np.sum(x / np.linalg.norm(x) * (y / np.linalg.norm(y))), -1, 1))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs, as Spearman's correlation wants."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place.reshape(-1)]
