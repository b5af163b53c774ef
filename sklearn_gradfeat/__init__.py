"""Gradients as features, as a scikit-learn estimator."""

from sklearn_gradfeat._classifier import GradientFeatureClassifier
from sklearn_gradfeat._image_files import ImageFiles
from sklearn_gradfeat._loading import load
from sklearn_gradfeat.displays import (
    FeatureComparisonDisplay,
    LayerContributionDisplay,
    ObjectiveDisplay,
    SaliencyDisplay,
)

__all__ = [
    "FeatureComparisonDisplay",
    "GradientFeatureClassifier",
    "ImageFiles",
    "LayerContributionDisplay",
    "ObjectiveDisplay",
    "SaliencyDisplay",
    "load",
]
__version__ = "0.1.0"
