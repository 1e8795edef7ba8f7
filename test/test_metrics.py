"""The measures of fine-tuning are those of scikit-learn and scipy."""

from tasks import metrics
from tasks.classifier import figures_of
from tasks.labelled import Split

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("count", [2, 5])
def test_measures_of_classes_are_those_of_scikit_learn(count):
    theirs = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(count)
    label = rng.integers(0, count, 200)
    predicted = np.where(rng.random(200) < 0.6, label, rng.integers(0, count, 200))
    ours = metrics.of_classes(predicted, label, positive=None)
    assert ours["accuracy"] == theirs.accuracy_score(label, predicted)
    assert ours["matthews"] == pytest.approx(theirs.matthews_corrcoef(label, predicted))
    assert ours["f1"] == pytest.approx(theirs.f1_score(label, predicted, average="macro"))
    assert ours["accuracy_and_f1"] == pytest.approx((ours["accuracy"] + ours["f1"]) / 2)
    of_one = metrics.of_classes(predicted == 1, label == 1, positive=1)["f1"]
    assert of_one == pytest.approx(theirs.f1_score(label == 1, predicted == 1))


def test_correlations_are_those_of_scipy():
    theirs = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    label = rng.integers(0, 6, 100) / 5  # many ties
    predicted = np.round(label + rng.normal(0, 0.5, 100), 1)
    ours = metrics.of_scores(predicted, label)
    a, b = theirs.pearsonr(predicted, label)[0], theirs.spearmanr(predicted, label)[0]
    expected = dict(pearson=a, spearman=b, pearson_and_spearman=(a + b) / 2)
    assert ours == pytest.approx(expected)


def test_a_measure_that_is_not_defined_is_zero():
    constant, label = np.zeros(4, int), np.array([0, 1, 1, 0])
    assert set(metrics.of_scores(constant, label).values()) == {0}
    assert metrics.of_classes(constant, label, 1)["matthews"] == 0
    assert metrics.of_classes(constant, constant, 1)["f1"] == 0


@pytest.mark.parametrize("names, f1", [("0 1", 4 / 5), ("0.0 1.0", 4 / 5), ("a b", 11 / 15)])
def test_f1_is_of_the_class_one_however_it_is_written(names, f1):
    split = Split([], np.array([0, 0, 1, 1]))
    figures = figures_of(torch.eye(2)[[0, 1, 1, 1]], split, names.split())
    assert figures["f1"] == pytest.approx(f1)
