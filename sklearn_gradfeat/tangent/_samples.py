"""The inverse Hessian of a :class:`TangentObjective` by way of its samples.

With few samples, the linear map ``A`` to the logits has fewer rows than columns. Woodbury's
identity then gives the inverse of ``Aᵀ S A + D``, for the curvatures ``S`` of the loss and the
penalties ``D``, from the Gram matrix ``A D⁻¹ Aᵀ``. For linear layers that see one row of each
sample, that matrix is a product of two small ones, so no gradient feature is formed here either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sklearn_gradfeat.tangent._head import LinearizedHead
from sklearn_gradfeat.tangent._objective import TangentObjective, TangentTerm, agrees
from sklearn_gradfeat.tangent._patches import LayerCall, output_gradients, record
from sklearn_gradfeat.tangent._products import Tensors

# Samples times outputs. A Gram matrix of this size is 128 MiB, and factored in seconds.
MAX_ROWS = 4096
# A block without a penalty gets this share of its curvature as one. More would make the inverse
# less exact there, less would cost digits everywhere.
_FLOOR = 1e-6


class SampleInverse:
    """Inverse Hessian, exact where the loss has no curvature between outputs.

    Parameters
    ----------
    objective : TangentObjective
        The objective, in float64.
    gram : tensor of shape (n_samples * n_outputs, n_samples * n_outputs)
        ``Ω J Jᵀ Ωᵀ`` as :func:`tangent_gram` gives it.
    logits : tensor of shape (n_samples, n_outputs)
        Where the curvature of the loss is taken.
    """

    def __init__(self, objective: TangentObjective, gram: Tensor, logits: Tensor) -> None:
        weights, n_outputs = objective.loss.weights, objective.loss.n_outputs
        rows = objective.features
        inner = gram.new_zeros(2 * weights.shape) if rows is None else rows @ rows.T
        of_sample = gram.diagonal().view(-1, n_outputs).sum(1)
        levels = (
            _level(objective.alpha, weights @ inner.diagonal()),
            _FLOOR,
            _level(float(objective.penalty[-1]), weights @ of_sample),
        )
        shared = inner / levels[0] + (1 / levels[1] if objective.fit_intercept else 0.0)
        self.objective = objective
        self.root = objective.loss.curvatures(logits).sqrt()
        scale = self.root.reshape(-1)
        system = gram / levels[2] + torch.kron(shared, torch.eye(n_outputs).to(shared))
        system *= scale[:, None] * scale
        system.diagonal().add_(1.0)
        self.factor = torch.linalg.cholesky(system)
        pairs = zip(objective.sizes, levels, strict=True)
        self.penalty = torch.cat([objective.like.new_full((n,), level) for n, level in pairs])

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the inverse to a flat vector."""
        x = x / self.penalty
        seen = (self.root * self.objective.forward(x)).reshape(-1, 1)
        solved = torch.cholesky_solve(seen, self.factor).view_as(self.root)
        return x - self.objective.adjoint(self.root * solved) / self.penalty


def _level(penalty: float, curvature: Tensor) -> float:
    """Return the penalty of a block, or a small one where there is none."""
    return max(penalty, _FLOOR * float(curvature)) or 1.0


def tangent_gram(tangent: TangentTerm, n_samples: int) -> Tensor | None:
    """Return ``Ω J Jᵀ Ωᵀ``, over pairs of sample and output, where it is cheap.

    None for many samples, and for parameters of anything but linear layers that see one row of
    each sample, and are used nowhere else.
    """
    omega = tangent.omega
    if n_samples * len(omega) > MAX_ROWS:
        return None
    batches = []
    for rows, boundary in tangent.batches():
        layers = _layer_rows(tangent.head, omega, boundary, rows.stop - rows.start)
        if layers is None:
            return None
        batches.append(layers)
    gram = omega.new_zeros(())
    pairs = torch.ones_like(omega @ omega.T)
    for layer in zip(*batches, strict=True):
        inputs, gradients = (torch.cat(parts) for parts in zip(*layer, strict=True))
        gradients = gradients.flatten(0, 1)
        gram = gram + torch.kron(inputs @ inputs.T, pairs) * (gradients @ gradients.T)
    return gram if _is_gram(gram, tangent, n_samples) else None


def _is_gram(gram: Tensor, tangent: TangentTerm, n_samples: int) -> bool:
    """Whether the matrix does to random numbers what the tangent products do.

    It does not where anything but the recorded layers uses their parameters.
    """
    generator = torch.Generator().manual_seed(0)
    size = (n_samples, len(tangent.omega))
    given = torch.randn(size, generator=generator, dtype=torch.float64).to(tangent.omega)
    u = given.new_zeros(tangent.head.size)
    for rows, boundary in tangent.batches():
        u += tangent.head.vjp(boundary, given[rows] @ tangent.omega)
    expected = torch.empty_like(given)
    for rows, boundary in tangent.batches():
        expected[rows] = tangent.head.jvp(boundary, u) @ tangent.omega.T
    return agrees((gram @ given.reshape(-1)).view_as(expected), expected, given.dtype)


def _layer_rows(
    head: LinearizedHead, omega: Tensor, boundary: Tensors, n_samples: int
) -> list[tuple[Tensor, Tensor]] | None:
    """Return what meets the weight and the bias of every layer, and what leaves it.

    Scaled inputs of shape (n_samples, n_inputs) and gradients of the logits in the output,
    (n_samples, n_outputs, width); None where those are not all that there is.
    """
    activation, calls = record(head, boundary, differentiable=True)
    if not _all_linear(calls, len(head.values), n_samples):
        return None
    gradients = output_gradients(activation, calls, omega)
    inputs = [call.scaled_rows(head.values, head.scales, n_samples)[0, :, 0] for call in calls]
    return [(a, torch.stack(g, 1)) for a, *g in zip(inputs, *gradients, strict=True)]


def _all_linear(calls: list[LayerCall], n_parameters: int, n_samples: int) -> bool:
    """Whether every parameter belongs to a linear layer that sees each sample once."""
    covered = [call.weight for call in calls] + [c.bias for c in calls if c.bias is not None]
    return sorted(covered) == list(range(n_parameters)) and all(
        call.kind == "linear" and call.inputs.shape[:-1] == (n_samples,) for call in calls
    )
