"""The inverse Hessian along a path of penalties."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sklearn_gradfeat.curvature._coarse_space import Subspace, leading_subspace
from sklearn_gradfeat.curvature._preconditioner import Curvature, Preconditioner
from sklearn_gradfeat.curvature._sample_space import SampleInverse, tangent_gram
from sklearn_gradfeat.curvature._spectrum import damping
from sklearn_gradfeat.linearized import Loss, TangentObjective
from sklearn_gradfeat.solvers import CurvaturePairs, Solution, minimize, same_curvature

_ROUNDS = 6


def largest_curvature(objective: TangentObjective) -> float:
    """Return about the largest curvature of the loss at the model that predicts nothing.

    By power iteration, which comes from below. An intercept follows the other unknowns, so that
    a constant in the features does not count.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(objective.penalty.shape, generator=generator, dtype=torch.float64)
    x = x.to(objective.like)
    logits = objective.forward(torch.zeros_like(x))
    weights = objective.loss.curvatures(logits)
    size = 1.0
    for _ in range(_ROUNDS):
        norm = float(x.norm())
        if norm == 0:
            return 0.0
        seen = objective.forward(x / norm)
        if objective.fit_intercept:
            mean = (weights * seen).sum(0) / weights.sum(0)
            seen -= mean
            seen[seen.abs() <= 4 * torch.finfo(x.dtype).eps * mean.abs()] = 0  # rounding errors
        x = objective.adjoint(weights * seen)
        size = float(x.norm())
    return size


# To what share of the gradient norm the model in the subspace is solved, and in how many
# iterations at most: from nothing, and when all but a little is known already.
_FIRST, _LATER = (0.002, 100), (0.1, 20)


class CoarseSolve:
    """Minimises an objective over a subspace, starting each time where it ended before.

    Parameters
    ----------
    objective : TangentObjective
        The objective.
    subspace : Subspace
        A subspace of its unknowns.
    inverse : Preconditioner
        Approximate inverse Hessian of the objective.
    anew : bool
        Nothing is known of the best point yet.
    """

    def __init__(
        self, objective: TangentObjective, subspace: Subspace, inverse: Preconditioner, anew: bool
    ) -> None:
        assert objective.tangent is not None
        alpha, n = objective.tangent.alpha, subspace.sizes[0]
        curvature = torch.cat([block.curvature.reshape(-1) for block in subspace.blocks])
        curvature = curvature * (inverse.curvature.total / subspace.total)
        self.loss, self.subspace = objective.loss, subspace
        self.penalty = torch.cat([objective.penalty[:n], torch.full_like(curvature, alpha)])
        self.inverse = _Inverse(inverse, n, 1 / (curvature + damping(alpha, curvature)))
        self.curvature_pairs: CurvaturePairs | None = None
        self.limits = _FIRST if anew else _LATER

    def __call__(self, x: Tensor, logits: Tensor, norm: float) -> tuple[Tensor, Tensor, float]:
        """Return a point, its logits and the change of the objective.

        ``norm`` is that of the gradient, in the metric of the inverse, before the last step.
        """
        start = self.subspace.restrict(x)
        around = _Around(
            self.loss, self.penalty, self.subspace, logits - self.subspace.forward(start)
        )
        share, max_iter = self.limits
        solution = minimize(
            around,
            start,
            lambda _: self.inverse,
            tolerance=share * norm,
            max_iter=max_iter,
            curvature_pairs=self.curvature_pairs,
        )
        self.curvature_pairs, self.limits = solution.curvature_pairs, _LATER
        moved = solution.x - start
        gain = solution.objective_path[-1] - solution.objective_path[0]
        return x + self.subspace.extend(moved), logits + self.subspace.forward(moved), gain


@dataclass(frozen=True)
class _Inverse:
    """The inverse Hessian in the eigenbasis, where that of the layers is diagonal."""

    whole: Preconditioner
    n_affine: int
    diagonal: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        n = self.n_affine
        return torch.cat([self.whole.affine(x[:n]), self.diagonal * x[n:]])


@dataclass(frozen=True)
class _Around:
    """The objective in a subspace, the rest of the unknowns at rest."""

    loss: Loss
    penalty: Tensor
    subspace: Subspace
    rest: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.rest + self.subspace.forward(x)

    def adjoint(self, cotangent: Tensor) -> Tensor:
        return self.subspace.adjoint(cotangent)

    def forward_adjoint(self, direction: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        change = self.subspace.forward(direction)
        return change, self.adjoint(self.loss.gradient(logits + change))


class Inverses:
    """Inverse Hessians of objectives that differ in their penalties alone.

    They share what does not depend on penalties: the Gram matrix of the samples; or the
    curvature as long as that holds, and what the solver learned of it.

    Attributes
    ----------
    curvature_pairs : CurvaturePairs or None
        What was learned in the last fit, for the next one that starts where that ended.
    """

    curvature_pairs: CurvaturePairs | None = None

    def __init__(self) -> None:
        self._curvature: Curvature | None = None
        self._gram: Tensor | None = None
        self._grams = True
        self._subspaces: list[Subspace | None] = []  # empty until there is need of one

    def at(self, objective: TangentObjective) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
        """Return the function that inverts the Hessian at given logits: exactly where cheap."""
        wide = objective.like.dtype == torch.float64
        if wide and self._grams and self._gram is None and objective.tangent is not None:
            self._gram = tangent_gram(objective.tangent, objective.n_samples)
            self._grams = self._gram is not None
        gram = self._gram
        if gram is None:
            return lambda logits: self._preconditioner(objective, logits)
        return lambda logits: SampleInverse(objective, gram, logits)

    def exact_for(self, objective: TangentObjective) -> bool:
        """Whether a Newton step leads to the optimum, after :meth:`at` that objective."""
        quadratic = (
            objective.loss.quadratic_minimizer is not None and objective.like.dtype == torch.float64
        )
        return quadratic and (objective.tangent is None or self._gram is not None)

    def coarse(self, objective: TangentObjective) -> Callable[[Any], CoarseSolve | None]:
        """Return the function that corrects points within leading directions, given an inverse."""
        return functools.partial(self._correction, objective)

    def _correction(self, objective: TangentObjective, inverse: Any) -> CoarseSolve | None:
        """Return the correction, unless the inverse is exact or no subspace is worth it."""
        if objective.tangent is None or not isinstance(inverse, Preconditioner):
            return None
        anew = not self._subspaces
        if anew:
            self._subspaces = [leading_subspace(objective, inverse.curvature)]
        (subspace,) = self._subspaces
        return None if subspace is None else CoarseSolve(objective, subspace, inverse, anew)

    def learn(self, solution: Solution) -> None:
        """Remember what the solver found, unless the inverses are exact."""
        self.curvature_pairs = solution.curvature_pairs if self._gram is None else None

    def _preconditioner(self, objective: TangentObjective, logits: Tensor) -> Preconditioner:
        known = self._curvature
        if known is not None and not same_curvature(known.total, objective.loss, logits):
            known = None
        inverse = Preconditioner(objective, logits, known)
        self._curvature = inverse.curvature
        return inverse
