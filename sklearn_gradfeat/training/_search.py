"""The choice of penalties by the loss of held-out samples.

1. ``alpha``, for the model on the activations alone, whose fits are cheap.
2. ``gradient_alpha`` with that ``alpha``. The model without a gradient term competes.

A path goes from strong to weak by powers of ten, until the loss rises clearly, or has not fallen
twice in a row. A fall by less than half a standard error does not count, nor does one by less than
a ten-thousandth of the loss of the zero model. Every fit starts from the one with the next stronger
penalty. The path of ``alpha`` starts at the largest curvature of the loss, that of
``gradient_alpha`` at the curvature along the first step of the second stage. So penalties follow
the scale of the data. A path whose best value is its first goes on to stronger ones. The model
without a gradient term ends no path: strong penalties may be worse than none, and weak ones better.

The choice is the strongest penalty whose loss is within half a standard error of the smallest one;
the standard error is that of the difference, sample by sample. If that is the penalty with the
smallest loss itself, the choice is the minimum of a parabola through it and its neighbours, in the
logarithm of the penalty. A gradient term that makes no fall that counts is left out.

With several linearisations, the loss of a ``gradient_alpha`` is that of the network after the first
move. A moved network fits the training samples closely, so ``alpha`` is ten times as large. The
path is tried again with the first ``alpha`` if no moved network is better than the activations, or
if the moved networks are better with the output weights for that ``alpha``. There, and with a given
``alpha``, the first linear model competes. The best pair alone has further linearisations, which
give their number, see :class:`Relinearized`.

Without samples to hold out, as with one sample of each class, a rule by scale takes their place:
``alpha`` is the mean variance of the activations, divided by the number of samples, as in a
regression with ``C = 1`` on standardised activations; and there is no gradient term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from sklearn_gradfeat.curvature import largest_curvature
from sklearn_gradfeat.data import number_of_first_rank, row_blocks, sum_over_ranks
from sklearn_gradfeat.training._held_out import (
    ENOUGH,
    ENOUGH_WITH_GRADIENTS,
    Array,
    Folds,
    HeldOut,
    LeftOut,
    Relinearized,
)
from sklearn_gradfeat.training._penalties import FLAT, STEP
from sklearn_gradfeat.training._progress import Progress
from sklearn_gradfeat.training._two_stage_fit import Prepared, TwoStageFit

# A rise by a larger share that is not tolerated ends a path at once.
_CLEAR = 0.02
# Standard errors that a stronger penalty may be worse. A smaller difference does not count.
_TOLERATED = 0.5
# Losses that differ by a smaller share are equal up to rounding errors.
_ROUNDING = 1e-9
_MAX_STEPS = 8  # down, and as many up
# A fall of the loss by a smaller share of that of the zero model counts as none.
_NEGLIGIBLE = 1e-4


# alpha, gradient_alpha, mean loss, standard error
Row = tuple[float, float, float, float]


class Choice(NamedTuple):
    """The chosen penalties, and the held-out losses of all that were tried.

    ``n_models`` counts the linear models and moved networks up to the chosen one. ``scores`` has
    the columns ``alpha``, ``gradient_alpha``, ``loss`` and ``standard_error``.
    """

    alpha: float
    gradient_alpha: float
    n_models: int
    scores: dict[str, Array]


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
    features, n_linearizations = stages.settings.features, stages.settings.n_linearizations
    rows = []
    if features == "activation":
        gradient_alpha = math.inf
    if gradient_alpha == math.inf:
        n_linearizations = 1
    loss = stages.loss
    zero = loss.weights.new_zeros(len(loss.weights), loss.n_outputs)
    negligible = _NEGLIGIBLE * loss.value(zero)
    if alpha is None or gradient_alpha is None or n_linearizations is None:
        if progress is not None:
            progress.search()
        folds, left_out = Folds.of(prepared, stages), LeftOut.where_cheap(prepared, stages)
    any_alpha = alpha is None and n_linearizations != 1
    if alpha is None:
        held_out = left_out or folds.enough(ENOUGH)
        alpha = stages.journal.number("scale of alpha", lambda: _alpha_by_scale(stages))
        if held_out is not None:
            objective = stages.objective(0.0, stages.samples.activation, None)
            path = _Path(held_out, lambda a: (a, math.inf), progress, negligible)
            largest = stages.journal.number(
                "largest curvature", lambda: largest_curvature(objective)
            )
            alpha = path.best_from(largest or 1.0)
            rows += path.rows()
    n_models = 1 if n_linearizations in (1, None) else 2 * n_linearizations
    if gradient_alpha is None or n_linearizations is None:
        distances = [abs(math.log(row[0] / alpha)) for row in rows]
        nearest = rows[int(np.argmin(distances))][0] if rows else alpha
        larger = STEP * alpha if any_alpha and gradient_alpha is None else alpha
        of_gradients = _held_out_of_gradients(
            folds, left_out, stages, alpha, larger, nearest, n_linearizations, negligible
        )
        if gradient_alpha is None:
            scale = stages.curvature_of_step(stages.fit_activation(larger))
            gradient_alpha = math.inf if features == "full" else scale or 1.0
            if of_gradients is not None and scale > 0:
                alpha, gradient_alpha, tried = _best_pair(
                    of_gradients, alpha, larger, scale, features == "full", progress, negligible
                )
                rows += tried
        if isinstance(of_gradients, Relinearized):
            n_models = of_gradients.n_models(alpha, gradient_alpha)
    names = "alpha", "gradient_alpha", "loss", "standard_error"
    columns = np.array(rows, dtype=np.float64).reshape(-1, len(names)).T
    return Choice(alpha, gradient_alpha, n_models, dict(zip(names, columns, strict=True)))


def _best_pair(
    held_out: HeldOut,
    alpha: float,
    larger: float,
    scale: float,
    infinite: bool,
    progress: Progress | None,
    negligible: float,
) -> tuple[float, float, list[Row]]:
    """Return both penalties of the best model with a gradient term, and all that were tried.

    The path has the ``larger`` of two ``alpha``. It is tried again with the other one if there is
    no gradient term, or if moved networks are better with its output weights.
    """
    path = _Path(
        held_out, lambda g: (larger if math.isfinite(g) else alpha, g), progress, negligible
    )
    best, rows = path.best_from(scale, infinite), path.rows()
    settled = not isinstance(held_out, Relinearized) or held_out.refitted >= path.smallest
    if larger == alpha or (math.isfinite(best) and settled):
        return larger, best, rows
    other = _Path(held_out, lambda g: (alpha, g), progress, negligible)
    found = other.best_from(best if math.isfinite(best) else scale)
    rows += other.rows()
    if path.smallest - other.smallest > negligible:
        return alpha, found, rows
    return (larger if math.isfinite(best) else alpha), best, rows


def _held_out_of_gradients(
    folds: Folds,
    left_out: LeftOut | None,
    stages: TwoStageFit,
    alpha: float,
    larger: float,
    nearest: float,
    n_linearizations: int | None,
    negligible: float,
) -> HeldOut | None:
    """Return the held-out samples of models with a gradient term, or None without any."""
    if n_linearizations == 1 and left_out is not None and left_out.gram(alpha) is not None:
        return left_out
    enough = folds.enough(ENOUGH)
    if enough is None:
        return None
    enough = enough.typical_first(nearest).enough(ENOUGH_WITH_GRADIENTS)
    assert enough is not None
    first = stages.fit_activation(larger)
    if n_linearizations == 1:
        shared = stages.shared(first)
        if shared is not None:
            enough.share(*shared)
        return enough
    if stages.has_coarse_space(first):
        enough.share(first.inverses, True)
    return Relinearized(enough, n_linearizations, negligible, alpha)


class _Path:
    """The losses of one penalty, from strong to weak.

    Parameters
    ----------
    held_out : HeldOut
        The losses of held-out samples.
    pair_of : callable
        Maps a value of the penalty to ``(alpha, gradient_alpha)``.
    progress : Progress or None
        Shows the best value so far.
    negligible : float, default=0.0
        The largest fall of the loss that counts as none, however small the loss.
    """

    def __init__(
        self,
        held_out: HeldOut,
        pair_of: Callable[[float], tuple[float, float]],
        progress: Progress | None,
        negligible: float = 0.0,
    ) -> None:
        self._held_out, self._pair_of, self._progress = held_out, pair_of, progress
        self._negligible = negligible
        self._losses: dict[float, Array] = {}
        self._means: dict[float, float] = {}

    def best_from(self, start: float, infinite: bool = False) -> float:
        """Return the best penalty of a path that begins at ``start``.

        ``infinite`` says whether an infinite penalty is a choice, too; it is the choice if no other
        one has a loss that is smaller by more than a negligible fall.
        """
        if infinite:
            self._try(math.inf)
            if self._means[math.inf] <= self._negligible:
                return math.inf
        failures, penalty = 0, start
        for _ in range(_MAX_STEPS):
            failures = 0 if self._try(penalty) else failures + 1
            if failures == 2 or self._rises(penalty):
                break
            penalty /= STEP
        penalty = start
        for _ in range(_MAX_STEPS):
            if self._lowest() not in (penalty, math.inf):
                break
            penalty *= STEP
            if not self._try(penalty):
                break
        return self._chosen()

    @property
    def smallest(self) -> float:
        """The smallest loss."""
        return min(self._means.values())

    def rows(self) -> list[Row]:
        """Return penalties, mean loss, and the standard error of its difference to the best."""
        return [
            (*self._pair_of(penalty), mean, self._error(penalty, self._lowest()))
            for penalty, mean in self._means.items()
        ]

    def _try(self, penalty: float) -> bool:
        """Try a penalty, and return whether its loss is clearly below those of the path."""
        former = self._lowest_of_path()
        self._losses[penalty] = losses = self._held_out.losses(*self._pair_of(penalty))
        finite = bool(np.isfinite(losses).all())
        mean = float(np.average(losses, weights=self._held_out.weights)) if finite else math.inf
        self._means[penalty] = mean = number_of_first_rank(mean)
        if self._progress is not None:
            best = self._lowest()
            self._progress.tried(*self._pair_of(best), self._means[best])
        if former is None:
            return True
        smallest = self._means[former]
        clear = max(FLAT * smallest, self._negligible, _TOLERATED * self._error(penalty, former))
        return smallest - mean > clear

    def _lowest(self) -> float:
        """Return the strongest of the penalties with the smallest loss."""
        return min(self._means, key=lambda penalty: (self._means[penalty], -penalty))

    def _lowest_of_path(self) -> float | None:
        """Return the strongest of the finite penalties with the smallest loss, None without any."""
        finite = [penalty for penalty in self._means if math.isfinite(penalty)]
        return min(finite, key=lambda p: (self._means[p], -p), default=None)

    def _error(self, penalty: float, other: float) -> float:
        """Return the standard error of the difference of two losses."""
        weights = self._held_out.weights
        with np.errstate(invalid="ignore"):
            difference = self._losses[penalty] - self._losses[other]
            apart = weights * (difference - np.average(difference, weights=weights))
        return float(np.sqrt(np.square(apart).sum()) / weights.sum())

    def _rises(self, penalty: float) -> bool:
        """Whether the loss is clearly above the smallest one of the path."""
        best = self._lowest_of_path() or penalty
        smallest = self._means[best]
        rise = self._means[penalty] - smallest
        return not rise <= max(_CLEAR * smallest, _TOLERATED * self._error(penalty, best))

    def _near(self, penalty: float) -> float:
        """Return the loss of a penalty, up to rounding errors, infinite if it was not tried."""
        found = (mean for p, mean in self._means.items() if math.isclose(p, penalty))
        return next(found, math.inf)

    def _chosen(self) -> float:
        """Return the choice, see the top of this module."""
        best = self._lowest()
        if self._means.get(math.inf, math.inf) - self._means[best] <= self._negligible:
            return math.inf
        rounding = _ROUNDING * abs(self._means[best])
        tolerated = {p: max(_TOLERATED * self._error(p, best), rounding) for p in self._means}
        limit = {p: self._means[best] + tolerated[p] for p in self._means}
        strongest = max(p for p in self._means if self._means[p] <= limit[p] or p == best)
        if strongest != best:
            return strongest
        stronger, weaker = self._near(best * STEP), self._near(best / STEP)
        rise, fall = weaker - self._means[best], stronger - self._means[best]
        if not 0 < rise + fall < math.inf:
            return best
        return float(best * STEP ** ((rise - fall) / (rise + fall) / 2))


def _alpha_by_scale(stages: TwoStageFit) -> float:
    """Return the mean variance of the activations, divided by the number of samples."""
    weights = stages.loss.weights
    activation = stages.samples.activation
    mean = weights.new_zeros(activation.shape[1])
    for rows in row_blocks(*activation.shape):
        mean += weights[rows] @ activation[rows].to(weights)
    mean = sum_over_ranks(mean)
    rounding = 4 * torch.finfo(activation.dtype).eps * mean.abs()
    variances = torch.zeros_like(mean)
    for rows in row_blocks(*activation.shape):
        deviation = activation[rows].to(weights) - mean
        deviation[deviation.abs() <= rounding] = 0
        variances += weights[rows] @ deviation.square()
    variance = float(sum_over_ranks(variances).mean())
    n_used = int(sum_over_ranks((weights > 0).sum()))
    return variance / n_used if variance > 0 else 1.0
