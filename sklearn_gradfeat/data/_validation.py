"""Validation of ``X``: arrays of any number of dimensions, and lazy arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import scipy.sparse as sp
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from sklearn_gradfeat.data._batches import is_lazy, without_torch


@contextmanager
def restored_on_error(estimator: Any, *names: str) -> Iterator[None]:
    """Put attributes back as they were if the block fails."""
    before = {name: getattr(estimator, name) for name in names if hasattr(estimator, name)}
    try:
        yield
    except BaseException:
        for name in names:
            estimator.__dict__.pop(name, None)
        estimator.__dict__.update(before)
        raise


def validate_samples(estimator: Any, X: Any, y: Any = "no_validation") -> tuple[Any, Any]:
    """Validate the input of ``fit``; sets ``n_features_in_`` and ``feature_names_in_``.

    Parameters
    ----------
    estimator : estimator
        The estimator that is fitted.
    X : array-like of shape (n_samples, ...)
        The samples.
    y : array-like, default="no_validation"
        The targets, returned as an array.

    Returns
    -------
    (X, y)
        An ndarray, or ``X`` itself where it is lazy; and an ndarray.
    """
    X, y = without_torch(X), without_torch(y)
    if not is_lazy(X):
        check = {"allow_nd": True, "ensure_min_samples": 2, "multi_output": True}
        X, y = validate_data(estimator, X, _dense(y), **check)
    else:
        if y is None:
            raise ValueError(
                f"{type(estimator).__name__} requires y to be passed, but the target y is None."
            )
        y = check_array(_dense(y), ensure_2d=False, dtype=None, input_name="y")
        if len(y) != X.shape[0]:
            raise ValueError(
                f"Found input variables with inconsistent numbers of samples: "
                f"X has {X.shape[0]}, y has {len(y)}."
            )
        estimator.n_features_in_ = X.shape[1]
        estimator.__dict__.pop("feature_names_in_", None)
    _check_axes(X)
    return X, y


def validate_new_samples(estimator: Any, X: Any) -> Any:
    """Validate samples to predict against those that the estimator was fitted on."""
    check_is_fitted(estimator)
    X = without_torch(X)
    expected = estimator.sample_shape_
    shape = getattr(X, "shape", ())
    if len(shape) > 1 and len(expected) + len(shape) > 3 and tuple(shape[1:]) != expected:
        raise ValueError(
            f"X has samples of shape {tuple(shape[1:])}, but {type(estimator).__name__} was "
            f"fitted with samples of shape {expected}."
        )
    if is_lazy(X):
        _check_axes(X)
        return X
    X = validate_data(estimator, X, allow_nd=True, reset=False)
    if X.shape[1:] != expected:
        raise ValueError(
            f"X has samples of shape {X.shape[1:]}, but {type(estimator).__name__} was "
            f"fitted with samples of shape {expected}."
        )
    return X


def _dense(y: Any) -> Any:
    """Turn a sparse indicator matrix into an array."""
    return y.toarray() if sp.issparse(y) else y


def _check_axes(X: Any) -> None:
    """Refuse samples with an empty axis, which scikit-learn only does for rows."""
    if X.shape[0] == 0:
        raise ValueError(
            f"Found array with 0 sample(s) (shape={tuple(X.shape)}) while a minimum of 1 is "
            "required."
        )
    if 0 in X.shape:
        raise ValueError(
            f"Found array with 0 feature(s) (shape={tuple(X.shape)}) while a minimum of 1 is "
            "required along every axis."
        )
