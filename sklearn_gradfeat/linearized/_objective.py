"""The training objective of the linear model, over every sample.

With activation ``f``, Jacobian ``J`` and fitted output weights ``Ω``, the logits

    W f + b + Ω J (s ∘ u)

are linear in the unknowns ``x = [W, b, u]``, held as one flat vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sklearn_gradfeat.linearized._jacobian import LinearizedHead, Tensors
from sklearn_gradfeat.linearized._losses import Loss

# Two maps are the same if they differ by no more than this power of the rounding unit.
_ROUNDING = 0.4


def agrees(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether outcomes of a map are the same, up to rounding in the precision of the map."""
    bound = torch.finfo(dtype).eps ** _ROUNDING * float(expected.norm())
    return bool((found - expected).norm() <= bound)


class Batches(Protocol):
    """The boundary tensors of all samples, batch by batch."""

    def __call__(self, stride: int = 1) -> Iterator[tuple[slice, Tensors]]:
        """Iterate over (rows, boundary) of every ``stride``-th sample."""


class Parts(NamedTuple):
    """The unknowns: weights (n_outputs, n_features), intercept, displacements ``u``."""

    weights: Tensor
    intercept: Tensor
    u: Tensor


@dataclass(frozen=True)
class TangentTerm:
    """The gradient features: a linearised head, its inputs and its output weights.

    Parameters
    ----------
    head : LinearizedHead
        Gives ``J u`` and ``Jᵀ g``.
    batches : callable
        ``batches()`` iterates over (rows, boundary tensors) and covers every sample once.
    omega : tensor of shape (n_outputs, n_features)
        The output weights ``Ω``.
    alpha : float
        L2 penalty on ``u``.
    """

    head: LinearizedHead
    batches: Batches
    omega: Tensor
    alpha: float


@dataclass(frozen=True)
class TangentObjective:
    """Weighted mean loss plus L2 penalties, as a function of a flat vector.

    Parameters
    ----------
    loss : Loss
        The loss, in the logits.
    activation : tensor of shape (n_samples, n_features) or None
        The activations; None leaves the weights out of the model.
    tangent : TangentTerm or None
        The gradient features; None leaves the displacements out.
    alpha : float
        L2 penalty on the weights.
    fit_intercept : bool
        Whether the intercept is free. It is never penalised.
    n_samples : int
        Number of samples.
    like : tensor
        An empty tensor with the dtype and device of the unknowns.
    accumulator : torch.device
        Where the float64 logits live.
    """

    loss: Loss
    activation: Tensor | None
    tangent: TangentTerm | None
    alpha: float
    fit_intercept: bool
    n_samples: int
    like: Tensor
    accumulator: torch.device
    sizes: tuple[int, int, int] = field(init=False)
    penalty: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Lay out the unknowns and their penalty."""
        c = self.loss.n_outputs
        d = 0 if self.activation is None else self.activation.shape[1]
        p = 0 if self.tangent is None else self.tangent.head.size
        sizes = (c * d, c if self.fit_intercept else 0, p)
        penalties = (self.alpha, 0.0, self.tangent.alpha if self.tangent else 0.0)
        penalty = torch.cat(
            [self.like.new_full((n,), v) for n, v in zip(sizes, penalties, strict=True)]
        )
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "penalty", penalty)

    def split(self, x: Tensor) -> Parts:
        """View a flat vector as its parts; parts left out are empty."""
        weights, intercept, u = torch.split(x, list(self.sizes))
        return Parts(weights.view(self.loss.n_outputs, -1), intercept, u)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, of shape (n_samples, n_outputs), float64."""
        parts = self.split(x)
        logits = self._affine(parts)
        if self.tangent is not None and bool(parts.u.any()):
            omega = self.tangent.omega
            for rows, boundary in self.tangent.batches():
                logits[rows] += self._wide(self.tangent.head.jvp(boundary, parts.u) @ omega.T)
        return logits

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """Return the transpose of :meth:`forward`, applied to ``cotangent``."""
        u = self.like.new_zeros(self.sizes[2])
        if self.tangent is not None:
            for rows, boundary in self.tangent.batches():
                u += self.tangent.head.vjp(
                    boundary, self._narrow(cotangent[rows]) @ self.tangent.omega
                )
        return self._join(cotangent, u)

    def forward_adjoint(self, direction: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the change ``D`` of the logits and the loss gradient at ``logits + D``."""
        parts = self.split(direction)
        change = self._affine(parts)
        u = self.like.new_zeros(self.sizes[2])
        if self.tangent is not None:
            omega = self.tangent.omega
            for rows, boundary in self.tangent.batches():

                def cotangent_of(tangent: Tensor, rows: slice = rows) -> Tensor:
                    change[rows] += self._wide(tangent @ omega.T)
                    residual = self.loss.gradient(logits[rows] + change[rows], rows)
                    return self._narrow(residual) @ omega

                u += self.tangent.head.jvp_then_vjp(boundary, parts.u, cotangent_of)[1]
        return change, self._join(self.loss.gradient(logits + change), u)

    def _affine(self, parts: Parts) -> Tensor:
        """Return the logits of the activation term and the intercept."""
        logits = torch.zeros(
            self.n_samples, self.loss.n_outputs, dtype=torch.float64, device=self.accumulator
        )
        if self.activation is not None:
            logits += self._wide(self.activation @ parts.weights.T)
        if self.fit_intercept:
            logits += self._wide(parts.intercept)
        return logits

    def _join(self, cotangent: Tensor, u: Tensor) -> Tensor:
        """Return the adjoint of the activation term and the intercept, with ``u``."""
        narrow = self._narrow(cotangent)
        empty = self.like.new_empty(0)
        weights = empty if self.activation is None else (narrow.T @ self.activation).reshape(-1)
        intercept = self._narrow(cotangent.sum(0)) if self.fit_intercept else empty
        return torch.cat([weights, intercept, u])

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.accumulator, torch.float64)

    def _narrow(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.like.device, self.like.dtype)
