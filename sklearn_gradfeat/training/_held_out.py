"""The losses of held-out samples: by folds, or by leave-one-out where that has a closed form.

*Folds.* Copies of a sample are in one fold. Classes are spread evenly over the folds. The content
of the samples decides, by its hash: so the folds do not depend on the order of the samples, and an
integer weight has the same effect as repetitions. A class with one distinct sample is never held
out. Five folds of a few samples say little, and one fold of many says enough: folds are used until
they hold ``_ENOUGH`` samples together.

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
# Distinct held-out samples that are enough to compare penalties.
_ENOUGH = int(__import__("os").environ.get("ENOUGH", 200))
# Held-out losses need no more digits than this tolerance gives.
_TOL = float(__import__("os").environ.get("STOL", 1e-2))
# A pass over the pairs of this many samples and outputs takes less time than a fit.
_MAX_LEFT_OUT = 1024
# Models of a path that are kept, for later fits to start from.
_KEPT = 4

Losses = npt.NDArray[np.float64]


class HeldOut(Protocol):
    """The loss of every held-out sample for given penalties.

    Attributes
    ----------
    weights : ndarray of shape (n_held_out,)
        The weights of the held-out samples.
    names : ndarray of shape (n_held_out,)
        Equal for copies of a sample.
    """

    weights: Losses
    names: npt.NDArray[np.uint64]

    def losses(self, alpha: float, gradient_alpha: float) -> Losses:
        """Return the unweighted losses, of shape (n_held_out,)."""


def assign_folds(
    names: npt.NDArray[np.uint64], strata: npt.NDArray[np.intp], weights: npt.NDArray[np.float64]
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
    stratum = np.full(len(distinct), strata.max(initial=0) + 1)
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

    def losses(self, alpha: float, gradient_alpha: float) -> Losses:
        """Return the losses of the model that was fitted on all other samples."""
        if alpha not in self.first_stages:
            stronger = min((a for a in self.first_stages if a > alpha), default=None)
            warm = None if stronger is None else self.first_stages[stronger].model
            self.first_stages[alpha] = self.stages.fit_activation(alpha, warm)
        first = self.first_stages[alpha]
        model = first.model
        if math.isfinite(gradient_alpha):
            model, _ = self.stages.fit_gradient(
                first, gradient_alpha, self._start(alpha, gradient_alpha)
            )
            self.models[alpha, gradient_alpha] = model
            for oldest in list(self.models)[:-_KEPT]:
                del self.models[oldest]
        model = self.held.problem.reduced(self.stages.problem.restored(model))
        logits = cached_logits(model, self.samples).to(self.held.loss.weights)
        return np.asarray(to_numpy(self.held.loss.losses(logits)))

    def _start(self, alpha: float, gradient_alpha: float) -> LinearModel:
        """Return the model with the next stronger penalty, or the first stage."""
        stronger = [pair for pair in self.models if pair[0] == alpha and pair[1] > gradient_alpha]
        return self.models[min(stronger)] if stronger else self.first_stages[alpha].model


class Folds:
    """The losses of samples that are left out of the fit in turn, a fold at a time."""

    def __init__(
        self, prepared: Prepared, stages: TwoStageFit, folds: list[npt.NDArray[np.bool_]]
    ) -> None:
        tol = max(_TOL, prepared.settings.tol)
        loose = prepared._replace(settings=replace(prepared.settings, tol=tol))
        self._folds, rows = [], [np.flatnonzero(fold) for fold in folds]
        for fold, out in zip(folds, rows, strict=True):
            kept = np.flatnonzero(~fold)
            training, held = loose.subset(kept), loose.subset(out)
            fits = TwoStageFit(training, stages.problem.subset(kept))
            self._folds.append(_Fold(fits, held, TwoStageFit(held, stages.problem.subset(out))))
        everything = np.concatenate(rows)
        self.weights = stages.problem.weights[everything]
        self.names = prepared.samples.names[everything]

    def losses(self, alpha: float, gradient_alpha: float) -> Losses:
        """Return the unweighted losses, of shape (n_held_out,)."""
        return np.concatenate([fold.losses(alpha, gradient_alpha) for fold in self._folds])


class LeftOut:
    """The leave-one-out losses of squared errors."""

    def __init__(self, prepared: Prepared, stages: TwoStageFit) -> None:
        loss = stages.loss
        assert isinstance(loss, Squared)
        names, rows, groups = np.unique(
            prepared.samples.names, return_index=True, return_inverse=True
        )
        merged = loss.merged(torch.from_numpy(groups).to(loss.weights.device))
        problem = replace(stages.problem, loss=lambda _: merged)
        self._stages, self._loss = TwoStageFit(prepared.subset(rows), problem), merged
        self._grams: dict[float, Tensor | None] = {}
        self.names, self.weights = names, np.asarray(to_numpy(merged.weights))

    @property
    def is_cheap(self) -> bool:
        """Whether there are few samples, and at least two of them have a weight."""
        n_rows = self._loss.targets.numel()
        return n_rows <= _MAX_LEFT_OUT and int((self._loss.weights > 0).sum()) > 1

    def gram(self, alpha: float) -> Tensor | None:
        """Return the Gram matrix of the gradient term, or None if it is not cheap."""
        stages = self._stages
        if alpha not in self._grams:
            tangent = stages.tangent(stages.fit_activation(alpha).model, 0.0)
            wide = stages.like.dtype == torch.float64
            self._grams[alpha] = tangent_gram(tangent, len(self.names)) if wide else None
        return self._grams[alpha]

    def losses(self, alpha: float, gradient_alpha: float) -> Losses:
        """Return the unweighted losses, infinite where rounding errors dominate."""
        stages = self._stages
        if math.isfinite(gradient_alpha):
            objective = stages.second_objective(stages.fit_activation(alpha), gradient_alpha)
            gram = self.gram(alpha)
        else:
            objective, gram = stages.objective(alpha, stages.samples.activation, None), None
        try:
            return np.asarray(to_numpy(self._loss.losses(leave_one_out(objective, gram))))
        except ValueError:
            return np.full(len(self.names), np.inf)


def by_folds(prepared: Prepared, stages: TwoStageFit) -> Folds | None:
    """Return the losses by folds, or None if no sample can be held out."""
    problem, names = stages.problem, prepared.samples.names
    folds = assign_folds(names, problem.strata, problem.weights)
    n_distinct = len(np.unique(names[folds >= 0]))
    if not n_distinct:
        return None
    n_folds = min(N_FOLDS, math.ceil(_ENOUGH * N_FOLDS / n_distinct))
    return Folds(prepared, stages, [folds == k for k in range(n_folds) if (folds == k).any()])


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
