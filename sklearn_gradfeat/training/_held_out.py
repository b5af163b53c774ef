"""The losses of held-out samples: by folds, or by leave-one-out where that has a closed form.

*Folds.* Copies of a sample are in one fold. Classes are spread evenly over the folds. The content
of the samples decides, by its hash: so the folds do not depend on the order of the samples, and an
integer weight has the same effect as repetitions. A class with one distinct sample is never held
out. One fold of many samples says enough, and five folds of a few say little: folds are used until
they hold enough samples together, more of them for the cheap models on the activations. Where most
samples are of one class, twice the number of the others counts.

A fold with few samples is solved with explicit rows, by Newton's method. With the right singular
vectors ``V`` of the activations, ``W f`` is linear in ``Vᵀ f``; with a root ``A Aᵀ`` of the Gram
matrix of the gradient term, the term has the rows of ``A``, and the penalty stays as it is.

*Leave-one-out*, for squared errors and few samples, needs no fits, see
:mod:`sklearn_gradfeat.curvature._sample_space`. Copies of a sample count as one sample.

Ranks that fit together have the same folds as one process with all samples. They have neither
explicit rows nor leave-one-out, whose systems take all samples into one process.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sklearn_gradfeat.curvature import (
    CoarsePath,
    Inverses,
    activation_gram,
    leave_one_out,
    tangent_gram,
)
from sklearn_gradfeat.data import n_ranks, number_of_first_rank, rows_of_all_ranks, sum_over_ranks
from sklearn_gradfeat.linearized import (
    LinearizedHead,
    LinearModel,
    Squared,
    TangentObjective,
    to_numpy,
)
from sklearn_gradfeat.solvers import newton
from sklearn_gradfeat.training._problem import Problem
from sklearn_gradfeat.training._relinearization import Relinearization
from sklearn_gradfeat.training._two_stage_fit import (
    COARSE_TOL,
    FirstStage,
    Prepared,
    TwoStageFit,
)

N_FOLDS = 5
# Distinct held-out samples that are enough to compare penalties, of the models on the activations
# and of those with a gradient term.
ENOUGH = 500
ENOUGH_WITH_GRADIENTS = 100
# Held-out losses need no more digits than this tolerance gives.
_TOL = 1e-3
# Largest n_samples * n_outputs of leave-one-out: a factorisation then takes less than a fit.
_MAX_LEFT_OUT = 1024
# Largest n_samples * n_outputs of a fold with explicit rows.
_MAX_DENSE = 400
# Models of a path that are kept, for later fits to start from.
_KEPT = 4
_MAX_LINEARIZATIONS = 10
# A linearisation that lowers the loss by a smaller share is not worth its time.
_GAIN = 5e-3

Array = npt.NDArray[np.float64]


class HeldOut(Protocol):
    """The losses of held-out samples for given penalties."""

    def losses(self, alpha: float, gradient_alpha: float) -> Array:
        """Return the mean losses of the distinct held-out samples."""

    @property
    def weights(self) -> Array:
        """The weights of the distinct held-out samples."""


def assign_folds(
    names: npt.NDArray[np.uint64], strata: npt.NDArray[np.intp], weights: Array
) -> npt.NDArray[np.intp]:
    """Return the fold of every sample, or -1 for samples that are never held out.

    Parameters
    ----------
    names : ndarray of shape (n_samples,), uint64
        A hash of the content of each sample.
    strata : ndarray of shape (n_samples,), int
        The classes. Copies of a sample with several classes count for the lowest one.
    weights : ndarray of shape (n_samples,)
        Samples of weight zero are never held out.

    Returns
    -------
    ndarray of shape (n_samples,), int
        Numbers from 0 to 4, or -1.
    """
    folds = np.full(len(names), -1)
    used = np.flatnonzero(weights > 0)
    distinct, copy_of = np.unique(names[used], return_inverse=True)
    stratum = np.full(len(distinct), strata.max())
    np.minimum.at(stratum, copy_of, strata[used])
    order = np.lexsort((distinct, stratum))
    order = order[np.bincount(stratum)[stratum[order]] > 1]
    of_distinct = np.full(len(distinct), -1)
    of_distinct[order] = np.arange(len(order)) % N_FOLDS
    folds[used] = of_distinct[copy_of]
    return folds


def _informative(
    names: npt.NDArray[np.uint64], strata: npt.NDArray[np.intp], has_classes: bool
) -> int:
    """Return the number of distinct samples, at most twice that outside of the largest class."""
    first = np.unique(names, return_index=True)[1]
    outside = len(first) - int(np.bincount(strata[first]).max())
    return min(len(first), 2 * outside) if has_classes else len(first)


class _Fold:
    """The fits of one fold, and its held-out samples.

    Parameters
    ----------
    prepared : Prepared
        All samples.
    problem : Problem
        Their targets and weights.
    is_held_out : ndarray of shape (n_samples,), bool
        The held-out samples.
    size : int
        Their number as :func:`_informative` counts it.
    """

    def __init__(
        self, prepared: Prepared, problem: Problem, is_held_out: npt.NDArray[np.bool_], size: int
    ) -> None:
        self.size = size
        self._prepared, self._problem, self._is_held_out = prepared, problem, is_held_out
        self._train, self._test = _some(~is_held_out), _some(is_held_out)
        self._weights = np.where(is_held_out, problem.weights, 0)[self._test]
        self._train_weights = np.where(is_held_out, 0, problem.weights)
        self._first_stages: dict[float, FirstStage] = {}
        self._models: dict[tuple[float, float], LinearModel] = {}
        self._shared: Inverses | None = None
        self._has_subspace = False
        self._paths: dict[float, CoarsePath] = {}
        self._to_minimize: defaultdict[float, list[TangentObjective]] = defaultdict(list)
        self._moved: TwoStageFit | None = None
        # Copies of a sample are one sample, with the sum of their weights.
        names = prepared.samples.names[is_held_out]
        distinct = np.unique(rows_of_all_ranks(names)[0])
        self._copy_of, self._n_distinct = np.searchsorted(distinct, names), len(distinct)
        self.weights = self._sums(self._weights)

    @functools.cached_property
    def stages(self) -> TwoStageFit:
        """The fits to the training samples."""
        return self._fits(self._train, self._train_weights)

    @functools.cached_property
    def _weighted(self) -> TwoStageFit:
        """The same fits, with the held-out samples at weight zero."""
        problem = self._problem.subset(np.arange(len(self._train_weights)), self._train_weights)
        return TwoStageFit(self._prepared, problem)

    @functools.cached_property
    def held(self) -> TwoStageFit:
        """The loss of the held-out samples."""
        weights = np.where(self._is_held_out, self._problem.weights, 0)
        return self._fits(self._test, weights)

    @functools.cached_property
    def _rows(self) -> _Rows | None:
        if n_ranks() > 1 or len(self._train) * self.stages.loss.n_outputs > _MAX_DENSE:
            return None
        both = np.concatenate([self._train, self._test])
        return _Rows(self._fits(both, self._problem.weights), self.stages)

    def _fits(self, rows: npt.NDArray[np.intp], weights: Array) -> TwoStageFit:
        problem = self._problem.subset(rows, weights[rows])
        return TwoStageFit(self._prepared.subset(rows), problem)

    def _sums(self, values: Array) -> Array:
        """Return the sums of values over the copies of every held-out sample."""
        values = values[: len(self._copy_of)]
        sums = np.bincount(self._copy_of, values, minlength=self._n_distinct)
        return sum_over_ranks(sums.astype(np.float64))

    def losses(self, alpha: float, gradient_alpha: float) -> Array:
        """Return the losses of the model that was fitted on all other samples."""
        logits = None if self._rows is None else self._rows.logits(alpha, gradient_alpha)
        if logits is not None:
            return self._losses(lambda: logits)
        if self._has_subspace and math.isfinite(gradient_alpha):
            first = self._first(alpha)
            objective = self._weighted.second_objective(first, gradient_alpha)
            self._to_minimize[alpha].append(objective)
            return self._losses(lambda: self._minimum(first))
        return self._losses_of(self._model(alpha, gradient_alpha))

    def _minimum(self, first: FirstStage) -> Tensor:
        """Return the logits at the last minimum over the coarse space that was asked for.

        Each starts from the former one. So a fit that goes on after a kill repeats those that its
        journal has the losses of.
        """
        if first.alpha not in self._paths:
            self._paths[first.alpha] = self._weighted.coarse_path(first)
        tol, objectives = min(COARSE_TOL, self.stages.settings.tol), self._to_minimize[first.alpha]
        for objective in objectives:
            self._paths[first.alpha].minimum(objective, tol)
        objectives.clear()
        return self._paths[first.alpha].logits[self._test]

    def start(self, alpha: float) -> Relinearization:
        """Return several linearisations at the pretrained parameters."""
        return Relinearization(self.stages, self._first(alpha))

    def go_on(self, run: Relinearization, gradient_alpha: float) -> tuple[Array, Array | None]:
        """Return the losses of the next linear model, and of the network if it moves."""
        reduced = self.stages.problem.reduced
        linear = self._losses_of(reduced(run.linear(gradient_alpha).model))
        moved = run.moved()
        self._moved = run.stages
        return linear, None if moved is None else self._losses_of(reduced(moved.model))

    def refitted(self, alpha: float) -> Array:
        """Return the losses of the last moved network, with output weights of this ``alpha``."""
        assert self._moved is not None
        return self._losses_of(self._moved.fit_activation(alpha).model)

    def _losses_of(self, model: LinearModel) -> Array:
        """Return the mean losses of the distinct held-out samples for a model."""
        return self._losses(lambda: cached_logits(model, self._prepared.subset(self._test)))

    def _losses(self, logits: Callable[[], Tensor]) -> Array:
        """Return the mean losses of the distinct held-out samples for their logits."""

        def compute() -> Array:
            shift = self.stages.problem.offset - self.held.problem.offset
            found = logits()
            found = found + torch.from_numpy(shift).to(found)
            losses: Array = to_numpy(self.held.loss.losses(found.to(self.held.loss.weights)))
            return self._sums(self._weights * losses) / self.weights

        return self._prepared.journal.numbers("losses of held-out samples", compute)

    def _first(self, alpha: float) -> FirstStage:
        """Return the fit of the output weights to the samples that are not held out."""
        if alpha not in self._first_stages:
            stronger = min((a for a in self._first_stages if a > alpha), default=None)
            warm = None if stronger is None else self._first_stages[stronger].model
            first = self._first_stages[alpha] = self.stages.fit_activation(alpha, warm)
            if self._shared is not None:
                first.inverses = self._shared.with_layers()
        return self._first_stages[alpha]

    def _model(self, alpha: float, gradient_alpha: float) -> LinearModel:
        """Return the model of the samples that are not held out."""
        first = self._first(alpha)
        model = first.model
        if math.isfinite(gradient_alpha):
            start = self._start(alpha, gradient_alpha)
            model, _ = self.stages.fit_gradient(first, gradient_alpha, start)
            self._models[alpha, gradient_alpha] = model
            for oldest in list(self._models)[:-_KEPT]:
                del self._models[oldest]
        return model

    def share(self, inverses: Inverses, has_subspace: bool) -> None:
        """Use the factors of the gradient layers of the fit to all samples."""
        self._shared, self._has_subspace = inverses, has_subspace
        for first in self._first_stages.values():
            first.inverses = inverses.with_layers()

    def _start(self, alpha: float, gradient_alpha: float) -> LinearModel:
        """Return the model with the next stronger penalty, or the first stage."""
        stronger = [pair for pair in self._models if pair[0] == alpha and pair[1] > gradient_alpha]
        return self._models[min(stronger)] if stronger else self._first_stages[alpha].model


def _some(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Return the chosen samples, or the first one where a rank has none of them."""
    return np.flatnonzero(chosen) if chosen.any() else np.zeros(1, dtype=np.intp)


class _Rows:
    """The logits of held-out samples from explicit rows.

    Parameters
    ----------
    both : TwoStageFit
        The training samples, followed by the held-out ones.
    train : TwoStageFit
        The training samples.
    """

    def __init__(self, both: TwoStageFit, train: TwoStageFit) -> None:
        self._both, self._train = both, train
        one = torch.eye(train.loss.n_outputs).to(train.loss.weights)
        n_train, activation = len(train.loss.weights), both.samples.activation.to(one)
        if train.settings.fit_intercept:  # then the mean is no direction of its own
            activation = activation - activation[:n_train].mean(0)
        self._basis = torch.linalg.svd(activation[:n_train], full_matrices=False).Vh.T
        inner = activation @ self._basis
        self._activation = torch.einsum("nr,ce->ncer", inner, one).flatten(2)
        self._intercept = one.expand(len(activation), -1, -1)
        if not train.settings.fit_intercept:
            self._intercept = self._intercept[..., :0]
        self._roots: dict[float, Tensor | None] = {}
        self._last: dict[tuple[int, ...], Tensor] = {}

    def logits(self, alpha: float, gradient_alpha: float) -> Tensor | None:
        """Return the logits, or None if the gradient term has no cheap Gram matrix."""
        blocks = {self._activation: alpha, self._intercept: 0.0}
        if math.isfinite(gradient_alpha):
            if alpha not in self._roots:
                self._roots[alpha] = self._root(alpha)
            root = self._roots[alpha]
            if root is None:
                return None
            if self._train.settings.features == "gradient":
                del blocks[self._activation]
            blocks[root] = gradient_alpha
        rows, x = self._solve(blocks)
        return rows[len(self._train.loss.weights) :] @ x

    def _solve(self, blocks: dict[Tensor, float]) -> tuple[Tensor, Tensor]:
        """Return the rows of all samples, and the optimum on the training samples."""
        rows, loss = torch.cat(list(blocks), dim=2), self._train.loss
        penalty = torch.cat([block.new_full(block.shape[2:], p) for block, p in blocks.items()])
        terms = tuple(map(id, blocks))
        start = self._last.get(terms, torch.zeros_like(penalty))
        self._last[terms] = newton(loss, rows[: len(loss.weights)], penalty, start)
        return rows, self._last[terms]

    def _root(self, alpha: float) -> Tensor | None:
        """Return a root of the Gram matrix of the gradient term, with the ``Ω`` of ``alpha``."""
        if self._both.like.dtype != torch.float64:
            return None
        _, x = self._solve({self._activation: alpha, self._intercept: 0.0})
        n_outputs, n_samples = self._train.loss.n_outputs, len(self._activation)
        omega = x[: self._activation.shape[2]].view(n_outputs, -1) @ self._basis.T
        gram = tangent_gram(self._both.tangent(omega, 0.0), n_samples)
        if gram is None:
            return None
        n_train = len(self._train.loss.weights) * n_outputs
        values, vectors = torch.linalg.eigh(gram[:n_train, :n_train])
        kept = values > torch.finfo(values.dtype).eps * len(values) * values[-1]
        root = gram[:, :n_train] @ vectors[:, kept] / values[kept].sqrt()
        found: Tensor = root.reshape(n_samples, n_outputs, int(kept.sum()))
        return found


class Folds:
    """The losses of samples that are left out of the fit in turn, a fold at a time.

    Parameters
    ----------
    folds : list of _Fold
        The folds.
    """

    def __init__(self, folds: list[_Fold]) -> None:
        self._folds = folds

    @classmethod
    def of(cls, prepared: Prepared, stages: TwoStageFit) -> Folds:
        """Return the folds of a problem; there are none if no sample can be held out."""
        problem, tol = stages.problem, max(_TOL, prepared.settings.tol)
        loose = prepared._replace(settings=replace(prepared.settings, tol=tol))
        names, own = rows_of_all_ranks(prepared.samples.names)
        strata, weights = (rows_of_all_ranks(of)[0] for of in (problem.strata, problem.weights))
        numbers = assign_folds(names, strata, weights)
        folds = []
        for k in range(numbers.max() + 1):
            size = _informative(names[numbers == k], strata[numbers == k], strata.max() > 0)
            folds.append(_Fold(loose, problem, numbers[own] == k, size))
        return cls(folds)

    def enough(self, n_samples: int) -> Folds | None:
        """Return the first folds that hold so many samples, see the module; all, or None."""
        return self.divided(n_samples)[0] if self._folds else None

    def divided(self, n_samples: int) -> tuple[Folds, Folds]:
        """Return the first folds that hold so many samples, and the others."""
        held = np.cumsum([fold.size for fold in self._folds])
        n_folds = int(np.searchsorted(held, n_samples)) + 1
        return Folds(self._folds[:n_folds]), Folds(self._folds[n_folds:])

    def __bool__(self) -> bool:
        return bool(self._folds)

    def share(self, inverses: Inverses, has_subspace: bool) -> None:
        """Use the factors of the gradient layers of the fit to all samples.

        With a coarse space, its minima take the place of fits with a gradient term.
        """
        for fold in self._folds:
            fold.share(inverses, has_subspace)

    def start(self, alpha: float) -> Runs:
        """Return several linearisations at the pretrained parameters."""
        return Runs([(fold, fold.start(alpha)) for fold in self._folds])

    def refitted(self, alpha: float) -> Array:
        """Return the losses of the last moved networks, with output weights of this ``alpha``."""
        return np.concatenate([fold.refitted(alpha) for fold in self._folds])

    def typical_first(self, alpha: float) -> Folds:
        """Return the folds, ordered by how far their loss is from the mean of all folds.

        The loss is that of the models on the activations. In a fold of few samples, it may be far
        from typical, and then the best penalties are, too.
        """
        folds = [(fold, fold.losses(alpha, math.inf)) for fold in self._folds]
        means = [np.average(losses, weights=fold.weights) for fold, losses in folds]
        distances = np.abs(np.array(means) - np.mean(means))
        return Folds([self._folds[i] for i in np.argsort(distances, kind="stable")])

    @property
    def weights(self) -> Array:
        """The weights of the distinct held-out samples."""
        return np.concatenate([fold.weights for fold in self._folds])

    def losses(self, alpha: float, gradient_alpha: float) -> Array:
        """Return the mean losses of the distinct held-out samples."""
        return np.concatenate([fold.losses(alpha, gradient_alpha) for fold in self._folds])


class Runs:
    """Several linearisations in all folds.

    Parameters
    ----------
    runs : list of (_Fold, Relinearization)
        The folds.

    Attributes
    ----------
    gradient_alphas : tuple of float
        The penalties of the linearisations so far.
    has_ended : bool
        Whether no network has moved in the last one.
    former : ndarray or None
        The losses of the networks before the last one; None at the pretrained parameters.
    """

    def __init__(self, runs: list[tuple[_Fold, Relinearization]]) -> None:
        self._runs = runs
        self._losses: list[Array | None] = [None] * len(runs)
        # Of folds where no network moved with the last penalty: the losses of the linear model.
        self._stuck: list[Array | None] = [None] * len(runs)
        self.gradient_alphas: tuple[float, ...] = ()
        self.has_ended = False
        self.former: Array | None = None

    def copy(self) -> Runs:
        """Return a copy that goes on from the same points."""
        found = copy.copy(self)
        found._runs = [(fold, run.copy()) for fold, run in self._runs]
        found._losses = list(self._losses)
        return found

    def go_on(self, gradient_alpha: float) -> tuple[Array, Array]:
        """Return the losses of the next linear models and of the networks after the next move."""
        if self.gradient_alphas:
            self.former = self._every()
        stay = self.gradient_alphas[-1:] == (gradient_alpha,)
        pairs = [
            (linear, None) if stay and linear is not None else fold.go_on(run, gradient_alpha)
            for (fold, run), linear in zip(self._runs, self._stuck, strict=True)
        ]
        self._stuck = [linear if moved is None else None for linear, moved in pairs]
        self.has_ended = all(moved is None for _, moved in pairs)
        for i, (linear, moved) in enumerate(pairs):
            if moved is not None or self._losses[i] is None:
                self._losses[i] = linear if moved is None else moved
        self.gradient_alphas += (gradient_alpha,)
        return np.concatenate([linear for linear, _ in pairs]), self._every()

    def _every(self) -> Array:
        return np.concatenate([losses for losses in self._losses if losses is not None])

    def models(self, gradient_alpha: float) -> Iterator[Array]:
        """Iterate over the losses of further linear models and moved networks, in turn."""
        while not self.has_ended:
            linear, moved = self.go_on(gradient_alpha)
            yield linear
            if not self.has_ended:
                yield moved


class _Judged(NamedTuple):
    """The losses after a linearisation.

    ``refitted`` is the mean loss of the moved networks with output weights for another ``alpha``.
    """

    linear: Array
    moved: Array
    runs: Runs
    refitted: float


@dataclass
class _Turn:
    """The linearisations around one point.

    Attributes
    ----------
    point : Runs
        The point.
    loss : float
        The smallest mean loss of the network at the point and of those that moved from there.
    best : _Judged or None
        The network that has it; None for the one at the point.
    gradient_alpha : float
        The last penalty.
    """

    point: Runs
    loss: float
    best: _Judged | None = None
    gradient_alpha: float = math.inf


class Relinearized:
    """The losses of samples that are left out of several linearisations.

    Penalties from strong to weak share a point, with the rows of the samples there, for as long as
    the losses of the linear models and of the moved networks fall. Then the next one goes on from
    the last of these networks, if that is better than the one at the point. So the last penalties
    are judged after several linearisations.

    Parameters
    ----------
    folds : Folds
        The folds.
    n_linearizations : int or None
        The largest number of linearisations; None is no limit.
    negligible : float
        The largest fall of the loss that counts as none, however small the loss.
    alpha : float
        The penalty that suits the activations.

    Attributes
    ----------
    refitted : float
        The smallest mean loss of the networks that moved with another penalty, with the output
        weights for ``alpha``.
    gave_up : bool
        Whether the networks that moved with the last ``alpha`` would be better with these output
        weights, so that nothing goes on from them.
    """

    def __init__(
        self, folds: Folds, n_linearizations: int | None, negligible: float, alpha: float
    ) -> None:
        self._folds, self._most = folds, n_linearizations or math.inf
        self._negligible, self._alpha = negligible, alpha
        self._turns: dict[float, _Turn] = {}
        self._judged: dict[tuple[float, float], _Judged] = {}
        self._smallest: defaultdict[float, float] = defaultdict(lambda: math.inf)
        self.refitted, self.gave_up = math.inf, False

    @property
    def weights(self) -> Array:
        """The weights of the distinct held-out samples."""
        return self._folds.weights

    def losses(self, alpha: float, gradient_alpha: float) -> Array:
        """Return the mean losses of the distinct held-out samples after the next linearisation.

        They are those of the moved network. With the ``alpha`` that suits the activations, the
        linear model competes.
        """
        if math.isinf(gradient_alpha):
            return self._folds.losses(alpha, gradient_alpha)
        found = self._judge(alpha, gradient_alpha)
        losses = found.moved
        if alpha == self._alpha:
            losses = min(found.linear, losses, key=self._mean)
        self._forget(alpha, gradient_alpha, self._mean(losses))
        return losses

    def _judge(self, alpha: float, gradient_alpha: float) -> _Judged:
        """Return the losses of the linear models and of the moved networks, and where these are."""
        pair = alpha, gradient_alpha
        if pair not in self._judged:
            turn = self._turns.get(alpha)
            goes_on = turn is not None and gradient_alpha < turn.gradient_alpha
            if turn is None or not goes_on:
                unmoved = self._mean(self._folds.losses(alpha, math.inf))
                turn = self._turns[alpha] = _Turn(self._folds.start(alpha), unmoved)
                self.gave_up = False
            self._judged[pair] = self._next(turn, *pair)
        return self._judged[pair]

    def _next(self, turn: _Turn, alpha: float, gradient_alpha: float) -> _Judged:
        """Return the losses after a linearisation around the point, or around the next one."""
        turn.gradient_alpha = gradient_alpha
        found, best = self._moved_from(turn.point, alpha, gradient_alpha), turn.best
        if best is not None and not self._falls(best, found):
            self.gave_up = best.refitted < turn.loss
            if self.gave_up or len(best.runs.gradient_alphas) >= self._most:
                return found
            turn.point, turn.best = best.runs, None
            found = self._moved_from(turn.point, alpha, gradient_alpha)
        if self._mean(found.moved) < turn.loss:
            turn.best, turn.loss = found, self._mean(found.moved)
        return found

    def _falls(self, former: _Judged, found: _Judged) -> bool:
        """Whether both losses fall; where that of the linear model rises, it overshoots."""
        linear = self._mean(found.linear) < self._mean(former.linear)
        return linear and self._counts(self._mean(former.moved), self._mean(found.moved))

    def _moved_from(self, point: Runs, alpha: float, gradient_alpha: float) -> _Judged:
        """Return the losses after a linearisation around a point."""
        runs = point.copy()
        linear, moved = runs.go_on(gradient_alpha)
        refitted = math.inf
        if alpha != self._alpha:
            refitted = self._mean(self._folds.refitted(self._alpha))
            self.refitted = min(self.refitted, refitted)
        return _Judged(linear, moved, runs, refitted)

    def _forget(self, alpha: float, gradient_alpha: float, mean: float) -> None:
        """Forget the networks of penalties that cannot be the choice: they take memory."""
        if mean > self._smallest[alpha]:
            del self._judged[alpha, gradient_alpha]
        elif mean < self._smallest[alpha]:
            self._smallest[alpha] = mean
            others = [p for p in self._judged if p[0] == alpha and p[1] != gradient_alpha]
            for pair in others:
                del self._judged[pair]

    def stronger(self, alpha: float, gradient_alpha: float) -> tuple[float, ...]:
        """Return the penalties of the linearisations before those with this one."""
        if math.isinf(gradient_alpha):
            return ()
        return self._judge(alpha, gradient_alpha).runs.gradient_alphas[:-1]

    def n_models(self, alpha: float, gradient_alpha: float) -> int:
        """Return the number of linear models and moved networks up to the best one."""
        if math.isinf(gradient_alpha):
            return 1
        self._turns.clear()  # the rows of the samples take memory
        linear, moved, runs, _ = self._judge(alpha, gradient_alpha)
        judged = (linear,) if runs.has_ended else (linear, moved)
        n_former, former = 2 * len(runs.gradient_alphas) - 2, runs.former
        n_left = int(min(2 * _MAX_LINEARIZATIONS, 2 * self._most - n_former))
        every = itertools.chain(judged, runs.copy().models(gradient_alpha))
        models = itertools.islice(every, n_left)
        former = self._folds.losses(alpha, math.inf) if former is None else former
        return n_former + self._while_it_falls(self._mean(former), models)

    def _while_it_falls(self, former: float, models: Iterator[Array]) -> int:
        """Return the number of the best model, until the next ones are no better.

        The search ends at a moved network if neither it nor the linear model before it is better.
        A linear model alone does not end it: the model may overshoot where its shortened move does
        not. The search also ends where the gains of the moved networks become too small, if they
        go on to shrink by the last factor. ``former`` is the loss before the first model.
        """
        smallest, number_of_best, gain = math.inf, 0, 0.0
        for number, losses in enumerate(models, 1):
            mean = self._mean(losses)
            # A moved network predicts faster than the linear model before it.
            is_as_good = number % 2 == 0 and number_of_best == number - 1
            is_as_good = is_as_good and not self._counts(mean, smallest)
            if not number_of_best or is_as_good or self._counts(smallest, mean):
                smallest, number_of_best = mean, number
            elif number % 2 == 0 and number - number_of_best > 1:
                break
            if number % 2 == 0:
                former_gain, gain, former = gain, former - mean, mean
                if 0 < gain < former_gain and not self._counts(mean, mean - gain**2 / former_gain):
                    break
        return number_of_best

    def _counts(self, former: float, following: float) -> bool:
        """Whether the fall of the loss is worth a linearisation."""
        return following < (1 - _GAIN) * former and former - following > self._negligible

    def _mean(self, losses: Array) -> float:
        return number_of_first_rank(float(np.average(losses, weights=self.weights)))


class LeftOut:
    """The leave-one-out losses of squared errors.

    Parameters
    ----------
    prepared : Prepared
        The samples.
    stages : TwoStageFit
        Both stages on them.
    """

    def __init__(self, prepared: Prepared, stages: TwoStageFit) -> None:
        assert isinstance(stages.loss, Squared)
        self._loss, self._stages = stages.loss, stages
        _, rows, groups = np.unique(prepared.samples.names, return_index=True, return_inverse=True)
        self._order = rows  # of the names, as with copies
        if len(rows) < len(groups):
            self._order = np.arange(len(rows))
            self._loss = stages.loss.merged(torch.from_numpy(groups).to(self._loss.weights.device))
            problem = replace(stages.problem, loss=lambda _: self._loss)
            self._stages = TwoStageFit(prepared.subset(rows), problem)
        self._grams: dict[float, Tensor | None] = {}
        self._activation_gram: Tensor | None = None

    @classmethod
    def where_cheap(cls, prepared: Prepared, stages: TwoStageFit) -> LeftOut | None:
        """Return the losses where they have a closed form that takes less time than fits."""
        if not isinstance(stages.loss, Squared) or n_ranks() > 1:
            return None
        if len(np.unique(prepared.samples.names)) * stages.loss.n_outputs > _MAX_LEFT_OUT:
            return None
        found = cls(prepared, stages)
        return found if int((found.weights > 0).sum()) > 1 else None

    @property
    def weights(self) -> Array:
        """The weights of the distinct samples."""
        weights: Array = to_numpy(self._loss.weights)[self._order]
        return weights

    def has_gram(self, alpha: float) -> bool:
        """Return whether the Gram matrix of the gradient term is cheap and exact."""
        first, journal = self._stages.fit_activation(alpha), self._stages.journal
        return bool(journal.number("has a Gram matrix", lambda: self._gram(first) is not None))

    def _gram(self, first: FirstStage) -> Tensor | None:
        """Return the Gram matrix of the gradient term, or None if it is not cheap or exact."""
        if first.alpha not in self._grams:
            first.inverses.at(self._stages.second_objective(first, 1.0))
            self._grams[first.alpha] = first.inverses.gram
        return self._grams[first.alpha]

    def losses(self, alpha: float, gradient_alpha: float) -> Array:
        """Return the losses of the distinct samples, infinite where rounding errors dominate."""
        stages = self._stages
        first = stages.fit_activation(alpha) if math.isfinite(gradient_alpha) else None

        def compute() -> Array:
            gram = None if first is None else self._gram(first)
            objective = stages.objective(alpha, stages.samples.activation, None)
            if self._activation_gram is None:
                self._activation_gram = activation_gram(objective)
            if first is not None:
                objective = stages.second_objective(first, gradient_alpha)
            try:
                predictions = leave_one_out(objective, gram, self._activation_gram)
                losses: Array = to_numpy(self._loss.losses(predictions))
            except ValueError:
                losses = np.full(len(self._loss.weights), np.inf)
            return losses[self._order]

        return stages.journal.numbers("losses of left-out samples", compute)


def cached_logits(model: LinearModel, prepared: Prepared) -> Tensor:
    """Return the logits of samples that have passed the frozen layers."""
    samples, moved = prepared.samples, bool(model.point)
    head = LinearizedHead.from_network(prepared.network.moved(model.point))

    def compute() -> Tensor:
        logits = samples.activation.new_empty(len(samples.activation), len(model.intercept))
        for rows, boundary in samples.batches() if model.moves or moved else [(slice(None), ())]:
            activation = None if moved else samples.activation[rows]
            logits[rows] = model.logits(head, boundary, activation)
        return logits

    return samples.batch_size.retry(compute)
