"""Inverse Hessians of objectives that differ in their penalties, and what they share.

========================  ====================================================================
inverse                   used
========================  ====================================================================
``SampleInverse``         in float64, with few samples (``n_samples * n_outputs <= 4096``) and
                          gradient layers that see each sample once: exact up to the curvature
                          between outputs. Its system has the samples of one process.
``Preconditioner``        otherwise: K-FAC, with a coarse space where that is cheap
========================  ====================================================================

None of the expensive parts depends on the penalties, so all penalties share them:

* the Gram matrix ``Ω J Jᵀ Ωᵀ`` of the samples, for good;
* the Kronecker factors, until the summed curvature of the loss has changed by a factor of two;
* the coarse space, for good: later preconditioners rescale its curvature;
* the curvature pairs of the last solve, for the next one, which starts at its solution.

Fits to a part of the samples share the factors of the layers with the fit to all of them, up to the
scale. Where there is a coarse space, its minimum takes the place of such a fit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sklearn_gradfeat.curvature._coarse_path import CoarsePath
from sklearn_gradfeat.curvature._coarse_solve import CoarseSolve
from sklearn_gradfeat.curvature._coarse_space import Block, Subspace, leading_subspace
from sklearn_gradfeat.curvature._preconditioner import Curvature, Preconditioner
from sklearn_gradfeat.curvature._sample_space import SampleInverse, tangent_gram
from sklearn_gradfeat.curvature._spectrum import NOT_FINITE
from sklearn_gradfeat.data import n_ranks, number_of_first_rank, sum_over_ranks
from sklearn_gradfeat.linearized import TangentObjective
from sklearn_gradfeat.solvers import CurvaturePairs, Solution, same_curvature

_POWER_ITERATIONS = 6


class Inverses:
    """Inverse Hessians of objectives that differ in their penalties alone.

    Attributes
    ----------
    curvature_pairs : CurvaturePairs or None
        The curvature pairs of the last solve.
    """

    curvature_pairs: CurvaturePairs | None = None

    def __init__(self) -> None:
        self._curvature: Curvature | None = None
        self._gram: Tensor | None = None
        self._gram_is_cheap = True  # until it turns out otherwise
        self._subspaces: list[Subspace | None] = []  # empty until the first coarse solve
        self._layers_of: Curvature | None = None
        # The blocks of a coarse space of these layers, with its curvature, once one was found.
        self._blocks: list[tuple[list[Block], float]] = []

    @property
    def gram(self) -> Tensor | None:
        """The Gram matrix of the samples, if :meth:`at` found it cheap."""
        return self._gram

    def with_layers(self) -> Inverses:
        """Return inverses with the same factors of the layers, up to the scale.

        They serve a linearisation around another point, or the loss of a part of the samples.
        """
        following = Inverses()
        following._layers_of = self._curvature or self._layers_of
        following._gram_is_cheap = self._gram_is_cheap
        following._blocks = self._blocks
        return following

    def learn_layers(self, objective: TangentObjective, logits: Tensor) -> None:
        """Compute the factors of the layers, unless the Gram matrix of the samples is cheap."""
        self.at(objective)
        if self._gram is None:
            self._preconditioner(objective, logits)

    def coarse_path(self, objective: TangentObjective, x: Tensor) -> CoarsePath | None:
        """Return the minima in the coarse space from ``x`` on, or None without such a space.

        It needs the factors of the layers, see :meth:`with_layers`.
        """
        if self._layers_of is None:
            return None
        logits = objective.forward(x)
        curvature = self._preconditioner(objective, logits).curvature
        if self._blocks:
            return CoarsePath(x, logits, Subspace(objective, *self._blocks[0]), curvature)
        subspace = leading_subspace(objective, curvature)
        if subspace is None:
            return None
        self._blocks.append((subspace.blocks, subspace.total))
        return CoarsePath(x, logits, subspace, curvature)

    def at(self, objective: TangentObjective) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
        """Return the function from logits to the inverse Hessian there."""
        wide = objective.like.dtype == torch.float64
        untried = self._gram_is_cheap and self._gram is None and n_ranks() == 1
        if wide and untried and objective.tangent is not None:
            self._gram = tangent_gram(objective.tangent, objective.n_samples)
            self._gram_is_cheap = self._gram is not None
        gram = self._gram
        if gram is None:
            return lambda logits: self._preconditioner(objective, logits)
        return lambda logits: SampleInverse(objective, gram, logits)

    def exact_for(self, objective: TangentObjective) -> bool:
        """Return whether a Newton step reaches the optimum; call :meth:`at` before."""
        quadratic = (
            objective.loss.quadratic_minimizer is not None and objective.like.dtype == torch.float64
        )
        return quadratic and (objective.tangent is None or self._gram is not None)

    def coarse(self, objective: TangentObjective) -> Callable[[Any], CoarseSolve | None]:
        """Return the function from an inverse to the coarse-space solve of an objective."""
        return functools.partial(self._coarse_solve, objective)

    def learn(self, solution: Solution) -> None:
        """Keep the curvature pairs of a solve, unless the inverse is exact."""
        self.curvature_pairs = solution.curvature_pairs if self._gram is None else None

    def _coarse_solve(self, objective: TangentObjective, inverse: Any) -> CoarseSolve | None:
        """Return the coarse-space solve, or None if the inverse is exact or no space is cheap."""
        if objective.tangent is None or not isinstance(inverse, Preconditioner):
            return None
        first = not self._subspaces
        if first:
            self._subspaces = [leading_subspace(objective, inverse.curvature)]
        (subspace,) = self._subspaces
        return None if subspace is None else CoarseSolve(objective, subspace, inverse, first)

    def _preconditioner(self, objective: TangentObjective, logits: Tensor) -> Preconditioner:
        """Return the K-FAC inverse, with the former Kronecker factors while they hold."""
        known = self._curvature
        if known is not None and not same_curvature(known.total, objective.loss, logits):
            known = None
        if known is None and objective.tangent is not None and self._layers_of is not None:
            known = Curvature(objective, logits, self._layers_of)
        inverse = Preconditioner(objective, logits, known)
        self._curvature = inverse.curvature
        return inverse


def largest_curvature(objective: TangentObjective) -> float:
    """Estimate the largest eigenvalue of the Hessian of the loss at zero logits.

    Power iteration approaches it from below. The curvature between outputs is left out. A free
    intercept follows the other unknowns, so the weighted mean over the samples is subtracted,
    and constant columns do not count.

    Raises
    ------
    ValueError
        If it is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(objective.penalty.shape, generator=generator, dtype=torch.float64)
    x = x.to(objective.like)
    logits = objective.forward(torch.zeros_like(x))
    weights = objective.loss.curvatures(logits)
    size = 1.0
    for _ in range(_POWER_ITERATIONS):
        norm = _norm(x)
        if norm == 0:
            return 0.0
        seen = objective.forward(x / norm)
        if objective.fit_intercept:
            mean = sum_over_ranks((weights * seen).sum(0)) / sum_over_ranks(weights.sum(0))
            seen -= mean
            seen[seen.abs() <= 4 * torch.finfo(x.dtype).eps * mean.abs()] = 0  # rounding errors
        x = objective.adjoint(weights * seen)
        size = _norm(x)
        if not math.isfinite(size):
            raise ValueError(NOT_FINITE)
    return number_of_first_rank(size)


def _norm(x: Tensor) -> float:
    """Return the norm of a vector whose squares may leave the range of float64."""
    largest = float(x.abs().max())
    return largest * float((x / largest).norm()) if 0 < largest < math.inf else largest
