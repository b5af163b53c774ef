"""Targets and weights of the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_sample_weight, check_array, column_or_1d

from sklearn_gradfeat.linearized import Bernoulli, Huber, LinearModel, Loss, Multinomial, Squared


@dataclass(frozen=True)
class Problem:
    """What the targets and the weights of the samples make of a fit.

    Attributes
    ----------
    loss : callable
        Maps a device to the loss on it.
    attributes : dict
        What the fitted estimator is to know of the targets.
    centre : ndarray of shape (n_outputs,) or None
        What was taken off the targets and goes back to the intercept; None is zero.
    scale : ndarray of shape (n_outputs,) or None
        What makes the outputs of the optimum those of the estimator; None is one.
    """

    loss: Callable[[torch.device], Loss]
    attributes: dict[str, Any]
    centre: npt.NDArray[np.float64] | None = None
    scale: npt.NDArray[np.float64] | None = None

    def offset(self, n_outputs: int) -> npt.NDArray[np.float64]:
        """Return the centre as numbers."""
        return np.zeros(n_outputs) if self.centre is None else self.centre

    def finished(self, model: LinearModel) -> LinearModel:
        """Return the model of the estimator, given the optimum of the loss."""
        scaled = model if self.scale is None else model.scaled(self.scale)
        return scaled.shifted(self.offset(len(model.intercept)))

    def unfinished(self, model: LinearModel) -> LinearModel:
        """Return the inverse of :meth:`finished`."""
        shifted = model.shifted(-self.offset(len(model.intercept)))
        return shifted if self.scale is None else shifted.scaled(1 / self.scale)


@dataclass(frozen=True)
class Classification(Problem):
    """What classes or labels make of a fit.

    Attributes
    ----------
    targets : ndarray of shape (n_samples,) or (n_samples, n_labels)
        Class indices, or zeros and ones.
    weights : ndarray of shape (n_samples,)
        Adding up to one.
    loss_name : str
        As in the classifier.
    """

    targets: npt.NDArray[Any] = field(kw_only=True)
    weights: npt.NDArray[np.float64] = field(kw_only=True)
    loss_name: str = field(kw_only=True)

    @classmethod
    def of(
        cls,
        targets: npt.NDArray[Any],
        weights: npt.NDArray[np.float64],
        classes: npt.NDArray[Any],
        loss: str,
    ) -> Classification:
        """Return the problem for encoded targets and a loss by name."""
        return cls(
            lambda device: classification_loss(targets, weights, len(classes), loss, device),
            {"classes_": classes, "_multilabel": targets.ndim == 2},
            targets=targets,
            weights=weights,
            loss_name=loss,
        )

    def part(self, rows: npt.NDArray[np.intp]) -> Classification:
        """Return the problem of some samples, with the same classes."""
        few, classes = self.weights[rows], self.attributes["classes_"]
        return self.of(self.targets[rows], few / few.sum(), classes, self.loss_name)


def encode(y: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the classes, and class indices or an indicator matrix."""
    check_classification_targets(y)
    kind = type_of_target(y)
    if kind == "multilabel-indicator":
        if not np.isin(y, (0, 1)).all():
            raise ValueError("y: multi-label targets are a matrix of zeros and ones.")
        return np.arange(y.shape[1]), np.asarray(y, dtype=np.float64)
    if kind == "multiclass-multioutput":
        raise ValueError(
            "y has several columns that are no indicators. Multi-label targets are a matrix "
            "of zeros and ones; for several outputs use sklearn's MultiOutputClassifier."
        )
    classes, targets = np.unique(column_or_1d(y, warn=True), return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            "The classifier needs samples of at least 2 classes, but y contains one class: "
            f"{classes[0]}."
        )
    return classes, targets


def classification_loss(
    targets: npt.NDArray[Any],
    weights: npt.NDArray[np.float64],
    n_classes: int,
    loss: str,
    device: torch.device,
) -> Loss:
    """Return the loss that fits the targets: one output for two classes.

    Squared errors are those to 1 for the class or label of a sample, and -1 for any other.
    """
    w = torch.from_numpy(weights).to(device)
    several = targets.ndim == 1 and n_classes > 2
    if several and loss == "log_loss":
        return Multinomial(torch.from_numpy(targets).to(device, torch.int64), w, n_classes)
    columns = np.eye(n_classes)[targets] if several else targets.reshape(len(targets), -1)
    zeros_and_ones = torch.from_numpy(columns.astype(np.float64)).to(device)
    if loss == "squared":
        return Squared(2 * zeros_and_ones - 1, w)
    return Bernoulli(zeros_and_ones, w)


def numeric(y: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the targets of a regression, of shape (n_samples,) or (n_samples, n_outputs)."""
    try:
        numbers: npt.NDArray[np.float64] = check_array(
            y, ensure_2d=False, dtype=np.float64, input_name="y"
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"y must hold finite real numbers. {error}") from error
    return numbers


def centre(
    targets: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the weighted mean of every column, without any rounding where it is constant."""
    anchor = targets[weights.argmax()]
    mean: npt.NDArray[np.float64] = anchor + weights @ (targets - anchor)
    return mean


def regression_loss(
    targets: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    epsilon: float | None,
    device: torch.device,
) -> Loss:
    """Return Huber's loss, or the squared one where there is no ``epsilon``."""
    columns, w = torch.from_numpy(targets).to(device), torch.from_numpy(weights).to(device)
    return Squared(columns, w) if epsilon is None else Huber(columns, w, epsilon)


def sample_weights(
    y: npt.NDArray[Any], sample_weight: Any, class_weight: Any = None
) -> npt.NDArray[np.float64]:
    """Return the weight of every sample, adding up to one."""
    weights = _check_sample_weight(sample_weight, y, dtype=np.float64, ensure_non_negative=True)
    if class_weight is not None:
        weights = weights * _class_weights(class_weight, y, weights)
    total = weights.sum()
    if not total > 0:
        raise ValueError("sample_weight: the weights add up to zero, so there is no data.")
    normalized: npt.NDArray[np.float64] = weights / total
    return normalized


def _class_weights(
    class_weight: Any, y: npt.NDArray[Any], weights: npt.NDArray[np.float64]
) -> npt.NDArray[Any]:
    """Return the factor of every sample; "balanced" counts samples by their weight."""
    if class_weight != "balanced" or y.ndim == 2:
        factors: npt.NDArray[Any] = compute_sample_weight(class_weight, y)
        return factors
    _, members = np.unique(y, return_inverse=True)
    totals = np.bincount(members, weights)
    present = totals > 0
    factors = np.zeros_like(totals)
    factors[present] = weights.sum() / (present.sum() * totals[present])
    return factors[members]
