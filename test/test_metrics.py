"""The measures of fine-tuning, against their formulas and against scikit-learn and scipy."""

from tasks import metrics

import numpy as np
import pytest


def classes(count):
    """Labels, and predictions of which somewhat more than half are right."""
    rng = np.random.default_rng(count)
    label = rng.integers(0, count, 200)
    return np.where(rng.random(200) < 0.6, label, rng.integers(0, count, 200)), label


def test_binary_measures_follow_the_table_of_hits_and_misses():
    predicted, label = classes(2)
    tp, fp = np.sum((predicted == 1) & (label == 1)), np.sum((predicted == 1) & (label == 0))
    fn, tn = np.sum((predicted == 0) & (label == 1)), np.sum((predicted == 0) & (label == 0))
    measures = metrics.of_classes(predicted, label, positive=1)
    assert measures["accuracy"] == (tp + tn) / 200
    assert measures["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert measures["matthews"] == pytest.approx((tp * tn - fp * fn) / root)
    mean = (measures["accuracy"] + measures["f1"]) / 2
    assert measures["accuracy_and_f1"] == pytest.approx(mean)


def test_spearman_ranks_ties_by_their_mean():
    x, y = np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 3])
    a, b = np.array([1, 2.5, 2.5, 4]) - 2.5, np.array([1, 3.5, 2, 3.5]) - 2.5
    formula = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    assert metrics.of_scores(x, y)["spearman"] == pytest.approx(formula)


def test_a_measure_that_is_not_defined_is_zero():
    constant, label = np.zeros(4, int), np.array([0, 1, 1, 0])
    assert set(metrics.of_scores(constant, label).values()) == {0}
    assert metrics.of_classes(constant, label, 1)["matthews"] == 0
    assert metrics.of_classes(constant, constant, 1)["f1"] == 0


@pytest.mark.parametrize("count", [2, 5])
def test_measures_are_those_of_scikit_learn(count):
    theirs = pytest.importorskip("sklearn.metrics")
    predicted, label = classes(count)
    measures = metrics.of_classes(predicted, label, positive=None)
    assert measures["accuracy"] == theirs.accuracy_score(label, predicted)
    assert measures["matthews"] == pytest.approx(theirs.matthews_corrcoef(label, predicted))
    assert measures["f1"] == pytest.approx(theirs.f1_score(label, predicted, average="macro"))


def test_correlations_are_those_of_scipy():
    theirs = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    label = rng.integers(0, 6, 100) / 5  # many ties
    predicted = np.round(label + rng.normal(0, 0.5, 100), 1)
    measures = metrics.of_scores(predicted, label)
    pearson, spearman = theirs.pearsonr(predicted, label)[0], theirs.spearmanr(predicted, label)[0]
    assert measures["pearson"] == pytest.approx(pearson)
    assert measures["spearman"] == pytest.approx(spearman)
    assert measures["pearson_and_spearman"] == pytest.approx((pearson + spearman) / 2)
