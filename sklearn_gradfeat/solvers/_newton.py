"""Newton's method for a loss of a linear map, in the space of samples.

With the map ``A``, the penalties ``Λ`` and the Gram matrix ``K = A Λ⁻¹ Aᵀ``, the unknowns at the
optimum are ``Λ⁻¹ Aᵀ β``, with one number ``β`` for each sample and output, and the logits are
``K β + b`` with a free intercept ``b``. A step from the logits ``z`` leads to the solution of ::

    β = h - H (K β + b),    Σᵢ βᵢ = 0,    h = H z - loss'(z)

where ``H`` has the blocks of the Hessian of the loss. With ``R = H^½``, the only system is that of
``I + R K R``, which is well conditioned. An exact line search follows. It takes a handful of steps,
where the passes over a network and their bookkeeping would take more time than the arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sklearn_gradfeat.linearized import Loss
from sklearn_gradfeat.solvers._line_search import Line, search
from sklearn_gradfeat.solvers._steps import NOT_FINITE

_MAX_ITER = 50
# The Newton decrement at the start of the last step, as a share of the objective.
_TOL = 1e-6


def newton(
    loss: Loss, gram: Tensor, fit_intercept: bool, near: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise ``loss(K β + b) + βᵀ K β / 2``.

    Parameters
    ----------
    loss : Loss
        The loss of the logits.
    gram : tensor of shape (n_samples * n_outputs, n_samples * n_outputs), float64
        The matrix ``K``.
    fit_intercept : bool
        Whether there is an intercept ``b``; otherwise it is zero.
    near : tensor of shape (n_samples, n_outputs) or None
        Logits that may be close to those of the optimum. The first step starts there, unless it
        leads to a larger objective than that of zero logits.

    Returns
    -------
    (tensor, tensor, tensor)
        ``β``, of shape (n_samples, n_outputs), ``b``, of shape (n_outputs,), and the logits.

    Raises
    ------
    FloatingPointError
        If the Hessian is not finite.
    """
    shape = len(loss.weights), loss.n_outputs
    dual, intercept = gram.new_zeros(shape), gram.new_zeros(loss.n_outputs)
    logits = torch.zeros_like(dual)
    value = loss.value(logits)
    if near is not None:
        point = _newton_point(loss, gram, fit_intercept, near, loss.gradient(near))
        there = _times(gram, point[0]) + point[1]
        value_there = loss.value(there) + float((point[0] * (there - point[1])).sum()) / 2
        if value_there < value:
            (dual, intercept), logits, value = point, there, value_there
    for _ in range(_MAX_ITER):
        gradient = loss.gradient(logits)
        dual_there, intercept_there = _newton_point(loss, gram, fit_intercept, logits, gradient)
        logits_there = _times(gram, dual_there) + intercept_there
        change, moved = logits_there - logits, dual_there - dual
        linear = float((moved * (logits - intercept)).sum())
        quadratic = float((moved * (change - (intercept_there - intercept))).sum())
        decrement = -(float((gradient * change).sum()) + linear) / 2
        length, gain = search(Line(loss, logits, change, linear, quadratic), value)
        if gain >= 0:
            break
        dual, intercept = dual + length * moved, torch.lerp(intercept, intercept_there, length)
        logits, value = logits + length * change, value + gain
        if decrement <= _TOL * abs(value):
            break
    return dual, intercept, logits


def _newton_point(
    loss: Loss, gram: Tensor, fit_intercept: bool, logits: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the ``β`` and ``b`` to which a Newton step leads."""
    hessian, n_outputs = loss.hessians(logits), loss.n_outputs
    values, vectors = torch.linalg.eigh(torch.nan_to_num(hessian, nan=0.0))
    root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    system = _scaled(root, _scaled(root, gram).T)
    if not math.isfinite(float(system.diagonal().max())) or not bool(hessian.isfinite().all()):
        raise FloatingPointError(NOT_FINITE)
    system.diagonal().add_(1.0)
    factor = torch.linalg.cholesky(system)
    free = (hessian @ logits[:, :, None])[:, :, 0] - gradient
    columns = [_times(gram, free).reshape(-1, 1)]
    if fit_intercept:
        columns.append(torch.eye(n_outputs).to(gram).repeat(len(logits), 1))
    seen = _scaled(root, torch.cholesky_solve(_scaled(root, torch.cat(columns, 1)), factor))
    dual, of_intercept = free - seen[:, 0].view_as(free), seen[:, 1:].unflatten(0, free.shape)
    intercept = torch.zeros_like(logits[0])
    if fit_intercept:  # a softmax does not depend on the mean of the intercepts
        intercept = torch.linalg.pinv(of_intercept.sum(0), hermitian=True) @ dual.sum(0)
        dual = dual - of_intercept @ intercept
    return dual, intercept


def _times(gram: Tensor, dual: Tensor) -> Tensor:
    return (gram @ dual.reshape(-1)).view_as(dual)


def _scaled(root: Tensor, matrix: Tensor) -> Tensor:
    """Return the product with the block diagonal matrix of ``root``."""
    return (root @ matrix.view(*root.shape[:2], -1)).flatten(0, 1)
