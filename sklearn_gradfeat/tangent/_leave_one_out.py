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

from sklearn_gradfeat.tangent._objective import TangentObjective

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
    targets, weights = objective.loss.bottom, objective.loss.weights
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
    if objective.features is not None:
        rows = objective.features.to(one)
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
