"""The inverse Hessian and leave-one-out predictions, in the space of samples.

With few samples, a system in all pairs of sample and output is smaller than one in the unknowns.
Let ``A`` be the map from the unknowns to the logits, ``Λ`` the penalties, ``S`` the curvatures of
the loss in the logits, as a diagonal matrix, and ``K = A Λ⁻¹ Aᵀ`` the Gram matrix.

*Inverse Hessian*, by the Woodbury identity, with ``R = S^½``::

    (Aᵀ S A + Λ)⁻¹ = Λ⁻¹ - Λ⁻¹ Aᵀ R (I + R K R)⁻¹ R A Λ⁻¹

It is exact if the loss has no curvature between outputs: squared errors, binary cross-entropy.

*Leave-one-out.* With squared errors and sample weights ``S``, the fit to targets ``y`` has the
errors ``S⁻¹ M⁻¹ y``, for ``M = K + S⁻¹``. The fit without sample i predicts it with the error::

    ([M⁻¹]ᵢᵢ)⁻¹ [M⁻¹ y]ᵢ

where ``[M⁻¹]ᵢᵢ`` is a block of n_outputs rows. A free intercept has no penalty: then ``M⁻¹``
stands for its limit, as the intercept's part of ``K`` goes to infinity.

The Gram matrix of the displacements, ``Ω J Jᵀ Ωᵀ``, is cheap for linear layers that see each
sample once, with input ``a`` and gradient ``g`` of a logit: a layer adds ``(aᵀa') (gᵀg')``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sklearn_gradfeat.backbones import threads_for
from sklearn_gradfeat.curvature._layer_rows import LayerCall, output_gradients, record
from sklearn_gradfeat.curvature._spectrum import STEPS
from sklearn_gradfeat.linearized import (
    LinearizedHead,
    TangentObjective,
    TangentTerm,
    Tensors,
    agrees,
)

# Largest n_samples * n_outputs. A Gram matrix of this width takes 128 MiB, its factorisation
# seconds.
MAX_ROWS = 4096
# An unpenalised block gets this share of its curvature as its penalty. A larger share makes the
# inverse less exact there, a smaller one costs digits everywhere.
_FLOOR = 1e-6


class SampleInverse:
    """Inverse Hessian, exact if the loss has no curvature between outputs.

    Parameters
    ----------
    objective : TangentObjective
        The objective, in float64. Its linear map is that of the samples of the Gram matrix.
    gram : tensor of shape (n_samples * n_outputs, n_samples * n_outputs)
        ``Ω J Jᵀ Ωᵀ``.
    curvatures : tensor of shape (n_samples, n_outputs)
        Curvatures of the loss in the logits of these samples.
    weights : tensor of shape (n_samples,)
        Weights of the samples.
    """

    def __init__(
        self, objective: TangentObjective, gram: Tensor, curvatures: Tensor, weights: Tensor
    ) -> None:
        n_outputs, rows = objective.loss.n_outputs, objective.activation
        inner = gram.new_zeros(2 * weights.shape) if rows is None else rows @ rows.T
        of_sample = gram.diagonal().view(-1, n_outputs).sum(1)
        assert objective.tangent is not None
        levels = (
            _level(objective.alpha, weights @ inner.diagonal()),
            _FLOOR,
            _level(objective.tangent.alpha, weights @ of_sample),
        )
        shared = inner / levels[0] + (1 / levels[1] if objective.fit_intercept else 0.0)
        self.objective = objective
        self.root = curvatures.sqrt()
        scale = self.root.reshape(-1)
        system = gram / levels[2] + torch.kron(shared, torch.eye(n_outputs).to(shared))
        system *= scale[:, None] * scale
        system.diagonal().add_(1.0)
        with threads_for(len(system) ** 3 / STEPS):
            self.factor = torch.linalg.cholesky(system)
        pairs = zip(objective.sizes, levels, strict=True)
        self.penalty = torch.cat([objective.like.new_full((n,), level) for n, level in pairs])

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the inverse to a flat vector."""
        wide = x.to(self.penalty) / self.penalty
        seen = (self.root * self.objective.forward(wide)).reshape(-1, 1)
        solved = torch.cholesky_solve(seen, self.factor).view_as(self.root)
        pulled = self.objective.part_of_adjoint(self.root * solved)
        return (wide - pulled / self.penalty).to(x)


def _level(penalty: float, curvature: Tensor) -> float:
    """Return the penalty of a block, at least a small share of its curvature."""
    return max(penalty, _FLOOR * float(curvature)) or 1.0


def tangent_gram(tangent: TangentTerm, n_samples: int) -> Tensor | None:
    """Return ``Ω J Jᵀ Ωᵀ`` over pairs of sample and output, or None if it is not cheap.

    It is cheap for few samples and for parameters of linear layers that see one row of each
    sample, if the parameters have no other use.

    Parameters
    ----------
    tangent : TangentTerm
        The gradient term.
    n_samples : int
        Number of samples.

    Returns
    -------
    tensor of shape (n_samples * n_outputs, n_samples * n_outputs) or None
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
    """Return whether the matrix agrees with the Jacobian products on a random vector.

    It does not if a parameter has another use besides the recorded layers.
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
    """Return inputs and gradients of every layer, or None if these do not determine ``J``.

    Scaled inputs have shape (n_samples, n_inputs), gradients of the logits in the output of the
    layer (n_samples, n_outputs, width).
    """
    activation, calls = record(head, boundary, differentiable=True)
    if not _all_linear(calls, len(head.values), n_samples):
        return None
    gradients = [
        [call.output_rows(g, n_samples)[0, :, 0] for call, g in zip(calls, pulled, strict=True)]
        for pulled in output_gradients(activation, calls, omega)
    ]
    inputs = [call.scaled_rows(head.values, head.scales, n_samples)[0, :, 0] for call in calls]
    return [(a, torch.stack(g, 1)) for a, *g in zip(inputs, *gradients, strict=True)]


def _all_linear(calls: list[LayerCall], n_parameters: int, n_samples: int) -> bool:
    """Return whether every parameter belongs to a linear layer that sees each sample once."""
    covered = [call.weight for call in calls] + [c.bias for c in calls if c.bias is not None]
    return sorted(covered) == list(range(n_parameters)) and all(
        call.kind == "linear" and call.inputs.shape[:-1].numel() == n_samples for call in calls
    )


# Largest ratio of a diagonal entry of K to the smallest one of S⁻¹; beyond, float64 has no digits
# left for the errors.
_DIGITS = 1e12


def leave_one_out(
    objective: TangentObjective, gram: Tensor | None, inner: Tensor | None = None
) -> Tensor:
    """Return the leave-one-out predictions.

    Leaving a sample out removes its term from the loss. The weights of the other samples, the
    penalties and ``Ω`` remain the same.

    Parameters
    ----------
    objective : TangentObjective
        Squared errors, with penalties above zero.
    gram : tensor of shape (n_samples * n_outputs, n_samples * n_outputs) or None
        ``Ω J Jᵀ Ωᵀ`` from :func:`tangent_gram`; None without displacements.
    inner : tensor of shape (n_samples, n_samples) or None
        The result of :func:`activation_gram`; None computes it.

    Returns
    -------
    tensor of shape (n_samples, n_outputs), float64
        The model of all samples predicts samples of weight zero.

    Raises
    ------
    ValueError
        If the penalties are so small that rounding errors dominate.
    """
    targets, weights = objective.loss.quadratic_minimizer, objective.loss.weights
    assert targets is not None
    kernel = _kernel(objective, gram, inner).to(targets)
    n_outputs = targets.shape[1]
    used = (weights > 0).repeat_interleave(n_outputs)
    y = targets.reshape(-1)[used]
    system = kernel[used][:, used]
    own = 1 / weights.repeat_interleave(n_outputs)[used]
    if system.diagonal().max() > _DIGITS * own.min():
        smallest = float(objective.penalty[objective.penalty > 0].min())
        raise ValueError(
            f"cv='loo' is dominated by rounding errors at penalties as small as {smallest:.3g}. "
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


def activation_gram(objective: TangentObjective) -> Tensor:
    """Return the Gram matrix of the activations, of shape (n_samples, n_samples), float64.

    A free intercept makes the common mean of all samples irrelevant. It is subtracted, since a
    large mean would cost digits.
    """
    assert objective.activation is not None
    weights = objective.loss.weights
    rows = objective.activation.to(weights)
    if objective.fit_intercept:
        rows = rows - weights @ rows
    return rows @ rows.T


def _kernel(
    objective: TangentObjective, gram: Tensor | None, inner: Tensor | None = None
) -> Tensor:
    """Return the part of ``K`` of the penalised unknowns, see :func:`activation_gram`."""
    weights = objective.loss.weights
    one = torch.eye(objective.loss.n_outputs).to(weights)
    kernel = torch.zeros_like(one).repeat((objective.n_samples,) * 2)
    if objective.activation is not None:
        inner = activation_gram(objective) if inner is None else inner
        kernel = torch.kron(inner / objective.alpha, one)
    if objective.tangent is not None:
        assert gram is not None
        gram = gram.to(one)
        kernel += (_centred(gram, weights) if objective.fit_intercept else gram) / (
            objective.tangent.alpha
        )
    return kernel


def _centred(gram: Tensor, weights: Tensor) -> Tensor:
    """Return the Gram matrix of the rows minus their weighted mean, for each output."""
    pairs = gram.view(len(weights), -1, len(weights), len(gram) // len(weights))
    left = torch.einsum("i,icjd->cjd", weights, pairs)
    right = torch.einsum("icjd,j->icd", pairs, weights)
    both = torch.einsum("i,icd->cd", weights, right)
    return (pairs - left - right[:, :, None] + both[:, None]).view_as(gram)
