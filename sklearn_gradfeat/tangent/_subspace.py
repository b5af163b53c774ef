"""The leading directions of the displacements, in which a sample is a few short rows.

A layer adds ``Σ_p g_pᵀ U a_p`` to a logit, for its inputs ``a_p`` and the gradients ``g_p`` in its
outputs at the positions p. In the leading eigenvectors ``G`` and ``A`` of its Kronecker factors,
``U = G R Aᵀ``, that is ``Σ_p (Gᵀ g_p)ᵀ R (Aᵀ a_p)``. Once the rows are projected, the model in
``R`` is evaluated without the network: exactly, and many times as fast.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sklearn_gradfeat.tangent._kfac import record
from sklearn_gradfeat.tangent._objective import TangentObjective, TangentTerm
from sklearn_gradfeat.tangent._patches import LayerCall
from sklearn_gradfeat.tangent._preconditioner import Curvature, Layer
from sklearn_gradfeat.tangent._products import Tensors

# What an evaluation may cost, as a share of what the layers alone cost in a pass.
_SHARE = 1 / 8
# Multiplications that take as long as reading a number.
_READING = 16
# What the rows of all samples may take, in bytes.
_MAX_BYTES = 2**29
# Every output takes a pass backwards through the head before the first row is there.
_MAX_OUTPUTS = 32
# Where the layers take fewer multiplications for a sample, a pass is as good as free.
_MIN_COST = 2**15
# Shares of the largest curvature that the leading eigenvectors of either side have to reach.
_FLOORS = np.geomspace(1e-6, 0.5, 40)
# A map is right if it errs by no more than this power of the rounding unit.
_ROUNDING = 0.4


class LayoutError(Exception):
    """A layer does not see the samples one by one in every batch."""


@dataclass(frozen=True)
class Block:
    """The part of one layer: orthonormal columns on the output and on the input side.

    ``weight`` and ``bias`` are positions in the tuple of parameters; ``curvature`` is that of
    every entry of ``R``.
    """

    weight: int
    bias: int | None
    outputs: Tensor
    inputs: Tensor
    curvature: Tensor

    @classmethod
    def of(cls, layer: Layer, ranks: tuple[int, int]) -> Block:
        """Take so many eigenvectors of either factor."""
        sides = zip((layer.output, layer.inputs), ranks, strict=True)
        (g, outputs), (a, inputs) = ((s.values[0, -r:], s.columns(r)) for s, r in sides)
        return cls(layer.weight, layer.factor.bias, outputs, inputs, g[:, None] * a)

    def extend(self, r: Tensor, pieces: list[Tensor]) -> None:
        """Write displacements from coordinates."""
        matrix = self.outputs @ r.view_as(self.curvature) @ self.inputs.T
        if self.bias is not None:
            pieces[self.bias] = matrix[:, -1]
            matrix = matrix[:, :-1]
        pieces[self.weight] = matrix

    def restrict(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the coordinates of the part of displacements that lies in the subspace."""
        matrix = pieces[self.weight].flatten(1)
        if self.bias is not None:
            matrix = torch.cat([matrix, pieces[self.bias][:, None]], 1)
        return (self.outputs.T @ matrix @ self.inputs).reshape(-1)


class Subspace:
    """The linear map to the logits on leading directions, with the weights and the intercept.

    Its coordinates are the flat vector ``[W, b, R₁, R₂, ...]``. Penalties are no part of it.

    Parameters
    ----------
    objective : TangentObjective
        The objective on all displacements.
    blocks : list of Block
        At most one for each layer.
    total : float
        The curvature of the loss that theirs goes with.
    """

    def __init__(self, objective: TangentObjective, blocks: list[Block], total: float) -> None:
        assert objective.tangent is not None
        self.total = total
        self.head, self.blocks = objective.tangent.head, blocks
        self.affine = replace(objective, tangent=None)
        self.sizes = [sum(self.affine.sizes), *(block.curvature.numel() for block in blocks)]
        self.rows: list[Tensors] = []
        for rows, boundary in objective.tangent.batches():
            n = rows.stop - rows.start
            for i, projected in enumerate(_projected(objective.tangent, blocks, boundary, n)):
                if i == len(self.rows):
                    shapes = ((objective.n_samples, *part.shape[1:]) for part in projected)
                    self.rows.append(tuple(map(objective.like.new_empty, shapes)))
                for whole, part in zip(self.rows[i], projected, strict=True):
                    if part.shape[1:] != whole.shape[1:]:
                        raise LayoutError
                    whole[rows] = part

    def exact(self, objective: TangentObjective) -> bool:
        """Whether the map is that of the objective.

        It is not where layers hand samples on in another order, or where a parameter is used
        by anything but recorded layers.
        """
        generator = torch.Generator().manual_seed(0)
        coordinates = torch.randn(sum(self.sizes), generator=generator, dtype=torch.float64)
        x = coordinates.to(objective.like)
        x[: self.sizes[0]] = 0
        expected = objective.forward(self.extend(x))
        bound = torch.finfo(x.dtype).eps ** _ROUNDING * float(expected.norm())
        return bool((self.forward(x) - expected).norm() <= bound)

    def only(self, kept: Sequence[int]) -> Subspace:
        """Return the subspace of some of the layers."""
        part = copy.copy(self)
        part.blocks, part.rows = [self.blocks[i] for i in kept], [self.rows[i] for i in kept]
        part.sizes = [self.sizes[0], *(self.sizes[1 + i] for i in kept)]
        return part

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, of shape (n_samples, n_outputs), float64."""
        affine, *coordinates = x.split(self.sizes)
        logits = self.affine.forward(affine)
        for block, r, (inputs, gradients) in zip(self.blocks, coordinates, self.rows, strict=True):
            moved = (inputs @ r.view_as(block.curvature).T).flatten(1)
            logits += torch.bmm(gradients, moved[:, :, None])[:, :, 0].to(logits)
        return logits

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """Return the transpose of :meth:`forward`, applied to ``cotangent``."""
        parts = [self.affine.adjoint(cotangent)]
        narrow = cotangent.to(parts[0])[:, None]
        for block, (inputs, gradients) in zip(self.blocks, self.rows, strict=True):
            pulled = torch.bmm(narrow, gradients).view(-1, len(block.curvature))
            parts.append((pulled.T @ inputs.flatten(0, 1)).reshape(-1))
        return torch.cat(parts)

    def extend(self, x: Tensor) -> Tensor:
        """Return the unknowns of the objective from coordinates."""
        affine, *coordinates = x.split(self.sizes)
        pieces = [torch.zeros_like(value) for value in self.head.values]
        for block, r in zip(self.blocks, coordinates, strict=True):
            block.extend(r, pieces)
        return torch.cat([affine, *(piece.reshape(-1) for piece in pieces)])

    def restrict(self, x: Tensor) -> Tensor:
        """Return the coordinates of the part of the unknowns that lies in the subspace."""
        affine, u = x[: self.sizes[0]], x[self.sizes[0] :]
        pieces = self.head.pieces(u)
        return torch.cat([affine, *(block.restrict(pieces) for block in self.blocks)])


def leading_subspace(objective: TangentObjective, curvature: Curvature) -> Subspace | None:
    """Return the largest subspace that is cheap, if there is one.

    Layers whose part of the map is not that of the objective are left out of it.

    Parameters
    ----------
    objective : TangentObjective
        The objective, with displacements.
    curvature : Curvature
        Its Kronecker factors.

    Returns
    -------
    Subspace or None
    """
    tangent = objective.tangent
    assert tangent is not None
    rows, boundary = next(iter(tangent.batches()))
    calls = record(tangent.head, tangent.head.values, boundary)[1]
    n_positions = _positions(calls, rows.stop - rows.start)
    layers = [
        layer for layer in curvature.layers if layer.weight in n_positions and layer.decomposed
    ]
    positions = [n_positions[layer.weight] for layer in layers]
    widths = [(layer.factor.output.shape[-1], layer.factor.inputs.shape[-1]) for layer in layers]
    most = _SHARE * sum(n * g * a for n, (g, a) in zip(positions, widths, strict=True))
    n_outputs = len(tangent.omega)
    if not layers or most < _SHARE * _MIN_COST or n_outputs > _MAX_OUTPUTS:
        return None
    largest = max(float(layer.output.values.max() * layer.inputs.values.max()) for layer in layers)
    room = _MAX_BYTES / objective.like.element_size() / objective.n_samples
    for floor in largest * _FLOORS if largest > 0 else ():
        ranks = [_ranks(layer, floor) for layer in layers]
        sized = list(zip(positions, ranks, strict=True))
        numbers = sum(n * (a + n_outputs * g) for n, (g, a) in sized)
        cost = sum(n * g * a for n, (g, a) in sized) + _READING * numbers
        if cost <= most and numbers <= room:
            found = [(layer, r) for layer, r in zip(layers, ranks, strict=True) if min(r) > 0]
            blocks = [Block.of(*each) for each in found]
            try:
                return _checked(objective, Subspace(objective, blocks, curvature.total))
            except LayoutError:
                return None
    return None


def _checked(objective: TangentObjective, subspace: Subspace) -> Subspace | None:
    """Return the part of a subspace that has the right map, if any."""
    if subspace.exact(objective):
        return subspace
    alone = [i for i in range(len(subspace.blocks)) if subspace.only([i]).exact(objective)]
    rest = subspace.only(alone)
    return rest if alone and rest.exact(objective) else None


def _ranks(layer: Layer, floor: float) -> tuple[int, int]:
    """Return how many directions on either side have a curvature above a floor."""
    g, a = layer.output.values, layer.inputs.values
    return int((g * a.max() > floor).sum()), int((a * g.max() > floor).sum())


def _positions(calls: Sequence[LayerCall], n_samples: int) -> dict[int, int]:
    """Return the number of positions of the layers that can be restricted, by their weight."""
    found: dict[int, int] = {}
    unfit = set()
    for call in calls:
        _, by_sample, n, _ = call.output_rows(call.output, n_samples).shape
        found[call.weight] = found.get(call.weight, 0) + n
        if call.groups > 1 or by_sample != n_samples:
            unfit.add(call.weight)
    return {weight: n for weight, n in found.items() if weight not in unfit}


def _projected(
    tangent: TangentTerm, blocks: Sequence[Block], boundary: Tensors, n_samples: int
) -> list[Tensors]:
    """Return the rows of some samples, for each block.

    Inputs of shape (n_samples, n_positions, rank) and gradients of the logits,
    (n_samples, n_outputs, n_positions * rank).
    """
    head = tangent.head
    leaves = tuple(value.detach().requires_grad_() for value in head.values)
    with torch.enable_grad():
        activation, calls = record(head, leaves, boundary)
    outputs = [call.output for call in calls]
    of_block = [[i for i, call in enumerate(calls) if call.weight == b.weight] for b in blocks]
    if any(calls[i].output_rows(outputs[i], n_samples).shape[1] != n_samples
           for chosen in of_block for i in chosen):  # fmt: skip
        raise LayoutError
    pulled: list[list[Tensor]] = [[] for _ in blocks]
    for row in tangent.omega:
        gradients = torch.autograd.grad(
            activation, outputs, row.expand_as(activation),
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip
        for block, chosen, found in zip(blocks, of_block, pulled, strict=True):
            parts = [calls[i].output_rows(gradients[i], n_samples)[0] for i in chosen]
            found.append((torch.cat(parts, 1) @ block.outputs).flatten(1))
    inputs = [
        torch.cat([calls[i].scaled_rows(head.values, head.scales, n_samples)[0] for i in chosen], 1)
        for chosen in of_block
    ]
    return [
        (rows @ block.inputs, torch.stack(gradients, 1))
        for rows, block, gradients in zip(inputs, blocks, pulled, strict=True)
    ]
