"""Fitted estimators as files and as torch modules."""

from sklearn_gradfeat.io._export import LinearizedNetwork, TwoClasses
from sklearn_gradfeat.io._loading import load_estimator
from sklearn_gradfeat.io._saving import save_estimator

__all__ = ["LinearizedNetwork", "TwoClasses", "load_estimator", "save_estimator"]
