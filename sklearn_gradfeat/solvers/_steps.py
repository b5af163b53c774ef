"""Points of a minimisation, and the ways from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from sklearn_gradfeat.linearized import Loss
from sklearn_gradfeat.solvers._line_search import Line, search

# Moves (unknowns, logits) at a gradient norm, and says by how much that changes the objective.
Correct: TypeAlias = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]


class LinearObjective(Protocol):
    """``loss(A x) + Σ penalty x² / 2`` for a linear map ``A`` from x to logits."""

    @property
    def loss(self) -> Loss:
        """The loss of the logits."""

    @property
    def penalty(self) -> Tensor:
        """Coefficients of the quadratic penalty, of the shape of x."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``A x``, of shape (n_samples, n_outputs), float64."""

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """Return ``Aᵀ cotangent``, of the shape of x."""

    def forward_adjoint(self, direction: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``D = A direction`` and ``Aᵀ loss'(logits + D)`` from a single pass."""


class Point(NamedTuple):
    """Unknowns, with their logits, the gradient and the objective."""

    x: Tensor
    logits: Tensor
    gradient: Tensor
    value: float


def start(objective: LinearObjective, x: Tensor) -> Point:
    """Return the point at ``x``."""
    logits = objective.forward(x)
    value = objective.loss.value(logits) + penalised(objective, x, x) / 2
    return _with_gradient(objective, x, logits, value)


def _with_gradient(objective: LinearObjective, x: Tensor, logits: Tensor, value: float) -> Point:
    """Return a point; its gradient takes a pass."""
    gradient = objective.adjoint(objective.loss.gradient(logits)) + objective.penalty * x
    return Point(x, logits, gradient, value)


def _line(objective: LinearObjective, point: Point, direction: Tensor, change: Tensor) -> Line:
    """Return the objective along a direction that changes the logits like this."""
    linear, quadratic = (penalised(objective, direction, x) for x in (point.x, direction))
    return Line(objective.loss, point.logits, change, linear, quadratic)


def penalised(objective: LinearObjective, x: Tensor, y: Tensor) -> float:
    """Return ``Σ penalty x y``, in float64: over millions of numbers float32 is off by 1e-5."""
    penalty = objective.penalty.to(objective.loss.weights)
    return float((penalty * x.to(penalty)) @ y.to(penalty))


def stepped(
    objective: LinearObjective, point: Point, direction: Tensor
) -> tuple[Point | None, int]:
    """Return the best point along a direction, if it is better at all, and the passes it took."""
    penalty, bottom = objective.penalty, objective.loss.quadratic_minimizer
    change, adjoint = objective.forward_adjoint(
        direction, point.logits if bottom is None else bottom
    )
    step, gain = search(_line(objective, point, direction, change), point.value)
    if gain >= 0:
        return None, 1
    logits, x, value = point.logits + step * change, point.x + step * direction, point.value + gain
    if bottom is not None:
        gradient = point.gradient + step * (adjoint + penalty * direction)
    elif step == 1.0:
        gradient = adjoint + penalty * x
    else:
        return _with_gradient(objective, x, logits, value), 2
    return Point(x, logits, gradient, value), 1


def stepped_and_corrected(
    objective: LinearObjective, point: Point, direction: Tensor, correct: Correct, norm: float
) -> tuple[Point | None, int]:
    """Return what a correction makes of the best point along a direction."""
    change = objective.forward(direction)
    step, gain = search(_line(objective, point, direction, change), point.value)
    if gain >= 0:
        return None, 1
    x, logits = point.x + step * direction, point.logits + step * change
    moved, cost = corrected(
        objective, Point(x, logits, point.gradient, point.value + gain), correct, norm
    )
    return moved, 1 + cost


def corrected(
    objective: LinearObjective, point: Point, correct: Correct, norm: float
) -> tuple[Point, int]:
    """Return what a correction makes of a point."""
    x, logits, gain = correct(point.x, point.logits, norm)
    return _with_gradient(objective, x, logits, point.value + gain), 1
