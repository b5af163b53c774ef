"""Inverses of Kronecker products of symmetric matrices, through their eigenvalues.

With ``G = U g Uᵀ`` and ``A = V a Vᵀ``, the solution of ``G X A + alpha X = B`` is::

    X = U [(Uᵀ B V) / (g aᵀ + alpha)] Vᵀ

A factor that is too wide for a full decomposition keeps its leading eigenvalues; the mean of
the others stands for each of them on the rest of the space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from sklearn_gradfeat.backbones import threads_for
from sklearn_gradfeat.data import block_size, of_first_rank

# Up to this width the full decomposition takes a few seconds; wider matrices get a partial one.
MAX_EXACT = 2048
_RANK = 1024
_ITERATIONS = 3
# Largest ratio of two eigenvalues whose inverses may cancel each other in float32.
_RANGE = 1e5
# A decomposition has many steps, after which threads wait for each other. To be large, it must
# have this many times the multiplications of a product.
STEPS = 8

NOT_FINITE = (
    "The squares of the activations, or of their derivatives in the gradient layers, are "
    "NaN or infinite. If the activations are huge, scale X. If a derivative is infinite, "
    "as that of a square root at zero, choose other gradient_layers, or set "
    "features='activation'."
)


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
        The mean of the other eigenvalues; None if there are none.
    """

    values: Tensor
    vectors: Tensor | None
    rest: Tensor | None = None

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> Spectrum:
        """Decompose matrices of shape (..., n, n)."""
        home = "cpu" if matrix.device.type == "mps" else matrix.device
        n = matrix.shape[-1]
        if n <= MAX_EXACT:
            # In float32 the decomposition of a nearly singular matrix may fail, without an error.
            values, vectors = eigh(matrix.to(home, torch.float64))
            return cls._agreed(values.clamp(min=0).to(matrix), vectors.to(matrix))
        values, vectors = _leading(matrix.to(home))
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        rest = (trace - values.sum(-1).to(trace)) / (n - values.shape[-1])
        return cls._agreed(values.to(matrix), vectors.to(matrix), rest.clamp(min=0))

    @classmethod
    def from_rows(cls, rows: Tensor) -> Spectrum:
        """Decompose ``rowsᵀ rows``, for rows of shape (n_rows, n) or (1, n_rows, n), n_rows < n."""
        home, one = "cpu" if rows.device.type == "mps" else rows.device, rows.shape[:-2]
        wide = rows.reshape(rows.shape[-2:]).to(home, torch.float64)
        with threads_for(wide.numel() * len(wide)):
            gram = wide @ wide.T
        values, vectors = eigh(gram)
        # The vectors of smaller values are dominated by rounding errors of the largest one.
        kept = values > len(wide) * torch.finfo(rows.dtype).eps * values[-1]
        values = values[kept]
        vectors = wide.T @ vectors[:, kept] / values.sqrt()
        values, vectors = (t.reshape(*one, *t.shape).to(rows) for t in (values, vectors))
        return cls._agreed(values, vectors, rows.new_zeros(one))

    @classmethod
    def _agreed(cls, values: Tensor, vectors: Tensor, rest: Tensor | None = None) -> Spectrum:
        """Return the spectrum of the first rank: the signs of eigenvectors are arbitrary."""
        rest = None if rest is None else of_first_rank(rest)
        return cls(of_first_rank(values), of_first_rank(vectors), rest)

    def columns(self, n: int) -> Tensor:
        """Return the last eigenvectors of the first matrix."""
        assert self.vectors is not None
        return self.vectors[0, :, -n:]


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of symmetric matrices, float64.

    torch uses divide and conquer, which is fast but may fail to converge. QR iterations in host
    memory follow then, and where a device has no memory for the decomposition.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError(NOT_FINITE)
    try:
        with threads_for(matrix.shape[-1] ** 3 / STEPS):
            values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:
        host = matrix.cpu().numpy()
        found = [scipy.linalg.eigh(one, driver="ev") for one in host.reshape(-1, *host.shape[-2:])]
        values, vectors = (torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True))
        shape = matrix.shape
        return values.view(shape[:-1]).to(matrix), vectors.view(shape).to(matrix)
    return values, vectors


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues with their eigenvectors, by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[-1], _RANK, generator=generator, dtype=matrix.dtype)
    basis = start.to(matrix.device).expand(*matrix.shape[:-1], _RANK)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, vectors = eigh((basis.mT @ matrix @ basis).double())
    return values.clamp(min=0), basis @ vectors.to(basis)


class KroneckerInverse:
    """The inverse of ``output ⊗ inputs + alpha``, on tensors (..., n_outputs, n_inputs)."""

    def __init__(self, output: Spectrum, inputs: Spectrum, alpha: float) -> None:
        self.output, self.inputs = output, inputs
        curvature = output.values[..., :, None] * inputs.values[..., None, :]
        self.damping = damping(alpha, curvature)
        self.wide_range = False
        if inputs.rest is not None and curvature.numel():
            smallest = float((output.values[..., 0] * inputs.rest).min()) + self.damping
            self.wide_range = float(curvature.max()) > _RANGE * smallest

    def __call__(self, matrix: Tensor) -> Tensor:
        """Return the solution for a matrix."""
        solved = matrix.clone(memory_format=torch.contiguous_format)
        self.solve_(solved)
        return solved

    def solve_(self, matrix: Tensor, bias: Tensor | None = None) -> None:
        """Replace a matrix by the solution.

        Parameters
        ----------
        matrix : tensor of shape (..., n_outputs, n_inputs)
            The matrix, or all but its last column.
        bias : tensor of shape (..., n_outputs, 1) or None
            The last column, if it is elsewhere.
        """
        parts = [matrix] if bias is None else [matrix, bias]
        sizes = [part.shape[-1] for part in parts]
        with threads_for(matrix.numel() * self.inputs.values.shape[-1]):
            if self.inputs.vectors is None:
                values = self.inputs.values.split(sizes, -1)
                for part, eigenvalues in zip(parts, values, strict=True):
                    self._divide_(part, eigenvalues)
            else:
                self._solve_(parts, self.inputs.vectors.split(sizes, -2))

    def _solve_(self, parts: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        """Do the same in the eigenbasis of the inputs, whose rows are those of the columns."""
        inside = _inside(parts, vectors)
        rest = None if self.inputs.rest is None else self.inputs.rest[..., None]
        if rest is None:
            self._divide_(inside, self.inputs.values)
            _add(inside, parts, vectors, keep=0)
            return
        if self.wide_range:
            # Subtract twice to remove rounding errors, which are divided by a tiny number then.
            _add(inside, parts, vectors, sign=-1)
            _add(_inside(parts, vectors), parts, vectors, sign=-1)
            self._divide_(inside, self.inputs.values)
        else:
            # The inverse on the rest of the space, corrected within the eigenbasis.
            other = inside.clone()
            self._divide_(other, rest)
            self._divide_(inside, self.inputs.values)
            inside -= other
            del other
        for part in parts:
            self._divide_(part, rest)
        _add(inside, parts, vectors)

    def _divide_(self, matrix: Tensor, eigenvalues: Tensor) -> None:
        """Apply the inverse to columns in the eigenbasis of the inputs, some at a time."""
        n_columns = max(1, block_size(matrix.device) // max(1, matrix.shape[:-1].numel()))
        for start in range(0, matrix.shape[-1], n_columns):
            some = slice(start, start + n_columns)
            shared = eigenvalues.shape[-1] == 1
            own = eigenvalues if shared else eigenvalues[..., some]
            self._divide_all(matrix[..., some], own[..., None, :])

    def _divide_all(self, matrix: Tensor, eigenvalues: Tensor) -> None:
        output, curvature = self.output, self.output.values[..., None] * eigenvalues + self.damping
        if output.vectors is None:
            matrix.div_(curvature)
            return
        inside = output.vectors.mT @ matrix
        if output.rest is None:
            matrix.copy_(output.vectors @ inside.div_(curvature))
            return
        for _ in range(2):
            matrix.sub_(output.vectors @ (output.vectors.mT @ matrix))
        matrix.div_(output.rest[..., None, None] * eigenvalues + self.damping)
        matrix.add_(output.vectors @ inside.div_(curvature))


def _inside(parts: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """Return the product of a matrix, in parts of its columns, with the rows of vectors."""
    total = parts[0] @ vectors[0]
    for part, rows in zip(parts[1:], vectors[1:], strict=True):
        total += part * rows if part.shape[-1] == 1 else part @ rows
    return total


def _add(
    inside: Tensor,
    parts: Sequence[Tensor],
    vectors: Sequence[Tensor],
    keep: float = 1,
    sign: float = 1,
) -> None:
    """Replace a matrix by ``keep`` times it plus ``sign`` times the columns from the eigenbasis."""
    for part, rows in zip(parts, vectors, strict=True):
        add = part.addmm_ if part.ndim == 2 else part.baddbmm_
        add(inside, rows.mT, beta=keep, alpha=sign)


def damping(alpha: float, curvature: Tensor) -> float:
    """Return the penalty, or the smallest one that keeps an unpenalised block invertible."""
    largest = float(curvature.max()) if curvature.numel() else 0.0
    return max(alpha, torch.finfo(curvature.dtype).eps * largest, 1e-30)
