"""The measures of fine-tuning, against their formulas written out and against scikit-learn and scipy."""

from tasks import metrics

import numpy as np
import pytest


def classes(seed, count=3, n=200):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, count, n)
    return np.where(rng.random(n) < 0.6, label, rng.integers(0, count, n)), label


@pytest.mark.parametrize("seed", range(3))
def test_binary_measures_follow_the_table_of_hits_and_misses(seed):
    predicted, label = classes(seed, 2)
    tp, fp = np.sum((predicted == 1) & (label == 1)), np.sum((predicted == 1) & (label == 0))
    fn, tn = np.sum((predicted == 0) & (label == 1)), np.sum((predicted == 0) & (label == 0))
    assert metrics.accuracy(predicted, label) == (tp + tn) / 200
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert metrics.f1(predicted, label, 1) == pytest.approx(
        2 * precision * recall / (precision + recall)
    )
    root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert metrics.matthews(predicted, label) == pytest.approx((tp * tn - fp * fn) / root)
    assert metrics.matthews(1 - label, label) == pytest.approx(-1)


def test_spearman_ranks_ties_by_their_mean():
    assert metrics.ranks(np.array([10, 20, 20, 5])).tolist() == [2, 3.5, 3.5, 1]
    x, y = np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 3])
    a, b = np.array([1, 2.5, 2.5, 4]) - 2.5, np.array([1, 3.5, 2, 3.5]) - 2.5
    assert metrics.spearman(x, y) == pytest.approx(
        (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    )
    assert metrics.spearman(x, np.exp(x)) == 1


def test_a_measure_that_is_not_defined_is_zero():
    constant, label = np.zeros(4, int), np.array([0, 1, 1, 0])
    assert (
        metrics.pearson(constant, label)
        == metrics.matthews(constant, label)
        == metrics.spearman(constant, label)
        == 0
    )
    assert metrics.f1(constant, constant, 1) == 0


@pytest.mark.parametrize("count", [2, 5])
def test_measures_are_those_of_scikit_learn(count):
    theirs = pytest.importorskip("sklearn.metrics")
    predicted, label = classes(7, count)
    assert metrics.accuracy(predicted, label) == theirs.accuracy_score(label, predicted)
    assert metrics.matthews(predicted, label) == pytest.approx(
        theirs.matthews_corrcoef(label, predicted)
    )
    assert metrics.macro_f1(predicted, label) == pytest.approx(
        theirs.f1_score(label, predicted, average="macro")
    )
    for c in range(count):
        score = theirs.f1_score(label, predicted, labels=[c], average="macro")
        assert metrics.f1(predicted, label, c) == pytest.approx(score)


def test_correlations_are_those_of_scipy():
    theirs = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    label = rng.integers(0, 6, 100) / 5  # many ties
    predicted = np.round(label + rng.normal(0, 0.5, 100), 1)
    assert metrics.pearson(predicted, label) == pytest.approx(theirs.pearsonr(predicted, label)[0])
    assert metrics.spearman(predicted, label) == pytest.approx(
        theirs.spearmanr(predicted, label)[0]
    )
    found = metrics.of_scores(predicted, label)
    assert found["pearson_and_spearman"] == pytest.approx(
        (found["pearson"] + found["spearman"]) / 2
    )
