"""How good are predictions: the measures that GLUE's tasks are scored by, in numpy.

Predictions and labels are arrays of the same length. All results are between -1 or 0 and 1; where a measure is not
defined, as the correlation with a constant, it is 0. Tested against scikit-learn and scipy.
"""

import numpy as np


def accuracy(predicted: np.ndarray, label: np.ndarray) -> float:
    return float(np.mean(predicted == label))


def f1(predicted: np.ndarray, label: np.ndarray, positive: int) -> float:
    """Harmonic mean of precision and recall of the class `positive`."""
    both = np.sum((predicted == positive) & (label == positive))
    either = np.sum(predicted == positive) + np.sum(label == positive)
    return float(2 * both / either) if either else 0.0


def macro_f1(predicted: np.ndarray, label: np.ndarray) -> float:
    """Mean of the F1 of all classes that occur."""
    return float(np.mean([f1(predicted, label, c) for c in np.union1d(predicted, label)]))


def matthews(predicted: np.ndarray, label: np.ndarray) -> float:
    """Matthews correlation; for more than two classes Gorodkin's R_K, which is the same for two."""
    classes = np.union1d(predicted, label)
    p = (predicted[:, None] == classes).astype(np.float64)  # (N, K), one 1 in each row
    y = (label[:, None] == classes).astype(np.float64)
    p, y = p - p.mean(0), y - y.mean(0)
    spread = np.sum(p * p) * np.sum(y * y)
    return float(np.sum(p * y) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(predicted: np.ndarray, label: np.ndarray) -> float:
    x, y = (np.asarray(a, np.float64) for a in (predicted, label))
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(np.sum(x / np.linalg.norm(x) * (y / np.linalg.norm(y))), -1, 1))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place.reshape(-1)]


def spearman(predicted: np.ndarray, label: np.ndarray) -> float:
    return pearson(ranks(predicted), ranks(label))


def of_classes(predicted: np.ndarray, label: np.ndarray, positive: int | None) -> dict:
    """All measures of a classification. positive: the class whose F1 counts; None: the mean of all classes'."""
    found = dict(
        accuracy=accuracy(predicted, label),
        f1=macro_f1(predicted, label) if positive is None else f1(predicted, label, positive),
        matthews=matthews(predicted, label),
    )
    return {**found, "accuracy_and_f1": (found["accuracy"] + found["f1"]) / 2}


def of_scores(predicted: np.ndarray, label: np.ndarray) -> dict:
    """All measures of a regression."""
    found = dict(pearson=pearson(predicted, label), spearman=spearman(predicted, label))
    return {**found, "pearson_and_spearman": (found["pearson"] + found["spearman"]) / 2}
