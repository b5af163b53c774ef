"""Losses of linear models: value, gradient and curvature in the logits.

The logits of a regression are its predictions. Every loss is a weighted sum over samples
with weights that add up to one, so its value is a weighted mean. All arithmetic is float64.

Where several ranks fit together, arrays with one row for each sample have the samples of this
rank, and values and means are those of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sklearn_gradfeat.data import sum_over_ranks


class Loss(Protocol):
    """A smooth convex function of the logits of all training samples."""

    @property
    def quadratic_minimizer(self) -> Tensor | None:
        """Logits that minimise a quadratic loss; None for any other loss."""

    @property
    def n_outputs(self) -> int:
        """Number of logits per sample."""

    @property
    def weights(self) -> Tensor:
        """Weights of the samples, adding up to one."""

    def losses(self, logits: Tensor) -> Tensor:
        """Return the loss of every sample, unweighted, for logits (n_samples, n_outputs)."""

    def value(self, logits: Tensor) -> float:
        """Return the weighted mean loss."""

    def gradient(self, logits: Tensor, rows: slice | None = None) -> Tensor:
        """Return the derivative in the logits, optionally of some rows alone."""

    def mean_curvature(self, logits: Tensor) -> Tensor:
        """Return the weighted mean of the (n_outputs, n_outputs) Hessian blocks."""

    def curvatures(self, logits: Tensor) -> Tensor:
        """Return the weighted diagonal of the Hessian, of shape (n_samples, n_outputs)."""

    def hessians(self, logits: Tensor) -> Tensor:
        """Return the weighted Hessian blocks, of shape (n_samples, n_outputs, n_outputs)."""


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

    def losses(self, logits: Tensor) -> Tensor:
        """Return the cross-entropies."""
        return torch.logsumexp(logits, 1) - logits.gather(1, self.targets[:, None])[:, 0]

    def value(self, logits: Tensor) -> float:
        """Return the weighted mean cross-entropy."""
        return float(sum_over_ranks(self.weights @ self.losses(logits)))

    def gradient(self, logits: Tensor, rows: slice | None = None) -> Tensor:
        """Return ``w (p - onehot(y))``, optionally of some rows alone."""
        rows = rows or slice(None)
        residual = torch.softmax(logits, 1)
        residual.scatter_add_(1, self.targets[rows, None], -torch.ones_like(residual[:, :1]))
        return residual * self.weights[rows, None]

    def mean_curvature(self, logits: Tensor) -> Tensor:
        """Return the mean of ``diag(p) - p pᵀ``."""
        p = torch.softmax(logits, 1)
        weighted = self.weights[:, None] * p
        return sum_over_ranks(torch.diag(weighted.sum(0)) - weighted.T @ p)

    def curvatures(self, logits: Tensor) -> Tensor:
        """Return the weighted ``p (1 - p)``."""
        p = torch.softmax(logits, 1)
        return self.weights[:, None] * p * (1 - p)

    def hessians(self, logits: Tensor) -> Tensor:
        """Return the weighted ``diag(p) - p pᵀ``."""
        p = torch.softmax(logits, 1)
        return self.weights[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])


@dataclass(frozen=True)
class Shifted:
    """A loss of logits to which constants are added.

    Parameters
    ----------
    loss : Loss
        The loss.
    offset : tensor of shape (n_samples, n_outputs), float64
        The constants.
    """

    loss: Loss
    offset: Tensor

    @property
    def quadratic_minimizer(self) -> Tensor | None:
        """The minimiser of a quadratic loss, minus the constants."""
        minimizer = self.loss.quadratic_minimizer
        return None if minimizer is None else minimizer - self.offset

    @property
    def n_outputs(self) -> int:
        """Number of logits per sample."""
        return self.loss.n_outputs

    @property
    def weights(self) -> Tensor:
        """Weights of the samples, adding up to one."""
        return self.loss.weights

    def losses(self, logits: Tensor) -> Tensor:
        """Return the loss of every sample."""
        return self.loss.losses(logits + self.offset)

    def value(self, logits: Tensor) -> float:
        """Return the weighted mean loss."""
        return self.loss.value(logits + self.offset)

    def gradient(self, logits: Tensor, rows: slice | None = None) -> Tensor:
        """Return the derivative in the logits, optionally of some rows alone."""
        return self.loss.gradient(logits + self.offset[rows or slice(None)], rows)

    def mean_curvature(self, logits: Tensor) -> Tensor:
        """Return the weighted mean of the Hessian blocks."""
        return self.loss.mean_curvature(logits + self.offset)

    def curvatures(self, logits: Tensor) -> Tensor:
        """Return the weighted diagonal of the Hessian."""
        return self.loss.curvatures(logits + self.offset)

    def hessians(self, logits: Tensor) -> Tensor:
        """Return the weighted Hessian blocks."""
        return self.loss.hessians(logits + self.offset)


@dataclass(frozen=True)
class _SumOverOutputs:
    """A loss that is a sum over the outputs, so its Hessian is diagonal."""

    targets: Tensor
    weights: Tensor

    @property
    def quadratic_minimizer(self) -> Tensor | None:
        """None: the loss is not quadratic."""
        return None

    @property
    def n_outputs(self) -> int:
        """Number of logits per sample."""
        return int(self.targets.shape[1])

    def losses(self, logits: Tensor) -> Tensor:
        """Return the sums over the outputs."""
        return self._losses(logits).sum(1)

    def value(self, logits: Tensor) -> float:
        """Return the weighted mean of the sums."""
        return float(sum_over_ranks(self.weights @ self.losses(logits)))

    def gradient(self, logits: Tensor, rows: slice | None = None) -> Tensor:
        """Return the derivative in the logits, optionally of some rows alone."""
        rows = rows or slice(None)
        return self._slope(logits, self.targets[rows]) * self.weights[rows, None]

    def mean_curvature(self, logits: Tensor) -> Tensor:
        """Return the diagonal matrix of the weighted mean of the curvatures."""
        return torch.diag(sum_over_ranks(self.weights @ self._curvature(logits)))

    def curvatures(self, logits: Tensor) -> Tensor:
        """Return the weighted curvatures."""
        return self.weights[:, None] * self._curvature(logits)

    def hessians(self, logits: Tensor) -> Tensor:
        """Return the weighted curvatures as diagonal matrices."""
        return torch.diag_embed(self.curvatures(logits))

    def _losses(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def _slope(self, logits: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def _curvature(self, logits: Tensor) -> Tensor:
        raise NotImplementedError


class Bernoulli(_SumOverOutputs):
    """Sigmoid and binary cross-entropy, summed over independent outputs.

    Parameters
    ----------
    targets : tensor of shape (n_samples, n_outputs), float64
        Zeros and ones.
    weights : tensor of shape (n_samples,), float64
        Non-negative, adding up to one.
    """

    def _losses(self, logits: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid((2 * self.targets - 1) * logits)

    def _slope(self, logits: Tensor, targets: Tensor) -> Tensor:
        return torch.sigmoid(logits) - targets

    def _curvature(self, logits: Tensor) -> Tensor:
        p = torch.sigmoid(logits)
        return p * (1 - p)


class Squared(_SumOverOutputs):
    """Half the squared error, summed over outputs.

    Parameters
    ----------
    targets : tensor of shape (n_samples, n_outputs), float64
        The targets.
    weights : tensor of shape (n_samples,), float64
        Non-negative, adding up to one.
    """

    @property
    def quadratic_minimizer(self) -> Tensor:
        """The targets."""
        return self.targets

    def merged(self, groups: Tensor) -> Squared:
        """Return the loss with one sample for each group of equal samples, up to a constant.

        Parameters
        ----------
        groups : tensor of shape (n_samples,), int64
            The number of the group of each sample.

        Returns
        -------
        Squared
            Its weights are the sums over the groups, its targets the weighted means.
        """
        n_groups = int(groups.max()) + 1
        weights = self.weights.new_zeros(n_groups).index_add_(0, groups, self.weights)
        sums = self.targets.new_zeros(n_groups, self.n_outputs)
        sums.index_add_(0, groups, self.weights[:, None] * self.targets)
        return Squared(sums / weights.clamp(min=torch.finfo(sums.dtype).tiny)[:, None], weights)

    def mean_curvature(self, logits: Tensor) -> Tensor:
        """Return the identity."""
        return torch.eye(self.n_outputs).to(logits)

    def _losses(self, logits: Tensor) -> Tensor:
        return (logits - self.targets).square() / 2

    def _slope(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits - targets

    def _curvature(self, logits: Tensor) -> Tensor:
        return torch.ones_like(logits)


@dataclass(frozen=True)
class Huber(_SumOverOutputs):
    """Half the squared error up to ``epsilon``, linear beyond, summed over outputs.

    For an error ``e`` the loss is ``m (|e| - m / 2)`` with ``m = min(|e|, epsilon)``.

    The second derivative vanishes beyond ``epsilon``, and then says nothing about the loss closer
    to the target. The curvature here is ``epsilon / max(|e|, epsilon)``: that of the parabola
    around the target which touches the loss at ``e``. It is nowhere smaller, and never zero.

    Parameters
    ----------
    targets : tensor of shape (n_samples, n_outputs), float64
        The targets.
    weights : tensor of shape (n_samples,), float64
        Non-negative, adding up to one.
    epsilon : float
        The absolute error at which the loss turns linear.
    """

    epsilon: float

    def _losses(self, logits: Tensor) -> Tensor:
        errors = (logits - self.targets).abs()
        near = errors.clamp(max=self.epsilon)
        return near * (errors - near / 2)

    def _slope(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits - targets).clamp(-self.epsilon, self.epsilon)

    def _curvature(self, logits: Tensor) -> Tensor:
        return self.epsilon / (logits - self.targets).abs().clamp(min=self.epsilon)
