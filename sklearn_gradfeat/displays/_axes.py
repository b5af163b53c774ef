"""Axes to draw on: new ones, given ones, or a given one divided."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils._optional_dependencies import check_matplotlib_support


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
        What is drawn; its name is for error messages.
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
    if isinstance(ax, Axes):
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
