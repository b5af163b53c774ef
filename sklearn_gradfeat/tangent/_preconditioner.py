"""The inverse of the approximate Hessian of a :class:`TangentObjective`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sklearn_gradfeat.tangent._kfac import (
    MAX_WIDTH,
    Factor,
    enough_samples,
    factors,
    loss_columns,
)
from sklearn_gradfeat.tangent._objective import TangentObjective, TangentTerm
from sklearn_gradfeat.tangent._spectrum import KroneckerInverse, Spectrum, damping


class Preconditioner:
    """Approximate inverse Hessian, with a block for the weights and one for each layer.

    Parameters
    ----------
    objective : TangentObjective
        The objective; its penalties enter exactly.
    logits : tensor of shape (n_samples, n_outputs)
        Where the curvature of the loss is taken.
    """

    def __init__(self, objective: TangentObjective, logits: Tensor) -> None:
        like = objective.like
        curvature = objective.loss.mean_curvature(logits).to(like)
        shares = objective.loss.curvatures(logits).sum(1)
        # Samples count by their curvature: those that are already fitted hardly matter.
        total = shares.sum()
        weights = (shares / total if total > 0 else objective.loss.weights).to(like)
        self.objective = objective
        self.affine = _affine_inverse(objective, curvature, weights)
        self.layers = (
            None
            if objective.tangent is None
            else _LayerInverses(objective.tangent, curvature, weights)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the inverse to a flat vector."""
        weights, intercept, u = self.objective.split(x)
        n_outputs = self.objective.loss.n_outputs
        joined = torch.cat([weights, intercept.view(n_outputs, -1)], 1)
        solved = self.affine(joined) if joined.numel() else joined
        d = weights.shape[1]
        affine = [solved[:, :d].reshape(-1), solved[:, d:].reshape(-1)]
        return torch.cat([*affine, u if self.layers is None else self.layers(u)])


def _affine_inverse(
    objective: TangentObjective, curvature: Tensor, weights: Tensor
) -> KroneckerInverse:
    """Return the inverse for the weights and the intercept, which share their inputs."""
    rows = objective.like.new_empty(objective.n_samples, 0)
    if objective.features is not None:
        rows = objective.features
    if objective.fit_intercept:
        rows = torch.cat([rows, torch.ones_like(weights)[:, None]], 1)
    weighted = weights[:, None] * rows
    wide = rows.shape[1] > MAX_WIDTH
    inputs = Spectrum((weighted * rows).sum(0), None) if wide else Spectrum.of(weighted.T @ rows)
    return KroneckerInverse(Spectrum.of(curvature), inputs, objective.alpha)


class _LayerInverses:
    """Inverses for the displacements, layer by layer."""

    def __init__(self, tangent: TangentTerm, curvature: Tensor, weights: Tensor) -> None:
        self.head = tangent.head
        _, few = next(iter(tangent.batches(math.ceil(len(weights) / 2))))
        stride = math.ceil(len(weights) / enough_samples(tangent.head, few))
        part = weights[::stride]
        total = part.sum()
        share = weights / total if total > 0 else torch.full_like(weights, 1 / len(part))
        columns = loss_columns(tangent.omega, curvature)
        found, diagonals = factors(self.head, tangent.batches(stride), columns, share)
        self.layers = {i: (f, f.inverse(tangent.alpha)) for i, f in found.items()}
        self.diagonals = {i: 1 / (d + damping(tangent.alpha, d)) for i, d in diagonals.items()}

    def __call__(self, u: Tensor) -> Tensor:
        """Apply the inverses to a flat vector of displacements."""
        pieces = list(self.head.pieces(u))
        for i, inverse in self.diagonals.items():
            pieces[i] = pieces[i] * inverse
        for i, (factor, layer) in self.layers.items():
            _solve(pieces, i, factor, layer)
        return torch.cat([piece.reshape(-1) for piece in pieces])


def _solve(pieces: list[Tensor], i: int, factor: Factor, inverse: KroneckerInverse) -> None:
    """Replace the pieces of a weight and its bias by their solution."""
    weight = pieces[i]
    matrix = weight.reshape(factor.groups, weight.shape[0] // factor.groups, -1)
    if factor.bias is None:
        pieces[i] = inverse(matrix).reshape(weight.shape)
        return
    bias = pieces[factor.bias]
    solved = inverse(torch.cat([matrix, bias.view(*matrix.shape[:2], 1)], 2))
    pieces[i] = solved[..., :-1].reshape(weight.shape)
    pieces[factor.bias] = solved[..., -1].reshape(bias.shape)
