"""The scale of the curvature, which penalties are measured by."""

from __future__ import annotations

import torch

from sklearn_gradfeat.tangent._objective import TangentObjective

_ROUNDS = 6


def largest_curvature(objective: TangentObjective) -> float:
    """Return about the largest curvature of the loss at the model that predicts nothing.

    By power iteration, which comes from below. An intercept follows the other unknowns, so that
    a constant in the features does not count.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(objective.penalty.shape, generator=generator, dtype=torch.float64)
    x = x.to(objective.like)
    logits = objective.forward(torch.zeros_like(x))
    weights = objective.loss.curvatures(logits)
    size = 1.0
    for _ in range(_ROUNDS):
        norm = float(x.norm())
        if norm == 0:
            return 0.0
        seen = objective.forward(x / norm)
        if objective.fit_intercept:
            seen -= (weights * seen).sum(0) / weights.sum(0)
        x = objective.adjoint(weights * seen)
        size = float(x.norm())
    return size
