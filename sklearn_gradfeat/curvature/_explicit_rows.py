"""The gradients of the logits as explicit rows, where these are cheaper than the network.

The row of a sample and logit has one number for each parameter. A layer with many positions
multiplies many times by each of its parameters, and the layers above it come on top. So for a small
layer far below the top, a pass over the rows is much cheaper than one through the network. The rows
take one backward pass for every logit, and hold for all penalties.

The choice compares the multiplications of a forward pass, counted from shapes, with the numbers of
the rows. Nothing is timed: where memory suffices, the same fit makes the same choice, and so do all
ranks.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from sklearn_gradfeat.backbones import threads_for, threads_for_head
from sklearn_gradfeat.curvature._factored_term import factored
from sklearn_gradfeat.curvature._kfac import per_sample_gradients
from sklearn_gradfeat.curvature._layer_rows import multiplications, output_gradients, record
from sklearn_gradfeat.curvature._sample_space import SampleInverse
from sklearn_gradfeat.data import (
    on_all_ranks,
    row_blocks,
    rows_of_all_ranks,
    sum_over_ranks,
    unless_out_of_memory,
)
from sklearn_gradfeat.linearized import (
    ExplicitTerm,
    LinearizedHead,
    TangentObjective,
    TangentTerm,
    Tensors,
    agrees,
)

# The cost of a fit through the network, in forward passes: 20 passes of the solver, each of which
# takes as long as four forward passes.
_NETWORK = 20 * 4
# The cost of the rows of one logit, in forward passes.
_LOGIT = 3
# Multiplications that take as long as what a fit does with one number of a row: write it, multiply
# by it in both directions in 20 passes, and use it in the Gram matrix of `SampledRows`.
_NUMBER = 600
# Smallest and largest number of rows in this Gram matrix. In between, it takes about as long as a
# few passes over all rows.
_FEWEST, _MOST = 64, 2048
_SHARE = 64


def with_rows_if_cheap(
    tangent: TangentTerm, n_samples: int, max_bytes: int, max_factored: int = 0
) -> TangentTerm:
    """Return the gradient term with explicit rows, where these are cheap and fit into memory.

    Parameters
    ----------
    tangent : TangentTerm
        The gradient term.
    n_samples : int
        Number of samples.
    max_bytes : int
        Largest size of the rows and of their copies.
    max_factored : int, default=0
        Largest size of the factors of the rows, see :func:`factored`.

    Returns
    -------
    ExplicitTerm, FactoredTerm or TangentTerm
        The same map. It is the given term if neither kind of rows is cheap, if they take too much
        memory, or if they do not determine the map, as where a parameter has another use besides
        the layers.
    """
    n_outputs = len(tangent.omega)
    few = tangent.few(n_samples)
    forward = multiplications(tangent.head, few) / len(few[0])
    numbers = n_outputs * tangent.head.size
    cheap = _LOGIT * n_outputs * forward + _NUMBER * numbers <= _NETWORK * forward
    sampled = torch.float64.itemsize * numbers * _most_sampled(n_samples, n_outputs)
    n_bytes = n_samples * numbers * tangent.omega.element_size() + sampled
    if not on_all_ranks(cheap and n_bytes <= max_bytes):
        return factored(tangent, n_samples, max_factored) or tangent
    rows = unless_out_of_memory(lambda: _rows(tangent, n_samples))
    if not on_all_ranks(rows is not None):
        return tangent
    assert rows is not None
    return ExplicitTerm.from_rows(tangent, rows)


def _rows(tangent: TangentTerm, n_samples: int) -> Tensor | None:
    """Return the rows of all samples, or None if they do not agree with Jacobian products."""
    head, omega = tangent.head, tangent.omega
    few = tangent.few(n_samples)
    n_inputs = sum(
        call.output_rows(call.output, len(few[0])).shape[2] * head.values[call.weight][0].numel()
        for call in record(head, few)[1]
    )
    rows = omega.new_empty(n_samples, len(omega), head.size)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(head.size, generator=generator, dtype=torch.float64).to(omega)
    for some, boundary in tangent.batches():
        with threads_for_head(head.values, boundary):
            for block in row_blocks(len(boundary[0]), n_inputs, device=omega.device):
                part = tuple(z[block] for z in boundary)
                if not _fill(rows[some][block], head, part, omega):
                    return None
        if not agrees(rows[some] @ u, head.jvp(boundary, u) @ omega.T, omega.dtype):
            return None
    return rows


def _fill(place: Tensor, head: LinearizedHead, boundary: Tensors, omega: Tensor) -> bool:
    """Write the rows of a batch; return whether the activation depends on the parameters.

    The gradient in the weight of a layer is a product of the gradients of its outputs with its
    inputs, for each sample. Other parameters have their gradients sample by sample.
    """
    n_samples = len(place)
    activation, calls = record(head, boundary, differentiable=True)
    if not activation.requires_grad:
        return False
    pieces = place.split([value.numel() for value in head.values], dim=2)
    calls = [
        call for call in calls if call.output_rows(call.output, n_samples).shape[1] == n_samples
    ]
    inputs = [call.input_rows(head.values[call.weight].shape[2:], n_samples) for call in calls]
    for number, gradients in enumerate(output_gradients(activation, calls, omega)):
        written: set[int] = set()
        for call, x, gradient in zip(calls, inputs, gradients, strict=True):
            g = call.output_rows(gradient, n_samples)
            parts = {call.weight: (head.scales[call.weight] * g).mT @ x}
            if call.bias is not None:
                parts[call.bias] = g.sum(2) * head.scales[call.bias]
            for i, part in parts.items():
                target, flat = pieces[i][:, number], part.transpose(0, 1).flatten(1)
                target.add_(flat) if i in written else target.copy_(flat)
            written |= set(parts)
    covered = {i for call in calls for i in (call.weight, call.bias)}
    rest = [i for i in range(len(pieces)) if i not in covered]
    for span, number, found in per_sample_gradients(head, rest, boundary, omega):
        for i, gradient in zip(rest, found, strict=True):
            pieces[i][span, number] = gradient.flatten(1)
    return True


class SampledRows:
    """The rows of some samples of all ranks, in double precision, for any penalties.

    Their inverse Hessian, scaled to the curvature of all samples, approximates the whole one.
    They are drawn from those with a weight, or are all samples where these are few.

    Parameters
    ----------
    objective : TangentObjective
        The objective, with explicit rows.

    Attributes
    ----------
    is_whole : bool
        Whether they are the rows of all samples.
    """

    def __init__(self, objective: TangentObjective) -> None:
        tangent = objective.tangent
        assert isinstance(tangent, ExplicitTerm)
        n_samples, n_outputs, _ = tangent.rows.shape
        total = int(sum_over_ranks(torch.tensor(n_samples)))
        most = _most_sampled(total, n_outputs)
        self.is_whole = most == total
        self._drawn = torch.arange(n_samples)
        if not self.is_whole:
            weighted = torch.nonzero(objective.loss.weights.cpu())[:, 0]
            share = most / int(sum_over_ranks(torch.tensor(len(weighted))))
            order = torch.randperm(len(weighted), generator=torch.Generator().manual_seed(0))
            self._drawn = weighted[order[: math.ceil(share * len(weighted))]].sort().values

        def sampled(rows: Tensor) -> Tensor:
            chosen = rows_of_all_ranks(rows[self._drawn.to(rows.device)])[0]
            return chosen.to(objective.accumulator, torch.float64)

        activation = objective.activation
        self._activation = None if activation is None else sampled(activation)
        self._weights = sampled(objective.loss.weights)
        self._term = ExplicitTerm.from_rows(tangent, sampled(tangent.rows))
        matrix = self._term.rows.flatten(0, 1)
        with threads_for(matrix.numel() * len(matrix)):
            self._gram = matrix @ matrix.T

    def inverse(self, objective: TangentObjective, logits: Tensor) -> SampleInverse:
        """Return the inverse Hessian of an objective with these rows at some logits."""
        assert objective.tangent is not None
        curvatures = objective.loss.curvatures(logits)
        chosen = rows_of_all_ranks(curvatures[self._drawn.to(curvatures.device)])[0]
        if not self.is_whole and chosen.any():
            chosen = chosen * (sum_over_ranks(curvatures.sum()) / chosen.sum())
        sampled = replace(
            objective,
            activation=self._activation,
            tangent=replace(self._term, alpha=objective.tangent.alpha),
            n_samples=len(chosen),
            like=self._weights[:0],
        )
        return SampleInverse(sampled, self._gram, chosen, self._weights)


def _most_sampled(n_samples: int, n_outputs: int) -> int:
    """Return the largest number of samples in the Gram matrix, at least one."""
    n_rows = int(math.sqrt(_SHARE * n_samples * n_outputs))
    return min(n_samples, max(1, min(max(n_rows, _FEWEST), _MOST) // n_outputs))
