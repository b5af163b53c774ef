"""The inverse Hessian along a path of penalties."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sklearn_gradfeat.solvers import Secants, Solution, same_curvature
from sklearn_gradfeat.tangent._correction import Correction
from sklearn_gradfeat.tangent._leading import leading_subspace
from sklearn_gradfeat.tangent._objective import TangentObjective
from sklearn_gradfeat.tangent._preconditioner import Curvature, Preconditioner
from sklearn_gradfeat.tangent._samples import SampleInverse, tangent_gram
from sklearn_gradfeat.tangent._subspace import Subspace


class Inverses:
    """Inverse Hessians of objectives that differ in their penalties alone.

    They share what does not depend on penalties: the Gram matrix of the samples; or the
    curvature as long as that holds, and what the solver learned of it.

    Attributes
    ----------
    secants : Secants or None
        What was learned in the last fit, for the next one that starts where that ended.
    """

    secants: Secants | None = None

    def __init__(self) -> None:
        self._curvature: Curvature | None = None
        self._gram: Tensor | None = None
        self._grams = True
        self._subspaces: list[Subspace | None] = []  # empty until there is need of one

    def of(self, objective: TangentObjective) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
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
        """Whether a Newton step leads to the optimum, after :meth:`of` that objective."""
        quadratic = objective.loss.bottom is not None and objective.like.dtype == torch.float64
        return quadratic and (objective.tangent is None or self._gram is not None)

    def coarse(self, objective: TangentObjective) -> Callable[[Any], Correction | None]:
        """Return the function that corrects points within leading directions, given an inverse."""
        return functools.partial(self._correction, objective)

    def _correction(self, objective: TangentObjective, inverse: Any) -> Correction | None:
        """Return the correction, unless the inverse is exact or no subspace is worth it."""
        if objective.tangent is None or not isinstance(inverse, Preconditioner):
            return None
        anew = not self._subspaces
        if anew:
            self._subspaces = [leading_subspace(objective, inverse.curvature)]
        (subspace,) = self._subspaces
        return None if subspace is None else Correction(objective, subspace, inverse, anew)

    def learn(self, solution: Solution) -> None:
        """Remember what the solver found, unless the inverses are exact."""
        self.secants = solution.secants if self._gram is None else None

    def _preconditioner(self, objective: TangentObjective, logits: Tensor) -> Preconditioner:
        known = self._curvature
        if known is not None and not same_curvature(known.total, objective.loss, logits):
            known = None
        inverse = Preconditioner(objective, logits, known)
        self._curvature = inverse.curvature
        return inverse
