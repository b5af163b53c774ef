"""Kronecker-factored curvature of the linear model, as a preconditioner [1]_ [2]_.

For a layer with input rows ``a`` and output gradients ``g`` the curvature of its weight is
approximated by ``E[g gᵀ] ⊗ E[a aᵀ]``. Parameters of any other kind get their exact
diagonal. The curvature of the loss is its mean over the samples at the fitted ``Ω``, so
the factors depend on the weighted samples alone, not on chance. Of many samples every k-th is
taken: a few hundred do as well as thousands.

References
----------
.. [1] J. Martens and R. Grosse, Optimizing Neural Networks with Kronecker-factored
   Approximate Curvature, ICML 2015, arXiv:1503.05671.
.. [2] R. Grosse and J. Martens, A Kronecker-factored approximate Fisher matrix for
   convolution layers, ICML 2016, arXiv:1602.01407.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap

from sklearn_gradfeat.backbones import differentiable_attention
from sklearn_gradfeat.curvature._layer_rows import LayerCall, output_gradients, record
from sklearn_gradfeat.curvature._spectrum import Spectrum
from sklearn_gradfeat.linearized import LinearizedHead, Tensors

# Samples enough for a preconditioner, and rows of a Gram matrix as a multiple of its width.
_MIN_SAMPLES, _MAX_SAMPLES = 256, 1024
_ROWS_PER_COLUMN = 2
_MIN_POSITIONS = 4
# Directions of the curvature of the loss that are followed through the head.
_MAX_COLUMNS = 16
# A wider factor keeps its diagonal alone: the matrix would take gigabytes.
MAX_WIDTH = 8192
# Rows are kept as they are while there are so many times fewer than columns.
_FEW = 2
# Numbers held at once when squares of per-sample gradients are summed.
_MAX_PER_SAMPLE = 2**26


class Factor:
    """Gram matrices of the inputs and the output gradients of one layer, per group."""

    def __init__(self, weight: Tensor, bias: int | None, groups: int) -> None:
        self.bias, self.groups = bias, groups
        n_inputs = weight[0].numel() + (bias is not None)
        self.inputs = _empty_gram(weight, groups, n_inputs)
        self.output = _empty_gram(weight, groups, weight.shape[0] // groups)
        self.rows: list[Tensor] = []
        self.n_rows = 0

    def add_inputs(self, rows: Tensor, weights: Tensor) -> None:
        """Add rows of shape (groups, n_samples, positions, n_inputs)."""
        share = _by_row(rows, weights) / rows.shape[2]
        self.rows.append((rows * share.sqrt()[:, None, None]).flatten(1, 2))
        self.n_rows += self.rows[-1].shape[1]
        if self.groups > 1 or _FEW * self.n_rows > rows.shape[3]:
            self.sum_rows()

    def sum_rows(self) -> None:
        """Sum up in the Gram matrix what is kept as rows."""
        for part in self.rows:
            self.inputs += (part**2).sum(1) if self.inputs.ndim == 2 else part.mT @ part
        self.rows = []

    def add_output(self, rows: Tensor, weights: Tensor) -> None:
        """Add gradients of shape (groups, n_samples, positions, n_outputs)."""
        self.output += _gram(rows, weights)

    def spectra(self) -> tuple[Spectrum, Spectrum]:
        """Return the decompositions of both, output first."""
        few = Spectrum.from_rows(torch.cat(self.rows, 1)) if self.rows else None
        return _spectrum(self.output), few or _spectrum(self.inputs)


def _spectrum(gram: Tensor) -> Spectrum:
    return Spectrum.from_matrix(gram) if gram.ndim == 3 else Spectrum(gram, None)


def _empty_gram(like: Tensor, groups: int, width: int) -> Tensor:
    """Return zeros to sum a Gram matrix in, or its diagonal alone if it is too wide."""
    return like.new_zeros((groups, width) if width > MAX_WIDTH else (groups, width, width))


def _gram(rows: Tensor, weights: Tensor) -> Tensor:
    """Sum ``w r rᵀ`` over samples and positions; its diagonal alone if it is too wide."""
    weighted = (rows * _by_row(rows, weights)[:, None, None]).flatten(1, 2)
    flat = rows.flatten(1, 2)
    return (weighted * flat).sum(1) if rows.shape[-1] > MAX_WIDTH else weighted.mT @ flat


def _by_row(rows: Tensor, weights: Tensor) -> Tensor:
    """Return the weights of the samples, or equal ones where rows do not tell the sample."""
    n_rows = rows.shape[1]
    return weights if n_rows == len(weights) else weights.sum().expand(n_rows) / n_rows


def loss_columns(omega: Tensor, curvature: Tensor) -> Tensor:
    """Return rows ``u`` with ``Σ u uᵀ ≈ Ωᵀ H Ω`` for the mean curvature ``H`` of the loss."""
    values, vectors = torch.linalg.eigh(curvature.cpu().double())
    root = (vectors * values.clamp(min=0).sqrt()).T @ omega.cpu().double()
    _, singular, right = torch.linalg.svd(root, full_matrices=False)
    keep = min(_MAX_COLUMNS, int((singular > 1e-7 * singular.max()).sum()))
    columns: Tensor = singular[:keep, None] * right[:keep]
    return columns.to(omega)


def factors(
    head: LinearizedHead,
    batches: Iterable[tuple[slice, Tensors]],
    columns: Tensor,
    weights: Tensor,
) -> tuple[dict[int, Factor], dict[int, Tensor]]:
    """Return the factors of the layers and the diagonals of the other parameters."""
    found: dict[int, Factor] = {}
    diagonals: dict[int, Tensor] = {}
    n_samples = len(weights)
    for rows, boundary in batches:
        w = weights[rows]
        activation, calls = record(head, boundary, differentiable=True)
        if not activation.requires_grad:
            raise ValueError("The activation does not depend on the gradient layers.")
        chosen: list[_Positions] = []
        for grads in output_gradients(activation, calls, columns):
            rows_out = [c.output_rows(g, len(w)) for c, g in zip(calls, grads, strict=True)]
            if not chosen:  # the first column is the strongest
                chosen = [_strongest(r, w) for r in rows_out]
                for call, positions in zip(calls, chosen, strict=True):
                    width = head.values[call.weight][0].numel()
                    _add_inputs(found, call, head, w, positions.most(width, n_samples))
            n_rows = n_samples * len(columns)
            for call, gradient, positions in zip(calls, rows_out, chosen, strict=True):
                found[call.weight].add_output(positions.strongest(gradient, n_rows), w)
        covered = {*found, *(f.bias for f in found.values())}
        rest = [i for i in range(len(head.values)) if i not in covered]
        for i, square in zip(rest, _squares(head, rest, boundary, columns, w), strict=True):
            diagonals[i] = diagonals.get(i, 0.0) + square
    return found, diagonals


@dataclass(frozen=True)
class _Positions:
    """Positions of a layer by their influence, strongest first, and shares of the whole."""

    order: Tensor
    share: Tensor

    def most(self, width: int, n_rows: int) -> Tensor:
        """Return enough positions for a Gram matrix, given the rows at each of them."""
        enough = max(_MIN_POSITIONS, math.ceil(_ROWS_PER_COLUMN * width / n_rows))
        return self.order[:enough]

    def strongest(self, rows: Tensor, n_rows: int) -> Tensor:
        """Return rows at the strongest positions, scaled to stand for all of them."""
        chosen = self.most(rows.shape[-1], n_rows)
        share = float(self.share[: len(chosen)].sum())
        return rows[:, :, chosen] / math.sqrt(share) if share > 0 else rows[:, :, chosen]


def _strongest(rows: Tensor, w: Tensor) -> _Positions:
    """Order the positions of gradients, (groups, n_samples, positions, n_outputs), by size.

    The gradient of a class token, say, is all there is; most positions may not matter.
    """
    energy = (rows**2).sum((0, 3)).T @ _by_row(rows, w)
    total = energy.sum()
    share, order = torch.sort(energy / total if total > 0 else energy, descending=True, stable=True)
    return _Positions(order, share)


def _add_inputs(
    found: dict[int, Factor],
    call: LayerCall,
    head: LinearizedHead,
    w: Tensor,
    positions: Tensor,
) -> None:
    """Add the inputs of one call of a layer to its factor."""
    value = head.values[call.weight]
    factor = found.get(call.weight)
    if factor is None:
        factor = found[call.weight] = Factor(value, call.bias, call.groups)
    factor.add_inputs(call.scaled_rows(head.values, head.scales, len(w), positions), w)


def enough_samples(head: LinearizedHead, boundary: Tensors) -> int:
    """Return how many samples give every Gram matrix enough rows, from a few of them."""
    n_samples = len(boundary[0])
    most = _MIN_SAMPLES
    for call in record(head, boundary)[1]:
        n_positions = call.output_rows(call.output, n_samples).shape[2]
        n_columns = head.values[call.weight][0].numel()
        most = max(most, math.ceil(_ROWS_PER_COLUMN * n_columns / n_positions))
    return min(most, _MAX_SAMPLES)


def _squares(
    head: LinearizedHead, rest: Sequence[int], boundary: Tensors, columns: Tensor, w: Tensor
) -> list[Tensor]:
    """Return the weighted sums of squared per-sample gradients, in scaled coordinates."""
    if not rest:
        return []

    def output(chosen: Tensors, sample: Tensors, column: Tensor) -> Tensor:
        values = list(head.values)
        for i, value in zip(rest, chosen, strict=True):
            values[i] = value
        return head.head(tuple(values), tuple(z[None] for z in sample))[0] @ column

    chosen = tuple(head.values[i] for i in rest)
    size = max(1, _MAX_PER_SAMPLE // sum(value.numel() for value in chosen))
    per_sample = grad(output)
    totals = [torch.zeros_like(value) for value in chosen]
    for start in range(0, len(w), size):
        part = slice(start, start + size)
        for column in columns:
            with differentiable_attention():
                gradients = _each(per_sample, chosen, tuple(z[part] for z in boundary), column)
            for total, gradient in zip(totals, gradients, strict=True):
                total.add_(torch.einsum("n,n...->...", w[part], gradient**2))
    return [head.scales[i] ** 2 * total for i, total in zip(rest, totals, strict=True)]


def _each(
    gradient: Callable[..., Tensors], chosen: Tensors, boundary: Tensors, column: Tensor
) -> Tensors:
    """Return the gradients of every sample, one by one where the head cannot be batched."""
    try:
        batched: Tensors = vmap(gradient, in_dims=(None, 0, None))(chosen, boundary, column)
        return batched
    except RuntimeError:
        single = [gradient(chosen, sample, column) for sample in zip(*boundary, strict=True)]
        return tuple(map(torch.stack, zip(*single, strict=True)))
