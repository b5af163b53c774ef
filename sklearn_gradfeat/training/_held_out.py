"""The losses of held-out samples: by folds, or by leave-one-out where that has a closed form.

*Folds.* Copies of a sample are in one fold. Classes are spread evenly over the folds. The content
of the samples decides, by its hash: so the folds do not depend on the order of the samples, and an
integer weight has the same effect as repetitions. A class with one distinct sample is never held
out. One fold of many samples says enough, and five folds of a few say little: folds are used until
they hold enough samples together, more of them for the cheap models on the activations.

*Leave-one-out*, for squared errors and few samples, needs no fits, see
:mod:`sklearn_gradfeat.curvature._sample_space`. Copies of a sample count as one sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sklearn_gradfeat.curvature import leave_one_out, tangent_gram
from sklearn_gradfeat.linearized import LinearizedHead, LinearModel, Squared, to_numpy
from sklearn_gradfeat.training._two_stage_fit import FirstStage, Prepared, TwoStageFit

N_FOLDS = 5
# Distinct held-out samples that are enough to compare penalties, of the models on the activations
# and of those with a gradient term.
ENOUGH = 500
ENOUGH_WITH_GRADIENTS = 100
# Held-out losses need no more digits than this tolerance gives.
_TOL = 1e-3
# Largest n_samples * n_outputs of leave-one-out: a factorisation then takes less than a fit.
_MAX_LEFT_OUT = 1024
# Models of a path that are kept, for later fits to start from.
_KEPT = 4

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


@dataclass
class _Fold:
    """The fits of one fold, and its held-out samples."""

    stages: TwoStageFit
    samples: Prepared
    held: TwoStageFit
    first_stages: dict[float, FirstStage] = field(default_factory=dict)
    models: dict[tuple[float, float], LinearModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Sum the weights of the copies of a sample."""
        weights = self.held.problem.weights
        _, self._copy_of = np.unique(self.samples.samples.names, return_inverse=True)
        self._weights, self.weights = weights, np.bincount(self._copy_of, weights)

    def losses(self, alpha: float, gradient_alpha: float) -> Array:
        """Return the losses of the model that was fitted on all other samples."""
        if alpha not in self.first_stages:
            stronger = min((a for a in self.first_stages if a > alpha), default=None)
            warm = None if stronger is None else self.first_stages[stronger].model
            self.first_stages[alpha] = self.stages.fit_activation(alpha, warm)
        first = self.first_stages[alpha]
        model = first.model
        if math.isfinite(gradient_alpha):
            start = self._start(alpha, gradient_alpha)
            model, _ = self.stages.fit_gradient(first, gradient_alpha, start)
            self.models[alpha, gradient_alpha] = model
            for oldest in list(self.models)[:-_KEPT]:
                del self.models[oldest]
        model = self.held.problem.reduced(self.stages.problem.restored(model))
        logits = cached_logits(model, self.samples).to(self.held.loss.weights)
        losses: Array = to_numpy(self.held.loss.losses(logits))
        means: Array = np.bincount(self._copy_of, self._weights * losses) / self.weights
        return means

    def _start(self, alpha: float, gradient_alpha: float) -> LinearModel:
        """Return the model with the next stronger penalty, or the first stage."""
        stronger = [pair for pair in self.models if pair[0] == alpha and pair[1] > gradient_alpha]
        return self.models[min(stronger)] if stronger else self.first_stages[alpha].model


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
        numbers = assign_folds(prepared.samples.names, problem.strata, problem.weights)
        folds = []
        for number in range(numbers.max() + 1):
            train, test = (np.flatnonzero(m) for m in (numbers != number, numbers == number))
            fits = TwoStageFit(loose.subset(train), problem.subset(train))
            held = loose.subset(test)
            folds.append(_Fold(fits, held, TwoStageFit(held, problem.subset(test))))
        return cls(folds)

    def enough(self, n_samples: int) -> Folds | None:
        """Return the first folds that hold so many distinct samples, all, or None."""
        if not self._folds:
            return None
        held = np.cumsum([len(fold.weights) for fold in self._folds])
        return Folds(self._folds[: int(np.searchsorted(held, n_samples)) + 1])

    def typical_first(self, alpha: float) -> Folds:
        """Return the folds in another order: first those with a loss near that of all folds.

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
        loss = stages.loss
        assert isinstance(loss, Squared)
        _, rows, groups = np.unique(prepared.samples.names, return_index=True, return_inverse=True)
        self._loss = loss.merged(torch.from_numpy(groups).to(loss.weights.device))
        problem = replace(stages.problem, loss=lambda _: self._loss)
        self._stages = TwoStageFit(prepared.subset(rows), problem)
        self._grams: dict[float, Tensor | None] = {}

    @classmethod
    def where_cheap(cls, prepared: Prepared, stages: TwoStageFit) -> LeftOut | None:
        """Return the losses where they have a closed form that takes less time than fits."""
        if not isinstance(stages.loss, Squared):
            return None
        found = cls(prepared, stages)
        few = found._loss.targets.numel() <= _MAX_LEFT_OUT
        return found if few and int((found.weights > 0).sum()) > 1 else None

    @property
    def weights(self) -> Array:
        """The weights of the distinct samples."""
        weights: Array = to_numpy(self._loss.weights)
        return weights

    def gram(self, alpha: float) -> Tensor | None:
        """Return the Gram matrix of the gradient term, or None if it is not cheap or exact."""
        if alpha not in self._grams:
            tangent = self._stages.tangent(self._stages.fit_activation(alpha).model, 0.0)
            exact = self._stages.like.dtype == torch.float64
            n_samples = len(self._loss.weights)
            self._grams[alpha] = tangent_gram(tangent, n_samples) if exact else None
        return self._grams[alpha]

    def losses(self, alpha: float, gradient_alpha: float) -> Array:
        """Return the losses of the distinct samples, infinite where rounding errors dominate."""
        stages = self._stages
        if math.isfinite(gradient_alpha):
            objective = stages.second_objective(stages.fit_activation(alpha), gradient_alpha)
            gram = self.gram(alpha)
        else:
            objective, gram = stages.objective(alpha, stages.samples.activation, None), None
        try:
            losses: Array = to_numpy(self._loss.losses(leave_one_out(objective, gram)))
        except ValueError:
            losses = np.full(len(self._loss.weights), np.inf)
        return losses


def cached_logits(model: LinearModel, prepared: Prepared) -> Tensor:
    """Return the logits of samples that have passed the frozen layers."""
    samples, network = prepared.samples, prepared.network
    head = LinearizedHead.from_network(network)

    def compute() -> Tensor:
        logits = samples.activation.new_empty(len(samples.activation), len(model.intercept))
        for rows, boundary in samples.batches() if model.moves else [(slice(None), ())]:
            logits[rows] = model.logits(head, boundary, samples.activation[rows])
        return logits

    return samples.batch_size.retry(compute)
