"""The training objective of the linear model, over all samples.

The logits of a sample are, with its activation ``f`` and its Jacobian ``J`` in θ₂, ::

    b + W f + Ω J (s ∘ u)

They are linear in the unknowns ``x = [W, b, u]``, held as one flat vector; ``Ω`` is fixed, and
``s`` holds the scales of the parametrization. The objective is ::

    Σᵢ ωᵢ loss(logitsᵢ, yᵢ)  +  alpha/2 ‖W‖²  +  gradient_alpha/2 ‖u‖²

with sample weights ``ωᵢ`` that add up to one. A solver needs the linear map from ``x`` to the
logits (a Jacobian-vector product), its adjoint (a vector-Jacobian product), and both in one pass.
Logits are always float64.

Where several ranks fit together, logits are those of the samples of a rank, and an adjoint is the
sum over the samples of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sklearn_gradfeat.backbones import threads_for
from sklearn_gradfeat.data import BatchSize, Result, sum_over_ranks
from sklearn_gradfeat.linearized._jacobian import LinearizedHead, Tensors
from sklearn_gradfeat.linearized._logits import linear_logits
from sklearn_gradfeat.linearized._losses import Loss

# Largest relative difference of results that agree, as a power of the machine epsilon.
_ROUNDING = 0.4


def agrees(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two results are equal up to rounding errors of ``dtype``, row by row.

    A row is the last axis. Errors are relative to its norm, and to that of a typical row.
    """
    size = expected.norm(dim=-1)
    bound = torch.finfo(dtype).eps ** _ROUNDING * (size + size.square().mean().sqrt())
    return bool(((found - expected).norm(dim=-1) <= bound).all())


class Batches(Protocol):
    """The inputs of the head for all samples, batch by batch."""

    def __call__(self, stride: int = 1) -> Iterator[tuple[slice, Tensors]]:
        """Iterate over (rows, boundary tensors) of every ``stride``-th sample."""


@dataclass(frozen=True)
class TangentTerm:
    """The gradient term ``Ω J u`` of all samples, and its adjoint.

    ``J`` here is the Jacobian in ``u``, with the scales of the parametrization.

    Parameters
    ----------
    head : LinearizedHead
        Computes ``J u`` and ``Jᵀ g`` for a batch.
    batches : callable
        ``batches()`` iterates over (rows, boundary tensors) and covers every sample once.
    omega : tensor of shape (n_outputs, n_features)
        The output weights ``Ω``.
    alpha : float
        L2 penalty on ``u``.
    batch_size : BatchSize or None
        The size of the batches. It is halved, and a pass repeated, where memory runs out.
    empty : callable or None
        Returns an uninitialised tensor of a shape with one row for each sample, where such tensors
        may not be in memory. None creates them like ``omega``.
    """

    head: LinearizedHead
    batches: Batches
    omega: Tensor
    alpha: float
    batch_size: BatchSize | None = None
    empty: Callable[..., Tensor] | None = None

    def few(self, n_samples: int, n: int = 2) -> Tensors:
        """Return the boundary tensors of at most ``n`` of the ``n_samples`` samples."""
        _, boundary = next(iter(self.batches(math.ceil(n_samples / n))))
        return boundary

    def add_forward(self, u: Tensor, logits: Tensor) -> Tensor:
        """Return ``logits + Ω J u``."""

        def forward_pass() -> Tensor:
            total = logits.clone()
            for rows, boundary in self.batches():
                total[rows] += self._logits(self.head.jvp(boundary, u)).to(logits)
            return total

        return self.retry(forward_pass)

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """Return ``Σᵢ Jᵢᵀ Ωᵀ cotangentᵢ``."""

        def adjoint_pass() -> Tensor:
            u = self.omega.new_zeros(self.head.size)
            for rows, boundary in self.batches():
                self.head.vjp(boundary, self._pulled(cotangent[rows]), u)
            return u

        return self.retry(adjoint_pass)

    def add_forward_adjoint(
        self, u: Tensor, logits: Tensor, cotangent_of: Callable[[slice, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return ``logits + Ω J u`` and its adjoint at ``cotangent_of(rows, logits)``, in one pass.

        The cotangent of a batch may depend on the logits of that batch alone.
        """

        def both() -> tuple[Tensor, Tensor]:
            total, pulled = logits.clone(), self.omega.new_zeros(self.head.size)
            for rows, boundary in self.batches():

                def cotangent(tangent: Tensor, rows: slice = rows) -> Tensor:
                    total[rows] += self._logits(tangent).to(logits)
                    return self._pulled(cotangent_of(rows, total[rows]))

                self.head.jvp_then_vjp(boundary, u, cotangent, pulled)
            return total, pulled

        return self.retry(both)

    def _logits(self, tangent: Tensor) -> Tensor:
        return linear_logits(tangent=tangent, omega=self.omega)

    def _pulled(self, cotangent: Tensor) -> Tensor:
        return cotangent.to(self.omega) @ self.omega

    def retry(self, compute: Callable[[], Result]) -> Result:
        """Return ``compute()``, repeated in smaller batches where memory runs out."""
        return compute() if self.batch_size is None else self.batch_size.retry(compute)


class Parts(NamedTuple):
    """The unknowns: weights (n_outputs, n_features), intercept, scaled displacements ``u``."""

    weights: Tensor
    intercept: Tensor
    u: Tensor


@dataclass(frozen=True)
class TangentObjective:
    """Weighted mean loss plus L2 penalties, as a function of a flat vector.

    Parameters
    ----------
    loss : Loss
        The loss, as a function of the logits.
    activation : tensor of shape (n_samples, n_features) or None
        The activations; None leaves ``W`` out of the model.
    tangent : TangentTerm or None
        The gradient term; None leaves ``u`` out of the model.
    alpha : float
        L2 penalty on ``W``.
    fit_intercept : bool
        Whether the intercept is free. It is never penalised.
    n_samples : int
        Number of samples.
    like : tensor
        An empty tensor with the dtype and device of the unknowns.
    accumulator : torch.device
        The device of the float64 logits.
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
    penalties: Tensors = field(init=False)

    def __post_init__(self) -> None:
        """Lay out the unknowns and their penalties."""
        c = self.loss.n_outputs
        d = 0 if self.activation is None else self.activation.shape[1]
        p = 0 if self.tangent is None else self.tangent.head.size
        sizes = (c * d, c if self.fit_intercept else 0, p)
        penalties = (self.alpha, 0.0, self.tangent.alpha if self.tangent else 0.0)
        blocks = tuple(
            self.like.new_full((), v).expand(n) for n, v in zip(sizes, penalties, strict=True)
        )
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "penalties", blocks)

    @property
    def penalty(self) -> Tensor:
        """The coefficients of the penalty as one vector, which takes memory."""
        return torch.cat(self.penalties)

    def split(self, x: Tensor) -> Parts:
        """View a flat vector as its parts; parts that the model lacks are empty."""
        weights, intercept, u = torch.split(x, list(self.sizes))
        return Parts(weights.view(self.loss.n_outputs, -1), intercept, u)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, of shape (n_samples, n_outputs), float64."""
        parts = self.split(x)
        logits = self._affine(parts)
        if self.tangent is None or not bool(parts.u.any()):
            return logits
        return self.tangent.add_forward(parts.u, logits)

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """Return the transpose of :meth:`forward`, applied to ``cotangent``."""
        return sum_over_ranks(self.part_of_adjoint(cotangent))

    def part_of_adjoint(self, cotangent: Tensor) -> Tensor:
        """Return the part of :meth:`adjoint` that comes from the samples of this rank."""
        u = self.like.new_empty(0) if self.tangent is None else self.tangent.adjoint(cotangent)
        return self._join(cotangent, u)

    def forward_adjoint(self, direction: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the change ``D`` of the logits and ``Aᵀ loss'(logits + D)``, in one pass."""
        parts = self.split(direction)
        change, u = self._affine(parts), self.like.new_empty(0)
        if self.tangent is not None:
            change, u = self.tangent.add_forward_adjoint(
                parts.u, change, lambda rows, moved: self.loss.gradient(logits[rows] + moved, rows)
            )
        return change, sum_over_ranks(self._join(self.loss.gradient(logits + change), u))

    def _affine(self, parts: Parts) -> Tensor:
        """Return ``b + W f``."""
        logits = torch.zeros(
            self.n_samples, self.loss.n_outputs, dtype=torch.float64, device=self.accumulator
        )
        if self.activation is not None:
            with threads_for(self.activation.numel() * self.loss.n_outputs):
                logits += linear_logits(self.activation, weights=parts.weights).to(logits)
        if self.fit_intercept:
            logits += parts.intercept.to(logits)
        return logits

    def _join(self, cotangent: Tensor, u: Tensor) -> Tensor:
        """Return the adjoint of ``b + W f``, followed by ``u``."""
        narrow = cotangent.to(self.like)
        weights = intercept = self.like.new_empty(0)
        if self.activation is not None:
            with threads_for(self.activation.numel() * self.loss.n_outputs):
                weights = (narrow.T @ self.activation).reshape(-1)
        if self.fit_intercept:
            intercept = cotangent.sum(0).to(self.like)
        return torch.cat([weights, intercept, u])
