"""scikit-learn's own checks: all of them in float64, all but three in float32."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier

ROUNDED = {
    "check_sample_weight_equivalence_on_dense_data",
    "check_methods_subset_invariance",
    "check_classifiers_multilabel_output_format_predict_proba",  # a probability rounds to one
}


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
    ]
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_estimator_checks(estimator, check):
    name = getattr(check, "func", check).__name__
    if estimator.precision == "float32" and name in ROUNDED:
        pytest.skip("asks for more digits than float32 has")
    check(estimator)
