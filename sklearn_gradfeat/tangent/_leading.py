"""How many leading directions of the displacements are worth a subspace."""

from __future__ import annotations

import numpy as np

from sklearn_gradfeat.tangent._objective import TangentObjective
from sklearn_gradfeat.tangent._patches import record
from sklearn_gradfeat.tangent._preconditioner import Curvature, Layer
from sklearn_gradfeat.tangent._subspace import Block, LayoutError, Subspace, positions

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
            blocks = [Block.of(layer, r, n, n_outputs) for layer, r, n in each if min(r) > 0]
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
