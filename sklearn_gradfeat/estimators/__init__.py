"""The scikit-learn estimators."""

from sklearn_gradfeat.estimators._base import (
    BaseGradientFeature,
)
from sklearn_gradfeat.estimators._classifier import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
)
from sklearn_gradfeat.estimators._load import (
    load,
)
from sklearn_gradfeat.estimators._printing import (
    layer_of,
)
from sklearn_gradfeat.estimators._regressor import (
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
)

__all__ = [
    "BaseGradientFeature",
    "GradientFeatureClassifier",
    "GradientFeatureClassifierCV",
    "GradientFeatureRegressor",
    "GradientFeatureRegressorCV",
    "layer_of",
    "load",
]
