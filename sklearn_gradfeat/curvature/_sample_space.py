"""What the model of all other samples predicts for each one, from one factorisation.

With squared errors, the fit is linear in the targets ``y``. Under penalties that make the Gram
matrix of the samples ``K``, and with their weights ``S``, the errors of the fit are
``S⁻¹ M⁻¹ y`` for ``M = K + S⁻¹``. The error of sample i in the fit without it is
``([M⁻¹]ᵢᵢ)⁻¹ [M⁻¹ y]ᵢ``: a number for one output, a system of a few equations for several. An
intercept without a penalty turns ``M⁻¹`` into its limit for ``K`` plus any multiple of ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sklearn_gradfeat.curvature._layer_rows import LayerCall, output_gradients, record
from sklearn_gradfeat.linearized import (
    LinearizedHead,
    TangentObjective,
    TangentTerm,
    Tensors,
    agrees,
)

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
        rows = objective.activation
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


# Where a sample weighs less than this share of its own features, float64 has no digits left for it.
_DIGITS = 1e12


def leave_one_out(objective: TangentObjective, gram: Tensor | None) -> Tensor:
    """Return what the models that lack one sample each predict for that.

    The loss without a sample is the sum of the other terms as they are, so penalties weigh as
    much as before; and ``Ω`` stays what it is.

    Parameters
    ----------
    objective : TangentObjective
        Squared errors, with penalties above zero.
    gram : tensor of shape (n_samples * n_outputs, n_samples * n_outputs) or None
        ``Ω J Jᵀ Ωᵀ`` as :func:`tangent_gram` gives it; None without displacements.

    Returns
    -------
    tensor of shape (n_samples, n_outputs), float64
        Samples of weight zero are predicted by the model of all others, which is that of all.

    Raises
    ------
    ValueError
        If penalties are so small that rounding would decide.
    """
    targets, weights = objective.loss.quadratic_minimizer, objective.loss.weights
    assert targets is not None
    kernel = _kernel(objective, gram).to(targets)
    n_outputs = targets.shape[1]
    used = (weights > 0).repeat_interleave(n_outputs)
    y = targets.reshape(-1)[used]
    system = kernel[used][:, used]
    own = 1 / weights.repeat_interleave(n_outputs)[used]
    if system.diagonal().max() > _DIGITS * own.min():
        smallest = float(objective.penalty[objective.penalty > 0].min())
        raise ValueError(
            f"cv='loo' has no digits left at penalties as small as {smallest:.3g}. "
            "Increase the smallest alphas and gradient_alphas, or set cv to a number of folds."
        )
    system.diagonal().add_(own)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    intercept = torch.zeros_like(targets[0])
    if objective.fit_intercept:
        ones = torch.eye(n_outputs).to(y).repeat(len(y) // n_outputs, 1)
        seen = inverse @ ones
        share = torch.linalg.solve(ones.T @ seen, seen.T)
        intercept = share @ y
        inverse -= seen @ share
    dual = inverse @ y
    samples = (-1, n_outputs)
    blocks = inverse.unflatten(1, samples).unflatten(0, samples).diagonal(dim1=0, dim2=2)
    errors = torch.linalg.solve(blocks.permute(2, 0, 1), dual.view(samples))
    predictions = (kernel[:, used] @ dual).view_as(targets) + intercept
    predictions[weights > 0] = targets[weights > 0] - errors
    return predictions


def _kernel(objective: TangentObjective, gram: Tensor | None) -> Tensor:
    """Return the Gram matrix of the unknowns that have penalties, in units of those.

    An intercept takes up what all samples have in common, which is taken off for its digits.
    """
    weights = objective.loss.weights
    one = torch.eye(objective.loss.n_outputs).to(weights)
    kernel = torch.zeros_like(one).repeat((objective.n_samples,) * 2)
    if objective.activation is not None:
        rows = objective.activation.to(one)
        if objective.fit_intercept:
            rows = rows - weights @ rows
        kernel += torch.kron(rows @ rows.T / objective.alpha, one)
    if objective.tangent is not None:
        assert gram is not None
        gram = gram.to(one)
        kernel += (_centred(gram, weights) if objective.fit_intercept else gram) / (
            objective.tangent.alpha
        )
    return kernel


def _centred(gram: Tensor, weights: Tensor) -> Tensor:
    """Return the Gram matrix of rows without their weighted mean, output by output."""
    pairs = gram.view(len(weights), -1, len(weights), len(gram) // len(weights))
    left = torch.einsum("i,icjd->cjd", weights, pairs)
    right = torch.einsum("icjd,j->icd", pairs, weights)
    both = torch.einsum("i,icd->cd", weights, right)
    return (pairs - left - right[:, :, None] + both[:, None]).view_as(gram)
