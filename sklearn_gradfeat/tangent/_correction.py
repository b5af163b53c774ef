"""The best point within the leading subspace around any other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sklearn_gradfeat._losses import Loss
from sklearn_gradfeat.solvers import Secants, minimize
from sklearn_gradfeat.tangent._objective import TangentObjective
from sklearn_gradfeat.tangent._preconditioner import Preconditioner
from sklearn_gradfeat.tangent._spectrum import damping
from sklearn_gradfeat.tangent._subspace import Subspace

# To what share of the gradient norm the model in the subspace is solved, and in how many
# iterations at most: from nothing, and when all but a little is known already.
_FIRST, _LATER = (0.002, 100), (0.1, 20)


class Correction:
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
        self.secants: Secants | None = None
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
            secants=self.secants,
        )
        self.secants, self.limits = solution.secants, _LATER
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
