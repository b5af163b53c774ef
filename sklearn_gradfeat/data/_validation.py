"""Validation of ``X`` and ``y``: arrays of any number of dimensions, and lazy arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import scipy.sparse as sp
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from sklearn_gradfeat.data._batches import from_torch, is_lazy


@contextmanager
def restored_on_error(estimator: Any, *names: str) -> Iterator[None]:
    """Restore attributes of the estimator if the block raises an error."""
    before = {name: getattr(estimator, name) for name in names if hasattr(estimator, name)}
    try:
        yield
    except BaseException:
        for name in names:
            estimator.__dict__.pop(name, None)
        estimator.__dict__.update(before)
        raise


def validate_samples(estimator: Any, X: Any, y: Any = "no_validation") -> tuple[Any, Any]:
    """Validate the input of ``fit``, and set ``n_features_in_`` and ``feature_names_in_``.

    Parameters
    ----------
    estimator : estimator
        The estimator to fit.
    X : array-like, tensor or torch Dataset of shape (n_samples, ...)
        The samples.
    y : array-like or tensor, default="no_validation"
        The targets; a sparse indicator matrix becomes dense.

    Returns
    -------
    X : ndarray or lazy array of shape (n_samples, ...)
        The samples. A lazy array is returned unread.
    y : ndarray
        The targets.
    """
    X, y = from_torch(X), from_torch(y)
    y = y.toarray() if sp.issparse(y) else y
    if not is_lazy(X):
        check = {"allow_nd": True, "ensure_min_samples": 2, "multi_output": True}
        X, y = validate_data(estimator, X, y, **check)
    else:
        if y is None:
            raise ValueError(
                f"{type(estimator).__name__} requires y to be passed, but the target y is None."
            )
        y = check_array(y, ensure_2d=False, dtype=None, input_name="y")
        if len(y) != X.shape[0]:
            raise ValueError(
                "Found input variables with inconsistent numbers of samples: "
                f"X has {X.shape[0]}, y has {len(y)}. Pass one target for each sample."
            )
        estimator.n_features_in_ = X.shape[1]
        estimator.__dict__.pop("feature_names_in_", None)
    _check_not_empty(X)
    return X, y


def validate_new_samples(estimator: Any, X: Any) -> Any:
    """Validate samples for prediction: their shape must be the one seen in ``fit``."""
    check_is_fitted(estimator)
    X = from_torch(X)
    expected = estimator.sample_shape_
    # scikit-learn checks the number of columns and the names of tabular data.
    if len(getattr(X, "shape", ())) > 1 and len(expected) + len(X.shape) > 3:
        _check_sample_shape(estimator, X)
    if is_lazy(X):
        _check_not_empty(X)
        return X
    X = validate_data(estimator, X, allow_nd=True, reset=False)
    _check_sample_shape(estimator, X)
    return X


def _check_sample_shape(estimator: Any, X: Any) -> None:
    """Raise an error unless the samples have the shape of those in ``fit``."""
    shape = tuple(X.shape[1:])
    if shape != estimator.sample_shape_:
        raise ValueError(
            f"X has samples of shape {shape}, but {type(estimator).__name__} was fitted with "
            f"samples of shape {estimator.sample_shape_}. Pass samples of that shape."
        )


def _check_not_empty(X: Any) -> None:
    """Raise an error if any axis is empty; scikit-learn checks only one- and two-dimensional X."""
    if 0 in X.shape:
        what = "feature" if X.shape[0] else "sample"
        raise ValueError(
            f"Found array with 0 {what}(s) (shape={tuple(X.shape)}) while a minimum of 1 is "
            "required along every axis of X."
        )
