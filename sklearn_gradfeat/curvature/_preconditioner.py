"""The preconditioner: a block-diagonal approximation of the inverse Hessian.

With ``H`` the mean Hessian of the loss in the logits, ``f`` the activation with mean ``m``, and
``E`` the mean over the samples weighted by their curvature, the blocks of the Hessian are::

    weights, (n_outputs, n_features)      H ⊗ E[(f - m)(f - m)ᵀ] + alpha
    intercept, (n_outputs,)               H
    displacements of a layer              E[g gᵀ] ⊗ E[a aᵀ] + gradient_alpha        (K-FAC)
    displacements of other parameters     diagonal + gradient_alpha

*Centring.* ``W f + b = W (f - m) + (b + W m)``. In ``(W, b + W m)`` the weights and the intercept
have no common curvature, and the penalty is on ``W`` alone. So the gradient in ``W`` becomes
``g_W - g_b mᵀ``, and the solved intercept ``b - W m``. Without an intercept, ``m = 0``.

*Damping.* The penalties are the damping: in the eigenbasis of a Kronecker product they are added
to every eigenvalue. An unpenalised block gets the rounding unit times its largest eigenvalue.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sklearn_gradfeat.curvature._factored_term import FactoredTerm
from sklearn_gradfeat.curvature._kfac import (
    MAX_WIDTH,
    Batch,
    Factor,
    Signs,
    enough_samples,
    factors,
    loss_columns,
    network_batches,
    sums_over_ranks,
)
from sklearn_gradfeat.curvature._spectrum import MAX_EXACT, KroneckerInverse, Spectrum, damping
from sklearn_gradfeat.data import of_first_rank, row_blocks, rows_of_all_ranks, sum_over_ranks
from sklearn_gradfeat.linearized import TangentObjective, TangentTerm

# Curvatures of the intercept below this share of the largest one count as zero.
_FLAT = 1e-6


class Curvature:
    """The blocks of the Hessian of the loss, without any penalty.

    Parameters
    ----------
    objective : TangentObjective
        The objective; its penalties have no effect.
    logits : tensor of shape (n_samples, n_outputs)
        Where the curvature of the loss is taken.
    layers_of : Curvature, default=None
        Gives the factors of the layers, up to the scale, instead of passes over the head.
    """

    def __init__(
        self, objective: TangentObjective, logits: Tensor, layers_of: Curvature | None = None
    ) -> None:
        like = objective.like
        curvature = objective.loss.mean_curvature(logits).to(like)
        shares = objective.loss.curvatures(logits).sum(1)
        # Samples are weighted by their curvature, which is small where the fit is good.
        total = sum_over_ranks(shares.sum())
        weights = (shares / total if total > 0 else objective.loss.weights).to(like)
        self.total = float(total)
        self.outputs = Spectrum.from_matrix(curvature)
        self.mean, self.inputs = _centred(objective, weights)
        self.layers: list[Layer] = []
        self.diagonals: dict[int, Tensor] = {}
        if layers_of is not None:
            ratio = self.total / layers_of.total if layers_of.total > 0 else 1.0
            self.layers = [
                layer._replace(output=replace(layer.output, values=layer.output.values * ratio))
                for layer in layers_of.layers
            ]
            self.diagonals = {i: ratio * values for i, values in layers_of.diagonals.items()}
        elif objective.tangent is not None:
            found, self.diagonals = _layer_factors(objective.tangent, curvature, weights)
            self.layers = [Layer(i, factor, *factor.spectra()) for i, factor in found.items()]


class Layer(NamedTuple):
    """The Kronecker factors of the layer with a given weight, and their spectra."""

    weight: int
    factor: Factor
    output: Spectrum
    inputs: Spectrum

    @property
    def decomposed(self) -> bool:
        """Return whether both factors have eigenvectors."""
        return all(s.vectors is not None and s.values.numel() for s in (self.output, self.inputs))

    @property
    def n_weights(self) -> int:
        """The number of entries of weight and bias, where both factors have eigenvectors."""
        assert self.output.vectors is not None
        assert self.inputs.vectors is not None
        return self.output.vectors.shape[-2] * self.inputs.vectors.shape[-2]


class Preconditioner:
    """Approximate inverse Hessian of an objective.

    Parameters
    ----------
    objective : TangentObjective
        The objective; its penalties enter exactly.
    logits : tensor of shape (n_samples, n_outputs)
        Where the curvature of the loss is taken.
    curvature : Curvature, default=None
        Replaces the curvature at ``logits``.
    """

    def __init__(
        self, objective: TangentObjective, logits: Tensor, curvature: Curvature | None = None
    ) -> None:
        self.objective = objective
        self.curvature = curvature or Curvature(objective, logits)
        outputs = self.curvature.outputs
        self.weights = KroneckerInverse(outputs, self.curvature.inputs, objective.alpha)
        one = Spectrum(objective.like.new_ones(1), None)
        self.intercept = KroneckerInverse(_regular(outputs), one, 0.0)
        self.layers = (
            None if objective.tangent is None else _LayerInverses(objective.tangent, self.curvature)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the inverse to a flat vector, which is overwritten and returned."""
        n = sum(self.objective.sizes[:2])
        x[:n] = self.affine(x[:n])
        if self.layers is not None:
            self.layers.solve_(x[n:])
        return x

    def affine(self, x: Tensor) -> Tensor:
        """Apply the blocks of the weights and the intercept."""
        weights, intercept = x.split(list(self.objective.sizes[:2]))
        weights = weights.view(self.objective.loss.n_outputs, -1)
        mean, column = self.curvature.mean, intercept.view(self.objective.loss.n_outputs, -1)
        if column.numel():
            weights = weights - column * mean
        solved = self.weights(weights) if weights.numel() else weights
        if column.numel():
            column = self.intercept(column) - solved @ mean[:, None]
        return torch.cat([solved.reshape(-1), column.reshape(-1)])


def _regular(outputs: Spectrum) -> Spectrum:
    """Replace the eigenvalues that vanish by the largest one.

    A softmax does not depend on the sum of all intercepts. The gradient along it consists of
    rounding errors, which must not be enlarged.
    """
    largest = outputs.values.max()
    safe = torch.where(outputs.values > _FLAT * largest, outputs.values, largest)
    return replace(outputs, values=safe if largest > 0 else torch.ones_like(safe))


def _centred(objective: TangentObjective, weights: Tensor) -> tuple[Tensor, Spectrum]:
    """Return the mean activation ``m`` and the spectrum of ``E[(f - m)(f - m)ᵀ]``."""
    rows = objective.like.new_empty(objective.n_samples, 0)
    if objective.activation is not None:
        rows = objective.activation
    n_features, n_rows = rows.shape[1], _count(rows)
    mean = rows.new_zeros(n_features)
    if objective.fit_intercept:
        mean = sum_over_ranks(weights @ rows)
    if n_rows < n_features and n_rows <= MAX_EXACT:
        own = weights.sqrt()[:, None] * (rows - mean)
        return mean, Spectrum.from_rows(rows_of_all_ranks(own)[0])
    diagonal = n_features > MAX_WIDTH
    total = rows.new_zeros(n_features if diagonal else (n_features, n_features))
    for some in row_blocks(*rows.shape, device=rows.device):
        centred = rows[some] - mean
        weighted = weights[some, None] * centred
        total += (weighted * centred).sum(0) if diagonal else weighted.T @ centred
    total = sum_over_ranks(total)
    return mean, Spectrum(total, None) if diagonal else Spectrum.from_matrix(total)


def _layer_factors(
    tangent: TangentTerm, curvature: Tensor, weights: Tensor
) -> tuple[dict[int, Factor], dict[int, Tensor]]:
    """Return the factors of the layers and the diagonals, from every k-th sample."""
    few = tangent.few(len(weights))
    stride = math.ceil(_count(weights) / enough_samples(tangent.head, few))
    part = weights[::stride]
    total = sum_over_ranks(part.sum())
    share = weights / total if total > 0 else torch.full_like(weights, 1 / _count(part))
    columns = of_first_rank(loss_columns(tangent.omega, curvature))
    n_samples = _count(part)

    def one_pass() -> tuple[dict[int, Factor], dict[int, Tensor]]:
        batches = _batches(tangent, stride, columns)
        return factors(tangent.head, batches, columns, share, n_samples)

    return sums_over_ranks(*tangent.retry(one_pass))


def _batches(tangent: TangentTerm, stride: int, columns: Tensor) -> Iterator[Batch]:
    """Iterate over the layers of every k-th sample, without the network where rows are kept."""
    if not isinstance(tangent, FactoredTerm) or tangent.rest is not None or not len(columns):
        yield from network_batches(tangent.head, tangent.batches(stride), columns)
        return
    kinds = torch.cat([Signs.kinds(boundary) for _, boundary in tangent.batches(stride)])
    for rows, layers in tangent.layer_gradients(stride, columns):
        yield Batch(rows, (), kinds[rows // stride], layers)


def _count(rows: Tensor) -> int:
    """Return the number of rows of all ranks."""
    return int(sum_over_ranks(torch.tensor(len(rows))))


class _LayerInverses:
    """The blocks of the displacements."""

    def __init__(self, tangent: TangentTerm, curvature: Curvature) -> None:
        self.head = tangent.head
        self.layers = [
            (layer, KroneckerInverse(layer.output, layer.inputs, tangent.alpha))
            for layer in curvature.layers
        ]
        self.diagonals = {
            i: 1 / (d + damping(tangent.alpha, d)) for i, d in curvature.diagonals.items()
        }

    def solve_(self, u: Tensor) -> None:
        """Apply the inverses to a flat vector ``u``, in place."""
        pieces = self.head.pieces(u)
        for i, scale in self.diagonals.items():
            pieces[i].mul_(scale)
        for layer, inverse in self.layers:
            weight, of_bias = pieces[layer.weight], layer.factor.bias
            matrix = weight.view(layer.factor.groups, -1, weight[0].numel())
            bias = None if of_bias is None else pieces[of_bias].view(*matrix.shape[:2], 1)
            inverse.solve_(matrix, bias)
