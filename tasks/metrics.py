"""How good are predictions: the measures that GLUE's tasks are scored by, in numpy.

Predictions and labels are arrays (N,). All results are between -1 or 0 and 1; where a measure is
not defined, as the correlation with a constant, it is 0. Tested against scikit-learn and scipy.
"""

import numpy as np


def of_classes(predicted: np.ndarray, label: np.ndarray, positive: int | None) -> dict:
    """All measures of a classification.

    positive: the class whose F1 counts; None: the mean of all classes'.
    """
    classes = np.union1d(predicted, label)
    p, y = predicted[:, None] == classes, label[:, None] == classes  # (N, K), True once in a row
    # harmonic mean of precision and recall, of each class
    f1 = 2 * (p & y).sum(0) / (p.sum(0) + y.sum(0))
    if positive is not None:
        f1 = f1[classes == positive]
    f1 = float(f1.mean()) if len(f1) else 0.0
    accuracy = float(np.mean(predicted == label))
    # Gorodkin's R_K, which for two classes is the Matthews correlation
    matthews = correlation(p - p.mean(0), y - y.mean(0))
    mean = (accuracy + f1) / 2
    return dict(accuracy=accuracy, f1=f1, matthews=matthews, accuracy_and_f1=mean)


def of_scores(predicted: np.ndarray, label: np.ndarray) -> dict:
    """All measures of a regression."""
    linear = correlation(predicted, label)
    ranked = correlation(ranks(predicted), ranks(label))
    return dict(pearson=linear, spearman=ranked, pearson_and_spearman=(linear + ranked) / 2)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's, over all elements."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(np.sum(x / np.linalg.norm(x) * (y / np.linalg.norm(y))), -1, 1))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs, as Spearman's correlation wants."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place.reshape(-1)]
