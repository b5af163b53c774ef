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

from collections import deque
from collections.abc import Callable, Sequence
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
    """

    def __init__(self, inverse: Inverse, like: Tensor) -> None:
        self.inverse, self.scale = inverse, 1.0
        n_pairs = max(_FEWEST, min(_MOST, _ELEMENTS // (2 * len(like))))
        self._steps, self._changes = (_Vectors(n_pairs, like, n_pairs == _MOST) for _ in range(2))
        self._products = np.zeros((n_pairs, n_pairs))  # SᵀY
        self._order: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._order)

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The pairs, the oldest first."""
        order = list(self._order)
        return list(zip(self._steps.copies(order), self._changes.copies(order), strict=True))

    def clear(self) -> None:
        """Drop all pairs."""
        while self._order:
            self._drop()

    def add(self, step: Tensor, change: Tensor, preconditioned: Tensor | None = None) -> None:
        """Store a pair; ``Py``, where it is given, yields the scale.

        A pair without positive curvature beyond rounding is left out.
        """
        numbers = [step @ change, step.norm(), change.norm()]
        if preconditioned is not None:
            numbers.append(change @ preconditioned)
        curvature, *lengths = torch.stack(numbers).tolist()
        if curvature <= torch.finfo(step.dtype).eps * lengths[0] * lengths[1]:
            return
        if preconditioned is not None:
            if lengths[2] <= 0:
                return
            self.scale = curvature / lengths[2]
        if len(self) == len(self._products):
            self._drop()
        slot = next(slot for slot in range(len(self._products)) if slot not in self._order)
        found = self._steps.products(change)
        self._products[: len(found), slot] = found
        self._products[slot, slot] = curvature
        self._steps[slot], self._changes[slot] = step, change
        self._order.append(slot)

    def recall(self, former: CurvaturePairs | None, penalties: tuple[Tensor, ...]) -> None:
        """Store the pairs of another fit, corrected for the difference of the penalties."""
        pairs = [] if former is None else former.pairs
        for i, (step, change) in enumerate(pairs, start=1):
            assert former is not None
            now = add_penalised(change.clone(), penalties, step)
            now = add_penalised(now, former.penalties, step, -1)
            self.add(step, now, self.inverse(now.clone()) if i == len(pairs) else None)

    def direction(self, gradient: Tensor, preconditioned: Tensor) -> Tensor:
        """Return ``-H g``; ``Pg`` is given.

        It leaves room for the next pair: the following passes need the memory.
        """
        if not self._order:
            return -self.scale * preconditioned
        order = list(self._order)
        products = self._products[np.ix_(order, order)]
        weights = _solved(products, self._steps.products(gradient)[order])
        q = self.inverse(self._changes.add_to(gradient.clone(), order, -weights))
        rest = products.diagonal() * weights - self.scale * self._changes.products(q)[order]
        q = self._steps.add_to(q.mul_(-self.scale), order, -_solved(products, rest, trans=1))
        if len(self) == len(self._products):
            self._drop()
        return q

    def _drop(self) -> None:
        """Drop the oldest pair."""
        slot = self._order.popleft()
        self._steps.free(slot)
        self._changes.free(slot)


class _Vectors:
    """Vectors in slots; short ones are rows of a matrix, for products with all of them."""

    def __init__(self, n_slots: int, like: Tensor, as_matrix: bool) -> None:
        self._matrix = like.new_empty(n_slots, len(like)) if as_matrix else None
        self._single: list[Tensor | None] = [None] * n_slots
        self._n_used = 0

    def __setitem__(self, slot: int, vector: Tensor) -> None:
        self._n_used = max(self._n_used, slot + 1)
        if self._matrix is None:
            self._single[slot] = vector
        else:
            self._matrix[slot] = vector

    def free(self, slot: int) -> None:
        """Free the memory of a single vector."""
        self._single[slot] = None

    def copies(self, slots: Sequence[int]) -> list[Tensor]:
        """Return the vectors in these slots, which do not change any more."""
        if self._matrix is not None:
            return list(self._matrix[list(slots)])
        return [vector for slot in slots if (vector := self._single[slot]) is not None]

    def products(self, x: Tensor) -> Array:
        """Return the inner products of a vector with those in the first slots."""
        if self._matrix is not None:
            found = self._matrix[: self._n_used] @ x
        else:
            zero = x.new_zeros(())
            vectors = self._single[: self._n_used]
            found = torch.stack([zero, *(zero if v is None else v @ x for v in vectors)])[1:]
        return np.array(found.tolist())

    def add_to(self, total: Tensor, slots: Sequence[int], weights: Array) -> Tensor:
        """Add a linear combination to ``total``, and return it."""
        if self._matrix is not None:
            every = np.zeros(self._n_used)
            every[slots] = weights
            rows = self._matrix[: self._n_used]
            return total.addmv_(rows.T, torch.from_numpy(every).to(total))
        for slot, weight in zip(slots, weights.tolist(), strict=True):
            vector = self._single[slot]
            assert vector is not None
            total.add_(vector, alpha=weight)
        return total


def _solved(products: Array, right: Array, trans: int = 0) -> Array:
    """Return the solution for the upper triangle of a matrix, or for its transpose."""
    found: Array = solve_triangular(products, right, trans=trans, check_finite=False)
    return found
