"""Gradients as features, as scikit-learn estimators."""

from sklearn_gradfeat.cache import config_context, get_config, set_config
from sklearn_gradfeat.data import ImageFiles, MaskedMean, TextTokenizer
from sklearn_gradfeat.estimators import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
    load,
)
from sklearn_gradfeat.inspection import (
    LayerContributionDisplay,
    ObjectiveDisplay,
    PenaltyDisplay,
    SaliencyDisplay,
)

__all__ = [
    "GradientFeatureClassifier",
    "GradientFeatureClassifierCV",
    "GradientFeatureRegressor",
    "GradientFeatureRegressorCV",
    "ImageFiles",
    "LayerContributionDisplay",
    "MaskedMean",
    "ObjectiveDisplay",
    "PenaltyDisplay",
    "SaliencyDisplay",
    "TextTokenizer",
    "config_context",
    "get_config",
    "load",
    "set_config",
]
__version__ = "0.1.0"
