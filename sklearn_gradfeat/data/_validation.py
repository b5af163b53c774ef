"""Validation of ``X`` and ``y``: arrays of any number of dimensions, and lazy arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from PIL import Image
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from sklearn_gradfeat.data._batches import is_lazy
from sklearn_gradfeat.data._containers import check_not_masked, to_numpy, to_numpy_input
from sklearn_gradfeat.data._ranks import n_ranks
from sklearn_gradfeat.data._targets import plain_targets

_MAX_LISTED = 5


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
    X : array-like, tensor, torch Dataset, or list of images or paths, of shape (n_samples, ...)
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
    check_not_masked(y, "y")
    X, y = to_numpy_input(X), to_numpy(y)
    y = y.toarray() if sp.issparse(y) else y
    if y is not None and not isinstance(y, str):
        y = plain_targets(y)
    if not is_lazy(X):
        fewest = 2 if n_ranks() == 1 else 1
        check = {"allow_nd": True, "ensure_min_samples": fewest, "multi_output": True}
        with _columns_named(X):
            X, y = validate_data(estimator, X, y, **check)
            X = _numeric(X)
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
    X = to_numpy_input(X)
    expected = estimator.sample_shape_
    # scikit-learn checks the number of columns and the names of tabular data.
    if len(getattr(X, "shape", ())) > 1 and len(expected) + len(X.shape) > 3:
        _check_sample_shape(estimator, X)
    if is_lazy(X):
        _check_not_empty(X)
        return X
    with _columns_named(X):
        X = _numeric(validate_data(estimator, X, allow_nd=True, reset=False))
    _check_sample_shape(estimator, X)
    return X


@contextmanager
def _columns_named(X: Any) -> Iterator[None]:
    """Name the columns that are not numeric in the error of the block."""
    try:
        yield
    except (TypeError, ValueError) as error:
        names = _not_numeric(X)
        if not names:
            raise
        listed = ", ".join(map(repr, names[:_MAX_LISTED]))
        raise ValueError(
            f"Columns of X are not numeric: {listed}{', ...' * (len(names) > _MAX_LISTED)}. Encode "
            "them, for example with OneHotEncoder in a ColumnTransformer, or leave them out. For a "
            "column of texts, put a TextTokenizer before the estimator in a pipeline. Pass a "
            f"column of images or of image paths alone: X=X[{names[0]!r}]."
        ) from error


def _numeric(X: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return X as numbers, or raise an error.

    scikit-learn lets objects and dates of some data frames pass.
    """
    if X.dtype.kind == "O":
        X = check_array(X, allow_nd=True)
    if X.dtype.kind not in "biuf":
        raise ValueError(f"X must hold numbers, got dtype {X.dtype}. Convert X to a numeric dtype.")
    return X


def _not_numeric(X: Any) -> list[Any]:
    """Return the columns of a data frame or a matrix of objects that have texts or dates."""
    if hasattr(X, "columns"):
        columns = [(name, np.asarray(X[name])) for name in X.columns]
    elif isinstance(X, np.ndarray) and X.ndim == 2:
        columns = list(enumerate(X.T))
    else:
        return []
    return [name for name, values in columns if values.dtype.kind in "mM" or _has_others(values)]


def _has_others(values: npt.NDArray[Any]) -> bool:
    """Return whether values contain an image, a path, or a string that is not a number."""
    for value in values if values.dtype.kind in "OSTU" else ():
        if isinstance(value, (Image.Image, os.PathLike)):
            return True
        try:
            float(value)
        except ValueError:
            return True
        except TypeError:  # a missing value, or an object that scikit-learn refuses
            continue
    return False


def _check_sample_shape(estimator: Any, X: Any) -> None:
    """Raise an error unless the samples have the shape of those in ``fit``."""
    shape = tuple(X.shape[1:])
    if shape != estimator.sample_shape_:
        single = "; for one sample, X[None]" * (X.shape == estimator.sample_shape_)
        raise ValueError(
            f"X has samples of shape {shape}, but {type(estimator).__name__} was fitted with "
            f"samples of shape {estimator.sample_shape_}. Pass samples of that shape{single}."
        )


def _check_not_empty(X: Any) -> None:
    """Raise an error if any axis is empty; scikit-learn checks only one- and two-dimensional X."""
    if 0 in X.shape:
        what = "feature" if X.shape[0] else "sample"
        raise ValueError(
            f"Found array with 0 {what}(s) (shape={tuple(X.shape)}) while a minimum of 1 is "
            "required along every axis of X."
        )
