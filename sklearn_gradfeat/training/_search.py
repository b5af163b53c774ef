"""The choice of penalties by the loss of held-out samples.

1. ``alpha``, for the model on the activations alone, whose fits are cheap.
2. ``gradient_alpha`` with that ``alpha``. The model without a gradient term competes.

A path goes from strong to weak by powers of ten, until the loss has not fallen twice in a row, and
then to the half powers beside the best value. Every fit starts from the one with the next stronger
penalty. The path of ``alpha`` starts at the largest curvature of the loss, that of
``gradient_alpha`` at the curvature along the first step of the second stage. So penalties follow
the scale of the data. A path whose best value is its first goes on to stronger ones.

Without samples to hold out, as with one sample of each class, a rule by scale takes their place:
``alpha`` is the mean variance of the activations, divided by the number of samples, as in a
regression with ``C = 1`` on standardised activations; and there is no gradient term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sklearn_gradfeat.curvature import largest_curvature
from sklearn_gradfeat.linearized import Squared
from sklearn_gradfeat.training._held_out import HeldOut, LeftOut, Losses, by_folds
from sklearn_gradfeat.training._progress import Progress
from sklearn_gradfeat.training._two_stage_fit import Prepared, TwoStageFit

_STEP = 10.0
# A fall by a smaller share counts as none.
_FLAT = 1e-3
# A loss above the smallest one by this factor ends a path at once.
_CLEAR = 1.02
_MAX_STEPS = 16  # down, and as many up


class Choice(NamedTuple):
    """The chosen penalties, and the held-out losses of all that were tried.

    ``scores`` has the columns ``alpha``, ``gradient_alpha``, ``loss`` and ``standard_error``.
    """

    alpha: float
    gradient_alpha: float
    scores: dict[str, npt.NDArray[np.float64]]


class _Tried:
    """The losses of the penalties that were tried."""

    def __init__(self, held_out: HeldOut, progress: Progress | None) -> None:
        self._held_out, self._progress = held_out, progress
        self.losses: dict[tuple[float, float], Losses] = {}

    def loss(self, alpha: float, gradient_alpha: float) -> float:
        """Return the mean loss for a pair of penalties."""
        found = self._held_out.losses(alpha, gradient_alpha)
        self.losses[alpha, gradient_alpha] = found
        mean = self._mean(found)
        if self._progress is not None:
            self._progress.tried(alpha, gradient_alpha, mean)
        return mean if math.isfinite(mean) else math.inf

    def _mean(self, losses: Losses) -> float:
        return float(np.average(losses, weights=self._held_out.weights))

    def rows(self) -> list[tuple[float, float, float, float]]:
        """Return penalties, mean loss, and the standard error of its difference to the best."""
        weights = self._held_out.weights
        best = self.losses[min(self.losses, key=lambda pair: self._mean(self.losses[pair]))]
        copy_of = np.unique(self._held_out.names, return_inverse=True)[1]
        rows = []
        for pair, losses in self.losses.items():
            with np.errstate(invalid="ignore"):
                difference = losses - best
                apart = weights * (difference - np.average(difference, weights=weights))
            error = math.sqrt(np.square(np.bincount(copy_of, apart)).sum()) / weights.sum()
            rows.append((*pair, self._mean(losses), error))
        return rows


def choose_penalties(
    prepared: Prepared,
    stages: TwoStageFit,
    alpha: float | None,
    gradient_alpha: float | None,
    progress: Progress | None = None,
) -> Choice:
    """Return penalties; those that are None are chosen by the loss of held-out samples.

    Parameters
    ----------
    prepared : Prepared
        All samples.
    stages : TwoStageFit
        Both stages on all samples.
    alpha, gradient_alpha : float or None
        The penalties that are given.
    progress : Progress or None
        Follows the search.

    Returns
    -------
    Choice
    """
    features, activation = stages.settings.features, stages.samples.activation
    rows: list[tuple[float, float, float, float]] = []
    folds = by_folds(prepared, stages)
    left_out = LeftOut(prepared, stages) if isinstance(stages.loss, Squared) else None
    if left_out is not None and not left_out.is_cheap:
        left_out = None
    held_out: HeldOut | None = left_out or folds
    if alpha is None and held_out is None:
        alpha = _alpha_by_scale(stages)
    elif alpha is None:
        assert held_out is not None
        tried = _Tried(held_out, progress)
        largest = largest_curvature(stages.objective(0.0, activation, None)) or 1.0
        alpha = _best_of_path(lambda a: tried.loss(a, math.inf), largest)
        rows += tried.rows()
    if features == "activation":
        gradient_alpha = math.inf
    if gradient_alpha is None:
        scale = stages.curvature_of_step(stages.fit_activation(alpha))
        if left_out is not None and left_out.gram(alpha) is None:
            held_out = folds
        if not scale > 0 or held_out is None:
            gradient_alpha = scale or 1.0 if features == "gradient" else math.inf
        else:
            tried = _Tried(held_out, progress)
            baseline = None if features == "gradient" else tried.loss(alpha, math.inf)
            gradient_alpha = _best_of_path(lambda a: tried.loss(alpha, a), scale, baseline)
            rows += tried.rows()
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    names = ("alpha", "gradient_alpha", "loss", "standard_error")
    return Choice(alpha, gradient_alpha, dict(zip(names, columns, strict=True)))


def _best_of_path(
    loss_of: Callable[[float], float], start: float, baseline: float | None = None
) -> float:
    """Return the penalty with the smallest loss.

    Parameters
    ----------
    loss_of : callable
        The loss of a penalty.
    start : float
        The penalty where the path starts.
    baseline : float or None
        The loss of an infinite penalty, if that is a choice.
    """
    losses = {} if baseline is None else {math.inf: baseline}

    def falls(penalty: float) -> bool:
        """Try a penalty; return whether it is clearly better than all before."""
        former = min(losses.values(), default=math.inf)
        losses[penalty] = loss_of(penalty)
        return losses[penalty] < (1 - _FLAT) * former

    def best() -> float:
        """Return the strongest of the best penalties."""
        return min(losses, key=lambda penalty: (losses[penalty], -penalty))

    failures, penalty = 0, start
    for _ in range(_MAX_STEPS):
        failures = 0 if falls(penalty) else failures + 1
        if failures == 2 or losses[penalty] > _CLEAR * losses[best()]:
            break
        penalty /= _STEP
    if best() in (start, math.inf):
        penalty = start
        for _ in range(_MAX_STEPS):
            penalty *= _STEP
            if not falls(penalty):
                break
    return _vertex(losses, best())


def _vertex(losses: dict[float, float], best: float) -> float:
    """Return the minimum of the parabola through the best value and its two neighbours.

    The losses are a function of the logarithm of the penalty.
    """
    stronger, weaker = best * _STEP, best / _STEP
    if math.isinf(best) or stronger not in losses or weaker not in losses:
        return best
    rise, fall = losses[weaker] - losses[best], losses[stronger] - losses[best]
    if not 0 < rise + fall < math.inf:
        return best
    shift = (rise - fall) / (rise + fall) / 2
    return float(best * _STEP**shift)


def _alpha_by_scale(stages: TwoStageFit) -> float:
    """Return the mean variance of the activations, divided by the number of samples."""
    weights = stages.loss.weights
    activation = stages.samples.activation.to(weights)
    variance = float((weights @ (activation - weights @ activation).square()).mean())
    n_used = int((weights > 0).sum())
    return variance / n_used if variance > 0 else 1.0
