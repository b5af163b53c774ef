"""Jacobian products of a head at its pretrained parameters.

``J`` is the derivative of the activation in the parameters. It is never formed: forward mode
gives ``J t``, backward mode ``Jᵀ v``. The products are pure functions of the head, its
parameters and a batch of boundary tensors; :class:`LinearizedHead` applies them to flat vectors.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sklearn_gradfeat.backbones import Network, differentiable_attention, threads_for_head

Tensors: TypeAlias = tuple[Tensor, ...]
Head: TypeAlias = Callable[[Tensors, Tensors], Tensor]
Product = TypeVar("Product")

# Forward-mode levels are global to the process, so only one thread at a time may open one.
_FORWARD_MODE = threading.RLock()


@functools.cache
def _load_forward_mode() -> None:
    """Load torch's forward derivatives, without the deprecation warnings of torch itself."""
    with _FORWARD_MODE, warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def jvp(
    head: Head, parameters: Tensors, boundary: Tensors, tangents: Tensors
) -> tuple[Tensor, Tensor]:
    """Return the activation and ``J t`` from one evaluation of the head in forward mode."""
    _load_forward_mode()
    threads = threads_for_head(parameters, boundary)
    with threads, _FORWARD_MODE, differentiable_attention(), forward_ad.dual_level():
        duals = tuple(map(forward_ad.make_dual, parameters, tangents))
        primal, tangent = forward_ad.unpack_dual(head(duals, boundary))
    if tangent is None:
        tangent = torch.zeros_like(primal)
    return primal, tangent


def jvp_by_double_backward(
    head: Head, parameters: Tensors, boundary: Tensors, tangents: Tensors
) -> Tensor:
    """Return ``J t`` from two backward passes.

    ``Jᵀ v`` is linear in ``v``, so its vector-Jacobian product with ``t`` is ``J t``, for any
    ``v``. Here ``v`` is one: at zero, torch returns NaN for operators that use logarithms.
    """
    threads = threads_for_head(parameters, boundary)
    with threads, torch.enable_grad(), differentiable_attention():
        leaves = tuple(p.detach().requires_grad_() for p in parameters)
        primal = head(leaves, boundary)
        v = torch.ones_like(primal, requires_grad=True)
        pulled = _grad(primal, leaves, v, create_graph=True)
        (tangent,) = torch.autograd.grad(pulled, v, tangents)
    return tangent


def vjp(head: Head, parameters: Tensors, boundary: Tensors, cotangent: Tensor) -> Tensors:
    """Return ``Jᵀ cotangent``, one tensor per parameter."""
    threads = threads_for_head(parameters, boundary)
    with threads, torch.enable_grad(), differentiable_attention():
        leaves = tuple(p.detach().requires_grad_() for p in parameters)
        return _grad(head(leaves, boundary), leaves, cotangent)


def jvp_then_vjp(
    head: Head,
    parameters: Tensors,
    boundary: Tensors,
    tangents: Tensors,
    cotangent_of: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensors]:
    """Return ``J t`` and ``Jᵀ cotangent_of(J t)`` from one evaluation of the head."""
    with torch.enable_grad(), threads_for_head(parameters, boundary):
        leaves = tuple(p.detach().requires_grad_() for p in parameters)
        primal, tangent = jvp(head, leaves, boundary, tangents)
        tangent = tangent.detach()
        return tangent, _grad(primal, leaves, cotangent_of(tangent))


def _grad(
    output: Tensor, leaves: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False
) -> Tensors:
    """Return the gradients in the leaves; zeros for a leaf that ``output`` does not depend on."""
    if not output.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(
        output, leaves, cotangent, create_graph=create_graph, materialize_grads=True
    )


_NTK_BIAS = math.sqrt(0.1)


def ntk_scale(parameter: Tensor, out_channels: int | None = None) -> float:
    """Return the constant that multiplies a parameter in the NTK parametrization [1]_.

    It is ``sqrt(1 / out_channels)`` for weights, and ``sqrt(0.1)`` for vectors such as biases
    and the scales of normalisation layers. The output channels are the first axis of the weight
    unless their number is given.

    References
    ----------
    .. [1] F. Mu, Y. Liang, Y. Li, Gradients as Features for Deep Representation Learning,
       ICLR 2020, arXiv:2004.05529.
    """
    if parameter.ndim < 2:
        return _NTK_BIAS
    return math.sqrt(1 / (out_channels or parameter.shape[0]))


class LinearizedHead:
    """``J u`` and ``Jᵀ v`` of a head, for a flat vector ``u`` of scaled displacements.

    Parameter k is displaced by ``scale_k * u_k``. With the scales of :func:`ntk_scale`, an L2
    penalty on ``u`` is that of the NTK parametrization.

    Forward mode lacks some operators. After the first one that is missing, two backward passes
    replace it.

    Parameters
    ----------
    head : callable
        ``head(parameters, boundary)`` returns the activation, (n_samples, n_features).
    parameters : dict of str to tensor
        The pretrained values, in the order in which the head takes them.
    parametrization : {"ntk", "standard"}
        The scales: those of :func:`ntk_scale`, or one.
    out_channels : dict of str to int, default={}
        The number of output channels of a parameter, where that is not its first axis.
    """

    def __init__(
        self,
        head: Head,
        parameters: dict[str, Tensor],
        parametrization: str,
        out_channels: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.head = head
        self.names = list(parameters)
        self.values: Tensors = tuple(parameters.values())
        self.scales = [
            ntk_scale(value, out_channels.get(name)) if parametrization == "ntk" else 1.0
            for name, value in parameters.items()
        ]
        self.size = sum(value.numel() for value in self.values)
        self._forward_mode = True

    @classmethod
    def from_network(cls, network: Network) -> LinearizedHead:
        """Return the head of a network, with displacements in the units of the parameters."""
        return cls(network.head, network.parameters, "standard")

    def activation(self, boundary: Tensors) -> Tensor:
        """Return the activation, of shape (n_samples, n_features)."""
        with torch.no_grad(), threads_for_head(self.values, boundary):
            return self.head(self.values, boundary)

    def jvp(self, boundary: Tensors, u: Tensor) -> Tensor:
        """Return ``J u``, of shape (n_samples, n_features)."""
        found = self._in_forward_mode(jvp, boundary, u)
        if found is not None:
            return found[1]
        return jvp_by_double_backward(self.head, self.values, boundary, self.displacements(u))

    def activation_and_jvp(self, boundary: Tensors, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activation and ``J u``, from one pass where possible."""
        found = self._in_forward_mode(jvp, boundary, u)
        return found or (self.activation(boundary), self.jvp(boundary, u))

    def vjp(self, boundary: Tensors, cotangent: Tensor, total: Tensor | None = None) -> Tensor:
        """Return ``Jᵀ cotangent`` as a flat vector, added to ``total``."""
        return self._add(vjp(self.head, self.values, boundary, cotangent), total)

    def jvp_then_vjp(
        self,
        boundary: Tensors,
        u: Tensor,
        cotangent_of: Callable[[Tensor], Tensor],
        total: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``J u`` and ``Jᵀ cotangent_of(J u)``, from one pass where possible.

        The second is added to ``total``.
        """
        found = self._in_forward_mode(jvp_then_vjp, boundary, u, cotangent_of)
        if found is not None:
            return found[0], self._add(found[1], total)
        tangent = self.jvp(boundary, u)
        return tangent, self.vjp(boundary, cotangent_of(tangent), total)

    def _in_forward_mode(
        self, product: Callable[..., Product], boundary: Tensors, u: Tensor, *options: Any
    ) -> Product | None:
        """Return a product in forward mode, or None if that lacks an operator of the head."""
        if not self._forward_mode:
            return None
        try:
            with torch.no_grad():
                return product(self.head, self.values, boundary, self.displacements(u), *options)
        except NotImplementedError:
            self._forward_mode = False
            return None

    def displacements(self, u: Tensor) -> Tensors:
        """Return the displacement of every parameter, in its own shape and units."""
        return tuple(
            scale * piece for scale, piece in zip(self.scales, self.pieces(u), strict=True)
        )

    def pieces(self, u: Tensor) -> Tensors:
        """View a flat vector ``u`` as one tensor per parameter."""
        flat = u.split([value.numel() for value in self.values])
        return tuple(
            piece.view(value.shape) for piece, value in zip(flat, self.values, strict=True)
        )

    def flatten(self, displacements: Tensors) -> Tensor:
        """Return the flat vector ``u`` of given displacements."""
        pairs = zip(displacements, self.scales, strict=True)
        pieces = [d.reshape(-1) / scale for d, scale in pairs]
        return torch.cat(pieces) if pieces else torch.empty(0)

    def _add(self, gradients: Tensors, total: Tensor | None) -> Tensor:
        """Add the gradient in ``u`` from the gradients in the displacements to ``total``."""
        if total is None:
            total = self.values[0].new_zeros(self.size) if self.values else torch.empty(0)
        for place, g, scale in zip(self.pieces(total), gradients, self.scales, strict=True):
            place.add_(g, alpha=scale)
        return total
