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


@parametrize_with_checks(
    [
        GradientFeatureClassifier(),
        GradientFeatureClassifier(features="activation"),
        GradientFeatureClassifier(features="gradient"),
        GradientFeatureClassifier(Factory()),
        GradientFeatureClassifier(precision="float32"),
        GradientFeatureRegressor(),
        GradientFeatureRegressor(features="activation"),
        GradientFeatureRegressor(features="gradient"),
        GradientFeatureRegressor(Factory()),
        GradientFeatureRegressor(precision="float32"),
        GradientFeatureRegressor(loss="huber"),
        GradientFeatureClassifierCV(alphas=2, gradient_alphas=2, cv=3),
        GradientFeatureRegressorCV(alphas=2, gradient_alphas=2, cv=3),
        GradientFeatureRegressorCV(features="activation", cv=3),
    ]
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_estimator_checks(estimator, check):
    check(estimator)
