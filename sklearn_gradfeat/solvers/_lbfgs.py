"""Preconditioned limited-memory BFGS for a loss of a linear map [1]_.

References
----------
.. [1] J. Nocedal and S. Wright, Numerical Optimization, 2nd edition, chapter 7,
   Springer 2006.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sklearn_gradfeat.linearized import Loss
from sklearn_gradfeat.solvers._steps import (
    Correct,
    LinearObjective,
    corrected,
    start,
    stepped,
    stepped_and_corrected,
)

_MEMORY = 30
# The preconditioner is made anew once the curvature of the loss has changed by such a factor.
# Curvature pairs from before would carry rounding errors over, so they go with it.
_CHANGE = 2.0
# A correction is worth making where the gradient norm has to come down by more than that.
_FAR = 8.0

Inverse: TypeAlias = Callable[[Tensor], Tensor]
Status = Literal["converged", "max_iter", "stalled", "interrupted"]


class CurvaturePairs(NamedTuple):
    """Steps, with the changes of the gradient over them under some penalty."""

    pairs: list[tuple[Tensor, Tensor]]
    penalty: Tensor


@dataclass(frozen=True)
class Solution:
    """What :func:`minimize` found.

    Attributes
    ----------
    x : tensor
        The minimiser.
    objective_path : list of float
        The objective at the start and after every iteration; it never increases.
    n_iter : int
        Number of iterations.
    n_passes : int
        Number of times the data was passed through the linear map or its adjoint.
    status : str
        ``"converged"``; ``"max_iter"``; ``"stalled"`` when rounding allows no more
        progress; ``"interrupted"`` when the callback asked to stop.
    norm : float
        Norm of the gradient in the metric of the preconditioner.
    curvature_pairs : CurvaturePairs
        What was learned of the objective near the minimiser.
    """

    x: Tensor
    objective_path: list[float]
    n_iter: int
    n_passes: int
    status: Status
    norm: float
    curvature_pairs: CurvaturePairs


class _Memory:
    """Curvature pairs and the two-loop recursion around a preconditioner."""

    def __init__(self, precondition: Callable[[Tensor], Inverse], loss: Loss, logits: Tensor):
        self.precondition = precondition(logits)
        self.curvature = float(loss.curvatures(logits).sum())
        self.scale = 1.0
        self.pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=_MEMORY)

    def add(self, step: Tensor, change: Tensor, solved: Tensor) -> None:
        """Remember a step, the change of the gradient, and that with the inverse applied."""
        curvature = float(step @ change)
        floor = torch.finfo(step.dtype).eps * float(step.norm()) * float(change.norm())
        metric = float(change @ solved)
        if curvature > floor and metric > 0:
            self.pairs.append((step, change, 1.0 / curvature))
            self.scale = curvature / metric

    def recall(self, curvature_pairs: CurvaturePairs | None, penalty: Tensor) -> None:
        """Remember what another fit learned: the penalty is a known part of every change."""
        if curvature_pairs is None:
            return
        for step, former in curvature_pairs.pairs:
            change = former + (penalty - curvature_pairs.penalty) * step
            self.add(step, change, self.precondition(change))

    def direction(self, gradient: Tensor, natural: Tensor) -> Tensor:
        """Return the quasi-Newton descent direction; ``natural`` is the inverse times gradient."""
        if not self.pairs:
            return -self.scale * natural
        q = -gradient
        weights = []
        for step, change, inverse in reversed(self.pairs):
            weight = inverse * float(step @ q)
            weights.append(weight)
            q = q - weight * change
        q = self.scale * self.precondition(q)
        for (step, change, inverse), weight in zip(self.pairs, reversed(weights), strict=True):
            q = q + (weight - inverse * float(change @ q)) * step
        return q


def minimize(
    objective: LinearObjective,
    x: Tensor,
    precondition: Callable[[Tensor], Inverse],
    *,
    tolerance: float,
    max_iter: int,
    callback: Callable[[int, float, Tensor], bool] | None = None,
    curvature_pairs: CurvaturePairs | None = None,
    coarse: Callable[[Inverse], Correct | None] | None = None,
) -> Solution:
    """Minimise a smooth convex objective of a linear map.

    The logits move along a known line, so its minimiser is found without touching the data. An
    iteration costs one pass over the data, and one more, of the adjoint alone, when the
    unit step is not good enough: only the gradient has to be computed anew. That
    of a quadratic loss is linear along the line, so there it is known.

    With a correction, the first iteration is that alone, and every other one ends with it. What
    quasi-Newton steps have left to do is much less, at two passes for each.

    Parameters
    ----------
    objective : LinearObjective
        The objective.
    x : tensor of shape (n,)
        The start.
    precondition : callable
        Maps logits to a function that applies a symmetric positive definite approximation
        of the inverse Hessian there. Called at the start and
        whenever the curvature of the loss has changed.
    tolerance : float
        Stop when the norm of the gradient, in the metric of the preconditioner, is no
        larger. Half its square is the decrease that a Newton step promises, so it does
        not depend on the units of the unknowns.
    max_iter : int
        Stop after so many iterations.
    callback : callable, default=None
        Called as ``callback(iteration, objective, x)``; returning True stops.
    curvature_pairs : CurvaturePairs, default=None
        What a fit that ended at ``x`` learned of the same loss, under whatever penalty.
    coarse : callable, default=None
        Called with every preconditioner, unless the start is nearly good enough.
        Returns None or a correction: ``correct(x, logits, norm)`` returns about the best point
        around that one in a subspace where that is cheap, and by how much the objective is
        lower there.

    Returns
    -------
    Solution
    """
    loss, penalty = objective.loss, objective.penalty
    point = start(objective, x)
    memory = _Memory(precondition, loss, point.logits)
    memory.recall(curvature_pairs, penalty)
    natural = memory.precondition(point.gradient)
    norm = _norm(point.gradient, natural)
    correct = coarse(memory.precondition) if coarse and norm > _FAR * tolerance else None
    path, passes, n_iter = [point.value], 1, 0
    status: Status = "converged"
    while norm > tolerance:
        if n_iter == max_iter:
            status = "max_iter"
            break
        if correct is None:
            moved, cost = stepped(objective, point, memory.direction(point.gradient, natural))
        elif n_iter == 0:
            moved, cost = corrected(objective, point, correct, norm)
        else:
            direction = memory.direction(point.gradient, natural)
            moved, cost = stepped_and_corrected(objective, point, direction, correct, norm)
        passes += cost
        if moved is None:
            if not memory.pairs:
                status = "stalled"
                break
            memory.pairs.clear()
            continue
        moved_natural = memory.precondition(moved.gradient)
        memory.add(moved.x - point.x, moved.gradient - point.gradient, moved_natural - natural)
        point, natural, n_iter = moved, moved_natural, n_iter + 1
        path.append(point.value)
        norm = _norm(point.gradient, natural)
        if callback is not None and callback(n_iter, point.value, point.x):
            status = "interrupted" if norm > tolerance else "converged"
            break
        if not same_curvature(memory.curvature, loss, point.logits):
            memory = _Memory(precondition, loss, point.logits)
            natural = memory.precondition(point.gradient)
            norm = _norm(point.gradient, natural)
            correct = coarse(memory.precondition) if coarse and correct else None
    learned = CurvaturePairs([(step, change) for step, change, _ in memory.pairs], penalty)
    return Solution(point.x, path, n_iter, passes, status, norm, learned)


def same_curvature(former: float, loss: Loss, logits: Tensor) -> bool:
    """Whether a preconditioner holds at logits, from the sum of curvatures it was made for."""
    return former / _CHANGE <= float(loss.curvatures(logits).sum()) <= former * _CHANGE


def preconditioned_norm(gradient: Tensor, precondition: Inverse) -> float:
    """Return the norm of a gradient in the metric of a preconditioner."""
    return _norm(gradient, precondition(gradient))


def _norm(gradient: Tensor, natural: Tensor) -> float:
    """Return the same, for a gradient and its product with the preconditioner."""
    square = float(gradient @ natural)
    if not math.isfinite(square):
        raise FloatingPointError(
            "The gradient of the objective is not finite. Scale X so that the activations of "
            "the backbone are of moderate size, or increase alpha."
        )
    return math.sqrt(abs(square))
