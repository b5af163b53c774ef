"""Minimisation of an objective over the coarse space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sklearn_gradfeat.curvature._coarse_space import Subspace
from sklearn_gradfeat.curvature._preconditioner import Preconditioner
from sklearn_gradfeat.curvature._spectrum import damping
from sklearn_gradfeat.data import of_first_rank
from sklearn_gradfeat.linearized import Loss, TangentObjective, Tensors
from sklearn_gradfeat.solvers import CurvaturePairs, minimize

# Tolerance as a share of the gradient norm, and largest number of iterations: for the first
# solve, and for the later ones, which start close to the solution.
_FIRST, _LATER = (0.002, 100), (0.1, 20)


class CoarseSolve:
    """Minimises an objective over a subspace; the curvature pairs of a solve serve the next.

    Parameters
    ----------
    objective : TangentObjective
        The objective.
    subspace : Subspace
        A subspace of its unknowns.
    inverse : Preconditioner
        Approximate inverse Hessian of the objective.
    first : bool
        Whether no earlier solve in this subspace came close to the solution.
    """

    def __init__(
        self, objective: TangentObjective, subspace: Subspace, inverse: Preconditioner, first: bool
    ) -> None:
        assert objective.tangent is not None
        alpha, n = objective.tangent.alpha, subspace.sizes[0]
        none = objective.like.new_empty(0)
        curvature = torch.cat([none, *(block.curvature.reshape(-1) for block in subspace.blocks)])
        curvature = curvature * (inverse.curvature.total / subspace.total)
        self.loss, self.subspace = objective.loss, subspace
        self.penalties = (
            *objective.penalties[:2],
            curvature.new_full((), alpha).expand_as(curvature),
        )
        self.inverse = _CoarseInverse(inverse, n, 1 / (curvature + damping(alpha, curvature)))
        self.curvature_pairs: CurvaturePairs | None = None
        self.limits = _FIRST if first else _LATER

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The curvature pairs of the last solve."""
        return [] if self.curvature_pairs is None else self.curvature_pairs.pairs

    def recall(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Go on after a solve that had these curvature pairs."""
        self.curvature_pairs, self.limits = CurvaturePairs(pairs, self.penalties), _LATER

    def __call__(self, x: Tensor, logits: Tensor, norm: float) -> tuple[Tensor, Tensor, float]:
        """Return the minimiser over the subspace through ``x``.

        Parameters
        ----------
        x : tensor of shape (n,)
            The unknowns of the objective; they are overwritten.
        logits : tensor of shape (n_samples, n_outputs), float64
            Their logits.
        norm : float
            Norm of the gradient, in the metric of the inverse, before the last step.

        Returns
        -------
        (tensor, tensor, float)
            The unknowns, their logits and the change of the objective.
        """
        start = of_first_rank(self.subspace.restrict(x))
        rest = logits - self.subspace.forward(start)
        share, max_iter = self.limits
        solution = minimize(
            CoarseObjective(self.loss, self.penalties, self.subspace, rest),
            start,
            lambda _: self.inverse,
            tolerance=lambda _: (share * norm) ** 2 / 2,
            max_iter=max_iter,
            curvature_pairs=self.curvature_pairs,
        )
        self.curvature_pairs, self.limits = solution.curvature_pairs, _LATER
        moved = solution.x - start
        gain = solution.objective_path[-1] - solution.objective_path[0]
        found = of_first_rank(self.subspace.extend_(moved, x))
        return found, logits + self.subspace.forward(moved), gain


@dataclass(frozen=True)
class _CoarseInverse:
    """The approximate inverse Hessian of the coordinates; K-FAC is diagonal in them."""

    whole: Preconditioner
    n_affine: int
    diagonal: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        n = self.n_affine
        return torch.cat([self.whole.affine(x[:n]), self.diagonal * x[n:]])


@dataclass(frozen=True)
class CoarseObjective:
    """The objective as a function of the coordinates; ``rest`` are the remaining logits."""

    loss: Loss
    penalties: Tensors
    subspace: Subspace
    rest: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.rest + self.subspace.forward(x)

    def adjoint(self, cotangent: Tensor) -> Tensor:
        return self.subspace.adjoint(cotangent)

    def forward_adjoint(self, direction: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        change = self.subspace.forward(direction)
        return change, self.adjoint(self.loss.gradient(logits + change))
