"""The coarse space: leading directions of the displacements, where a pass is cheap.

Most of the decrease of the objective lies along few directions of large curvature. A two-level
solver minimises over these directions separately, at little cost, and leaves the rest to
quasi-Newton steps. With ``G ⊗ A`` the K-FAC curvature of a layer, the coarse space holds the
displacements::

    D = U_g R U_aᵀ,    U_g, U_a: leading eigenvectors of G and A,    R: the coordinates

(the bias is the last column of ``D``). With input rows ``a`` and output gradients ``g_c`` of
logit ``c``, at the positions ``t`` of a sample, the layer adds to that logit::

    Σ_t g_ctᵀ D a_t = Σ_t (U_gᵀ g_ct)ᵀ R (U_aᵀ a_t)

The head is passed once, to keep the projected rows of every sample in one of the ways of
`_coarse_rows.py`; a ``FactoredTerm`` has all that they take. After that the map from ``R`` to the
logits is exact and needs no pass. ``U_g`` and ``U_a`` are orthonormal, so ``‖D‖² = ‖R‖²`` and the
penalty stays the same.

The ranks follow from one lower bound on the eigenvalues of all ``G ⊗ A``, the smallest for
which an evaluation takes at most an eighth of the time of the layers in a pass, and all rows
take at most 2 GiB.

*Many outputs.* The rows of a layer take a backward pass for every dimension that the output weights
``Ω`` span. Where that takes too long, the space holds the weights, the intercept and those layers
of which every activation sees one channel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sklearn_gradfeat.backbones import threads_for
from sklearn_gradfeat.cache import release_pages
from sklearn_gradfeat.curvature._coarse_rows import (
    ChannelRows,
    Cost,
    Layout,
    ProjectedRows,
    SummedRows,
)
from sklearn_gradfeat.curvature._factored_term import FactoredTerm, KeptLayer
from sklearn_gradfeat.curvature._layer_rows import (
    READING,
    LayerCall,
    backward_share,
    multiplications,
    output_gradients,
    record,
    spanning,
)
from sklearn_gradfeat.curvature._preconditioner import Curvature, Layer
from sklearn_gradfeat.data import (
    free_bytes,
    gather_over_ranks,
    on_all_ranks,
    row_blocks,
    sum_over_ranks,
)
from sklearn_gradfeat.linearized import (
    LinearizedHead,
    TangentObjective,
    TangentTerm,
    Tensors,
    agrees,
)

# Cost of an evaluation in the subspace, as a share of the cost of the layers in a pass. Between two
# steps of the solver, the minimum in a small space is enough: it takes hundreds of evaluations, all
# of which should not take longer than a few passes. Where the space takes the place of all
# directions, it is larger.
_BETWEEN_STEPS, _ALONE = 1 / 128, 1 / 8
# Largest size of the rows of all samples, in bytes.
_MAX_BYTES = 2**31
# On a device, they leave the rest of its free memory to the passes.
_SHARE_OF_DEVICE = 4
# Projecting the rows takes a backward pass for every output: at most as many as take the time of
# this many passes through the head.
_MAX_OUTPUTS = 32
# Samples that show the layouts of the layers; the map is compared with the network for all.
_FEW = 8
# Layers with fewer multiplications per sample have passes that are already cheap.
_MIN_COST = 2**15
# Candidate lower bounds on the eigenvalues, as shares of the largest one.
_FLOORS = np.geomspace(1e-6, 0.5, 40)


class LayoutError(Exception):
    """The positions of a layer differ between batches."""


@dataclass(frozen=True)
class Block:
    """The displacements ``U_g R U_aᵀ`` of one layer.

    Parameters
    ----------
    weight : int
        Position of the weight in the tuple of parameters.
    bias : int or None
        Position of the bias; None where it is not among the parameters.
    inputs : tensor of shape (n_columns, r_a)
        Orthonormal columns ``U_a``; ``U_g`` is part of ``rows``.
    curvature : tensor of shape (r_g, r_a)
        Curvature along every entry of ``R``, by K-FAC.
    rows : SummedRows
        What is kept of every sample.
    """

    weight: int
    bias: int | None
    inputs: Tensor
    curvature: Tensor
    rows: SummedRows

    @classmethod
    def from_layer(
        cls, layer: Layer, ranks: tuple[int, int], n_positions: int, kind: type[SummedRows]
    ) -> Block:
        """Return the block of the leading eigenvectors of both factors."""
        sides = zip((layer.output, layer.inputs), ranks, strict=True)
        (g, outputs), (a, inputs) = ((s.values[0, -r:], s.columns(r)) for s, r in sides)
        rows = kind(outputs, ranks[1], n_positions)
        return cls(layer.weight, layer.factor.bias, inputs, g[:, None] * a, rows)

    def row_blocks(self, n_samples: int) -> Iterator[slice]:
        """Iterate over blocks of samples."""
        width = sum(self.curvature.shape) + self.rows.channelwise * len(self.rows.outputs)
        return row_blocks(n_samples, self.rows.n_positions * width, device=self.curvature.device)

    def extend_(self, r: Tensor, pieces: Sequence[Tensor]) -> None:
        """Add ``U_g R U_aᵀ`` to the pieces of the layer."""
        matrix, rows = pieces[self.weight].flatten(1), self.rows.outputs @ r.view_as(self.curvature)
        matrix.addmm_(rows, self.inputs[: matrix.shape[1]].T)
        if self.bias is not None:
            pieces[self.bias].addmv_(rows, self.inputs[-1])

    def restrict(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return ``U_gᵀ D U_a``, the coordinates of the orthogonal projection."""
        matrix, outputs = pieces[self.weight].flatten(1), self.rows.outputs
        found = outputs.T @ matrix @ self.inputs[: matrix.shape[1]]
        if self.bias is not None:
            found += torch.outer(outputs.T @ pieces[self.bias], self.inputs[-1])
        return found.reshape(-1)


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
        self.omega = objective.tangent.omega
        self.outer, columns = spanning(self.omega)
        self.affine = replace(objective, tangent=None)
        self.sizes = [sum(self.affine.sizes), *(block.curvature.numel() for block in blocks)]
        self.rows = objective.tangent.retry(lambda: _rows(objective, blocks, columns))

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

    @property
    def share(self) -> float:
        """The share of the parameters that belong to the layers of the space."""
        places = {i for block in self.blocks for i in (block.weight, block.bias) if i is not None}
        return sum(self.head.values[i].numel() for i in places) / self.head.size

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
            matrix = r.view_as(block.curvature)
            for rows, part in _parts(block, kept):
                outputs = block.rows.forward(part, matrix) @ self._mixing(block).T
                logits[rows] += outputs.to(logits)
        return logits

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """Return the transpose of :meth:`forward`, applied to ``cotangent``."""
        parts = [self.affine.part_of_adjoint(cotangent)]
        narrow = cotangent.to(parts[0])
        for block, kept in zip(self.blocks, self.rows, strict=True):
            total = narrow.new_zeros(block.curvature.numel())
            for rows, part in _parts(block, kept):
                total += block.rows.adjoint(part, narrow[rows] @ self._mixing(block))
            parts.append(total)
        return sum_over_ranks(torch.cat(parts))

    def _mixing(self, block: Block) -> Tensor:
        """Return the matrix that maps the outputs of a block to the logits."""
        return self.omega if block.rows.channelwise else self.outer

    def extend(self, x: Tensor) -> Tensor:
        """Return the unknowns of the objective from coordinates."""
        return self.extend_(x, x.new_zeros(self.sizes[0] + self.head.size))

    def extend_(self, x: Tensor, total: Tensor) -> Tensor:
        """Add the unknowns of the objective from coordinates to ``total``, and return it."""
        affine, *coordinates = x.split(self.sizes)
        total[: self.sizes[0]] += affine
        pieces = self.head.pieces(total[self.sizes[0] :])
        for block, r in zip(self.blocks, coordinates, strict=True):
            block.extend_(r, pieces)
        return total

    def restrict(self, x: Tensor) -> Tensor:
        """Return the transpose of :meth:`extend`: coordinates of the orthogonal projection."""
        affine, u = x[: self.sizes[0]], x[self.sizes[0] :]
        pieces = self.head.pieces(u)
        return torch.cat([affine, *(block.restrict(pieces) for block in self.blocks)])


def _rows(objective: TangentObjective, blocks: Sequence[Block], columns: Tensor) -> list[Tensors]:
    """Return the rows of all samples for every block, in one pass.

    The outputs of a block are the activations, or their products with ``columns``.
    """
    tangent = objective.tangent
    assert tangent is not None
    empty = tangent.empty or objective.like.new_empty
    kept = [block.rows.empty(empty, objective.n_samples, len(columns)) for block in blocks]
    for rows, projected in _projections(tangent, columns, blocks) if blocks else ():
        for places, parts in zip(kept, projected, strict=True):
            for place, part in zip(places, parts, strict=True):
                place[rows] = part
                release_pages(place[rows])
    return kept


def _projections(
    tangent: TangentTerm, columns: Tensor, blocks: Sequence[Block]
) -> Iterator[tuple[slice, list[Tensors]]]:
    """Iterate over (rows, their rows for every block).

    Where the inputs and the output gradients of the layers are kept, this needs no network.
    """
    through: TangentTerm | None = tangent
    if isinstance(tangent, FactoredTerm) and not any(block.rows.channelwise for block in blocks):
        through = tangent.rest
        for rows, layers in tangent.kept:
            n = rows.stop - rows.start
            with threads_for(n * tangent.head.size):
                yield (
                    rows,
                    [
                        _from_kept(tangent.head, block, tangent.calls(layers, block.weight), n)
                        for block in blocks
                    ],
                )
    for rows, boundary in () if through is None else through.batches():
        n = rows.stop - rows.start
        yield rows, _project(tangent.head, columns, blocks, boundary, n)


def _from_kept(
    head: LinearizedHead, block: Block, calls: Sequence[KeptLayer], n_samples: int
) -> Tensors:
    """Return the rows of some samples for a block from the calls of its layer."""
    shape, basis = head.values[block.weight].shape, block.inputs.T
    bias = None
    if block.bias is not None:
        basis, bias = basis[:, :-1], head.scales[block.bias] * basis[:, -1]
    filters = (head.scales[block.weight] * basis).reshape(-1, *shape[1:])
    inputs = torch.cat([call.project(filters, bias, n_samples) for call in calls], 1)
    if inputs.shape[1] != block.rows.n_positions:
        raise LayoutError
    n_columns = calls[0].n_columns
    kept = block.rows.empty(inputs.new_empty, n_samples, n_columns)
    for i in range(n_columns):
        gradient = torch.cat([call.output_rows(i, n_samples)[0] for call in calls], 1)
        block.rows.put(kept, inputs, i, gradient)
    return kept


def _parts(block: Block, kept: Tensors) -> Iterator[tuple[slice, Tensors]]:
    """Iterate over (rows, what is kept of them for a block); what is in a file leaves memory."""
    for rows in block.row_blocks(len(kept[0])):
        part = tuple(z[rows] for z in kept)
        yield rows, part
        for z in part:
            release_pages(z)


def _project(
    head: LinearizedHead,
    columns: Tensor,
    blocks: Sequence[Block],
    boundary: Tensors,
    n_samples: int,
) -> list[Tensors]:
    """Return the rows of a batch of samples for every block."""
    activation, calls = record(head, boundary, differentiable=True)
    found = positions(calls, n_samples)
    if any(found.get(block.weight) != block.rows.n_positions for block in blocks):
        raise LayoutError
    of_block = [[call for call in calls if call.weight == block.weight] for block in blocks]
    inputs = [
        torch.cat([call.scaled_rows(head.values, head.scales, n_samples)[0] for call in own], 1)
        @ block.inputs
        for block, own in zip(blocks, of_block, strict=True)
    ]
    kept = [block.rows.empty(columns.new_empty, n_samples, len(columns)) for block in blocks]
    ones = columns.new_ones(1, columns.shape[1])
    for factors, channelwise in ((ones, True), (columns, False)):
        chosen = [i for i, block in enumerate(blocks) if block.rows.channelwise == channelwise]
        seen = [call for i in chosen for call in of_block[i]]
        for number, gradients in enumerate(output_gradients(activation, seen, factors)):
            pulled = iter(gradients)
            for i in chosen:
                rows = [call.output_rows(next(pulled), n_samples)[0] for call in of_block[i]]
                blocks[i].rows.put(kept[i], inputs[i], number, torch.cat(rows, 1))
    return kept


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


def layouts(tangent: TangentTerm, boundary: Tensors, n_samples: int) -> dict[int, Layout]:
    """Return the layout of each layer that the space may hold, from a batch of samples."""
    activation, calls = record(tangent.head, boundary, differentiable=True)
    n_positions, width = positions(calls, n_samples), activation.shape[1]
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(width, generator=generator, dtype=torch.float64).to(activation)
    columns = torch.stack([torch.ones_like(mixed), mixed])
    found: dict[int, Layout] = {}
    pulled = zip(*output_gradients(activation, calls, columns), strict=True)
    for call, gradients in zip(calls, pulled, strict=True):
        if call.weight not in n_positions:
            continue
        slopes, other = (call.output_rows(g, n_samples)[0] for g in gradients)
        n_channels, former = slopes.shape[-1], found.get(call.weight)
        channelwise = n_channels == width and agrees(slopes * mixed, other, slopes.dtype)
        channelwise = channelwise and (former is None or former.channelwise)
        found[call.weight] = Layout(n_positions[call.weight], n_channels, channelwise)
    return found


def leading_subspace(
    objective: TangentObjective, curvature: Curvature, alone: bool = True
) -> Subspace | None:
    """Return the largest subspace that is cheap, or None.

    Layers for which the map of the subspace differs from the objective are left out.

    Parameters
    ----------
    objective : TangentObjective
        The objective, with displacements.
    curvature : Curvature
        Its Kronecker factors.
    alone : bool
        Whether the space takes the place of all directions. It is smaller otherwise.

    Returns
    -------
    Subspace or None
    """
    tangent = objective.tangent
    assert tangent is not None
    boundary = tangent.few(objective.n_samples, _FEW)
    found = layouts(tangent, boundary, len(boundary[0]))
    found = dict(set.intersection(*(set(of.items()) for of in gather_over_ranks(found))))
    layers = [layer for layer in curvature.layers if layer.weight in found and layer.decomposed]
    cost = sum(found[x.weight].n_positions * x.n_weights for x in layers)
    if not layers or cost < _MIN_COST:
        return None
    n_outputs = max(gather_over_ranks(len(spanning(tangent.omega)[1])))
    _, calls = record(tangent.head, boundary)
    forward = multiplications(tangent.head, boundary)
    share = max(gather_over_ranks(backward_share(tangent.head, forward, calls)))
    many = n_outputs * share > _MAX_OUTPUTS
    if many:
        layers = [layer for layer in layers if found[layer.weight].channelwise]
    n_bytes = min(gather_over_ranks(_room(objective.like.device)))
    room = n_bytes / objective.like.element_size() / max(gather_over_ranks(objective.n_samples))
    chosen = _largest(
        [(layer, found[layer.weight]) for layer in layers],
        n_outputs,
        many,
        (_ALONE if alone else _BETWEEN_STEPS) * cost,
        room,
    )
    if not chosen and not (many and objective.activation is not None):
        return None
    blocks = [
        Block.from_layer(layer, ranks, found[layer.weight].n_positions, kind)
        for layer, ranks, kind in chosen
    ]
    try:
        subspace = Subspace(objective, blocks, curvature.total)
    except LayoutError:
        subspace = None
    if not on_all_ranks(subspace is not None):
        return None
    assert subspace is not None
    return _checked(objective, subspace)


def _room(device: torch.device) -> int:
    """Return how many bytes the rows of a subspace may have."""
    if device.type == "cuda":
        return min(_MAX_BYTES, free_bytes(device) // _SHARE_OF_DEVICE)
    return _MAX_BYTES


def _largest(
    layers: Sequence[tuple[Layer, Layout]], n_outputs: int, many: bool, cost: float, room: float
) -> list[tuple[Layer, tuple[int, int], type[SummedRows]]]:
    """Return the layers of the largest space that is cheap, with their ranks and rows.

    With ``many`` outputs no rows may take a backward pass for each of them.
    """
    largest = max(
        (float(x.output.values.max() * x.inputs.values.max()) for x, _ in layers), default=0
    )
    for floor in largest * _FLOORS if largest > 0 else ():
        ranks = [_ranks(layer, floor) for layer, _ in layers]
        kinds = [
            _cheapest(of, r, n_outputs, many) for (_, of), r in zip(layers, ranks, strict=True)
        ]
        numbers = sum(taken.numbers for taken, _ in kinds)
        evaluation = sum(_evaluation(taken) for taken, _ in kinds)
        if evaluation <= cost and numbers <= room:
            each = zip(layers, ranks, kinds, strict=True)
            return [(layer, r, kind) for (layer, _), r, (_, kind) in each if min(r) > 0]
    return []


def _cheapest(
    layout: Layout, ranks: tuple[int, int], n_outputs: int, many: bool
) -> tuple[Cost, type[SummedRows]]:
    """Return the rows of a layer that are evaluated fastest, and what they take."""
    kinds = [SummedRows, ProjectedRows] * (not many) + [ChannelRows] * layout.channelwise
    costs = [(kind.cost(layout, ranks, n_outputs), kind) for kind in kinds]
    return min(costs, key=lambda pair: _evaluation(pair[0]))


def _evaluation(cost: Cost) -> int:
    """Return the cost of an evaluation, in multiplications."""
    return cost.multiplications + READING * cost.numbers


def _checked(objective: TangentObjective, subspace: Subspace) -> Subspace | None:
    """Return the subspace of the layers whose map agrees with the objective, if any."""
    tangent = objective.tangent
    compared = isinstance(tangent, FactoredTerm) and tangent.rest is None  # with the network
    if on_all_ranks(compared) or subspace.exact(objective):
        return subspace
    alone = [i for i in range(len(subspace.blocks)) if subspace.only([i]).exact(objective)]
    rest = subspace.only(alone)
    return rest if alone and rest.exact(objective) else None


def _ranks(layer: Layer, floor: float) -> tuple[int, int]:
    """Return the number of eigenvectors on either side with a curvature above ``floor``."""
    g, a = layer.output.values, layer.inputs.values
    return int((g * a.max() > floor).sum()), int((a * g.max() > floor).sum())
