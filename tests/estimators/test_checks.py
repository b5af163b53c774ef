"""scikit-learn's own checks."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
)

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


class Factory:
    """A factory whose name is the same in every process, as test names must be."""

    def __call__(self):
        return nn.Sequential(nn.LazyLinear(24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh())

    def __repr__(self):
        return "Factory()"


@parametrize_with_checks(
    [
        GradientFeatureClassifier(),
        GradientFeatureRegressor(),
        GradientFeatureClassifierCV(alphas=[1.0, 0.01], gradient_alphas=[0.1], cv=2),
        GradientFeatureRegressorCV(alphas=[1.0, 0.01], gradient_alphas=[0.1], cv=2),
    ]
)
def test_estimator_checks(estimator, check):
    check(estimator)


# These differ from the others in the choice of the penalties, in the number of linearisations, in
# the loss, in the terms of the model, in its precision or in its network alone.
@pytest.mark.slow
@parametrize_with_checks(
    [
        GradientFeatureClassifier(alpha=0.01, gradient_alpha=0.01),
        GradientFeatureRegressor(alpha=0.01, gradient_alpha=0.01),
        GradientFeatureClassifier(alpha=0.01, gradient_alpha=0.01, n_linearizations=3),
        GradientFeatureClassifier(n_linearizations="auto"),
        GradientFeatureClassifier(Factory(), alpha=1e-4, gradient_alpha=1e-4),
        GradientFeatureClassifier(loss="squared", alpha=1e-4, gradient_alpha=1e-4),
        GradientFeatureRegressor(loss="huber", alpha=1e-4, gradient_alpha=1e-4),
        GradientFeatureClassifier(Factory()),
        GradientFeatureClassifier(loss="squared"),
        GradientFeatureRegressor(loss="huber"),
        GradientFeatureClassifier(features="activation"),
        GradientFeatureClassifier(features="gradient"),
        GradientFeatureClassifier(precision="float32"),
        GradientFeatureRegressor(features="activation"),
        GradientFeatureRegressor(features="gradient"),
        GradientFeatureRegressor(Factory()),
        GradientFeatureRegressor(precision="float32"),
        GradientFeatureRegressorCV(features="activation", cv=3),
    ]
)
def test_estimator_checks_of_other_configurations(estimator, check):
    check(estimator)
