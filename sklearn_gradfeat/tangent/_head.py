"""A head linearised at its pretrained parameters, over flat vectors of displacements."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sklearn_gradfeat.tangent._products import (
    Head,
    Tensors,
    jvp,
    jvp_by_double_backward,
    jvp_then_vjp,
    jvp_with_primal,
    vjp,
)

_NTK_BIAS = math.sqrt(0.1)


def ntk_scale(parameter: Tensor) -> float:
    """Return the constant by which NTK parametrization multiplies a parameter.

    ``sqrt(1 / out_channels)`` for weights and ``sqrt(0.1)`` for vectors such as biases
    and the scales of normalisation layers [1]_.

    References
    ----------
    .. [1] F. Mu, Y. Liang, Y. Li, Gradients as Features for Deep Representation Learning,
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
