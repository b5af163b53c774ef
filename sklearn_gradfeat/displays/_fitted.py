"""The fitted estimator that a display is about, out of what it was passed in."""

from __future__ import annotations

from typing import Any

from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from sklearn_gradfeat._base import BaseGradientFeature


def unwrap(estimator: Any, X: Any = None) -> tuple[BaseGradientFeature, Any]:
    """Return the gradient-feature estimator in a pipeline or a search, and its input.

    Parameters
    ----------
    estimator : estimator
        A fitted estimator of this package; a pipeline that ends in one; or a search, whose
        best estimator is taken.
    X : array-like of shape (n_samples, ...), default=None
        Input of ``estimator``, which the steps of a pipeline transform.

    Returns
    -------
    (BaseGradientFeature, array-like)
    """
    inner = estimator
    while not isinstance(inner, BaseGradientFeature):
        if isinstance(inner, Pipeline):
            if X is not None and len(inner) > 1:
                X = inner[:-1].transform(X)
            inner = inner[-1]
        elif hasattr(inner, "best_estimator_"):
            inner = inner.best_estimator_
        else:
            raise TypeError(
                "The picture is of an estimator of sklearn_gradfeat, of a pipeline that ends in "
                f"one, or of a fitted search for one; got {type(estimator).__name__}."
            )
    check_is_fitted(inner, "coef_")
    return inner, X
