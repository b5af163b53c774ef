"""scikit-learn's own checks, none expected to fail."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier


def factory():
    return nn.Sequential(nn.LazyLinear(24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh())


@parametrize_with_checks(
    [
        GradientFeatureClassifier(),
        GradientFeatureClassifier(features="activation"),
        GradientFeatureClassifier(features="gradient"),
        GradientFeatureClassifier(factory),
        GradientFeatureClassifier(precision="float32"),
    ]
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_estimator_checks(estimator, check):
    check(estimator)
