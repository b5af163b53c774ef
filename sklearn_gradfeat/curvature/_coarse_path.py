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
        self._logits = logits
        self._subspace, self._curvature = subspace, curvature
        self._start = of_first_rank(subspace.restrict(x))
        self._rest = logits - subspace.forward(self._start)
        self._outside = subspace.extend_(-self._start, x.clone())
        self._last: tuple[float, Solution] | None = None

    @property
    def logits(self) -> Tensor:
        """The logits of all samples at the last minimum."""
        assert self._last is not None
        return self._subspace.forward(self._last[1].x) + self._rest

    def whole(self, x: Tensor) -> Tensor:
        """Return the unknowns of the objective for those of the coarse space."""
        return of_first_rank(self._subspace.extend_(x, self._outside.clone()))

    def minimum(
        self,
        objective: TangentObjective,
        tol: float,
        max_iter: int = _MAX_ITER,
        callback: Callable[[int, float, Tensor, float, float], bool] | None = None,
    ) -> Solution:
        """Return the minimum, as unknowns of the objective.

        The solver starts from the last minimum, if that had a stronger penalty, and from ``x``
        otherwise. It stops when the Newton decrement is ``tol`` times the fall of the objective
        since ``x``. Its only pass over the data is the one that gave the rows of the samples.
        ``callback`` is that of :func:`minimize`, with the unknowns of the coarse space.
        """
        assert objective.tangent is not None
        constant = penalised(objective, self._outside, self._outside) / 2

        def called_back(n_iter: int, found: float, *state: Any) -> bool:
            return callback is not None and callback(n_iter, constant + found, *state)

        start, pairs = self._start, None
        if self._last is not None and self._last[0] >= objective.tangent.alpha:
            start, pairs = self._last[1].x, self._last[1].curvature_pairs
        found = self._minimize(
            objective, start, tol, max_iter=max_iter, callback=called_back, curvature_pairs=pairs
        )
        self._last = objective.tangent.alpha, found
        return replace(
            found,
            x=self.whole(found.x),
            objective_path=[constant + value for value in found.objective_path],
            n_passes=1,
            curvature_pairs=CurvaturePairs([], objective.penalties),
        )

    def _minimize(
        self, objective: TangentObjective, start: Tensor, tol: float, **options: Any
    ) -> Solution:
        inverse = Preconditioner(objective, self._logits, self._curvature)
        solve = CoarseSolve(objective, self._subspace, inverse, True)
        coarse = CoarseObjective(objective.loss, solve.penalties, self._subspace, self._rest)
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
