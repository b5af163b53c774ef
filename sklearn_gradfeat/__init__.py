"""Gradients as features, as scikit-learn estimators."""

from sklearn_gradfeat._classifier import GradientFeatureClassifier
from sklearn_gradfeat._regressor import GradientFeatureRegressor

__all__ = ["GradientFeatureClassifier", "GradientFeatureRegressor"]
__version__ = "0.1.0"
