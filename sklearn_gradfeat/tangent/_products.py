"""Jacobian-vector and vector-Jacobian products of a head, as pure functions.

A head is a function ``f(parameters, boundary) -> activation`` of a tuple of parameters and
a tuple of per-sample tensors; its activation has shape (n_samples, n_features).
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sklearn_gradfeat._attention import differentiable_attention

Tensors: TypeAlias = tuple[Tensor, ...]
Head: TypeAlias = Callable[[Tensors, Tensors], Tensor]

# Forward-mode levels are global to the process, so two threads must not open one at once.
_FORWARD_MODE = threading.RLock()


@functools.cache
def _load_forward_mode() -> None:
    """Let torch load its forward derivatives, which warns of torch's own deprecations."""
    with _FORWARD_MODE, warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def jvp(head: Head, parameters: Tensors, boundary: Tensors, tangents: Tensors) -> Tensor:
    """Return ``J t``, the derivative of the activation along ``tangents``."""
    with torch.no_grad():
        return jvp_with_primal(head, parameters, boundary, tangents)[1].detach()


def jvp_with_primal(
    head: Head, parameters: Tensors, boundary: Tensors, tangents: Tensors
) -> tuple[Tensor, Tensor]:
    """Return the activation and ``J t`` from one evaluation of the head."""
    _load_forward_mode()
    with _FORWARD_MODE, differentiable_attention(), forward_ad.dual_level():
        duals = tuple(map(forward_ad.make_dual, parameters, tangents))
        primal, tangent = forward_ad.unpack_dual(head(duals, boundary))
    if tangent is None:
        tangent = torch.zeros_like(primal)
    return primal, tangent


def jvp_by_double_backward(
    head: Head, parameters: Tensors, boundary: Tensors, tangents: Tensors
) -> Tensor:
    """Return ``J t`` without forward mode.

    ``Jᵀ v`` is linear in ``v``, so its vector-Jacobian product with ``t`` is ``J t``, at any ``v``.
    It is not taken at zero, where torch returns NaN for operators that work with logarithms.
    """
    with torch.enable_grad(), differentiable_attention():
        leaves = tuple(p.detach().requires_grad_() for p in parameters)
        primal = head(leaves, boundary)
        dummy = torch.ones_like(primal, requires_grad=True)
        pulled = _grad(primal, leaves, dummy, create_graph=True)
        (tangent,) = torch.autograd.grad(pulled, dummy, tangents)
    return tangent


def vjp(head: Head, parameters: Tensors, boundary: Tensors, cotangent: Tensor) -> Tensors:
    """Return ``Jᵀ cotangent``, one tensor per parameter."""
    with torch.enable_grad(), differentiable_attention():
        leaves = tuple(p.detach().requires_grad_() for p in parameters)
        return _grad(head(leaves, boundary), leaves, cotangent)


def jvp_then_vjp(
    head: Head,
    parameters: Tensors,
    boundary: Tensors,
    tangents: Tensors,
    cotangent_of: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensors]:
    """Return ``t' = J t`` and ``Jᵀ cotangent_of(t')`` from one evaluation of the head."""
    with torch.enable_grad():
        leaves = tuple(p.detach().requires_grad_() for p in parameters)
        primal, tangent = jvp_with_primal(head, leaves, boundary, tangents)
        tangent = tangent.detach()
        return tangent, _grad(primal, leaves, cotangent_of(tangent))


def _grad(
    output: Tensor, leaves: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False
) -> Tensors:
    """Return the gradients of the leaves, zeros for a leaf that has no influence."""
    if not output.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(
        output, leaves, cotangent, create_graph=create_graph, materialize_grads=True
    )
