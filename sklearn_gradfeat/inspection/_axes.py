"""Axes to draw on: new, given or divided ones; the estimator in a pipeline or a search."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.pipeline import Pipeline
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_is_fitted

from sklearn_gradfeat.estimators import BaseGradientFeature


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


def single_axes(display: object, ax: Any) -> Any:
    """Return the given axes, or new ones in a figure of their own."""
    check_matplotlib_support(f"{type(display).__name__}.plot")
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1] if ax is None else ax


def grid_of_axes(
    display: object, ax: Any, shape: tuple[int, int], size: tuple[float, float], **options: Any
) -> npt.NDArray[Any]:
    """Return axes in rows and columns.

    Parameters
    ----------
    display : display
        The display; error messages give the name of its class.
    ax : None, axes or array-like of axes
        None makes a figure, axes are divided, and an array is taken as it is.
    shape : (int, int)
        Numbers of rows and columns.
    size : (float, float)
        Width and height of a new figure, in inches.
    **options : dict
        For ``Figure.subplots``, such as ``sharey``; not for an array.

    Returns
    -------
    ndarray of axes of shape ``shape``
    """
    check_matplotlib_support(f"{type(display).__name__}.plot")
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    if ax is None:
        figure = plt.figure(figsize=size, layout="constrained")
        return np.asarray(figure.subplots(*shape, squeeze=False, **options))
    if isinstance(ax, Axes) and shape != (1, 1):
        ax.set_axis_off()
        grid = ax.get_subplotspec()
        if grid is None:
            raise ValueError("ax is in no grid of a figure, so it cannot be divided.")
        return np.asarray(grid.subgridspec(*shape).subplots(squeeze=False, **options))
    given = np.asarray(ax)
    if given.size != shape[0] * shape[1]:
        raise ValueError(
            f"{type(display).__name__} draws on {shape[0]} x {shape[1]} axes, ax holds "
            f"{given.size}. Pass as many, or one axes to be divided."
        )
    return given.reshape(shape)
