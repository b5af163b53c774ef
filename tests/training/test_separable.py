"""Classes that a model without penalties separates."""

import re
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureClassifierCV


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


def linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(5, 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"Increase gradient_alpha=0\."),
        ({"features": "gradient"}, r"Increase gradient_alpha=0\."),
        ({"alpha": 0}, r"Increase alpha=0 and gradient_alpha=0\."),
    ],
)
def test_gradient_features_that_separate_without_a_penalty_are_told(options, match):
    X, y = rows(True)
    options = {"alpha": 0.1, "gradient_alpha": 0, **options}
    with pytest.warns(ConvergenceWarning, match=f"classes are separable.*{match}"):
        GradientFeatureClassifier(linear(), **options).fit(X, y)


@pytest.mark.filterwarnings("error")
def test_gradient_features_that_do_not_separate():
    X, y = rows(False)
    X = np.repeat(X[:, :1], 5, 1)
    GradientFeatureClassifier(linear(), alpha=0.1, gradient_alpha=0).fit(X, y)


@pytest.mark.filterwarnings("ignore:The best of .* at an end of the list:UserWarning")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alphas": [0.1, 0], "gradient_alphas": [np.inf]}, "In 3 of 6 fits.* 0 out of alphas"),
        ({"alphas": [0.1], "gradient_alphas": [1, 0]}, "In 3 of 6 fits.* 0 out of gradient_alphas"),
        (
            {"alphas": [1, 0], "gradient_alphas": [1, 0], "scoring": "accuracy"},
            r"In 9 of 12 fits.* 0 out of alphas and gradient_alphas\.",
        ),
    ],
)
def test_separable_folds_of_a_search_are_told_once(options, match):
    X, y = rows(True)
    search = GradientFeatureClassifierCV(linear(), cv=3, refit=False, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        search.fit(X, y)
    told = [str(w.message) for w in caught if w.category is ConvergenceWarning]
    assert len(told) == 1
    assert re.search(match, told[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [GradientFeatureClassifier, GradientFeatureClassifierCV])
def test_penalties_that_are_chosen_for_separable_classes_are_not_zero(kind):
    X, y = rows(True)
    model = kind(linear()).fit(X, y)
    assert model.alpha_ > 0
    assert model.gradient_alpha_ > 0
    assert model.score(X, y) == 1
