"""Gradients as features, as a scikit-learn estimator."""

from sklearn_gradfeat._classifier import GradientFeatureClassifier
from sklearn_gradfeat._text import MaskedMean, TextTokenizer

__all__ = ["GradientFeatureClassifier", "MaskedMean", "TextTokenizer"]
__version__ = "0.1.0"
