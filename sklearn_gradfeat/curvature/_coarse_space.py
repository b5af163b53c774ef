"""The coarse space: leading directions of the displacements, where a pass is cheap.

Most of the decrease of the objective lies along few directions of large curvature. A two-level
solver minimises over these directions separately, at little cost, and leaves the rest to
quasi-Newton steps. With ``G ⊗ A`` the K-FAC curvature of a layer, the coarse space holds the
displacements::

    D = U_g R U_aᵀ,    U_g, U_a: leading eigenvectors of G and A,    R: the coordinates

(the bias is the last column of ``D``). With input rows ``a`` and output gradients ``g_c`` of
logit ``c``, at the positions ``t`` of a sample, the layer adds to that logit::

    Σ_t g_ctᵀ D a_t = Σ_t (U_gᵀ g_ct)ᵀ R (U_aᵀ a_t)

The head is passed once, to keep either the projected rows of every sample, or their products
summed over the positions. After that the map from ``R`` to the logits is exact and needs no
pass. ``U_g`` and ``U_a`` are orthonormal, so ``‖D‖² = ‖R‖²`` and the penalty stays the same.

Cost model, with ``r_g, r_a`` the ranks, ``T`` positions and ``c`` outputs, per sample:

* projected rows: ``T (r_a + c r_g)`` numbers and ``T r_g r_a`` multiplications;
* summed products: ``c r_g r_a`` of either. They are kept when they take fewer numbers.

The ranks follow from one lower bound on the eigenvalues of all ``G ⊗ A``, the smallest for
which an evaluation takes at most an eighth of the time of the layers in a pass, and all rows
take at most 2 GiB.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sklearn_gradfeat.cache import release_pages
from sklearn_gradfeat.curvature._layer_rows import LayerCall, output_gradients, record
from sklearn_gradfeat.curvature._preconditioner import Curvature, Layer
from sklearn_gradfeat.data import (
    gather_over_ranks,
    on_all_ranks,
    row_blocks,
    sum_over_ranks,
)
from sklearn_gradfeat.linearized import TangentObjective, TangentTerm, Tensors, agrees

# Cost of an evaluation in the subspace, as a share of the cost of the layers in a pass.
_SHARE = 1 / 8
# Multiplications that take as long as reading a number.
_READING = 16
# Largest size of the rows of all samples, in bytes.
_MAX_BYTES = 2**31
# Projecting the rows takes a backward pass through the head for every output.
_MAX_OUTPUTS = 32
# Layers with fewer multiplications per sample have passes that are already cheap.
_MIN_COST = 2**15
# Candidate lower bounds on the eigenvalues, as shares of the largest one.
_FLOORS = np.geomspace(1e-6, 0.5, 40)


class LayoutError(Exception):
    """The positions of a layer differ between batches."""


class Storage(NamedTuple):
    """Numbers to keep and multiplications of an evaluation, per sample of one layer."""

    numbers: int
    multiplications: int
    summed: bool

    @classmethod
    def cheapest(cls, ranks: tuple[int, int], n_positions: int, n_outputs: int) -> Storage:
        """Return the storage with fewer numbers: summed products or projected rows."""
        g, a = ranks
        rows, products = n_positions * (a + n_outputs * g), n_outputs * g * a
        if products <= rows:
            return cls(products, products, True)
        return cls(rows, n_positions * g * a, False)


@dataclass(frozen=True)
class Block:
    """The displacements ``U_g R U_aᵀ`` of one layer.

    Parameters
    ----------
    weight : int
        Position of the weight in the tuple of parameters.
    bias : int or None
        Position of the bias; None where it is not among the parameters.
    outputs, inputs : tensor of shape (n_rows, r_g) and (n_columns, r_a)
        Orthonormal columns ``U_g`` and ``U_a``.
    curvature : tensor of shape (r_g, r_a)
        Curvature along every entry of ``R``, by K-FAC.
    n_positions : int
        Number of input rows per sample.
    summed : bool
        Whether to keep products that are summed over the positions, or the projected rows.
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
        cls, layer: Layer, ranks: tuple[int, int], n_positions: int, summed: bool
    ) -> Block:
        """Return the block of the leading eigenvectors of both factors."""
        sides = zip((layer.output, layer.inputs), ranks, strict=True)
        (g, outputs), (a, inputs) = ((s.values[0, -r:], s.columns(r)) for s, r in sides)
        bias, curvature = layer.factor.bias, g[:, None] * a
        return cls(layer.weight, bias, outputs, inputs, curvature, n_positions, summed)

    def empty(self, empty: Callable[..., Tensor], n_samples: int, n_outputs: int) -> Tensors:
        """Return uninitialised tensors for the rows of all samples, from ``empty(*shape)``."""
        n_leading, n_inputs = self.curvature.shape
        if self.summed:
            return (empty(n_samples, n_outputs, n_leading * n_inputs),)
        inputs = empty(n_samples, self.n_positions, n_inputs)
        return inputs, empty(n_samples, n_outputs, self.n_positions * n_leading)

    def row_blocks(self, n_samples: int) -> Iterator[slice]:
        """Iterate over blocks of samples."""
        return row_blocks(n_samples, self.n_positions * sum(self.curvature.shape))

    def rows(self, inputs: Tensor, gradients: Sequence[Tensor]) -> Tensors:
        """Return the rows to keep, from inputs and from projected gradients of every output."""
        projected = inputs @ self.inputs
        if self.summed:
            return (torch.stack([(g.mT @ projected).flatten(1) for g in gradients], 1),)
        return projected, torch.stack([g.flatten(1) for g in gradients], 1)

    def forward(self, rows: Tensors, r: Tensor) -> Tensor:
        """Return the contribution to the logits, of shape (n_samples, n_outputs)."""
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
        """Replace the pieces of the layer by ``U_g R U_aᵀ``."""
        matrix = self.outputs @ r.view_as(self.curvature) @ self.inputs.T
        if self.bias is not None:
            pieces[self.bias] = matrix[:, -1]
            matrix = matrix[:, :-1]
        pieces[self.weight] = matrix

    def restrict(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return ``U_gᵀ D U_a``, the coordinates of the orthogonal projection."""
        matrix = pieces[self.weight].flatten(1)
        if self.bias is not None:
            matrix = torch.cat([matrix, pieces[self.bias][:, None]], 1)
        return (self.outputs.T @ matrix @ self.inputs).reshape(-1)


class Subspace:
    """The linear map from the weights, the intercept and leading directions to the logits.

    Its coordinates are the flat vector ``[W, b, R₁, R₂, ...]``. It does not depend on penalties.

    Parameters
    ----------
    objective : TangentObjective
        The objective on all displacements.
    blocks : list of Block
        At most one for each layer.
    total : float
        The summed curvature of the loss for which the blocks give their curvature.
    """

    def __init__(self, objective: TangentObjective, blocks: list[Block], total: float) -> None:
        assert objective.tangent is not None
        self.total = total
        self.head, self.blocks = objective.tangent.head, blocks
        self.affine = replace(objective, tangent=None)
        self.sizes = [sum(self.affine.sizes), *(block.curvature.numel() for block in blocks)]
        self.rows = objective.tangent.retry(lambda: _rows(objective, blocks))

    def exact(self, objective: TangentObjective) -> bool:
        """Return whether the map agrees with the objective on a random vector.

        It does not if a layer reorders the samples, or if a parameter has another use besides
        the recorded layers.
        """
        generator = torch.Generator().manual_seed(0)
        coordinates = torch.randn(sum(self.sizes), generator=generator, dtype=torch.float64)
        x = coordinates.to(objective.like)
        x[: self.sizes[0]] = 0
        expected = objective.forward(self.extend(x))
        return on_all_ranks(agrees(self.forward(x), expected, x.dtype))

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
        for block, r, kept in zip(self.blocks, coordinates, self.rows, strict=True):
            for rows, part in _parts(block, kept):
                logits[rows] += block.forward(part, r).to(logits)
        return logits

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """Return the transpose of :meth:`forward`, applied to ``cotangent``."""
        parts = [self.affine.part_of_adjoint(cotangent)]
        narrow = cotangent.to(parts[0])
        for block, kept in zip(self.blocks, self.rows, strict=True):
            total = narrow.new_zeros(block.curvature.numel())
            for rows, part in _parts(block, kept):
                total += block.adjoint(part, narrow[rows])
            parts.append(total)
        return sum_over_ranks(torch.cat(parts))

    def extend(self, x: Tensor) -> Tensor:
        """Return the unknowns of the objective from coordinates."""
        affine, *coordinates = x.split(self.sizes)
        pieces = [torch.zeros_like(value) for value in self.head.values]
        for block, r in zip(self.blocks, coordinates, strict=True):
            block.extend(r, pieces)
        return torch.cat([affine, *(piece.reshape(-1) for piece in pieces)])

    def restrict(self, x: Tensor) -> Tensor:
        """Return the transpose of :meth:`extend`: coordinates of the orthogonal projection."""
        affine, u = x[: self.sizes[0]], x[self.sizes[0] :]
        pieces = self.head.pieces(u)
        return torch.cat([affine, *(block.restrict(pieces) for block in self.blocks)])


def _rows(objective: TangentObjective, blocks: Sequence[Block]) -> list[Tensors]:
    """Return the rows of all samples for every block, in one pass."""
    tangent, n_outputs = objective.tangent, objective.loss.n_outputs
    assert tangent is not None
    empty = tangent.empty or objective.like.new_empty
    kept = [block.empty(empty, objective.n_samples, n_outputs) for block in blocks]
    for rows, boundary in tangent.batches():
        projected = _project(tangent, blocks, boundary, rows.stop - rows.start)
        for places, parts in zip(kept, projected, strict=True):
            for place, part in zip(places, parts, strict=True):
                place[rows] = part
                release_pages(place[rows])
    return kept


def _parts(block: Block, kept: Tensors) -> Iterator[tuple[slice, Tensors]]:
    """Iterate over (rows, what is kept of them for a block); what is in a file leaves memory."""
    for rows in block.row_blocks(len(kept[0])):
        part = tuple(z[rows] for z in kept)
        yield rows, part
        for z in part:
            release_pages(z)


def _project(
    tangent: TangentTerm, blocks: Sequence[Block], boundary: Tensors, n_samples: int
) -> list[Tensors]:
    """Return the rows of a batch of samples for every block."""
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


def positions(calls: Sequence[LayerCall], n_samples: int) -> dict[int, int]:
    """Return the positions per sample of each layer, without groups or rows of unknown samples."""
    found: dict[int, int] = {}
    unfit = set()
    for call in calls:
        _, by_sample, n, _ = call.output_rows(call.output, n_samples).shape
        found[call.weight] = found.get(call.weight, 0) + n
        if call.groups > 1 or by_sample != n_samples:
            unfit.add(call.weight)
    return {weight: n for weight, n in found.items() if weight not in unfit}


def leading_subspace(objective: TangentObjective, curvature: Curvature) -> Subspace | None:
    """Return the largest subspace that is cheap, or None.

    Layers for which the map of the subspace differs from the objective are left out.

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
    found = dict(set.intersection(*(set(of.items()) for of in gather_over_ranks(found))))
    layers = [layer for layer in curvature.layers if layer.weight in found and layer.decomposed]
    n_positions = [found[layer.weight] for layer in layers]
    widths = [(layer.factor.output.shape[-1], layer.factor.inputs.shape[-1]) for layer in layers]
    cost = sum(n * g * a for n, (g, a) in zip(n_positions, widths, strict=True))
    n_outputs = len(tangent.omega)
    if not layers or cost < _MIN_COST or n_outputs > _MAX_OUTPUTS:
        return None
    largest = max(float(layer.output.values.max() * layer.inputs.values.max()) for layer in layers)
    room = _MAX_BYTES / objective.like.element_size() / max(gather_over_ranks(objective.n_samples))
    for floor in largest * _FLOORS if largest > 0 else ():
        ranks = [_ranks(layer, floor) for layer in layers]
        storages = [
            Storage.cheapest(r, n, n_outputs) for r, n in zip(ranks, n_positions, strict=True)
        ]
        numbers = sum(storage.numbers for storage in storages)
        evaluation = sum(storage.multiplications for storage in storages) + _READING * numbers
        if evaluation <= _SHARE * cost and numbers <= room:
            each = zip(layers, ranks, n_positions, storages, strict=True)
            blocks = [Block.from_layer(x, r, n, s.summed) for x, r, n, s in each if min(r) > 0]
            try:
                subspace = Subspace(objective, blocks, curvature.total)
            except LayoutError:
                subspace = None
            if not on_all_ranks(subspace is not None):
                return None
            assert subspace is not None
            return _checked(objective, subspace)
    return None


def _checked(objective: TangentObjective, subspace: Subspace) -> Subspace | None:
    """Return the subspace of the layers whose map agrees with the objective, if any."""
    if subspace.exact(objective):
        return subspace
    alone = [i for i in range(len(subspace.blocks)) if subspace.only([i]).exact(objective)]
    rest = subspace.only(alone)
    return rest if alone and rest.exact(objective) else None


def _ranks(layer: Layer, floor: float) -> tuple[int, int]:
    """Return the number of eigenvectors on either side with a curvature above ``floor``."""
    g, a = layer.output.values, layer.inputs.values
    return int((g * a.max() > floor).sum()), int((a * g.max() > floor).sum())
