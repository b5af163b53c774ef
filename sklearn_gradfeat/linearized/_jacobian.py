"""A head linearised at its pretrained parameters, over flat vectors of displacements."""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sklearn_gradfeat.backbones import differentiable_attention

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


_NTK_BIAS = math.sqrt(0.1)


def ntk_scale(parameter: Tensor) -> float:
    """Return the constant by which NTK parametrization multiplies a parameter.

    ``sqrt(1 / out_channels)`` for weights and ``sqrt(0.1)`` for vectors such as biases
    and the scales of normalisation layers [1]_.

    References
    ----------
    .. [1] F. Mu, Y. Liang, Y. Li, Gradients as CachedSamples for Deep Representation Learning,
       ICLR 2020, arXiv:2004.05529.
    """
    return math.sqrt(1 / parameter.shape[0]) if parameter.ndim > 1 else _NTK_BIAS


class LinearizedHead:
    """``J u`` and ``Jᵀ g`` of a head, for a flat vector ``u`` of scaled displacements.

    The displacement of parameter t is ``scale_t * u_t``, which under an L2 penalty on
    ``u`` is the NTK parametrization; scales of one give the standard one.

    Parameters
    ----------
    head : callable
        ``head(parameters, boundary)`` returns the activation, (n_samples, n_features).
    parameters : dict of str to tensor
        The pretrained values, in the order in which the head takes them.
    parametrization : {"ntk", "standard"}
        How displacements are scaled.
    """

    def __init__(self, head: Head, parameters: dict[str, Tensor], parametrization: str) -> None:
        self.head = head
        self.names = list(parameters)
        self.values: Tensors = tuple(parameters.values())
        self.scales = [
            ntk_scale(value) if parametrization == "ntk" else 1.0 for value in self.values
        ]
        self.size = sum(value.numel() for value in self.values)
        self._forward_mode = True

    def activation(self, boundary: Tensors) -> Tensor:
        """Return the activation, of shape (n_samples, n_features)."""
        with torch.no_grad():
            return self.head(self.values, boundary)

    def jvp(self, boundary: Tensors, u: Tensor) -> Tensor:
        """Return ``J u``, of shape (n_samples, n_features)."""
        tangents = self.displacements(u)
        if self._forward_mode:
            try:
                return jvp(self.head, self.values, boundary, tangents)
            except NotImplementedError:
                self._forward_mode = False
        return jvp_by_double_backward(self.head, self.values, boundary, tangents)

    def activation_and_jvp(self, boundary: Tensors, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activation and ``J u``, from one pass where possible."""
        if self._forward_mode:
            try:
                with torch.no_grad():
                    return jvp_with_primal(self.head, self.values, boundary, self.displacements(u))
            except NotImplementedError:
                self._forward_mode = False
        return self.activation(boundary), self.jvp(boundary, u)

    def vjp(self, boundary: Tensors, cotangent: Tensor) -> Tensor:
        """Return ``Jᵀ cotangent`` as a flat vector."""
        return self._flat(vjp(self.head, self.values, boundary, cotangent))

    def jvp_then_vjp(
        self, boundary: Tensors, u: Tensor, cotangent_of: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return ``t = J u`` and ``Jᵀ cotangent_of(t)`` from one pass where possible."""
        if self._forward_mode:
            try:
                tangent, pulled = jvp_then_vjp(
                    self.head, self.values, boundary, self.displacements(u), cotangent_of
                )
            except NotImplementedError:
                self._forward_mode = False
            else:
                return tangent, self._flat(pulled)
        tangent = self.jvp(boundary, u)
        return tangent, self.vjp(boundary, cotangent_of(tangent))

    def displacements(self, u: Tensor) -> Tensors:
        """Return the displacement of every parameter, in its own shape and units."""
        return tuple(
            scale * piece for scale, piece in zip(self.scales, self.pieces(u), strict=True)
        )

    def pieces(self, u: Tensor) -> Tensors:
        """View a flat vector as one tensor per parameter, still scaled."""
        flat = u.split([value.numel() for value in self.values])
        return tuple(
            piece.view(value.shape) for piece, value in zip(flat, self.values, strict=True)
        )

    def flatten(self, displacements: Tensors) -> Tensor:
        """Return the flat vector ``u`` of given displacements."""
        pairs = zip(displacements, self.scales, strict=True)
        pieces = [d.reshape(-1) / scale for d, scale in pairs]
        return torch.cat(pieces) if pieces else torch.empty(0)

    def _flat(self, gradients: Tensors) -> Tensor:
        """Return gradients in the displacements as one gradient in ``u``."""
        return torch.cat(
            [scale * g.reshape(-1) for g, scale in zip(gradients, self.scales, strict=True)]
        )
