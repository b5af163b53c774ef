"""The choice of penalties by the loss of held-out samples.

1. ``alpha``, for the model on the activations alone, whose fits are cheap.
2. ``gradient_alpha``. The model without a gradient term competes. Those with one have the strongest
   ``alpha`` whose loss is within a standard error of the smallest one. With a weak ``alpha``, the
   output weights are large, and with them the gradient features; a strong one costs little where
   the gradient term fits what the activations cannot.

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
logarithm of the penalty. A gradient term that makes no fall that counts is left out; if its loss
was smaller, more samples are held out first, where there are more folds.

With several linearisations, the loss of a ``gradient_alpha`` is that of the network after the next
move, see :class:`Relinearized`, and the choice is the value with the smallest loss. A moved network
fits the training samples closely, so ``alpha`` is ten times as large as without a gradient term.
The path is tried again with the smaller ``alpha`` if no moved network is better than the
activations, or if the moved networks are better with the output weights for that ``alpha``; where
they are before a further linearisation, the path ends there. With the smaller ``alpha``, and with a
given one, the first linear model competes. The best pair alone has further linearisations, which
give their number.

Without samples to hold out, as with one sample of each class, a rule by scale takes their place:
``alpha`` is the mean variance of the activations, divided by the number of distinct samples, as in
a regression with ``C = 1`` on standardised activations; and there is no gradient term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from sklearn_gradfeat.curvature import largest_curvature
from sklearn_gradfeat.data import (
    number_of_first_rank,
    row_blocks,
    rows_of_all_ranks,
    sum_over_ranks,
)
from sklearn_gradfeat.linearized import to_numpy
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
_FAILURES = 2  # in a row, that end a path
# A fall of the loss by a smaller share of that of the zero model counts as none.
_NEGLIGIBLE = 1e-4


# alpha, gradient_alpha, mean loss, standard error
Row = tuple[float, float, float, float]


class Choice(NamedTuple):
    """The chosen penalties, and the held-out losses of all that were tried.

    ``n_models`` counts the linear models and moved networks up to the chosen one, and ``stronger``
    has the penalties of the linearisations before those with ``gradient_alpha``. ``scores`` has the
    columns ``alpha``, ``gradient_alpha``, ``loss`` and ``standard_error``.
    """

    alpha: float
    gradient_alpha: float
    n_models: int
    stronger: tuple[float, ...]
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
    if features == "activation":
        gradient_alpha = math.inf
    if gradient_alpha == math.inf:
        n_linearizations = 1
    n_models = 1 if n_linearizations in (1, None) else 2 * n_linearizations
    if alpha is not None and gradient_alpha is not None and n_linearizations is not None:
        return Choice(alpha, gradient_alpha, n_models, (), _columns([]))
    search = _Search(prepared, stages, n_linearizations, progress)
    stronger: tuple[float, ...] = ()
    without = alpha
    if without is None:
        n_following = 1 + _FAILURES + (features == "full") if gradient_alpha is None else 0
        without, alpha = search.alphas(n_following)
        if gradient_alpha is not None and (math.isinf(gradient_alpha) or n_linearizations != 1):
            alpha = without
    assert alpha is not None
    if gradient_alpha is None or n_linearizations is None:
        held_out, others = search.of_gradients(without, alpha)
        if gradient_alpha is None:
            alpha, gradient_alpha = search.pair(held_out, others, without, alpha)
        if isinstance(held_out, Relinearized):
            n_models = 2
            if not search.stopped:
                n_models = held_out.n_models(alpha, gradient_alpha)
                stronger = held_out.stronger(alpha, gradient_alpha)
    return Choice(alpha, gradient_alpha, n_models, stronger, _columns(search.rows))


def _columns(rows: list[Row]) -> dict[str, Array]:
    names = "alpha", "gradient_alpha", "loss", "standard_error"
    columns = np.array(rows, dtype=np.float64).reshape(-1, len(names)).T
    return dict(zip(names, columns, strict=True))


class _Search:
    """The search for the penalties of a problem.

    Parameters
    ----------
    prepared, stages, progress
        As in :func:`choose_penalties`.
    n_linearizations : int or None
        The largest number of linearisations; None is no limit.

    Attributes
    ----------
    rows : list of Row
        All pairs of penalties that were tried.
    stopped : bool
        Whether a callback asked to stop.
    """

    def __init__(
        self,
        prepared: Prepared,
        stages: TwoStageFit,
        n_linearizations: int | None,
        progress: Progress | None,
    ) -> None:
        if progress is not None:
            progress.search()
        self._stages, self._progress = stages, progress
        self._n_linearizations = n_linearizations
        self._folds = Folds.of(prepared, stages)
        self._left_out = LeftOut.where_cheap(prepared, stages)
        loss = stages.loss
        zero = loss.weights.new_zeros(len(loss.weights), loss.n_outputs)
        self._negligible = _NEGLIGIBLE * loss.value(zero)
        self.stopped = False
        self.rows: list[Row] = []

    def _path(self, held_out: HeldOut, pair_of: Callable[[float], tuple[float, float]]) -> _Path:
        return _Path(held_out, pair_of, self._progress, self._negligible)

    def alphas(self, n_following: int) -> tuple[float, float]:
        """Return the best ``alpha`` without a gradient term, and the one for a gradient term.

        ``n_following`` is the number of pairs to try afterwards, for the progress.
        """
        one = self._n_linearizations == 1
        stages, held_out = self._stages, self._left_out or self._folds.enough(ENOUGH)
        by_scale = stages.journal.number("scale of alpha", lambda: _alpha_by_scale(stages))
        if held_out is None:
            return by_scale, by_scale if one else STEP * by_scale
        objective = stages.objective(0.0, stages.samples.activation, None)
        path = self._path(held_out, lambda a: (a, math.inf))
        path.n_following = n_following
        largest = stages.journal.number("largest curvature", lambda: largest_curvature(objective))
        best = path.best_from(largest or 1.0)
        self.rows += path.rows()
        self.stopped = path.stopped
        return best, max(best, path.strongest(1.0)) if one else STEP * best

    def of_gradients(self, without: float, alpha: float) -> tuple[HeldOut | None, Folds]:
        """Return the held-out samples of models with a gradient term, and folds with others.

        The former are None if no sample can be held out, or if a callback ended the search. The
        parameters are the ``alpha`` of the model without a gradient term, and of those with one.
        """
        stages, left_out = self._stages, self._left_out
        if self.stopped:
            return None, Folds([])
        if self._n_linearizations == 1 and left_out is not None and left_out.has_gram(alpha):
            return left_out, Folds([])
        enough = self._folds.enough(ENOUGH)
        if enough is None:
            return None, Folds([])
        tried = [row[0] for row in self.rows]
        nearest = min(tried, key=lambda other: abs(math.log(other / alpha)), default=alpha)
        first, others = enough.typical_first(nearest).divided(ENOUGH_WITH_GRADIENTS)
        of_alpha = stages.fit_activation(alpha)
        shared = stages.shared(of_alpha)
        if self._n_linearizations != 1:
            if shared is not None:
                first.share(shared[0], stages.has_coarse_space(of_alpha))
            found = Relinearized(first, self._n_linearizations, self._negligible, without)
            return found, Folds([])
        if shared is not None:
            first.share(*shared)
            others.share(*shared)
        return first, others

    def pair(
        self,
        held_out: HeldOut | None,
        others: Folds,
        without: float,
        alpha: float,
    ) -> tuple[float, float]:
        """Return the best pair of penalties.

        With several linearisations, models with a gradient term may have either ``alpha``, see the
        top of this module.

        Parameters
        ----------
        held_out : HeldOut or None
            The held-out samples.
        others : Folds
            Folds that hold out others.
        without, alpha : float
            The ``alpha`` of the model without a gradient term, and of those with one.

        Returns
        -------
        alpha, gradient_alpha : float
        """
        stages, infinite = self._stages, self._stages.settings.features == "full"
        scale = stages.curvature_of_step(stages.fit_activation(alpha))
        if held_out is None or not scale > 0:
            return (without, math.inf) if infinite else (alpha, scale or 1.0)
        path = self._path(held_out, lambda g: (without if math.isinf(g) else alpha, g))
        best = path.best_from(scale, infinite, others)
        self.rows += path.rows()
        self.stopped = path.stopped
        unsettled = isinstance(held_out, Relinearized) and (
            math.isinf(best) or held_out.refitted < path.smallest
        )
        if unsettled and alpha != without and not path.stopped:
            other = self._path(held_out, lambda g: (without, g))
            found = other.best_from(scale if math.isinf(best) else best)
            self.rows += other.rows()
            self.stopped = other.stopped
            if path.smallest - other.smallest > self._negligible:
                return without, found
        return without if math.isinf(best) else alpha, best


class _Path:
    """The losses of one penalty, from strong to weak.

    Parameters
    ----------
    held_out : HeldOut
        The losses of held-out samples.
    pair_of : callable
        Maps a value of the penalty to ``(alpha, gradient_alpha)``.
    progress : Progress or None
        Shows the best value so far, and may end the path.
    negligible : float, default=0.0
        The largest fall of the loss that counts as none, however small the loss.

    Attributes
    ----------
    n_following : int
        Number of pairs to try after this path, for the progress.
    stopped : bool
        Whether a callback asked to stop.
    """

    def __init__(
        self,
        held_out: HeldOut,
        pair_of: Callable[[float], tuple[float, float]],
        progress: Progress | None,
        negligible: float = 0.0,
    ) -> None:
        self._held_out, self._pair_of, self._progress = held_out, pair_of, progress
        self._weights, self._negligible = held_out.weights, negligible
        self._losses: dict[float, Array] = {}
        self._means: dict[float, float] = {}
        self._failures = self.n_following = 0
        self.stopped = False

    def best_from(self, start: float, infinite: bool = False, others: Folds | None = None) -> float:
        """Return the best penalty of a path that begins at ``start``.

        ``infinite`` says whether an infinite penalty is a choice, too; it is the choice if no other
        one has a loss that is smaller by more than a negligible fall. Before it takes the place of
        another one with a smaller loss, the samples of ``others`` are held out as well.
        """
        if infinite:
            self._try(math.inf)
            if self._means[math.inf] <= self._negligible or self.stopped:
                return math.inf
        penalty = start
        for _ in range(_MAX_STEPS):
            self._try(penalty)
            if self._failures == _FAILURES or self._rises(penalty) or self._ends:
                break
            penalty /= STEP
        penalty = start
        for _ in range(_MAX_STEPS):
            if self._lowest() not in (penalty, math.inf) or self._ends:
                break
            penalty *= STEP
            if not self._try(penalty):
                break
        chosen = self._chosen()
        fall = self._means.get(chosen, 0.0) - self.smallest
        if not others or math.isfinite(chosen) or fall <= self._negligible or self.stopped:
            return chosen
        for penalty, losses in self._losses.items():
            further = others.losses(*self._pair_of(penalty))
            self._losses[penalty] = np.concatenate([losses, further])
        self._weights = np.concatenate([self._weights, others.weights])
        self._means = {penalty: self._mean(losses) for penalty, losses in self._losses.items()}
        return self._chosen()

    @property
    def _ends(self) -> bool:
        """Whether a callback asked to stop, or another ``alpha`` is better."""
        gave_up = isinstance(self._held_out, Relinearized) and self._held_out.gave_up
        return self.stopped or gave_up

    def strongest(self, errors: float) -> float:
        """Return the strongest penalty whose loss is so many standard errors above the smallest."""
        best = self._lowest()
        rounding = _ROUNDING * abs(self._means[best])
        limit = {
            p: self._means[best] + max(errors * self._error(p, best), rounding) for p in self._means
        }
        return max(p for p in self._means if self._means[p] <= limit[p] or p == best)

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
        self._means[penalty] = mean = self._mean(losses)
        falls = True
        if former is not None:
            smallest, error = self._means[former], self._error(penalty, former)
            falls = smallest - mean > max(FLAT * smallest, self._negligible, _TOLERATED * error)
        self._failures = 0 if falls else self._failures + 1
        if self._progress is not None:
            best = self._lowest()
            n_left = max(_FAILURES - self._failures, 0) + self.n_following
            self.stopped = self._progress.tried(
                self._pair_of(penalty), self._pair_of(best), self._means[best], n_left
            )
        return falls

    def _mean(self, losses: Array) -> float:
        finite = bool(np.isfinite(losses).all())
        return number_of_first_rank(
            float(np.average(losses, weights=self._weights)) if finite else math.inf
        )

    def _lowest(self) -> float:
        """Return the strongest of the penalties with the smallest loss."""
        return min(self._means, key=lambda penalty: (self._means[penalty], -penalty))

    def _lowest_of_path(self) -> float | None:
        """Return the strongest of the finite penalties with the smallest loss, None without any."""
        finite = [penalty for penalty in self._means if math.isfinite(penalty)]
        return min(finite, key=lambda p: (self._means[p], -p), default=None)

    def _error(self, penalty: float, other: float) -> float:
        """Return the standard error of the difference of two losses."""
        weights = self._weights
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
        if isinstance(self._held_out, Relinearized):
            return best
        strongest = self.strongest(_TOLERATED)
        if strongest != best:
            return strongest
        stronger, weaker = self._near(best * STEP), self._near(best / STEP)
        rise, fall = weaker - self._means[best], stronger - self._means[best]
        if not 0 < rise + fall < math.inf:
            return best
        return float(best * STEP ** ((rise - fall) / (rise + fall) / 2))


def _alpha_by_scale(stages: TwoStageFit) -> float:
    """Return the mean variance of the activations, divided by the number of distinct samples."""
    weights = stages.loss.weights
    activation = stages.samples.activation
    mean = weights.new_zeros(activation.shape[1])
    for rows in row_blocks(*activation.shape, device=activation.device):
        mean += weights[rows] @ activation[rows].to(weights)
    mean = sum_over_ranks(mean)
    rounding = 4 * torch.finfo(activation.dtype).eps * mean.abs()
    variances = torch.zeros_like(mean)
    for rows in row_blocks(*activation.shape, device=activation.device):
        deviation = activation[rows].to(weights) - mean
        deviation[deviation.abs() <= rounding] = 0
        variances += weights[rows] @ deviation.square()
    variance = float(sum_over_ranks(variances).mean())
    names = stages.samples.names[to_numpy(weights) > 0]
    n_used = len(np.unique(rows_of_all_ranks(names)[0]))
    return variance / n_used if variance > 0 else 1.0
