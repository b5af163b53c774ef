"""How many leading directions of the displacements are worth a subspace."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sklearn_gradfeat.curvature._layer_rows import LayerCall, output_gradients, record
from sklearn_gradfeat.curvature._preconditioner import Curvature, Layer
from sklearn_gradfeat.linearized import TangentObjective, TangentTerm, Tensors, agrees


class LayoutError(Exception):
    """A layer does not see the samples one by one in every batch."""


@dataclass(frozen=True)
class Block:
    """The part of one layer: orthonormal columns on the output and on the input side.

    ``weight`` and ``bias`` are positions in the tuple of parameters; ``curvature`` is that of
    every entry of ``R``; ``n_positions`` is how often a sample meets the weight; ``summed`` says
    whether the gradients in ``R`` are kept, or the projected rows.
    """

    weight: int
    bias: int | None
    outputs: Tensor
    inputs: Tensor
    curvature: Tensor
    n_positions: int
    summed: bool

    @classmethod
    def from_layer(
        cls, layer: Layer, ranks: tuple[int, int], n_positions: int, n_outputs: int
    ) -> Block:
        """Take so many eigenvectors of either factor."""
        sides = zip((layer.output, layer.inputs), ranks, strict=True)
        (g, outputs), (a, inputs) = ((s.values[0, -r:], s.columns(r)) for s, r in sides)
        apart, summed = _numbers(ranks, n_positions, n_outputs)
        return cls(
            layer.weight, layer.factor.bias, outputs, inputs, g[:, None] * a, n_positions,
            summed <= apart,
        )  # fmt: skip

    @staticmethod
    def size(ranks: tuple[int, int], n_positions: int, n_outputs: int) -> tuple[int, int]:
        """Return numbers to keep for a sample, and multiplications of an evaluation."""
        apart, summed = _numbers(ranks, n_positions, n_outputs)
        if summed <= apart:
            return summed, summed
        return apart, n_positions * ranks[0] * ranks[1]

    def empty(self, like: Tensor, n_samples: int, n_outputs: int) -> Tensors:
        """Return room for what :meth:`rows` gives."""
        n_leading, n_inputs = self.curvature.shape
        if self.summed:
            return (like.new_empty(n_samples, n_outputs, n_leading * n_inputs),)
        inputs = like.new_empty(n_samples, self.n_positions, n_inputs)
        return inputs, like.new_empty(n_samples, n_outputs, self.n_positions * n_leading)

    def rows(self, inputs: Tensor, gradients: Sequence[Tensor]) -> Tensors:
        """Return what is kept of inputs and of projected gradients, one tensor an output."""
        projected = inputs @ self.inputs
        if self.summed:
            return (torch.stack([(g.mT @ projected).flatten(1) for g in gradients], 1),)
        return projected, torch.stack([g.flatten(1) for g in gradients], 1)

    def forward(self, rows: Tensors, r: Tensor) -> Tensor:
        """Return the part of the logits, of shape (n_samples, n_outputs)."""
        if self.summed:
            return rows[0] @ r
        inputs, gradients = rows
        moved = (inputs @ r.view_as(self.curvature).T).flatten(1)
        return torch.bmm(gradients, moved[:, :, None])[:, :, 0]

    def adjoint(self, rows: Tensors, cotangent: Tensor) -> Tensor:
        """Return the transpose of :meth:`forward`, applied to ``cotangent``."""
        if self.summed:
            return cotangent.reshape(-1) @ rows[0].flatten(0, 1)
        inputs, gradients = rows
        pulled = torch.bmm(cotangent[:, None], gradients).view(-1, len(self.curvature))
        return (pulled.T @ inputs.flatten(0, 1)).reshape(-1)

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
        n_outputs = objective.loss.n_outputs
        self.rows = [b.empty(objective.like, objective.n_samples, n_outputs) for b in blocks]
        for rows, boundary in objective.tangent.batches():
            projected = _projected(objective.tangent, blocks, boundary, rows.stop - rows.start)
            for places, parts in zip(self.rows, projected, strict=True):
                for place, part in zip(places, parts, strict=True):
                    place[rows] = part

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
        return agrees(self.forward(x), expected, x.dtype)

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
        for block, r, rows in zip(self.blocks, coordinates, self.rows, strict=True):
            logits += block.forward(rows, r).to(logits)
        return logits

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """Return the transpose of :meth:`forward`, applied to ``cotangent``."""
        parts = [self.affine.adjoint(cotangent)]
        narrow = cotangent.to(parts[0])
        pairs = zip(self.blocks, self.rows, strict=True)
        return torch.cat([*parts, *(block.adjoint(rows, narrow) for block, rows in pairs)])

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


def _projected(
    tangent: TangentTerm, blocks: Sequence[Block], boundary: Tensors, n_samples: int
) -> list[Tensors]:
    """Return what every block keeps of some samples."""
    head = tangent.head
    activation, calls = record(head, boundary, differentiable=True)
    found = positions(calls, n_samples)
    if any(found.get(block.weight) != block.n_positions for block in blocks):
        raise LayoutError
    of_block = [[i for i, call in enumerate(calls) if call.weight == b.weight] for b in blocks]
    pulled: list[list[Tensor]] = [[] for _ in blocks]
    for gradients in output_gradients(activation, calls, tangent.omega):
        for block, chosen, kept in zip(blocks, of_block, pulled, strict=True):
            parts = [calls[i].output_rows(gradients[i], n_samples)[0] for i in chosen]
            kept.append(torch.cat(parts, 1) @ block.outputs)
    inputs = [
        torch.cat([calls[i].scaled_rows(head.values, head.scales, n_samples)[0] for i in chosen], 1)
        for chosen in of_block
    ]
    return [
        block.rows(rows, gradients)
        for rows, block, gradients in zip(inputs, blocks, pulled, strict=True)
    ]


def _numbers(ranks: tuple[int, int], n_positions: int, n_outputs: int) -> tuple[int, int]:
    """Return how many numbers a sample has as rows, and as the sums over their products."""
    g, a = ranks
    return n_positions * (a + n_outputs * g), n_outputs * g * a


def positions(calls: Sequence[LayerCall], n_samples: int) -> dict[int, int]:
    """Return the number of positions of the layers that can be restricted, by their weight."""
    found: dict[int, int] = {}
    unfit = set()
    for call in calls:
        _, by_sample, n, _ = call.output_rows(call.output, n_samples).shape
        found[call.weight] = found.get(call.weight, 0) + n
        if call.groups > 1 or by_sample != n_samples:
            unfit.add(call.weight)
    return {weight: n for weight, n in found.items() if weight not in unfit}


# What an evaluation may cost, as a share of what the layers alone cost in a pass.
_SHARE = 1 / 8
# Multiplications that take as long as reading a number.
_READING = 16
# What the rows of all samples may take, in bytes.
_MAX_BYTES = 2**31
# Every output takes a pass backwards through the head before the first row is there.
_MAX_OUTPUTS = 32
# Where the layers take fewer multiplications for a sample, a pass is as good as free.
_MIN_COST = 2**15
# Shares of the largest curvature that the leading eigenvectors of either side have to reach.
_FLOORS = np.geomspace(1e-6, 0.5, 40)


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
    found = positions(record(tangent.head, boundary)[1], rows.stop - rows.start)
    layers = [layer for layer in curvature.layers if layer.weight in found and layer.decomposed]
    n_positions = [found[layer.weight] for layer in layers]
    widths = [(layer.factor.output.shape[-1], layer.factor.inputs.shape[-1]) for layer in layers]
    most = _SHARE * sum(n * g * a for n, (g, a) in zip(n_positions, widths, strict=True))
    n_outputs = len(tangent.omega)
    if not layers or most < _SHARE * _MIN_COST or n_outputs > _MAX_OUTPUTS:
        return None
    largest = max(float(layer.output.values.max() * layer.inputs.values.max()) for layer in layers)
    room = _MAX_BYTES / objective.like.element_size() / objective.n_samples
    for floor in largest * _FLOORS if largest > 0 else ():
        ranks = [_ranks(layer, floor) for layer in layers]
        sizes = [Block.size(r, n, n_outputs) for r, n in zip(ranks, n_positions, strict=True)]
        numbers, cost = (sum(each) for each in zip(*sizes, strict=True))
        if cost + _READING * numbers <= most and numbers <= room:
            each = zip(layers, ranks, n_positions, strict=True)
            blocks = [
                Block.from_layer(layer, r, n, n_outputs) for layer, r, n in each if min(r) > 0
            ]
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
