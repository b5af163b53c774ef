"""What the coarse space keeps of every sample, so that its map needs no network.

A displacement ``D = U_g R U_aᵀ`` of a layer adds to output ``c``, with input rows ``a_t`` and
gradients ``g_ct`` of that output at the positions ``t`` of a sample::

    Σ_t g_ctᵀ D a_t = Σ_t (U_gᵀ g_ct)ᵀ R (U_aᵀ a_t)

There are three ways to keep what this takes, with ``r_g, r_a`` the ranks, ``T`` positions, ``c``
outputs and ``d`` channels of the layer:

==================  ======================  =======================  ===========================
rows                numbers per sample      multiplications          kept
==================  ======================  =======================  ===========================
``SummedRows``      ``c r_g r_a``           ``c r_g r_a``            products, summed over ``t``
``ProjectedRows``   ``T (r_a + c r_g)``     ``T r_g r_a``            both projections
``ChannelRows``     ``T (r_a + d)``         ``T r_g (r_a + d)``      ``U_aᵀ a_t`` and slopes
==================  ======================  =======================  ===========================

``ChannelRows`` need a layer of which every activation sees one channel, as in a convolution that
only a nonlinearity and a mean over the positions follow. One slope for each position and channel,
from a single backward pass, then takes the place of the gradients of all outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sklearn_gradfeat.linearized import Tensors

Empty: TypeAlias = Callable[..., Tensor]


class Layout(NamedTuple):
    """Positions and output channels of a layer, and whether each activation sees one channel."""

    n_positions: int
    n_channels: int
    channelwise: bool


class Cost(NamedTuple):
    """Numbers to keep and multiplications of an evaluation, per sample of one layer."""

    numbers: int
    multiplications: int


@dataclass(frozen=True)
class SummedRows:
    """Products of input rows and gradients, summed over the positions.

    Parameters
    ----------
    outputs : tensor of shape (n_channels, r_g)
        Orthonormal columns ``U_g``.
    rank : int
        The rank ``r_a`` of the inputs.
    n_positions : int
        Number of input rows per sample.
    """

    outputs: Tensor
    rank: int
    n_positions: int
    channelwise: ClassVar = False

    @staticmethod
    def cost(layout: Layout, ranks: tuple[int, int], n_outputs: int) -> Cost:
        """Return the cost of these rows."""
        n = n_outputs * ranks[0] * ranks[1]
        return Cost(n, n)

    def empty(self, empty: Empty, n_samples: int, n_outputs: int) -> Tensors:
        """Return uninitialised tensors for the rows of all samples, from ``empty(*shape)``."""
        return (empty(n_samples, n_outputs, self.outputs.shape[1] * self.rank),)

    def put(self, rows: Tensors, inputs: Tensor, i: int, gradient: Tensor) -> None:
        """Write the rows of output ``i``, from ``U_aᵀ a_t`` and its gradients ``g_t``."""
        rows[0][:, i] = ((gradient @ self.outputs).mT @ inputs).flatten(1)

    def forward(self, rows: Tensors, r: Tensor) -> Tensor:
        """Return the contribution to the outputs, of shape (n_samples, n_outputs)."""
        return rows[0] @ r.reshape(-1)

    def adjoint(self, rows: Tensors, cotangent: Tensor) -> Tensor:
        """Return the transpose of :meth:`forward`, applied to ``cotangent``."""
        return cotangent.reshape(-1) @ rows[0].flatten(0, 1)


class ProjectedRows(SummedRows):
    """The projections of input rows and of gradients."""

    @staticmethod
    def cost(layout: Layout, ranks: tuple[int, int], n_outputs: int) -> Cost:
        """Return the cost of these rows."""
        (g, a), t = ranks, layout.n_positions
        return Cost(t * (a + n_outputs * g), t * g * a)

    def empty(self, empty: Empty, n_samples: int, n_outputs: int) -> Tensors:
        """Return uninitialised tensors for the rows of all samples, from ``empty(*shape)``."""
        inputs = empty(n_samples, self.n_positions, self.rank)
        return inputs, empty(n_samples, n_outputs, self.n_positions * self.outputs.shape[1])

    def put(self, rows: Tensors, inputs: Tensor, i: int, gradient: Tensor) -> None:
        """Write the rows of output ``i``, from ``U_aᵀ a_t`` and its gradients ``g_t``."""
        rows[0][:] = inputs
        rows[1][:, i] = (gradient @ self.outputs).flatten(1)

    def forward(self, rows: Tensors, r: Tensor) -> Tensor:
        """Return the contribution to the outputs, of shape (n_samples, n_outputs)."""
        inputs, gradients = rows
        moved = (inputs @ r.T).flatten(1)
        return torch.bmm(gradients, moved[:, :, None])[:, :, 0]

    def adjoint(self, rows: Tensors, cotangent: Tensor) -> Tensor:
        """Return the transpose of :meth:`forward`, applied to ``cotangent``."""
        inputs, gradients = rows
        pulled = torch.bmm(cotangent[:, None], gradients).view(-1, self.outputs.shape[1])
        return (pulled.T @ inputs.flatten(0, 1)).reshape(-1)


class ChannelRows(SummedRows):
    """Projected input rows, and the slope of every activation in its channel.

    The outputs are the activations.
    """

    channelwise = True

    @staticmethod
    def cost(layout: Layout, ranks: tuple[int, int], n_outputs: int) -> Cost:
        """Return the cost of these rows."""
        (g, a), t, d = ranks, layout.n_positions, layout.n_channels
        return Cost(t * (a + d), t * g * (a + d))

    def empty(self, empty: Empty, n_samples: int, n_outputs: int) -> Tensors:
        """Return uninitialised tensors for the rows of all samples, from ``empty(*shape)``."""
        shapes = (self.n_positions, self.rank), (self.n_positions, len(self.outputs))
        return tuple(empty(n_samples, *shape) for shape in shapes)

    def put(self, rows: Tensors, inputs: Tensor, i: int, gradient: Tensor) -> None:
        """Write the rows; the gradients are those of the sum of all activations."""
        rows[0][:], rows[1][:] = inputs, gradient

    def forward(self, rows: Tensors, r: Tensor) -> Tensor:
        """Return the contribution to the activations, of shape (n_samples, n_channels)."""
        inputs, slopes = rows
        return ((inputs @ r.T @ self.outputs.T) * slopes).sum(1)

    def adjoint(self, rows: Tensors, cotangent: Tensor) -> Tensor:
        """Return the transpose of :meth:`forward`, applied to ``cotangent``."""
        inputs, slopes = rows
        pulled = (cotangent[:, None] * slopes).flatten(0, 1) @ self.outputs
        return (pulled.T @ inputs.flatten(0, 1)).reshape(-1)
