"""Gradients as features, as scikit-learn estimators."""

from sklearn_gradfeat._classifier import GradientFeatureClassifier
from sklearn_gradfeat._image_files import ImageFiles
from sklearn_gradfeat._loading import load
from sklearn_gradfeat._regressor import GradientFeatureRegressor
from sklearn_gradfeat.displays import (
    FeatureComparisonDisplay,
    LayerContributionDisplay,
    ObjectiveDisplay,
    SaliencyDisplay,
)

__all__ = [
    "FeatureComparisonDisplay",
    "GradientFeatureClassifier",
    "GradientFeatureRegressor",
    "ImageFiles",
    "LayerContributionDisplay",
    "ObjectiveDisplay",
    "SaliencyDisplay",
    "load",
]
__version__ = "0.1.0"
