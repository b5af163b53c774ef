"""Kronecker-factored curvature of the linear model, from the gradients of samples [1]_ [2]_ [3]_.

Sample ``n`` meets the weight of a layer at positions ``t`` (patches of a convolution, tokens),
with input row ``a_nt`` and output gradient ``g_nt``. The curvature of the weight is::

    Σ_n w_n vec(M_n) vec(M_n)ᵀ  ≈  G ⊗ A / trace A,    M_n = Σ_t g_nt a_ntᵀ
    G = Σ_n w_n M_n M_nᵀ,    A = Σ_n w_n M_nᵀ M_n

The Kronecker product has the partial traces of the curvature. K-FAC has the sums of
``g_nt g_ntᵀ`` and of ``a_nt a_ntᵀ`` instead, as if positions were uncorrelated. Below a mean over
the positions all have nearly the same gradient, and the curvature is many times larger.

The ``g`` are gradients of ``vᵀ activation``, summed over rows ``v`` with ``Σ v vᵀ ≈ Ωᵀ H Ω``, where
``H`` is the mean Hessian of the loss in the logits. So the factors depend on the weighted samples
alone; no targets are drawn at random. Parameters of other layers get their diagonal
``Σ_n w_n (∂ vᵀ activation / ∂θ)²``. `_layer_rows` turns a layer, such as a convolution, into the
rows ``a`` and ``g``.

A Gram matrix needs about two rows per column; more rows hardly improve a preconditioner:

* Samples: every k-th, so that 128 to 1024 remain. The number grows with the widest layer.
* Positions: with the Gram matrix ``K = g_n g_nᵀ`` of the positions, ``M_nᵀ M_n = a_nᵀ K a_n``. Its
  rows are ``R a_n`` with a root ``Rᵀ R = K``. Where there are more positions than rows are needed,
  at least 4, the rows of ``R`` are products of ``g_n`` with signs, which differ between samples and
  logits as if random: the mean of ``Rᵀ R`` is ``K``. The content of a sample decides its signs, so
  that they do not depend on its batch or its process. The rows of ``M_n M_nᵀ`` follow in the same
  way, with inputs and gradients exchanged.

References
----------
.. [1] J. Martens and R. Grosse, Optimizing Neural Networks with Kronecker-factored
   Approximate Curvature, ICML 2015, arXiv:1503.05671.
.. [2] R. Grosse and J. Martens, A Kronecker-factored approximate Fisher matrix for
   convolution layers, ICML 2016, arXiv:1602.01407.
.. [3] V. Gupta, T. Koren and Y. Singer, Shampoo: Preconditioned Stochastic Tensor Optimization,
   ICML 2018, arXiv:1802.09568.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from sklearn_gradfeat.backbones import differentiable_attention
from sklearn_gradfeat.curvature._layer_rows import LayerGradients, record, record_with_norms
from sklearn_gradfeat.curvature._spectrum import Spectrum, eigh
from sklearn_gradfeat.data import (
    gather_over_ranks,
    is_out_of_memory,
    n_ranks,
    rows_of_all_ranks,
    sum_over_ranks,
)
from sklearn_gradfeat.linearized import LinearizedHead, Tensors

# Bounds on the number of samples, and rows of a Gram matrix as a multiple of its width.
_MIN_SAMPLES, _MAX_SAMPLES = 128, 1024
_ROWS_PER_COLUMN = 2
_MIN_ROWS = 4
# Different signs, and comparisons that decide which of them a sample has.
_N_KINDS, _N_COMPARED = 64, 32
# Largest number of rows v; each takes a backward pass through the head.
_MAX_COLUMNS = 16
# Up to this width a full decomposition is worth its time.
_MAX_EXACT = 1024
# Of a wider factor only the diagonal is kept: the matrix would take gigabytes.
MAX_WIDTH = 8192
# Rows are kept instead of their Gram matrix while there are this many times more columns.
_FEW = 2
# Width of the blocks of columns of a Gram matrix.
_WIDTH = 512
# Largest number of entries of the per-sample gradients that are squared at once.
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
        """Add rows of shape (groups, n_samples, n_rows, n_inputs)."""
        share = _by_row(rows, weights)
        self.rows.append((rows * share.sqrt()[:, None, None]).flatten(1, 2))
        self.n_rows += self.rows[-1].shape[1]
        if self.groups > 1 or _FEW * self.n_rows > rows.shape[3]:
            self.sum_rows()

    def sum_rows(self) -> None:
        """Add the rows that are kept to the Gram matrix."""
        for part in self.rows:
            if self.inputs.ndim == 2:
                self.inputs += (part**2).sum(1)
            else:
                _add_gram(self.inputs, part)
        self.rows = []

    def sum_over_ranks(self) -> None:
        """Add the matrices of all ranks, or put their rows together while they are few."""
        n_rows = gather_over_ranks(self.n_rows if self.rows else math.inf)
        if _FEW * sum(n_rows) > self.inputs.shape[-1]:
            self.sum_rows()
            self.inputs = sum_over_ranks(self.inputs)
        else:
            self.rows = [rows_of_all_ranks(torch.cat(self.rows, 1)[0])[0][None]]
        self.output = sum_over_ranks(self.output)

    def add_output(self, rows: Tensor, weights: Tensor) -> None:
        """Add rows of shape (groups, n_samples, n_rows, n_outputs)."""
        self.output += _gram(rows, weights)

    def spectra(self) -> tuple[Spectrum, Spectrum]:
        """Return the spectra of ``G / trace A`` and of ``A``, and let go of the matrices."""
        if self.rows:
            few = torch.cat(self.rows, 1)
            inputs, trace = Spectrum.from_rows(few), few.square().sum((1, 2))
        else:
            inputs, trace = _spectrum(self.inputs), _trace(self.inputs)
        scale = torch.where(trace > 0, trace, 1.0)
        output = _spectrum(self.output / scale.view(-1, *[1] * (self.output.ndim - 1)))
        self.rows, self.output, self.inputs = [], scale[:0], scale[:0]
        return output, inputs


def _trace(gram: Tensor) -> Tensor:
    """Return the trace of every matrix, or of every diagonal."""
    diagonal = gram if gram.ndim == 2 else gram.diagonal(dim1=1, dim2=2)
    return diagonal.sum(1)


def _spectrum(gram: Tensor) -> Spectrum:
    return Spectrum.from_matrix(gram, _MAX_EXACT) if gram.ndim == 3 else Spectrum(gram, None)


def _empty_gram(like: Tensor, groups: int, width: int) -> Tensor:
    """Return a Gram matrix of zeros, or only its diagonal if it is too wide."""
    return like.new_zeros((groups, width) if width > MAX_WIDTH else (groups, width, width))


def _gram(rows: Tensor, weights: Tensor) -> Tensor:
    """Return ``Σ w r rᵀ`` over samples and positions, or only its diagonal if it is too wide."""
    weighted = (rows * _by_row(rows, weights)[:, None, None]).flatten(1, 2)
    flat = rows.flatten(1, 2)
    return (weighted * flat).sum(1) if rows.shape[-1] > MAX_WIDTH else weighted.mT @ flat


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add ``rowsᵀ rows`` to symmetric matrices; blocks below the diagonal are copied from above."""
    for start in range(0, total.shape[-1], _WIDTH):
        block, right = slice(start, start + _WIDTH), slice(start + _WIDTH, None)
        total[:, block, start:] += rows[:, :, block].mT @ rows[:, :, start:]
        total[:, right, block] = total[:, block, right].mT


def _by_row(rows: Tensor, weights: Tensor) -> Tensor:
    """Return a weight for every row group: equal ones where the groups are not samples."""
    n_rows = rows.shape[1]
    return weights if n_rows == len(weights) else weights.sum().expand(n_rows) / n_rows


def loss_columns(omega: Tensor, curvature: Tensor) -> Tensor:
    """Return rows ``v``, strongest first, with ``Σ v vᵀ ≈ Ωᵀ H Ω`` for the mean Hessian ``H``."""
    values, vectors = torch.linalg.eigh(curvature.cpu().double())
    root = (vectors * values.clamp(min=0).sqrt()).T @ omega.cpu().double()
    _, singular, right = torch.linalg.svd(root, full_matrices=False)
    keep = min(_MAX_COLUMNS, int((singular > 1e-7 * singular.max()).sum()))
    columns: Tensor = singular[:keep, None] * right[:keep]
    # Their signs are rounding noise, and mixtures of positions depend on them.
    largest = columns.gather(1, columns.abs().argmax(1, keepdim=True))
    return (columns * largest.sign()).to(omega)


class Batch(NamedTuple):
    """Some samples: their rows, inputs of the head, numbers of :class:`Signs`, and layers."""

    rows: slice | Tensor
    boundary: Tensors
    kinds: Tensor
    layers: LayerGradients


def network_batches(
    head: LinearizedHead, batches: Iterable[tuple[slice, Tensors]], columns: Tensor
) -> Iterator[Batch]:
    """Iterate over batches of samples that pass the head.

    Parameters
    ----------
    head : LinearizedHead
        The head.
    batches : iterable of (slice, tuple of tensors)
        The rows and the boundary tensors of every batch.
    columns : tensor of shape (n_columns, n_features)
        The rows ``v`` of :func:`loss_columns`.
    """
    for rows, boundary in batches:
        record = record_with_norms(head, boundary, differentiable=True)
        if not record.activation.requires_grad:
            raise ValueError("The activation does not depend on the gradient layers.")
        layers = LayerGradients.from_network(record, columns, len(boundary[0]))
        yield Batch(rows, boundary, Signs.kinds(boundary), layers)


def factors(
    head: LinearizedHead,
    batches: Iterable[Batch],
    columns: Tensor,
    weights: Tensor,
    n_samples: int,
) -> tuple[dict[int, Factor], dict[int, Tensor]]:
    """Return the factors of the layers and the diagonals of the other parameters.

    Parameters
    ----------
    head : LinearizedHead
        The head.
    batches : iterable of Batch
        The samples.
    columns : tensor of shape (n_columns, n_features)
        The rows ``v`` of :func:`loss_columns`.
    weights : tensor of shape (n_samples,)
        Weights of the samples; only those of the batches count.
    n_samples : int
        Number of samples of the batches of all ranks.

    Returns
    -------
    (dict of int to Factor, dict of int to tensor)
        By position of the weight, or of the other parameter, in the tuple of parameters.
    """
    found: dict[int, Factor] = {}
    diagonals: dict[int, Tensor] = {}
    signs = Signs()
    for rows, boundary, kinds, (calls, by_column) in batches:
        w = weights[rows]
        mixed = [
            _Mixtures.of(
                call.scaled_rows(head.values, head.scales, len(w)),
                _enough(len(head.values[call.weight]) // call.groups, n_samples * len(columns)),
                signs,
                kinds,
            )
            for call in calls
        ]
        mixing = [
            _Mixtures(_enough(head.values[call.weight][0].numel(), n_samples), signs, kinds)
            for call in calls
        ]
        squares: dict[int, Tensor] = {}
        for outputs, vectors in by_column:
            for i, gradient in vectors.items():
                squares[i] = squares.get(i, 0.0) + w @ (head.scales[i] * gradient) ** 2
            for call, rows_out, roots, of_outputs in zip(
                calls, outputs, mixed, mixing, strict=True
            ):
                if call.weight not in found:
                    value = head.values[call.weight]
                    found[call.weight] = Factor(value, call.bias, call.groups)
                found[call.weight].add_output(roots @ rows_out, w)
                of_outputs.add(rows_out)
        for call, of_outputs in zip(calls, mixing, strict=True):
            rows_in = call.scaled_rows(head.values, head.scales, len(w))
            found[call.weight].add_inputs(of_outputs.root() @ rows_in, w)
        covered = {*found, *(f.bias for f in found.values()), *squares}
        rest = [i for i in range(len(head.values)) if i not in covered]
        others = zip(rest, _squares(head, rest, boundary, columns, w), strict=True)
        for i, square in (*squares.items(), *others):
            diagonals[i] = diagonals.get(i, 0.0) + square
    return found, diagonals


def sums_over_ranks(
    found: dict[int, Factor], diagonals: dict[int, Tensor]
) -> tuple[dict[int, Factor], dict[int, Tensor]]:
    """Return the factors and diagonals of the samples of all ranks."""
    if n_ranks() > 1:
        for factor in found.values():
            factor.sum_over_ranks()
    return found, {i: sum_over_ranks(diagonal) for i, diagonal in diagonals.items()}


def _enough(width: int, n_samples: int) -> int:
    """Return the number of rows of a sample that give a Gram matrix enough rows."""
    return max(_MIN_ROWS, math.ceil(_ROWS_PER_COLUMN * width / n_samples))


class _Mixtures:
    """Mixtures of the positions of a sample whose Gram matrix is that of given rows.

    Parameters
    ----------
    n : int
        Largest number of mixtures of a sample.
    signs : Signs
        The signs where there are more positions.
    kinds : tensor of shape (n_samples,), int64
        Which signs are those of a sample.
    """

    def __init__(self, n: int, signs: Signs, kinds: Tensor) -> None:
        self.n, self._signs, self._kinds = n, signs, kinds
        self._total: Tensor | None = None
        self._n_added = 0

    @classmethod
    def of(cls, rows: Tensor, n: int, signs: Signs, kinds: Tensor) -> Tensor:
        """Return the mixtures of some rows."""
        mixtures = cls(n, signs, kinds)
        mixtures.add(rows)
        return mixtures.root()

    def add(self, rows: Tensor) -> None:
        """Add rows of shape (groups, n_samples, positions, width) to those of other columns."""
        if rows.shape[2] <= self.n:
            part = rows @ rows.mT
        else:
            signs = self._signs.of(self._kinds + self._n_added, self.n, rows.shape[3])
            part = signs.to(rows) @ rows.mT / math.sqrt(self.n)
        self._n_added += 1
        self._total = part if self._total is None else self._total + part

    def root(self) -> Tensor:
        """Return the mixtures, of shape (groups, n_samples, n_mixtures, positions)."""
        total = self._total
        assert total is not None
        if total.shape[-1] > self.n:
            return total
        home = "cpu" if total.device.type == "mps" else total.device
        values, vectors = eigh(total.to(home, torch.float64))
        return (vectors * values.clamp(min=0).sqrt()[..., None, :]).mT.to(total)


class Signs:
    """Signs that look random, and are the same for the same sample in any batch."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], Tensor] = {}

    @staticmethod
    def kinds(boundary: Tensors) -> Tensor:
        """Return a number of every sample, by which numbers of it are larger than others."""
        real = [z.real for z in boundary]
        largest = max(real, key=lambda z: z[0].numel()).flatten(1)
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randint, generator=generator)
        places = draw(largest.shape[1], (2, _N_COMPARED)).to(largest.device)
        codes = draw(_N_KINDS, (_N_COMPARED,)).to(largest.device)
        is_larger = largest[:, places[0]] > largest[:, places[1]]
        return (is_larger * codes).sum(1)

    def of(self, kinds: Tensor, n: int, width: int) -> Tensor:
        """Return the signs of samples, of shape (n_samples, n, width), as int8."""
        if (n, width) not in self._found:
            generator = torch.Generator().manual_seed(0)
            bits = torch.randint(2, (_N_KINDS, n, width), generator=generator, dtype=torch.int8)
            self._found[n, width] = (2 * bits - 1).to(kinds.device)
        return self._found[n, width][kinds % _N_KINDS]


def enough_samples(head: LinearizedHead, boundary: Tensors) -> int:
    """Return the number of samples that gives every Gram matrix enough rows.

    ``boundary`` holds a few samples, which show the number of positions of every layer.
    """
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
    """Return the weighted sums of squared per-sample gradients in ``u``, per parameter."""
    totals = [torch.zeros_like(head.values[i]) for i in rest]
    for part, _, gradients in per_sample_gradients(head, rest, boundary, columns):
        for total, gradient in zip(totals, gradients, strict=True):
            total.add_(torch.einsum("n,n...->...", w[part], gradient**2))
    return totals


def per_sample_gradients(
    head: LinearizedHead, which: Sequence[int], boundary: Tensors, columns: Tensor
) -> Iterator[tuple[slice, int, Tensors]]:
    """Iterate over the gradients of ``column · activation`` in some parameters, in ``u``.

    Parameters
    ----------
    head : LinearizedHead
        The head.
    which : sequence of int
        Positions of the parameters in the tuple of parameters.
    boundary : tuple of tensors
        The inputs of the head.
    columns : tensor of shape (n_columns, n_features)
        The columns.

    Yields
    ------
    (slice, int, tuple of tensors)
        Some samples, the number of a column, and a tensor of one row for each of these samples for
        every parameter.
    """
    if not which:
        return

    def output(chosen: Tensors, sample: Tensors, column: Tensor) -> Tensor:
        values = list(head.values)
        for i, value in zip(which, chosen, strict=True):
            values[i] = value
        return head.head(tuple(values), tuple(z[None] for z in sample))[0] @ column

    chosen = tuple(head.values[i] for i in which)
    size = max(1, _MAX_PER_SAMPLE // sum(value.numel() for value in chosen))
    per_sample = grad(output)
    for start in range(0, len(boundary[0]), size):
        part = slice(start, start + size)
        for number, column in enumerate(columns):
            with differentiable_attention():
                gradients = _each(per_sample, chosen, tuple(z[part] for z in boundary), column)
            scaled = (head.scales[i] * g for i, g in zip(which, gradients, strict=True))
            yield part, number, tuple(scaled)


def _each(
    gradient: Callable[..., Tensors], chosen: Tensors, boundary: Tensors, column: Tensor
) -> Tensors:
    """Return the gradients of every sample, in a loop where ``vmap`` does not support the head."""
    try:
        batched: Tensors = vmap(gradient, in_dims=(None, 0, None))(chosen, boundary, column)
        return batched
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
    # Not in the handler: its traceback keeps the tensors of the attempt alive.
    single = [gradient(chosen, sample, column) for sample in zip(*boundary, strict=True)]
    return tuple(map(torch.stack, zip(*single, strict=True)))
