"""Gradients as features, as a scikit-learn estimator."""

from sklearn_gradfeat._classifier import GradientFeatureClassifier
from sklearn_gradfeat._config import config_context, get_config, set_config

__all__ = ["GradientFeatureClassifier", "config_context", "get_config", "set_config"]
__version__ = "0.1.0"
