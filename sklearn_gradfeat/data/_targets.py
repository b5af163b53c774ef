"""Targets and sample weights as the losses take them."""

from __future__ import annotations

import inspect
import math
from numbers import Number
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_sample_weight, check_array, column_or_1d

from sklearn_gradfeat.data._containers import check_not_masked, to_numpy
from sklearn_gradfeat.data._ranks import (
    gather_over_ranks,
    n_ranks,
    rows_of_all_ranks,
    sum_over_ranks,
)

# scikit-learn 1.6 does not check for zeros.
_ALLOW_ZEROS = {
    name: True
    for name in inspect.signature(_check_sample_weight).parameters
    if name == "allow_all_zero_weights"
}

_COLLECTIONS = (
    "y must hold one target for each sample, or one row of a matrix, but its items are lists, sets "
    "or arrays. For multilabel targets, pass a matrix of zeros and ones: "
    "y=sklearn.preprocessing.MultiLabelBinarizer().fit_transform(y)."
)


def plain_targets(y: Any) -> npt.NDArray[Any]:
    """Return targets as an array, with a numeric dtype of numpy if they are numbers.

    scikit-learn converts nullable integers and booleans to floats, and refuses objects.

    Parameters
    ----------
    y : array-like
        Targets, also with an extension dtype: nullable, categorical, or strings.

    Raises
    ------
    ValueError
        If an object is missing: None, NaN or NA. If it is a collection, such as a list of labels.
    """
    try:
        values: npt.NDArray[Any] = np.asarray(y)
    except ValueError as error:  # lists of different lengths
        raise ValueError(_COLLECTIONS) from error
    if values.dtype != object:
        return values
    if any(isinstance(value, (list, tuple, set, frozenset, np.ndarray)) for value in values.flat):
        raise ValueError(_COLLECTIONS)
    for position, value in np.ndenumerate(values):
        if _is_missing(value):
            raise ValueError(
                f"y has missing values, the first in row {position[0]}: {value}. Leave these "
                "samples out, or replace the values."
            )
    if all(isinstance(value, (Number, np.bool_)) for value in values.flat):
        return np.array(values.tolist())
    return values


def _is_missing(value: Any) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def encode_classes(y: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the classes, and the targets as class indices or as an indicator matrix.

    Parameters
    ----------
    y : ndarray of shape (n_samples,) or (n_samples, n_labels)
        Classes, or zeros and ones.

    Returns
    -------
    classes : ndarray of shape (n_classes,) or (n_labels,)
        The classes in order, or the numbers of the labels.
    targets : ndarray of shape (n_samples,), int, or (n_samples, n_labels), float64
        Class indices, or zeros and ones.

    Raises
    ------
    ValueError
        If there is one class only, or if ``y`` holds neither classes nor labels.
    """
    check_classification_targets(y)
    kind = type_of_target(y)
    if kind == "multilabel-indicator":
        if not np.isin(y, (0, 1)).all():
            raise ValueError("y: multilabel targets must be a matrix of zeros and ones.")
        return np.arange(y.shape[1]), np.asarray(y, dtype=np.float64)
    if kind == "multiclass-multioutput":
        raise ValueError(
            "y has several columns of classes. Pass one column of classes, or an indicator matrix "
            "of zeros and ones for multilabel targets. For several columns of classes, use "
            "sklearn.multioutput.MultiOutputClassifier."
        )
    classes, targets = _classes(column_or_1d(y, warn=True))
    if len(classes) < 2:
        raise ValueError(
            "The classifier needs samples of at least 2 classes, but y contains one class: "
            f"{classes[0]}."
        )
    return classes, targets


def _classes(y: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.intp]]:
    """Return the classes of all ranks in order, and the class of every sample as an index.

    Raises
    ------
    ValueError
        If some ranks have numbers and others strings.
    """
    own, members = np.unique(y, return_inverse=True)
    of_ranks = gather_over_ranks(own)
    if len({classes.dtype.kind in "biuf" for classes in of_ranks}) > 1:
        kinds = ", ".join(f"rank {i} has {classes.dtype}" for i, classes in enumerate(of_ranks))
        raise ValueError(f"y must have classes of one type on all ranks: {kinds}.")
    classes = np.unique(np.concatenate(of_ranks)) if len(of_ranks) > 1 else own
    return classes, np.searchsorted(classes, own)[members]


def numeric_targets(y: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the targets of a regression, of shape (n_samples,) or (n_samples, n_outputs)."""
    if y.dtype.kind in "mM":
        raise ValueError(
            f"y must hold finite real numbers, not dates or durations of the dtype {y.dtype}. "
            "Convert them to numbers of a unit of your choice."
        )
    try:
        numbers: npt.NDArray[np.float64] = check_array(
            y, ensure_2d=False, dtype=np.float64, input_name="y"
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"y must hold finite real numbers. {error}") from error
    return numbers


def weighted_mean(
    targets: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the weighted mean of every column, exact for a constant column.

    ``weights`` add up to one.
    """
    heaviest = weights.argmax()
    of_ranks = gather_over_ranks((weights[heaviest], targets[heaviest]))
    anchor = max(of_ranks, key=lambda found: found[0])[1]
    mean: npt.NDArray[np.float64] = anchor + sum_over_ranks(weights @ (targets - anchor))
    return mean


def weighted_median(
    targets: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the lower weighted median of every column; ``weights`` add up to one."""
    targets, weights = rows_of_all_ranks(targets)[0], rows_of_all_ranks(weights)[0]
    order = targets.argsort(axis=0)
    below = weights[order].cumsum(axis=0)
    middle = (below > 0.5 - 1e-9).argmax(axis=0)  # the same for weights and for repetitions
    columns = np.arange(targets.shape[1])
    median: npt.NDArray[np.float64] = targets[order[middle, columns], columns]
    return median


def plain_weights(sample_weight: Any, y: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the weights of samples as an array, with ones for None."""
    check_not_masked(sample_weight, "sample_weight")
    # The samples of one rank may all have weight zero.
    zeros = _ALLOW_ZEROS if n_ranks() > 1 else {}
    weights: npt.NDArray[np.float64] = _check_sample_weight(
        to_numpy(sample_weight), y, dtype=np.float64, ensure_non_negative=True, **zeros
    )
    return weights


def normalized_weights(
    y: npt.NDArray[Any], sample_weight: Any, class_weight: Any = None
) -> npt.NDArray[np.float64]:
    """Return the weight of every sample; the weights of all ranks add up to one.

    Parameters
    ----------
    y : ndarray of shape (n_samples,) or (n_samples, n_outputs)
        The targets.
    sample_weight : array-like of shape (n_samples,) or None
        Non-negative weights.
    class_weight : dict, "balanced", list of dict or None, default=None
        Factors by class. ``"balanced"`` counts every sample by its weight.

    Raises
    ------
    ValueError
        If a weight or a factor is negative, or if all weights are zero.
    """
    weights = _scaled(plain_weights(sample_weight, y))
    if class_weight is not None:
        factors = _class_factors(class_weight, y, weights)
        if (factors < 0).any():
            raise ValueError("class_weight: a factor is negative. Pass factors of at least zero.")
        weights = _scaled(weights * factors)
    total = sum_over_ranks(weights.sum())
    if not total > 0:
        raise ValueError(
            "sample_weight: the weights add up to zero. At least one weight must be positive."
        )
    normalized: npt.NDArray[np.float64] = weights / total
    return normalized


def _scaled(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Divide weights by a power of two, which is exact, so that sums do not overflow."""
    largest = max(gather_over_ranks(weights.max(initial=0)))
    if not np.isfinite(largest):
        raise ValueError(
            "class_weight: its product with the weights of the samples is infinite or NaN. Pass "
            "smaller factors."
        )
    scaled: npt.NDArray[np.float64] = np.ldexp(weights, -np.frexp(largest)[1])
    return scaled


def _class_factors(
    class_weight: Any, y: npt.NDArray[Any], weights: npt.NDArray[np.float64]
) -> npt.NDArray[Any]:
    """Return the factor of every sample."""
    if y.ndim == 2:
        everywhere, own = rows_of_all_ranks(y)
        factors: npt.NDArray[Any] = compute_sample_weight(class_weight, everywhere)[own]
        return factors
    classes, members = _classes(y)
    if class_weight != "balanced":
        factors = compute_sample_weight(class_weight, classes)
        return factors[members]
    totals = sum_over_ranks(np.bincount(members, weights, minlength=len(classes)))
    present = totals > 0
    factors = np.zeros_like(totals)
    factors[present] = sum_over_ranks(weights.sum()) / (present.sum() * totals[present])
    return factors[members]
