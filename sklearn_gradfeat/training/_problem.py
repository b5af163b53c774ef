"""The loss that targets and weights define, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sklearn_gradfeat.data import (
    gather_over_ranks,
    sum_over_ranks,
    weighted_mean,
    weighted_median,
)
from sklearn_gradfeat.linearized import (
    Bernoulli,
    Huber,
    LinearModel,
    Loss,
    Multinomial,
    Squared,
)


@dataclass(frozen=True)
class Problem:
    """The targets and weights of the training samples, as a loss.

    Attributes
    ----------
    loss : callable
        Maps a device to the loss on that device.
    subset : callable
        Maps rows, and weights in place of those of these samples, to the problem of these samples
        alone.
    weights : ndarray of shape (n_samples,)
        Weights of the samples, which add up to one.
    strata : ndarray of shape (n_samples,), int
        Groups of samples that every fold holds in the same shares: the classes.
    offset : ndarray of shape (n_outputs,)
        A constant that was subtracted from the targets, and belongs to the intercept.
    attributes : dict
        Attributes of the fitted estimator that depend on the targets alone.
    """

    loss: Callable[[torch.device], Loss]
    subset: Callable[..., Problem]
    weights: npt.NDArray[np.float64]
    strata: npt.NDArray[np.intp]
    offset: npt.NDArray[np.float64]
    attributes: dict[str, Any]

    def restored(self, model: LinearModel) -> LinearModel:
        """Return a model of the shifted targets as a model of the original ones."""
        return model.shifted(self.offset)

    def reduced(self, model: LinearModel) -> LinearModel:
        """Return the inverse of :meth:`restored`."""
        return model.shifted(-self.offset)


def classification_problem(
    classes: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    weights: npt.NDArray[np.float64],
    loss: str,
) -> Problem:
    """Return the problem of class indices or of an indicator matrix.

    Two classes have one output. The targets of squared errors are 1 for the class or the labels
    of a sample, and -1 for all others.
    """
    multilabel = targets.ndim == 2
    multiclass = not multilabel and len(classes) > 2
    n_outputs = len(classes) if multilabel or multiclass else 1

    def on(device: torch.device) -> Loss:
        w = torch.from_numpy(weights).to(device)
        if multiclass and loss == "log_loss":
            return Multinomial(torch.from_numpy(targets).to(device, torch.int64), w, n_outputs)
        columns = np.eye(n_outputs)[targets] if multiclass else targets.reshape(-1, n_outputs)
        indicators = torch.from_numpy(columns.astype(np.float64)).to(device)
        return Squared(2 * indicators - 1, w) if loss == "squared" else Bernoulli(indicators, w)

    def subset(
        rows: npt.NDArray[np.intp], of_rows: npt.NDArray[np.float64] | None = None
    ) -> Problem:
        w = _normalized(weights[rows] if of_rows is None else of_rows)
        return classification_problem(classes, targets[rows], w, loss)

    strata = np.zeros(len(targets), dtype=np.intp) if multilabel else targets
    attributes = {"classes_": classes, "_multilabel": multilabel}
    return Problem(on, subset, weights, strata, np.zeros(n_outputs), attributes)


_MAX_SPREAD = 1e140  # of targets, so that sums of squares are finite


def regression_problem(
    y: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    epsilon: float | None,
    fit_intercept: bool,
) -> Problem:
    """Return the problem of real targets: Huber's loss, or the squared one without ``epsilon``.

    With an intercept, the targets are centred: by the minimiser of the squared loss, the mean;
    or by the median for Huber's loss, since outliers move the mean. That changes the start of
    the solver, on which the tolerance depends, and not the optimum.

    Raises
    ------
    ValueError
        If squares of the centred targets leave the range of float64.
    """
    targets = y.reshape(len(y), -1)
    centre = weighted_mean if epsilon is None else weighted_median
    with np.errstate(over="ignore", invalid="ignore"):
        offset = centre(targets, weights) if fit_intercept else np.zeros(targets.shape[1])
        spread = np.max(gather_over_ranks(np.abs(targets - offset).max(axis=0)), axis=0)
    # Below the range the squares are zero, and the solver would stop at the zero model.
    outside = ~(spread <= _MAX_SPREAD) | ((spread > 0) & (spread < 1 / _MAX_SPREAD))
    if epsilon is None and outside.any():
        raise ValueError(
            f"y deviates from its mean by up to {spread[outside][0]:.3g}. Its squares leave the "
            "range of float64. Scale y, as sklearn.compose.TransformedTargetRegressor does with "
            "transformer=StandardScaler()."
        )

    def on(device: torch.device) -> Loss:
        centred = torch.from_numpy(targets - offset).to(device)
        w = torch.from_numpy(weights).to(device)
        return Squared(centred, w) if epsilon is None else Huber(centred, w, epsilon)

    def subset(
        rows: npt.NDArray[np.intp], of_rows: npt.NDArray[np.float64] | None = None
    ) -> Problem:
        w = _normalized(weights[rows] if of_rows is None else of_rows)
        return regression_problem(y[rows], w, epsilon, fit_intercept)

    strata = np.zeros(len(targets), dtype=np.intp)
    return Problem(on, subset, weights, strata, offset, {"_single_output": y.ndim == 1})


def _normalized(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return weights that add up to one."""
    normalized: npt.NDArray[np.float64] = weights / sum_over_ranks(weights.sum())
    return normalized
