"""Gradients as features, as a scikit-learn estimator."""

from sklearn_gradfeat._classifier import GradientFeatureClassifier
from sklearn_gradfeat._loading import load

__all__ = ["GradientFeatureClassifier", "load"]
__version__ = "0.1.0"
