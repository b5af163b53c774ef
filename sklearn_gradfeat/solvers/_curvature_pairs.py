"""Curvature pairs of limited-memory BFGS, and the direction that they give [1]_.

A pair consists of a step ``s`` and the change ``y`` of the gradient over it. With the steps as the
columns of ``S``, the changes as those of ``Y``, and an approximate inverse Hessian ``γP``, the
direction is ``-H g`` for

    H = S R⁻ᵀ D R⁻¹ Sᵀ + (I - S R⁻ᵀ Yᵀ) γP (I - Y R⁻¹ Sᵀ),

where ``R`` is the upper triangle of ``SᵀY`` with its diagonal ``D``. This is the two-loop recursion
with few operators and without a wait for every scalar product, which a GPU would be idle for.

References
----------
.. [1] R. H. Byrd, J. Nocedal, R. B. Schnabel, Representations of quasi-Newton matrices and their
   use in limited memory methods, Mathematical Programming 63, 1994.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import solve_triangular
from torch import Tensor

from sklearn_gradfeat.solvers._steps import add_penalised

# The smallest and the largest number of curvature pairs that are kept. In between, all pairs
# together have no more elements than this.
_FEWEST, _MOST = 2, 30
_ELEMENTS = 2**26
# Largest matrix of vectors, in numbers: moving its rows costs memory traffic.
_MATRIX = 2**22

Array: TypeAlias = npt.NDArray[np.float64]
# Applies a preconditioner; it may overwrite its argument.
Inverse: TypeAlias = Callable[[Tensor], Tensor]


class CurvaturePairs(NamedTuple):
    """Steps and the changes of the gradient over them, and the penalties of that objective."""

    pairs: list[tuple[Tensor, Tensor]]
    penalties: tuple[Tensor, ...]


class InverseHessian:
    """The approximate inverse Hessian of L-BFGS.

    Parameters
    ----------
    inverse : callable
        Applies ``P``.
    like : tensor of shape (n,)
        A vector of unknowns.

    Attributes
    ----------
    scale : float
        The factor ``γ``.
    products : ndarray of shape (n_pairs, n_pairs)
        The upper triangle is that of ``SᵀY``.
    """

    def __init__(self, inverse: Inverse, like: Tensor) -> None:
        self.inverse, self.scale = inverse, 1.0
        self._most = max(_FEWEST, min(_MOST, _ELEMENTS // (2 * len(like))))
        self._steps, self._changes = (_Vectors(self._most, len(like)) for _ in range(2))
        self.products = np.empty((0, 0))

    def __len__(self) -> int:
        return len(self.products)

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The pairs, the oldest first."""
        return list(zip(self._steps.copies(), self._changes.copies(), strict=True))

    def clear(self) -> None:
        """Free all pairs."""
        self._steps.clear()
        self._changes.clear()
        self.products = np.empty((0, 0))

    def add(self, step: Tensor, change: Tensor, preconditioned: Tensor | None = None) -> None:
        """Store a pair; ``Py``, where it is given, yields the scale.

        A pair without positive curvature beyond rounding is left out.
        """
        numbers = [step @ change, step.norm(), change.norm()]
        if preconditioned is not None:
            numbers.append(change @ preconditioned)
        curvature, *lengths = torch.stack(numbers).tolist()
        if not curvature > torch.finfo(step.dtype).eps * lengths[0] * lengths[1]:
            return
        if preconditioned is not None:
            if not lengths[2] > 0:
                return
            self.scale = curvature / lengths[2]
        if len(self) == self._most:
            self._drop()
        n = len(self)
        products = np.zeros((n + 1, n + 1))
        products[:n, :n], products[:n, n] = self.products, self._steps.products(change)
        products[n, n] = curvature
        self.products = products
        self._steps.append(step)
        self._changes.append(change)

    def recall(self, former: CurvaturePairs | None, penalties: tuple[Tensor, ...]) -> None:
        """Store the pairs of another fit, corrected for the difference of the penalties."""
        if former is None:
            return
        for step, change in former.pairs:
            now = add_penalised(change.clone(), penalties, step)
            self.add(step, add_penalised(now, former.penalties, step, -1))
        if len(self):
            last = self._changes.last
            metric = float(last @ self.inverse(last.clone()))
            self.scale = float(self.products[-1, -1]) / metric if metric > 0 else 1.0

    def direction(self, gradient: Tensor, preconditioned: Tensor) -> Tensor:
        """Return ``-H g``; ``Pg`` is given.

        It leaves room for the next pair: the following passes need the memory.
        """
        if not len(self):
            return -self.scale * preconditioned
        weights = _solved(self.products, self._steps.products(gradient))
        q = self.inverse(self._changes.add_to(gradient.clone(), -weights))
        rest = self.products.diagonal() * weights - self.scale * self._changes.products(q)
        q = self._steps.add_to(q.mul_(-self.scale), -_solved(self.products, rest, trans=1))
        if len(self) == self._most:
            self._drop()
        return q

    def _drop(self) -> None:
        """Drop the oldest pair."""
        self._steps.drop()
        self._changes.drop()
        self.products = self.products[1:, 1:]


class _Vectors:
    """Vectors in a queue; short ones are rows of a matrix, for products with all of them.

    The vectors are always in the first rows: a product with other rows has other last digits.
    """

    def __init__(self, most: int, size: int) -> None:
        self._shape = (most, size) if most * size <= _MATRIX else None
        self._matrix: Tensor | None = None
        self._vectors: list[Tensor] = []  # views of the rows, if there is a matrix

    @property
    def last(self) -> Tensor:
        """The vector that was added last."""
        return self._vectors[-1]

    def append(self, vector: Tensor) -> None:
        """Add a vector."""
        if self._shape is not None:
            if self._matrix is None:
                self._matrix = vector.new_empty(self._shape)
            vector = self._matrix[len(self._vectors)].copy_(vector)
        self._vectors.append(vector)

    def drop(self) -> None:
        """Drop the first vector."""
        if self._matrix is None:
            del self._vectors[0]
            return
        n = len(self._vectors) - 1
        self._matrix = self._matrix.roll(-1, 0)
        self._vectors = list(self._matrix[:n])

    def clear(self) -> None:
        """Free all vectors."""
        self._matrix, self._vectors = None, []

    def copies(self) -> list[Tensor]:
        """Return the vectors, which do not change any more.

        Each has memory of its own: the last digits of a product depend on the alignment.
        """
        if self._matrix is None:
            return list(self._vectors)
        return [vector.clone() for vector in self._vectors]

    def products(self, x: Tensor) -> Array:
        """Return the inner products with a vector."""
        if not self._vectors:
            return np.empty(0)
        if self._matrix is None:
            found = torch.stack([vector @ x for vector in self._vectors])
        else:
            found = self._matrix[: len(self._vectors)] @ x
        return np.array(found.tolist())

    def add_to(self, total: Tensor, weights: Array) -> Tensor:
        """Add a linear combination to ``total``, and return it."""
        if self._matrix is not None:
            rows = self._matrix[: len(self._vectors)]
            return total.addmv_(rows.T, torch.from_numpy(weights).to(total))
        for vector, weight in zip(self._vectors, weights.tolist(), strict=True):
            total.add_(vector, alpha=weight)
        return total


def _solved(products: Array, right: Array, trans: int = 0) -> Array:
    """Return the solution for the upper triangle of a matrix, or for its transpose."""
    found: Array = solve_triangular(products, right, trans=trans, check_finite=False)
    return found
