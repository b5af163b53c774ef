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
# A partial one has a third of the eigenvalues, and so many at most.
_MAX_RANK = 1024
_ITERATIONS = 3
# Largest ratio of two eigenvalues whose inverses may cancel each other in float32.
_RANGE = 1e5
# Largest ratio of the eigenvalues of a product that is computed in advance: its rounding errors
# are of the size of the largest one in all directions.
_NARROW = 100
# Arrays that only save operations are kept if they have at most so many numbers.
_TABLE = 2**18
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
    def from_matrix(cls, matrix: Tensor, largest: int = MAX_EXACT) -> Spectrum:
        """Decompose matrices of shape (..., n, n), in part where n is above the largest width."""
        home = "cpu" if matrix.device.type == "mps" else matrix.device
        n = matrix.shape[-1]
        if n <= largest:
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
    if not torch.isfinite(matrix.sum()):  # in one number, without another matrix
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
    generator, rank = torch.Generator().manual_seed(0), _rank(matrix.shape[-1])
    start = torch.randn(matrix.shape[-1], rank, generator=generator, dtype=matrix.dtype)
    basis = start.to(matrix.device).expand(*matrix.shape[:-1], rank)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, vectors = eigh((basis.mT @ matrix @ basis).double())
    return values.clamp(min=0), basis @ vectors.to(basis)


def _rank(n: int) -> int:
    """Return the number of eigenvalues of a partial decomposition."""
    return min(_MAX_RANK, n // 3)


class KroneckerInverse:
    """The inverse of ``output ⊗ inputs + alpha``, on tensors (..., n_outputs, n_inputs).

    If ``r`` is the rest of the inputs, the inverse for ``r`` is corrected in the eigenbasis::

        X = U [f(r) (Uᵀ B)] + U [(f(a) - f(r)) (Uᵀ B V)] Vᵀ,    f(a) = 1 / (g aᵀ + alpha)

    The first term is ``B / alpha`` if ``g r`` is negligible.
    """

    def __init__(self, output: Spectrum, inputs: Spectrum, alpha: float) -> None:
        self.output, self.inputs = output, inputs
        curvature = output.values[..., :, None] * inputs.values[..., None, :]
        self.damping = damping(alpha, curvature)
        self.wide_range, self._keep = False, 0.0
        self._beyond: _Reciprocals | None = None
        if inputs.rest is not None and output.values.numel():
            self._prepare_rest(inputs.rest, float(curvature.max()) if curvature.numel() else 0.0)
        less = None if inputs.rest is None or self.wide_range else inputs.rest[..., None]
        self._within = _Reciprocals(output, inputs.values, self.damping, less)

    def _prepare_rest(self, rest: Tensor, largest: float) -> None:
        """Prepare the inverse for the rest, where the largest curvature is given."""
        lowest = self.output.values.amin(-1) if self.output.rest is None else self.output.rest
        low = float((lowest * rest).min())
        high = float((self.output.values.amax(-1) * rest).max())
        self.wide_range = largest > _RANGE * (low + self.damping)
        if high <= torch.finfo(rest.dtype).eps * self.damping:
            self._keep = 1 / self.damping
            return
        narrow = high + self.damping <= _NARROW * (low + self.damping)
        self._keep = 1.0
        self._beyond = _Reciprocals(self.output, rest[..., None], self.damping, in_one=narrow)

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
        vectors = self.inputs.vectors
        with threads_for(matrix.numel() * self.inputs.values.shape[-1]):
            if vectors is None:
                self._within.multiply_(matrix)
                if bias is not None:
                    self._within.multiply_(bias, first=matrix.shape[-1])
            else:
                self._solve_(parts, vectors.split([part.shape[-1] for part in parts], -2))

    def _solve_(self, parts: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        """Do the same in the eigenbasis of the inputs, whose rows are those of the columns."""
        inside, again = _inside(parts, vectors), None
        if self.wide_range:
            # Subtract twice to remove rounding errors, which are divided by a tiny number then.
            _add(inside, parts, vectors, sign=-1)
            again = _inside(parts, vectors)
        self._within.multiply_(inside)
        if self._beyond is not None:
            for part in parts if again is None else [*parts, again]:
                self._beyond.multiply_(part)
        if again is not None:
            inside.sub_(again, alpha=self._keep)
        _add(inside, parts, vectors, keep=self._keep)


class _Reciprocals:
    """The matrix ``U f(g) Uᵀ`` of the outputs for every column in the eigenbasis of the inputs.

    Parameters
    ----------
    output : Spectrum
        The eigenvalues ``g`` and vectors ``U`` of the outputs.
    values : tensor of shape (..., n_columns) or (..., 1)
        The eigenvalues ``a`` of all columns, or the same for all.
    alpha : float
        The penalty in ``f(g) = 1 / (g a + alpha)``.
    less : tensor of shape (..., 1) or None
        Eigenvalues ``r``, for the difference ``1 / (g a + alpha) - 1 / (g r + alpha)``.
    in_one : bool
        Whether to multiply the three matrices in advance, if the product is not large. ``values``
        must be the same for all columns.
    """

    def __init__(
        self,
        output: Spectrum,
        values: Tensor,
        alpha: float,
        less: Tensor | None = None,
        *,
        in_one: bool = False,
    ) -> None:
        self.output, self.values, self.alpha, self.less = output, values, alpha, less
        self.table: Tensor | None = None
        self.product: Tensor | None = None
        vectors = output.vectors if in_one and output.rest is None else None
        if vectors is not None and vectors.numel() <= _TABLE:
            self.product = (vectors * self._scale(output.values, slice(None)).mT) @ vectors.mT
        elif output.values.numel() * values.shape[-1] <= _TABLE:
            self.table = self._scale(output.values, slice(None))

    def multiply_(self, matrix: Tensor, first: int = 0) -> None:
        """Multiply columns, of which the first one has a given number, some at a time."""
        n_columns = max(1, block_size(matrix.device) // max(1, matrix.shape[:-1].numel()))
        for start in range(0, matrix.shape[-1], n_columns):
            part = matrix[..., start : start + n_columns]
            self._multiply_(part, slice(first + start, first + start + part.shape[-1]))

    def _multiply_(self, matrix: Tensor, columns: slice) -> None:
        if self.product is not None:
            matrix.copy_(self.product @ matrix)
            return
        if self.values.shape[-1] == 1:
            columns = slice(None)
        vectors, rest = self.output.vectors, self.output.rest
        if self.table is None:
            scale = self._scale(self.output.values, columns)
        else:
            scale = self.table[..., columns]
        if vectors is None:
            matrix.mul_(scale)
            return
        inside = vectors.mT @ matrix
        if rest is None:
            _multiply_add_(matrix, vectors, inside.mul_(scale), keep=0)
            return
        # Subtract twice as in the eigenbasis of the inputs.
        _multiply_add_(matrix, vectors, inside, sign=-1)
        again, scale_of_rest = vectors.mT @ matrix, self._scale(rest[..., None], columns)
        inside.mul_(scale).sub_(again.mul_(scale_of_rest))
        _multiply_add_(matrix.mul_(scale_of_rest), vectors, inside)

    def _scale(self, output: Tensor, columns: slice) -> Tensor:
        """Return ``f`` of eigenvalues of the outputs, for some columns."""
        scale = (output[..., :, None] * self.values[..., None, columns]).add_(self.alpha)
        scale.reciprocal_()
        if self.less is not None:
            scale -= (output * self.less + self.alpha).reciprocal_()[..., :, None]
        return scale


def _inside(parts: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """Return the product of a matrix, in parts of its columns, with the rows of vectors."""
    total = parts[0] @ vectors[0]
    for part, rows in zip(parts[1:], vectors[1:], strict=True):
        if part.shape[-1] == 1:
            total.addcmul_(part, rows)
        else:
            _multiply_add_(total, part, rows)
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
        _multiply_add_(part, inside, rows.mT, keep, sign)


def _multiply_add_(
    total: Tensor, left: Tensor, right: Tensor, keep: float = 1, sign: float = 1
) -> None:
    """Replace ``total`` by ``keep`` times it plus ``sign`` times a product of matrices."""
    add = total.addmm_ if total.ndim == 2 else total.baddbmm_
    add(left, right, beta=keep, alpha=sign)


def damping(alpha: float, curvature: Tensor) -> float:
    """Return the penalty, or the smallest one that keeps an unpenalised block invertible."""
    largest = float(curvature.max()) if curvature.numel() else 0.0
    return max(alpha, torch.finfo(curvature.dtype).eps * largest, 1e-30)
