"""Classes that a model without penalties separates."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier


def rows(separable):
    rng, y = np.random.default_rng(0), np.arange(40) % 2
    X = rng.normal(size=(40, 5))
    if separable:
        X[:, 0] = 10 * y - 5
    return X, y


@pytest.mark.parametrize("features", ["activation", "full"])
def test_separable_classes_without_a_penalty_are_told(features):
    X, y = rows(True)
    model = GradientFeatureClassifier(nn.Linear(5, 4), features=features, alpha=0, gradient_alpha=0)
    with pytest.warns(ConvergenceWarning, match=r"classes are separable.* Increase alpha=0"):
        model.fit(X, y)


@pytest.mark.parametrize(
    ("options", "separable"),
    [({"alpha": 0}, False), ({"alpha": 1e-3}, True), ({"alpha": 0, "loss": "squared"}, True)],
)
def test_other_problems_are_not(options, separable):
    X, y = rows(separable)
    model = GradientFeatureClassifier(nn.Linear(5, 4), features="activation", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(X, y)
