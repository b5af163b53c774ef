"""The steps of the solver from one point to the next: along a line, over the coarse space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sklearn_gradfeat.data import block_size, number_of_first_rank
from sklearn_gradfeat.linearized import Loss
from sklearn_gradfeat.solvers._line_search import Line, search

NOT_FINITE = (
    "The gradient or the curvature of the objective is not finite. Scale X so that the "
    "activations of the backbone are of moderate size, scale the targets of a regression, or "
    "increase alpha."
)
# Unknowns that are converted to float64 at a time.
_BLOCK = 2**18


class CoarseSolver(Protocol):
    """Approximate minimiser over the coarse space through a point."""

    def __call__(self, x: Tensor, logits: Tensor, norm: float) -> tuple[Tensor, Tensor, float]:
        """Return new unknowns, their logits and the change of the objective.

        It may overwrite ``x``.
        """

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The curvature pairs of the last solve."""

    def recall(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Go on after a solve that had these curvature pairs."""


class LinearObjective(Protocol):
    """``loss(A x) + Σ penalty x² / 2`` for a linear map ``A`` from x to logits."""

    @property
    def loss(self) -> Loss:
        """The loss of the logits."""

    @property
    def penalties(self) -> tuple[Tensor, ...]:
        """Coefficients of the quadratic penalty, of blocks of x; equal ones are one number."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``A x``, of shape (n_samples, n_outputs), float64."""

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """Return ``Aᵀ cotangent``, of the shape of x."""

    def forward_adjoint(self, direction: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``D = A direction`` and ``Aᵀ loss'(logits + D)`` from a single pass."""


class Point(NamedTuple):
    """Unknowns with their logits, the gradient and the objective."""

    x: Tensor
    logits: Tensor
    gradient: Tensor
    value: float


def start(objective: LinearObjective, x: Tensor) -> Point:
    """Return the point at ``x``."""
    logits = objective.forward(x)
    value = objective.loss.value(logits) + penalised(objective, x, x) / 2
    return _with_gradient(objective, x, logits, value)


def penalised(objective: LinearObjective, x: Tensor, y: Tensor) -> float:
    """Return ``Σ penalty x y`` in float64; with millions of terms float32 is off by 1e-5."""
    return _penalised(objective, x, y)[0]


def _penalised(objective: LinearObjective, x: Tensor, *others: Tensor) -> list[float]:
    """Return the same for ``x`` with each of several vectors."""
    wide = objective.loss.weights
    totals = [wide.new_zeros(()) for _ in others]
    size = block_size(x.device, _BLOCK)
    for block in _blocks(objective.penalties, x, *others):
        for parts in zip(*(t.split(size) for t in block), strict=True):
            penalty, of_x, *of_others = (part.to(wide) for part in parts)
            weighted = penalty * of_x
            for total, part in zip(totals, of_others, strict=True):
                total.add_(weighted @ part)
    return [number_of_first_rank(total) for total in torch.stack(totals).tolist()]


def add_penalised(
    total: Tensor, penalties: tuple[Tensor, ...], x: Tensor, sign: float = 1
) -> Tensor:
    """Add ``sign penalty x`` to ``total``, and return it."""
    for penalty, place, part in _blocks(penalties, total, x):
        place.addcmul_(penalty, part, value=sign)
    return total


def _blocks(penalties: tuple[Tensor, ...], *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Iterate over the penalties with the parts of vectors that they belong to."""
    sizes = [len(penalty) for penalty in penalties]
    return zip(penalties, *(vector.split(sizes) for vector in vectors), strict=True)


def line_step(
    objective: LinearObjective, point: Point, direction: Tensor
) -> tuple[Point | None, int]:
    """Return the next point on a line, or None without a decrease, and the number of passes."""
    penalties, minimizer = objective.penalties, objective.loss.quadratic_minimizer
    # The gradient of a quadratic loss vanishes at its minimiser, so this adjoint is the change
    # of the gradient over a unit step. For any other loss it is the gradient after a unit step.
    change, adjoint = objective.forward_adjoint(
        direction, point.logits if minimizer is None else minimizer
    )
    step, gain = _search(objective, point, direction, change)
    if gain >= 0:
        return None, 1
    logits, value = point.logits + step * change, point.value + gain
    x = torch.add(point.x, direction, alpha=step)
    if minimizer is not None:
        gradient = add_penalised(adjoint, penalties, direction).mul_(step).add_(point.gradient)
    elif step == 1.0:
        gradient = add_penalised(adjoint, penalties, x)
    else:
        return _with_gradient(objective, x, logits, value), 2
    return Point(x, logits, gradient, value), 1


def line_and_coarse_step(
    objective: LinearObjective, point: Point, direction: Tensor, solve: CoarseSolver, norm: float
) -> tuple[Point | None, int]:
    """Return the same after a coarse-space solve; the gradient on the line is not needed."""
    change = objective.forward(direction)
    step, gain = _search(objective, point, direction, change)
    if gain >= 0:
        return None, 1
    x, logits = torch.add(point.x, direction, alpha=step), point.logits + step * change
    del direction  # memory for the next pass
    x, logits, more = solve(x, logits, norm)
    return _with_gradient(objective, x, logits, point.value + gain + more), 2


def coarse_step(
    objective: LinearObjective, point: Point, solve: CoarseSolver, norm: float
) -> tuple[Point, int]:
    """Return the point after a coarse-space solve, and the number of passes."""
    x, logits, gain = solve(point.x.clone(), point.logits, norm)
    return _with_gradient(objective, x, logits, point.value + gain), 1


def _search(
    objective: LinearObjective, point: Point, direction: Tensor, change: Tensor
) -> tuple[float, float]:
    """Search along a direction; ``change`` is the change of the logits over a unit step."""
    linear, quadratic = _penalised(objective, direction, point.x, direction)
    return search(Line(objective.loss, point.logits, change, linear, quadratic), point.value)


def _with_gradient(objective: LinearObjective, x: Tensor, logits: Tensor, value: float) -> Point:
    """Return a point; its gradient takes a pass."""
    gradient = objective.adjoint(objective.loss.gradient(logits))
    gradient = add_penalised(gradient, objective.penalties, x)
    return Point(x, logits, gradient, value)
