"""Fitted estimators as files and as torch modules."""

from sklearn_gradfeat.io._checkpoint import Checkpoint, Described
from sklearn_gradfeat.io._export import LinearizedNetwork, TwoClasses
from sklearn_gradfeat.io._loading import load_estimator
from sklearn_gradfeat.io._saving import describe, save_estimator

__all__ = [
    "Checkpoint",
    "Described",
    "LinearizedNetwork",
    "TwoClasses",
    "describe",
    "load_estimator",
    "save_estimator",
]
