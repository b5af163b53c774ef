"""Minima over the coarse space alone, for one penalty after the other.

Most of the decrease of an objective lies in the coarse space, where an evaluation needs no pass
over the network and the preconditioner is diagonal. That is close enough to compare penalties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sklearn_gradfeat.curvature._coarse_solve import CoarseObjective, CoarseSolve
from sklearn_gradfeat.curvature._coarse_space import Subspace
from sklearn_gradfeat.curvature._preconditioner import Curvature, Preconditioner
from sklearn_gradfeat.data import of_first_rank
from sklearn_gradfeat.linearized import TangentObjective
from sklearn_gradfeat.solvers import CurvaturePairs, Solution, minimize, penalised

_MAX_ITER = 100


class CoarsePath:
    """The minima of objectives that differ in the penalty on the displacements.

    Parameters
    ----------
    x : tensor of shape (n,)
        The unknowns of the objectives at the start.
    logits : tensor of shape (n_samples, n_outputs), float64
        Their logits.
    subspace : Subspace
        The coarse space of the objectives.
    curvature : Curvature
        The blocks of their Hessian.
    """

    def __init__(self, x: Tensor, logits: Tensor, subspace: Subspace, curvature: Curvature) -> None:
        self._x, self._logits = x, logits
        self._subspace, self._curvature = subspace, curvature
        self._start = of_first_rank(subspace.restrict(x))
        self._last: tuple[float, Solution] | None = None

    def minimum(self, objective: TangentObjective, tol: float) -> Tensor:
        """Return the logits of all samples at the minimum; ``x`` has no displacements.

        The solver starts from the last minimum, if that had a stronger penalty. It stops when the
        Newton decrement is ``tol`` times the fall of the objective since the first start.
        """
        assert objective.tangent is not None
        start, pairs = self._start, None
        if self._last is not None and self._last[0] >= objective.tangent.alpha:
            start, pairs = self._last[1].x, self._last[1].curvature_pairs
        rest = torch.zeros_like(self._logits)
        solution = self._minimize(
            objective, rest, start, tol, max_iter=_MAX_ITER, curvature_pairs=pairs
        )
        self._last = objective.tangent.alpha, solution
        return self._subspace.forward(solution.x)

    def solution(
        self,
        objective: TangentObjective,
        tol: float,
        max_iter: int,
        callback: Callable[[int, float, Tensor, float, float], bool] | None,
    ) -> Solution:
        """Return the minimum from ``x`` on, as unknowns of the objective.

        Its only pass over the data is the one that gave the rows of the samples. ``callback`` is
        that of :func:`minimize`, with the unknowns of the objective.
        """
        start, subspace = self._start, self._subspace
        outside = self._x - subspace.extend(start)
        constant = penalised(objective, outside, outside) / 2

        def whole(x: Tensor) -> Tensor:
            return of_first_rank(self._x + subspace.extend(x - start))

        def called_back(n_iter: int, found: float, x: Tensor, *decrement: float) -> bool:
            return callback is not None and callback(n_iter, constant + found, whole(x), *decrement)

        rest = self._logits - subspace.forward(start)
        found = self._minimize(objective, rest, start, tol, max_iter=max_iter, callback=called_back)
        return replace(
            found,
            x=whole(found.x),
            objective_path=[constant + value for value in found.objective_path],
            n_passes=1,
            curvature_pairs=CurvaturePairs([], objective.penalty),
        )

    def _minimize(
        self, objective: TangentObjective, rest: Tensor, start: Tensor, tol: float, **options: Any
    ) -> Solution:
        inverse = Preconditioner(objective, self._logits, self._curvature)
        solve = CoarseSolve(objective, self._subspace, inverse, True)
        coarse = CoarseObjective(objective.loss, solve.penalty, self._subspace, rest)
        baseline = objective.loss.value(self._logits)
        baseline += penalised(coarse, self._start, self._start) / 2
        rounding = torch.finfo(self._start.dtype).eps * abs(baseline)
        return minimize(
            coarse,
            start,
            lambda _: solve.inverse,
            tolerance=partial(_tolerance, baseline, tol, rounding),
            **options,
        )


def _tolerance(baseline: float, tol: float, rounding: float, value: float) -> float:
    return max(tol * (baseline - value), rounding)
