"""Losses of linear models: value, gradient and curvature in the logits.

The logits of a regression are its predictions. Every loss is a weighted sum over samples
with weights that add up to one, so that its value is a weighted mean. All arithmetic is
float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Loss(Protocol):
    """A smooth convex function of the logits of all training samples."""

    @property
    def quadratic_minimizer(self) -> Tensor | None:
        """Logits where the gradient of a quadratic loss vanishes; None for any other loss."""

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
        """Return the weighted diagonal of the Hessian block of every sample."""


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

    quadratic_minimizer: ClassVar[None] = None
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
        """Return the weighted ``p (1 - p)``."""
        p = torch.softmax(logits, 1)
        return self.weights[:, None] * p * (1 - p)


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

    quadratic_minimizer: ClassVar[None] = None
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
        """Return the weighted ``p (1 - p)``."""
        p = torch.sigmoid(logits)
        return self.weights[:, None] * p * (1 - p)


@dataclass(frozen=True)
class Squared:
    """Half the squared error, summed over outputs.

    Parameters
    ----------
    targets : tensor of shape (n_samples, n_outputs), float64
        What to predict.
    weights : tensor of shape (n_samples,), float64
        Non-negative, adding up to one.
    """

    targets: Tensor
    weights: Tensor

    @property
    def quadratic_minimizer(self) -> Tensor:
        """The targets."""
        return self.targets

    @property
    def n_outputs(self) -> int:
        """Number of predictions per sample."""
        return int(self.targets.shape[1])

    def value(self, logits: Tensor) -> float:
        """Return half the weighted mean of the summed squared errors."""
        return float(self.weights @ (logits - self.targets).square().sum(1)) / 2

    def gradient(self, logits: Tensor, rows: slice | None = None) -> Tensor:
        """Return the weighted errors of the rows that ``logits`` stand for."""
        rows = rows or slice(None)
        return (logits - self.targets[rows]) * self.weights[rows, None]

    def mean_curvature(self, logits: Tensor) -> Tensor:
        """Return the identity."""
        return torch.eye(self.n_outputs).to(logits)

    def curvatures(self, logits: Tensor) -> Tensor:
        """Return the weights."""
        return self.weights[:, None].expand_as(self.targets)


@dataclass(frozen=True)
class Huber:
    """Half the squared error up to ``epsilon``, linear beyond, summed over outputs.

    Beyond ``epsilon`` the second derivative is zero, and says nothing of what a step towards
    the target meets. The curvature here is that of the parabola around the target which
    touches the loss at the error: no smaller anywhere, and never zero.

    Parameters
    ----------
    targets : tensor of shape (n_samples, n_outputs), float64
        What to predict.
    weights : tensor of shape (n_samples,), float64
        Non-negative, adding up to one.
    epsilon : float
        The absolute error at which the loss turns linear.
    """

    quadratic_minimizer: ClassVar[None] = None
    targets: Tensor
    weights: Tensor
    epsilon: float

    @property
    def n_outputs(self) -> int:
        """Number of predictions per sample."""
        return int(self.targets.shape[1])

    def value(self, logits: Tensor) -> float:
        """Return the weighted mean of the summed losses."""
        errors = (logits - self.targets).abs()
        near = errors.clamp(max=self.epsilon)
        return float(self.weights @ (near * (errors - near / 2)).sum(1))

    def gradient(self, logits: Tensor, rows: slice | None = None) -> Tensor:
        """Return the weighted clipped errors of the rows that ``logits`` stand for."""
        rows = rows or slice(None)
        errors = (logits - self.targets[rows]).clamp(-self.epsilon, self.epsilon)
        return errors * self.weights[rows, None]

    def mean_curvature(self, logits: Tensor) -> Tensor:
        """Return the diagonal matrix of the mean curvature of every output."""
        return torch.diag(self.weights @ self._curvature(logits))

    def curvatures(self, logits: Tensor) -> Tensor:
        """Return the weighted curvatures."""
        return self.weights[:, None] * self._curvature(logits)

    def _curvature(self, logits: Tensor) -> Tensor:
        return self.epsilon / (logits - self.targets).abs().clamp(min=self.epsilon)
