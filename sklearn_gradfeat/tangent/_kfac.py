"""Kronecker-factored curvature of the linear model, as a preconditioner [1]_ [2]_.

For a layer with input rows ``a`` and output gradients ``g`` the curvature of its weight is
approximated by ``E[g gᵀ] ⊗ E[a aᵀ]``. Parameters of any other kind get their exact
diagonal. The curvature of the loss is its mean over the samples at the fitted ``Ω``, so
the factors depend on the weighted samples alone, neither on their order nor on chance; of
more than 1024 samples, every k-th is taken.

References
----------
.. [1] J. Martens and R. Grosse, Optimizing Neural Networks with Kronecker-factored
   Approximate Curvature, ICML 2015, arXiv:1503.05671.
.. [2] R. Grosse and J. Martens, A Kronecker-factored approximate Fisher matrix for
   convolution layers, ICML 2016, arXiv:1602.01407.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap

from sklearn_gradfeat._attention import differentiable_attention
from sklearn_gradfeat.tangent._head import LinearizedHead
from sklearn_gradfeat.tangent._patches import LayerCall, LayerRecorder
from sklearn_gradfeat.tangent._products import Tensors

# More samples only sharpen a preconditioner: with 256 as with 2048, the same iterations.
MAX_SAMPLES = 1024
# Directions of the curvature of the loss that are followed through the head.
_MAX_COLUMNS = 16
# Multiplications spent on the Gram matrix of the inputs of one layer.
_MAX_WORK = 2**38
# A wider factor keeps its diagonal alone: the matrix would take gigabytes.
MAX_WIDTH = 8192
# Up to this width the full decomposition takes a few seconds; above, the leading part alone.
_MAX_EXACT = 2048
_RANK = 1024
_ITERATIONS = 3
# Numbers held at once when squares of per-sample gradients are summed.
_MAX_PER_SAMPLE = 2**26


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of symmetric positive semi-definite matrices.

    Attributes
    ----------
    values : tensor of shape (..., n_values)
        The largest eigenvalues.
    vectors : tensor of shape (..., n, n_values) or None
        Their eigenvectors; None for a diagonal matrix.
    rest : tensor of shape (...) or None
        The mean of the eigenvalues that are left out.
    """

    values: Tensor
    vectors: Tensor | None
    rest: Tensor | None = None

    @classmethod
    def of(cls, matrix: Tensor) -> Spectrum:
        """Decompose matrices of shape (..., n, n)."""
        home = "cpu" if matrix.device.type == "mps" else matrix.device
        n = matrix.shape[-1]
        if n <= _MAX_EXACT:
            # In float32 the decomposition of a nearly singular matrix may fail, even silently.
            values, vectors = torch.linalg.eigh(matrix.to(home, torch.float64))
            return cls(values.clamp(min=0).to(matrix), vectors.to(matrix))
        values, vectors = _leading(matrix.to(home))
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        rest = (trace - values.sum(-1).to(trace)) / (n - values.shape[-1])
        return cls(values.to(matrix), vectors.to(matrix), rest.clamp(min=0))

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the last axis in the eigenbasis, and what the basis leaves out."""
        if self.vectors is None:
            return rows, None
        projected = rows @ self.vectors
        return projected, None if self.rest is None else rows - projected @ self.vectors.mT

    def restore(self, rows: Tensor) -> Tensor:
        """Return the last axis from the eigenbasis."""
        return rows if self.vectors is None else rows @ self.vectors.mT


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues with their eigenvectors, by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[-1], _RANK, generator=generator, dtype=matrix.dtype)
    basis = start.to(matrix.device).expand(*matrix.shape[:-1], _RANK)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, vectors = torch.linalg.eigh((basis.mT @ matrix @ basis).double())
    return values.clamp(min=0), basis @ vectors.to(basis)


class KroneckerInverse:
    """``(output ⊗ inputs + alpha)⁻¹`` on matrices of shape (..., n_outputs, n_inputs)."""

    def __init__(self, output: Spectrum, inputs: Spectrum, alpha: float) -> None:
        self.output, self.inputs = output, inputs
        curvature = output.values[..., :, None] * inputs.values[..., None, :]
        self.damping = damping(alpha, curvature)

    def __call__(self, matrix: Tensor) -> Tensor:
        """Apply the inverse."""
        projected, rest = self.inputs.project(matrix)
        solved = self.inputs.restore(self._solve(projected, self.inputs.values))
        if rest is None or self.inputs.rest is None:
            return solved
        return solved + self._solve(rest, self.inputs.rest[..., None])

    def _solve(self, matrix: Tensor, eigenvalues: Tensor) -> Tensor:
        """Apply the inverse to columns that are eigenvectors of the input side."""
        projected, rest = self.output.project(matrix.mT)
        curvature = eigenvalues[..., :, None] * self.output.values[..., None, :]
        solved = self.output.restore(projected / (curvature + self.damping))
        if rest is not None and self.output.rest is not None:
            outside = eigenvalues * self.output.rest[..., None]
            solved = solved + rest / (outside[..., :, None] + self.damping)
        return solved.mT


def damping(alpha: float, curvature: Tensor) -> float:
    """Return the penalty, or just enough to keep an unpenalised block invertible."""
    largest = float(curvature.max()) if curvature.numel() else 0.0
    return max(alpha, torch.finfo(curvature.dtype).eps * largest, 1e-30)


class Factor:
    """Gram matrices of the inputs and the output gradients of one layer, per group."""

    def __init__(self, weight: Tensor, bias: int | None, groups: int) -> None:
        self.bias, self.groups = bias, groups
        n_inputs = weight[0].numel() + (bias is not None)
        self.inputs = _empty_gram(weight, groups, n_inputs)
        self.output = _empty_gram(weight, groups, weight.shape[0] // groups)

    def add_inputs(self, rows: Tensor, weights: Tensor, scales: tuple[float, float]) -> None:
        """Add rows of shape (groups, n_samples, positions, n_inputs)."""
        rows = rows * scales[0]
        if self.bias is not None:
            rows = torch.cat([rows, torch.full_like(rows[..., :1], scales[1])], -1)
        self.inputs += _gram(rows, weights) / rows.shape[2]

    def add_output(self, rows: Tensor, weights: Tensor) -> None:
        """Add gradients of shape (groups, n_samples, positions, n_outputs)."""
        self.output += _gram(rows, weights)

    def inverse(self, alpha: float) -> KroneckerInverse:
        """Return the inverse of the block with the penalty ``alpha``."""
        output, inputs = (
            Spectrum.of(gram) if gram.ndim == 3 else Spectrum(gram, None)
            for gram in (self.output, self.inputs)
        )
        return KroneckerInverse(output, inputs, alpha)


def _empty_gram(like: Tensor, groups: int, width: int) -> Tensor:
    """Return zeros to sum a Gram matrix in, or its diagonal alone if it is too wide."""
    return like.new_zeros((groups, width) if width > MAX_WIDTH else (groups, width, width))


def _gram(rows: Tensor, weights: Tensor) -> Tensor:
    """Sum ``w r rᵀ`` over samples and positions; its diagonal alone if it is too wide."""
    if rows.shape[1] != len(weights):
        weights = weights.sum().expand(rows.shape[1]) / rows.shape[1]
    weighted = (rows * weights[:, None, None]).flatten(1, 2)
    flat = rows.flatten(1, 2)
    return (weighted * flat).sum(1) if rows.shape[-1] > MAX_WIDTH else weighted.mT @ flat


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
    n_samples: int,
) -> tuple[dict[int, Factor], dict[int, Tensor]]:
    """Return the factors of the layers and the diagonals of the other parameters."""
    leaves = tuple(value.detach().requires_grad_() for value in head.values)
    found: dict[int, Factor] = {}
    diagonals: dict[int, Tensor] = {}
    for rows, boundary in batches:
        w = weights[rows]
        with differentiable_attention(), torch.enable_grad(), LayerRecorder(leaves) as recorder:
            activation = head.head(leaves, boundary)
        if not activation.requires_grad:
            raise ValueError("The activation does not depend on the gradient layers.")
        calls = recorder.calls
        for call in calls:
            _add_call(found, call, head, w, n_samples)
        outputs = [call.output for call in calls]
        for column in columns if calls else ():
            grads = torch.autograd.grad(
                activation, outputs, column.expand_as(activation),
                retain_graph=True, materialize_grads=True,
            )  # fmt: skip
            for call, gradient in zip(calls, grads, strict=True):
                found[call.weight].add_output(call.output_rows(gradient, len(w)), w)
        covered = {*found, *(f.bias for f in found.values())}
        rest = [i for i in range(len(leaves)) if i not in covered]
        for i, square in zip(rest, _squares(head, rest, boundary, columns, w), strict=True):
            diagonals[i] = diagonals.get(i, 0.0) + square
    return found, diagonals


def _add_call(
    found: dict[int, Factor], call: LayerCall, head: LinearizedHead, w: Tensor, n_samples: int
) -> None:
    """Add the inputs of one call of a layer to its factor."""
    value = head.values[call.weight]
    factor = found.get(call.weight)
    if factor is None:
        factor = found[call.weight] = Factor(value, call.bias, call.groups)
    width = value[0].numel() + 1
    most = max(1, _MAX_WORK // (width**2 * n_samples))
    inputs = call.input_rows(value.shape[2:], len(w), most)
    scales = (head.scales[call.weight], 0.0 if call.bias is None else head.scales[call.bias])
    factor.add_inputs(inputs, w, scales)


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
