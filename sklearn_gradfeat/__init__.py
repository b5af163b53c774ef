"""Gradients as features, as a scikit-learn estimator."""

from sklearn_gradfeat._classifier import GradientFeatureClassifier

__all__ = ["GradientFeatureClassifier"]
__version__ = "0.1.0"
