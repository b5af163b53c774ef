"""Losses of linear models: value, gradient and curvature in the logits.

Every loss is a weighted sum over samples with weights that add up to one, so that its
value is a weighted mean. All arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Loss(Protocol):
    """A smooth convex function of the logits of all training samples."""

    @property
    def n_outputs(self) -> int:
        """Number of logits per sample."""

    @property
    def weights(self) -> Tensor:
        """Weights of the samples, adding up to one."""

    def value(self, logits: Tensor) -> float:
        """Return the weighted mean loss of logits of shape (n_samples, n_outputs)."""

    def gradient(self, logits: Tensor, rows: slice | None = None) -> Tensor:
        """Return the derivative in the logits, optionally of some rows alone."""

    def mean_curvature(self, logits: Tensor) -> Tensor:
        """Return the weighted mean of the (n_outputs, n_outputs) Hessian blocks."""

    def curvatures(self, logits: Tensor) -> Tensor:
        """Return the weighted trace of the Hessian block of every sample."""


@dataclass(frozen=True)
class Multinomial:
    """Softmax and cross-entropy over ``n_outputs`` classes.

    Parameters
    ----------
    targets : tensor of shape (n_samples,), int64
        Index of the class of each sample.
    weights : tensor of shape (n_samples,), float64
        Non-negative, adding up to one.
    n_outputs : int
        Number of classes.
    """

    targets: Tensor
    weights: Tensor
    n_outputs: int

    def value(self, logits: Tensor) -> float:
        """Return the weighted mean cross-entropy."""
        chosen = logits.gather(1, self.targets[:, None])[:, 0]
        return float(self.weights @ (torch.logsumexp(logits, 1) - chosen))

    def gradient(self, logits: Tensor, rows: slice | None = None) -> Tensor:
        """Return ``w (p - onehot(y))``, of the rows that ``logits`` stand for."""
        rows = rows or slice(None)
        residual = torch.softmax(logits, 1)
        residual.scatter_add_(1, self.targets[rows, None], -torch.ones_like(residual[:, :1]))
        return residual * self.weights[rows, None]

    def mean_curvature(self, logits: Tensor) -> Tensor:
        """Return the mean of ``diag(p) - p pᵀ``."""
        p = torch.softmax(logits, 1)
        weighted = self.weights[:, None] * p
        return torch.diag(weighted.sum(0)) - weighted.T @ p

    def curvatures(self, logits: Tensor) -> Tensor:
        """Return the weighted ``Σ p (1 - p)`` of every sample."""
        p = torch.softmax(logits, 1)
        return self.weights * (p * (1 - p)).sum(1)


@dataclass(frozen=True)
class Bernoulli:
    """Sigmoid and binary cross-entropy, summed over independent outputs.

    Parameters
    ----------
    targets : tensor of shape (n_samples, n_outputs), float64
        Zeros and ones.
    weights : tensor of shape (n_samples,), float64
        Non-negative, adding up to one.
    """

    targets: Tensor
    weights: Tensor

    @property
    def n_outputs(self) -> int:
        """Number of logits per sample."""
        return int(self.targets.shape[1])

    def value(self, logits: Tensor) -> float:
        """Return the weighted mean of the summed binary cross-entropies."""
        losses = -torch.nn.functional.logsigmoid((2 * self.targets - 1) * logits)
        return float(self.weights @ losses.sum(1))

    def gradient(self, logits: Tensor, rows: slice | None = None) -> Tensor:
        """Return ``w (p - y)``, of the rows that ``logits`` stand for."""
        rows = rows or slice(None)
        return (torch.sigmoid(logits) - self.targets[rows]) * self.weights[rows, None]

    def mean_curvature(self, logits: Tensor) -> Tensor:
        """Return the diagonal matrix of the mean of ``p (1 - p)``."""
        p = torch.sigmoid(logits)
        return torch.diag(self.weights @ (p * (1 - p)))

    def curvatures(self, logits: Tensor) -> Tensor:
        """Return the weighted ``Σ p (1 - p)`` of every sample."""
        p = torch.sigmoid(logits)
        return self.weights * (p * (1 - p)).sum(1)
