"""The gradient term from the gradients of the logits, kept as a matrix.

With the rows ``Ω J`` of every sample and logit, ``Ω J u`` and its adjoint are matrix products. They
need no network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sklearn_gradfeat.backbones import threads_for
from sklearn_gradfeat.linearized._objective import TangentTerm

# Numbers that a CPU multiplies at once in both directions: they stay in its cache.
_BLOCK = 2**19


@dataclass(frozen=True, kw_only=True)
class ExplicitTerm(TangentTerm):
    """The gradient term ``Ω J u`` from explicit rows.

    Parameters
    ----------
    rows : tensor of shape (n_samples, n_outputs, n)
        ``Ω J`` of every sample, with the scales of the parametrization.
    """

    rows: Tensor

    @classmethod
    def from_rows(cls, term: TangentTerm, rows: Tensor) -> ExplicitTerm:
        """Return a term with explicit rows."""
        return cls(**(vars(term) | {"rows": rows}))

    def add_forward(self, u: Tensor, logits: Tensor) -> Tensor:
        """Return ``logits + Ω J u``."""
        total = logits.clone()
        for some, rows in self._blocks():
            total[some] += _forward(rows, u, logits)
        return total

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """Return ``Σᵢ Jᵢᵀ Ωᵀ cotangentᵢ``."""
        u = self.rows.new_zeros(self.rows.shape[2])
        for some, rows in self._blocks():
            u += _adjoint(rows, cotangent[some])
        return u

    def add_forward_adjoint(
        self, u: Tensor, logits: Tensor, cotangent_of: Callable[[slice, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return ``logits + Ω J u`` and its adjoint at ``cotangent_of(rows, logits)``.

        The cotangent of a block may depend on the logits of that block alone.
        """
        total, pulled = logits.clone(), torch.zeros_like(u)
        for some, rows in self._blocks():
            total[some] += _forward(rows, u, logits)
            pulled += _adjoint(rows, cotangent_of(some, total[some]))
        return total, pulled

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Iterate over blocks of samples, and their rows."""
        n_samples, n_outputs, n = self.rows.shape
        in_cache = max(1, _BLOCK // max(1, n_outputs * n))
        size = in_cache if self.rows.device.type == "cpu" else n_samples
        with threads_for(self.rows.numel()):
            for start in range(0, n_samples, size):
                some = slice(start, start + size)
                yield some, self.rows[some]


def _forward(rows: Tensor, u: Tensor, like: Tensor) -> Tensor:
    return (rows.flatten(0, 1) @ u).view(rows.shape[:2]).to(like)


def _adjoint(rows: Tensor, cotangent: Tensor) -> Tensor:
    return cotangent.to(rows).reshape(-1) @ rows.flatten(0, 1)
