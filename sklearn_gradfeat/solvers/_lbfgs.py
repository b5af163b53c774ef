"""Preconditioned limited-memory BFGS for a loss of a linear map [1]_.

The caller sets the stopping rule: `training/_two_stage_fit.py` derives it from ``tol``.

References
----------
.. [1] J. Nocedal and S. Wright, Numerical Optimization, 2nd edition, chapter 7,
   Springer 2006.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sklearn_gradfeat.data import number_of_first_rank, of_first_rank, sum_over_ranks
from sklearn_gradfeat.linearized import Loss
from sklearn_gradfeat.solvers._curvature_pairs import CurvaturePairs, Inverse, InverseHessian
from sklearn_gradfeat.solvers._steps import (
    NOT_FINITE,
    CoarseSolver,
    LinearObjective,
    Point,
    coarse_step,
    line_and_coarse_step,
    line_step,
    start,
)

# A change of the total curvature of the loss by this factor rebuilds the preconditioner. The
# older curvature pairs are dropped with it: their rounding errors would remain.
_CHANGE = 2.0
# Coarse-space solves pay off when the gradient norm must decrease by more than this factor.
_FAR = 8.0

Status = Literal["converged", "max_iter", "stalled", "interrupted"]


class State(NamedTuple):
    """The end of an iteration of :func:`minimize`, from which another call goes on.

    Attributes
    ----------
    x, gradient : tensor
        The unknowns, and the gradient there.
    logits : tensor or None
        The logits there, which are sums over the iterations. None computes them from ``x``, and
        the gradient from them, which gives other last digits.
    built_at : tensor or None
        The unknowns at which the preconditioner was built. None where no state is kept.
    scale : float
        The factor ``γ`` of the preconditioner, see :func:`minimize`.
    objective_path, n_passes
        As in :class:`Solution`.
    pairs : list of (tensor, tensor)
        The curvature pairs.
    products : tensor of shape (n_pairs, n_pairs) or None
        Their inner products. None computes them, with other last digits.
    coarse_pairs : list of (tensor, tensor) or None
        Those of the last coarse-space solve; None without coarse-space solves.
    """

    x: Tensor
    gradient: Tensor
    logits: Tensor | None
    built_at: Tensor | None
    scale: float
    objective_path: list[float]
    n_passes: int
    pairs: list[tuple[Tensor, Tensor]]
    products: Tensor | None
    coarse_pairs: list[tuple[Tensor, Tensor]] | None


@dataclass(frozen=True)
class Solution:
    """The result of :func:`minimize`.

    Attributes
    ----------
    x : tensor
        The minimiser.
    objective_path : list of float
        The objective at the start and after every iteration; it never increases.
    n_iter : int
        Number of iterations.
    n_passes : int
        Number of passes over the data, through the linear map or its adjoint.
    status : str
        ``"converged"``; ``"max_iter"``; ``"stalled"`` when rounding errors prevent further
        progress; ``"interrupted"`` when the callback asked to stop.
    norm : float
        Norm of the gradient in the metric of the preconditioner.
    curvature_pairs : CurvaturePairs
        The curvature pairs of the last iterations.
    """

    x: Tensor
    objective_path: list[float]
    n_iter: int
    n_passes: int
    status: Status
    norm: float
    curvature_pairs: CurvaturePairs


class _Memory(InverseHessian):
    """The approximate inverse Hessian, and where its preconditioner was built."""

    def __init__(
        self,
        precondition: Callable[[Tensor], Inverse],
        loss: Loss,
        x: Tensor,
        logits: Tensor,
        is_kept: bool,
    ) -> None:
        super().__init__(precondition(logits), x)
        self.built_at = x if is_kept else None
        self.curvature = _curvature(loss, logits)

    def learn(self, step: Tensor, change: Tensor, gradient: Tensor, former: Tensor) -> Tensor:
        """Store the step to a point with a given gradient, and return ``Pg`` there.

        ``former``, that before the step, is overwritten.
        """
        preconditioned = self.inverse(gradient.clone())
        self.add(step, change, former.neg_().add_(preconditioned))
        return preconditioned

    def direction(self, gradient: Tensor, preconditioned: Tensor) -> Tensor:
        """Return the direction, of the same bits on all ranks."""
        return of_first_rank(super().direction(gradient, preconditioned))

    def forget(self) -> None:
        """Free the matrices and the pairs, before those of another memory exist."""
        del self.inverse
        self.clear()

    def restore(self, state: State) -> None:
        """Take the place of the memory at the end of an iteration."""
        for step, change in state.pairs:
            self.add(step, change)
        if state.products is not None:
            self.products = state.products.numpy()
        self.scale = state.scale


def minimize(
    objective: LinearObjective,
    x: Tensor,
    precondition: Callable[[Tensor], Inverse],
    *,
    tolerance: Callable[[float], float],
    max_iter: int,
    callback: Callable[[int, float, Tensor, float, float], bool] | None = None,
    curvature_pairs: CurvaturePairs | None = None,
    coarse: Callable[[Inverse], CoarseSolver | None] | None = None,
    state: State | None = None,
    keep: Callable[[State], None] | None = None,
) -> Solution:
    """Minimise ``F(x) = loss(A x) + Σ penalty x² / 2`` by preconditioned L-BFGS.

    ``Z = A x`` are the logits, ``g`` is the gradient of ``F``, and the preconditioner ``P``
    approximates the inverse Hessian. A pass over the data, through ``A`` or ``Aᵀ``, is the
    unit of cost. One iteration is:

    1. *Stopping rule.* Stop when the Newton decrement ``½ gᵀPg`` is at most ``tolerance(F)``.
       It predicts the decrease of ``F`` over a Newton step, and does not depend on the units
       of the unknowns.
    2. *Direction.* It is ``d = -H g``. ``H`` starts from ``γ P`` and
       satisfies the secant equations of the last curvature pairs: steps ``s`` and changes ``y``
       of the gradient, at most 30 of them, and fewer of more than a million unknowns. The last
       pair gives ``γ = sᵀy / yᵀPy``.
    3. *Exact line search.* The logits along ``x + t d`` are ``Z + t D`` with ``D = A d``.
       Once ``D`` is known, the search for ``t`` needs no pass.
    4. *Passes.* One pass returns both ``D`` and the gradient at ``t = 1``. The unit step is
       kept when it meets the Wolfe conditions; any other step takes a second pass, of the
       adjoint alone. The gradient of a quadratic loss is affine in ``t``, so one pass always
       suffices: with ``Q`` the Hessian of the loss, it is ``g + t (AᵀQD + penalty d)``.
    5. *Coarse-space solve.* With ``coarse``, the point then moves to an approximate minimiser
       of ``F`` over ``x + V``, where ``V`` is a subspace on which ``A`` is cheap. The first
       iteration with it consists of this solve alone. An iteration then costs two passes, but far
       fewer iterations are needed.
    6. *New preconditioner.* When the summed curvature of the loss has changed by a factor of
       two since ``P`` was built, ``P`` is built anew and the pairs are dropped. One pass
       computes ``Z`` anew from ``x``, so a later call can build the same ``P`` from ``x``.

    When no step along ``d`` decreases ``F`` or moves ``x``, the pairs are dropped; without pairs,
    rounding errors prevent further progress.

    Parameters
    ----------
    objective : LinearObjective
        The objective.
    x : tensor of shape (n,)
        The starting point.
    precondition : callable
        Maps logits to a function that applies ``P``, a symmetric positive definite
        approximation of the inverse Hessian at these logits. It may overwrite its argument.
    tolerance : callable
        Maps the objective to the Newton decrement at which to stop.
    max_iter : int
        Largest number of iterations.
    callback : callable, default=None
        Called as ``callback(iteration, objective, x, decrement, tolerance)`` after each
        iteration, with the Newton decrement and its value at which to stop; returning True
        stops the solver.
    curvature_pairs : CurvaturePairs, default=None
        The curvature pairs of a fit that ended at ``x``, of the same loss under any penalty.
    coarse : callable, default=None
        Called with every preconditioner, unless the start is nearly optimal. Returns None or a
        function ``solve(x, logits, norm)``, which returns an approximate minimiser over the coarse
        space through ``x``, its logits and the change of the objective. It may overwrite ``x``.
    state : State, default=None
        Where a former call ended an iteration, with the same arguments. This call then returns
        the same as that one would have, and without ``logits`` the same up to rounding errors.
    keep : callable, default=None
        Called with the state after each iteration.

    Returns
    -------
    Solution

    Raises
    ------
    FloatingPointError
        If the gradient is not finite.
    """
    loss, penalties = objective.loss, objective.penalties
    if state is None:
        point = start(objective, x)
        memory = _Memory(precondition, loss, point.x, point.logits, keep is not None)
        memory.recall(curvature_pairs, penalties)
        path, passes, coarse_pairs = [point.value], 1, None
    else:
        point, memory = _restored(objective, precondition, state)
        path, passes, coarse_pairs = list(state.objective_path), state.n_passes, state.coarse_pairs
    del x  # its memory, unless the caller has it
    preconditioned, norm = _measured(point, memory)
    n_iter = len(path) - 1
    solve = None if coarse is None or coarse_pairs is None else coarse(memory.inverse)
    if solve and coarse_pairs:
        solve.recall(coarse_pairs)
    status: Status = "converged"
    while norm**2 / 2 > tolerance(point.value):
        if n_iter == max_iter:
            status = "max_iter"
            break
        begins = n_iter == 0
        if begins and coarse and norm**2 / 2 > _FAR**2 * tolerance(point.value):
            solve = solve or coarse(memory.inverse)
        moved, cost = _step(objective, point, memory, preconditioned, norm, solve, begins)
        passes += cost
        if moved is None or (not begins and _stays(point, moved)):
            if not len(memory):
                status = "stalled"
                break
            memory.clear()
            continue
        step, change = _differences(point, moved, keep is not None)
        point, n_iter = moved, n_iter + 1
        preconditioned = memory.learn(step, change, point.gradient, preconditioned)
        del step, change, moved  # memory for the next preconditioner
        path.append(point.value)
        norm = _norm(point.gradient, preconditioned)
        decrement, wanted = norm**2 / 2, tolerance(point.value)
        if callback is not None and callback(n_iter, point.value, point.x, decrement, wanted):
            status = "interrupted"
            break
        if not same_curvature(memory.curvature, loss, point.logits):
            has_space, solve, passes = solve is not None, None, passes + 1
            del preconditioned
            point, memory = _rebuilt(objective, precondition, point, memory)
            preconditioned, norm = _measured(point, memory)
            solve = coarse(memory.inverse) if coarse and has_space else None
        if keep is not None:
            keep(_state(point, memory, path, passes, solve))
    return Solution(
        point.x, path, n_iter, passes, status, norm, CurvaturePairs(memory.pairs, penalties)
    )


def _stays(point: Point, moved: Point) -> bool:
    """Whether a step has not moved the unknowns, so that the next one would be the same."""
    return moved.value == point.value and torch.equal(moved.x, point.x)


def _differences(point: Point, moved: Point, is_kept: bool) -> tuple[Tensor, Tensor]:
    """Return the step to another point, and the change of the gradient.

    The former gradient is overwritten unless it is kept.
    """
    gradient = point.gradient.clone() if is_kept else point.gradient
    return moved.x - point.x, gradient.neg_().add_(moved.gradient)


def _measured(point: Point, memory: _Memory) -> tuple[Tensor, float]:
    """Return ``Pg`` at a point, and ``sqrt(gᵀPg)``."""
    preconditioned = memory.inverse(point.gradient.clone())
    return preconditioned, _norm(point.gradient, preconditioned)


def _rebuilt(
    objective: LinearObjective,
    precondition: Callable[[Tensor], Inverse],
    point: Point,
    former: _Memory,
) -> tuple[Point, _Memory]:
    """Return the point with logits computed anew, and a memory without pairs there."""
    is_kept = former.built_at is not None
    former.forget()
    point = point._replace(logits=objective.forward(point.x))
    return point, _Memory(precondition, objective.loss, point.x, point.logits, is_kept)


def _restored(
    objective: LinearObjective, precondition: Callable[[Tensor], Inverse], state: State
) -> tuple[Point, _Memory]:
    """Return the point of a state, and the memory there."""
    if state.logits is None:
        point = start(objective, state.x)
    else:
        point = Point(state.x, state.logits, state.gradient, state.objective_path[-1])
    at = state.x if state.built_at is None else state.built_at
    memory = _Memory(precondition, objective.loss, at, objective.forward(at), True)
    memory.restore(state)
    return point, memory


def _step(
    objective: LinearObjective,
    point: Point,
    memory: _Memory,
    preconditioned: Tensor,
    norm: float,
    solve: CoarseSolver | None,
    only_coarse: bool,
) -> tuple[Point | None, int]:
    """Return the next point, or None without a decrease, and the number of passes.

    ``only_coarse`` leaves out the step along a line, where there is a coarse space.
    """
    if solve is not None and only_coarse:
        return coarse_step(objective, point, solve, norm)
    if solve is None:
        return line_step(objective, point, memory.direction(point.gradient, preconditioned))
    return line_and_coarse_step(
        objective, point, memory.direction(point.gradient, preconditioned), solve, norm
    )


def _state(
    point: Point, memory: _Memory, path: list[float], passes: int, solve: CoarseSolver | None
) -> State:
    """Return the state at the end of an iteration."""
    coarse_pairs = None if solve is None else solve.pairs
    return State(
        point.x, point.gradient, point.logits, memory.built_at, memory.scale, list(path), passes,
        memory.pairs, torch.from_numpy(memory.products.copy()), coarse_pairs,
    )  # fmt: skip


def same_curvature(former: float, loss: Loss, logits: Tensor) -> bool:
    """Return whether the summed curvature of the loss is within a factor of two of a former one."""
    return former / _CHANGE <= _curvature(loss, logits) <= former * _CHANGE


def _curvature(loss: Loss, logits: Tensor) -> float:
    """Return the summed curvature of the loss."""
    return float(sum_over_ranks(loss.curvatures(logits).sum()))


def preconditioned_norm(gradient: Tensor, precondition: Inverse) -> float:
    """Return ``sqrt(gᵀPg)``, the norm of a gradient in the metric of a preconditioner."""
    return _norm(gradient, precondition(gradient.clone()))


def _norm(gradient: Tensor, preconditioned: Tensor) -> float:
    """Return ``sqrt(gᵀPg)`` from ``g`` and ``Pg``."""
    square = number_of_first_rank(float(gradient @ preconditioned))
    if not math.isfinite(square):
        raise FloatingPointError(NOT_FINITE)
    return math.sqrt(abs(square))
