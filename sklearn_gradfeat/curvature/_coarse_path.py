"""Minima over the coarse space alone, for one penalty after the other.

Most of the decrease of an objective lies in the coarse space, where an evaluation needs no pass
over the network and the preconditioner is diagonal. That is close enough to find the range of good
penalties. Weak penalties let a model fit single samples by the other directions, so for these the
minimum looks better on held-out samples than it is. One more step, along all directions, shows by
how much.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from sklearn_gradfeat.curvature._coarse_solve import CoarseObjective, CoarseSolve
from sklearn_gradfeat.curvature._coarse_space import Subspace
from sklearn_gradfeat.curvature._preconditioner import Curvature, Preconditioner
from sklearn_gradfeat.data import number_of_first_rank, of_first_rank
from sklearn_gradfeat.linearized import TangentObjective
from sklearn_gradfeat.solvers import CurvaturePairs, Point, best_on_line, minimize, penalised

_MAX_ITER = 100


class CoarsePath:
    """The minima of objectives that differ in the penalty on the displacements.

    Parameters
    ----------
    x : tensor of shape (n,)
        The unknowns of the objectives at the start, without displacements.
    logits : tensor of shape (n_samples, n_outputs), float64
        Their logits.
    subspace : Subspace
        The coarse space of the objectives.
    curvature : Curvature
        The blocks of their Hessian.
    """

    def __init__(self, x: Tensor, logits: Tensor, subspace: Subspace, curvature: Curvature) -> None:
        self._logits, self._subspace, self._curvature = logits, subspace, curvature
        self._start = of_first_rank(subspace.restrict(x))
        self._minima: dict[float, tuple[Tensor, float]] = {}  # with the objective, by penalty
        self._pairs: CurvaturePairs | None = None

    def minimize(self, objective: TangentObjective, tol: float) -> None:
        """Find the minimum.

        The solver starts from the last minimum, if that had a stronger penalty. It stops when the
        Newton decrement is ``tol`` times the fall of the objective since the first start.
        """
        solve = self._solve(objective, True)
        coarse = CoarseObjective(
            objective.loss, solve.penalty, self._subspace, torch.zeros_like(self._logits)
        )
        baseline = objective.loss.value(self._logits)
        baseline += penalised(coarse, self._start, self._start) / 2
        rounding = torch.finfo(self._start.dtype).eps * abs(baseline)
        start, pairs, alpha = self._start, None, _alpha(objective)
        if self._minima and (last := next(reversed(self._minima))) >= alpha:
            start, pairs = self._minima[last][0], self._pairs
        solution = minimize(
            coarse,
            start,
            lambda _: solve.inverse,
            tolerance=partial(_tolerance, baseline, tol, rounding),
            max_iter=_MAX_ITER,
            curvature_pairs=pairs,
        )
        self._minima[alpha] = solution.x, solution.objective_path[-1]
        self._pairs = solution.curvature_pairs

    def logits(self, objective: TangentObjective) -> Tensor:
        """Return the logits of all samples at the minimum."""
        return self._subspace.forward(self._minima[_alpha(objective)][0])

    def logits_after_step(self, objective: TangentObjective) -> Tensor:
        """Return the logits after a step along all directions from the minimum."""
        logits, (coordinates, value) = self.logits(objective), self._minima[_alpha(objective)]
        x = of_first_rank(self._subspace.extend(coordinates))
        solve = self._solve(objective, False)
        gradient = objective.adjoint(objective.loss.gradient(logits)) + objective.penalty * x
        direction = of_first_rank(-solve.inverse.whole(gradient))
        norm = math.sqrt(abs(number_of_first_rank(float(gradient @ direction))))
        moved = best_on_line(objective, Point(x, logits, gradient, value), direction)
        return logits if moved is None else solve(moved.x, moved.logits, norm)[1]

    def _solve(self, objective: TangentObjective, first: bool) -> CoarseSolve:
        inverse = Preconditioner(objective, self._logits, self._curvature)
        return CoarseSolve(objective, self._subspace, inverse, first)


def _alpha(objective: TangentObjective) -> float:
    assert objective.tangent is not None
    return objective.tangent.alpha


def _tolerance(baseline: float, tol: float, rounding: float, value: float) -> float:
    return max(tol * (baseline - value), rounding)
