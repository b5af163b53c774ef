"""Warnings of tabular data that the random network learns badly."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

# The largest standard deviation of a column, relative to the median one, without a warning.
_MAX_RATIO = 100
# Flat images have at least this many pixels at a side, and their values as many levels.
_MIN_SIDE = 16
_MIN_LEVELS = 32
_ROUNDING = 1e-3  # of values in [0, 255], in float32
_N_IMAGES = 100
# More rows than this would take time and memory, and show little more.
_MAX_ROWS = 10_000


def warn_of_tabular(X: npt.NDArray[Any], names: Any = None) -> None:
    """Warn of flat images, and of columns of very different scale.

    Parameters
    ----------
    X : ndarray of shape (n_samples, n_features)
        Validated tabular data.
    names : sequence or None, default=None
        The names of the columns.
    """
    shape = _image_shape(X)
    if shape is not None:
        warnings.warn(
            f"X seems to hold flat images: the values of pixels in {X.shape[1]} columns. The "
            "random network for tabular data ignores the positions of pixels. For the pretrained "
            "network for images, pass X in the shape that it had before it was flattened, such as "
            f"X.reshape{shape}, as uint8 or as floats in [0, 1].",
            UserWarning,
            stacklevel=2,
        )
        return
    some = X[:: math.ceil(len(X) / _MAX_ROWS)]
    with np.errstate(over="ignore", invalid="ignore"):
        scales = some.std(axis=0, dtype=np.float64)
    largest = int(scales.argmax())
    varying = np.sort(scales[scales > 0])
    if len(varying) > 1 and scales[largest] > _MAX_RATIO * varying[(len(varying) - 1) // 2]:
        name = largest if names is None else names[largest]
        warnings.warn(
            f"The columns of X have very different scales, and column {name!r} dominates the "
            "others. Scale X, for example with make_pipeline(StandardScaler(), ...).",
            UserWarning,
            stacklevel=2,
        )


def _image_shape(X: npt.NDArray[Any]) -> tuple[int, ...] | None:
    """Return a shape for samples that are flat images without doubt, else None.

    Such images are square, grey or RGB, with integers that reach 255, as they are or divided by
    255.
    """
    n_features = X.shape[1]
    for n_channels in (1, 3):
        side = math.isqrt(n_features // n_channels)
        if side >= _MIN_SIDE and n_channels * side**2 == n_features:
            break
    else:
        return None
    levels = np.unique(X[:_N_IMAGES])
    if len(levels) < _MIN_LEVELS or levels[0] < 0 or levels[-1] not in (1, 255):
        return None
    levels = levels / levels[-1] * 255.0
    if np.abs(levels - levels.round()).max() > _ROUNDING:
        return None
    return (-1, side, side) if n_channels == 1 else (-1, n_channels, side, side)
