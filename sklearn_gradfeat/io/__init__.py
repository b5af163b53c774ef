"""Fitted estimators as files and as torch modules."""

from sklearn_gradfeat.io._archive import (
    Arrays,
    digest,
    read_archive,
    unpack,
)
from sklearn_gradfeat.io._export import (
    LinearizedNetwork,
    TwoClasses,
)
from sklearn_gradfeat.io._saving import (
    WEIGHTS,
    probe,
    save_estimator,
    transformed,
)

__all__ = [
    "WEIGHTS",
    "Arrays",
    "LinearizedNetwork",
    "TwoClasses",
    "digest",
    "probe",
    "read_archive",
    "save_estimator",
    "transformed",
    "unpack",
]
