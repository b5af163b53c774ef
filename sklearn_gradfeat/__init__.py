"""Gradients as features, as scikit-learn estimators."""

from sklearn_gradfeat._classifier import GradientFeatureClassifier
from sklearn_gradfeat._classifier_cv import GradientFeatureClassifierCV
from sklearn_gradfeat._config import config_context, get_config, set_config
from sklearn_gradfeat._image_files import ImageFiles
from sklearn_gradfeat._loading import load
from sklearn_gradfeat._regressor import GradientFeatureRegressor
from sklearn_gradfeat._regressor_cv import GradientFeatureRegressorCV
from sklearn_gradfeat._text import MaskedMean, TextTokenizer
from sklearn_gradfeat.displays import (
    FeatureComparisonDisplay,
    LayerContributionDisplay,
    ObjectiveDisplay,
    SaliencyDisplay,
)

__all__ = [
    "FeatureComparisonDisplay",
    "GradientFeatureClassifier",
    "GradientFeatureClassifierCV",
    "GradientFeatureRegressor",
    "GradientFeatureRegressorCV",
    "ImageFiles",
    "LayerContributionDisplay",
    "MaskedMean",
    "ObjectiveDisplay",
    "SaliencyDisplay",
    "TextTokenizer",
    "config_context",
    "get_config",
    "load",
    "set_config",
]
__version__ = "0.1.0"
