"""Gradients as features, as a scikit-learn estimator."""

from sklearn_gradfeat._classifier import GradientFeatureClassifier
from sklearn_gradfeat._image_files import ImageFiles

__all__ = ["GradientFeatureClassifier", "ImageFiles"]
__version__ = "0.1.0"
