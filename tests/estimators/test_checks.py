"""scikit-learn's own checks, all of them."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
)


class Factory:
    """A factory whose name is the same in every process, as test names must be."""

    def __call__(self):
        return nn.Sequential(nn.LazyLinear(24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh())

    def __repr__(self):
        return "Factory()"


def failing(estimator):
    """Return the checks that an estimator is known to fail, and why."""
    if getattr(estimator, "loss", None) != "squared":
        return {}
    why = "which samples make logits of the predictions depends on how often each is repeated"
    return {"check_sample_weight_equivalence_on_dense_data": why}


@parametrize_with_checks(
    [
        GradientFeatureClassifier(),
        GradientFeatureClassifier(features="activation"),
        GradientFeatureClassifier(features="gradient"),
        GradientFeatureClassifier(Factory()),
        GradientFeatureClassifier(precision="float32"),
        GradientFeatureClassifier(loss="squared"),
        GradientFeatureRegressor(),
        GradientFeatureRegressor(features="activation"),
        GradientFeatureRegressor(features="gradient"),
        GradientFeatureRegressor(Factory()),
        GradientFeatureRegressor(precision="float32"),
        GradientFeatureRegressor(loss="huber"),
        GradientFeatureClassifierCV(alphas=2, gradient_alphas=2, cv=3),
        GradientFeatureRegressorCV(alphas=2, gradient_alphas=2, cv=3),
        GradientFeatureRegressorCV(features="activation", cv=3),
    ],
    expected_failed_checks=failing,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_estimator_checks(estimator, check):
    check(estimator)
