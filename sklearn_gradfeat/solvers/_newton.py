"""Newton's method for a loss of a linear map that is a small dense matrix.

Every step solves ``(Aᵀ S A + diag(penalty)) d = -g`` with the blocks ``S`` of the Hessian of the
loss, and is followed by an exact line search. It takes a handful of steps, where the passes over
a network and their bookkeeping would take more time than the arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sklearn_gradfeat.linearized import Loss
from sklearn_gradfeat.solvers._line_search import Line, search
from sklearn_gradfeat.solvers._steps import NOT_FINITE

_MAX_ITER = 50
# The Newton decrement at the end, as a share of the objective.
_TOL = 1e-10
# An unpenalised unknown gets this share of the largest curvature as its penalty.
_FLOOR = 1e-11
# The same for all unknowns, where rounding errors make the Hessian indefinite.
_MORE = 1e-8
_EPS = 10 * torch.finfo(torch.float64).eps


def newton(loss: Loss, rows: Tensor, penalty: Tensor, x: Tensor) -> Tensor:
    """Minimise ``loss(A x) + Σ penalty x² / 2``.

    Parameters
    ----------
    loss : Loss
        The loss of the logits.
    rows : tensor of shape (n_samples, n_outputs, n), float64
        The matrix ``A``.
    penalty : tensor of shape (n,), float64
        Not negative.
    x : tensor of shape (n,), float64
        The starting point.

    Returns
    -------
    tensor of shape (n,), float64

    Raises
    ------
    FloatingPointError
        If the Hessian is not finite.
    """
    matrix, logits = rows.flatten(0, 1), rows @ x
    value = loss.value(logits) + float(penalty * x @ x) / 2
    for _ in range(_MAX_ITER):
        gradient = matrix.T @ loss.gradient(logits).reshape(-1) + penalty * x
        curved = (loss.hessians(logits) @ rows).flatten(0, 1)
        hessian = matrix.T @ curved
        largest = float(hessian.diagonal().max())
        if not math.isfinite(largest):
            raise FloatingPointError(NOT_FINITE)
        hessian.diagonal().add_(penalty.clamp(min=_FLOOR * largest))
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            # Curvatures of nearly certain samples are rounding errors of numbers near one.
            scale = loss.weights @ rows.square().sum((1, 2))
            hessian.diagonal().add_(max(_MORE * largest, float(scale) * _EPS))
            factor = torch.linalg.cholesky(hessian)
        step = -torch.cholesky_solve(gradient[:, None], factor)[:, 0]
        decrement = -float(gradient @ step) / 2
        if decrement <= _TOL * abs(value):
            break
        change = (matrix @ step).view_as(logits)
        linear, quadratic = float(penalty * x @ step), float(penalty * step @ step)
        length, gain = search(Line(loss, logits, change, linear, quadratic), value)
        if gain >= 0:
            break
        x, logits, value = x + length * step, logits + length * change, value + gain
    return x
