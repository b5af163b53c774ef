"""The check that forward and backward derivatives of the gradient layers agree.

The solver needs ``J t`` and ``Jᵀ v`` of one matrix ``J``. Some operators do not provide that: a
derivative may be missing, be infinite, or be scaled on purpose. With ``u = Jᵀ v`` for a random
``v``, a few samples of the training data must satisfy::

    ⟨J u, v⟩ = ⟨u, Jᵀ v⟩

which takes one backward and one forward pass. The direction ``u`` is in the range of ``Jᵀ``, as are
those of the solver, because some operators keep entries constant in ``Jᵀ`` alone, such as the row
of a padding index. Where a derivative is zero, such as that of a layer before a norm that removes
its output, both sides are rounding errors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sklearn_gradfeat.backbones import Network
from sklearn_gradfeat.cache import CachedSamples
from sklearn_gradfeat.data import is_out_of_memory
from sklearn_gradfeat.linearized import LinearizedHead, Tensors

_N_SAMPLES = 8
# The products agree if they differ by no more than this power of the machine epsilon.
_ROUNDING = 0.3
_ADVICE = "Choose other gradient_layers, or replace that operation in the backbone."


def check_adjointness(network: Network, samples: CachedSamples) -> None:
    """Raise an error unless the products with ``J`` and ``Jᵀ`` agree on a few samples.

    Parameters
    ----------
    network : Network
        The network, cut below the gradient layers.
    samples : CachedSamples
        The training samples.

    Raises
    ------
    ValueError
        If they disagree, or if a derivative is missing or not finite; the message names the
        parameter.
    """
    boundary = samples.first(_N_SAMPLES)
    shape = len(boundary[0]), samples.activation.shape[1]
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=generator, dtype=torch.float64).to(samples.activation)
    try:
        head = LinearizedHead.from_network(network)
        noise = _noise(samples, v)
        if not _derivatives_agree(head, boundary, v, noise):
            names = _disagreeing(network, boundary, v, noise) or head.names
            raise ValueError(
                "The forward and the backward derivative of the backbone disagree in "
                f"{', '.join(map(repr, names))}, so there is no gradient term to fit. An operator "
                f"has a derivative of its own. {_ADVICE}"
            )
    except (RuntimeError, MemoryError) as error:  # NotImplementedError is one of the former
        if is_out_of_memory(error):  # training can do with fewer samples at once
            return
        names = _disagreeing(network, boundary, v, 0.0) or head.names
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"An operator that reads {', '.join(map(repr, names))} has no derivative that "
            f"training can use: {reason} {_ADVICE}"
        ) from error


def _noise(samples: CachedSamples, v: Tensor) -> float:
    """Return a change of ``⟨f, v⟩`` of the size of rounding errors."""
    size = float((samples.activation[: len(v)] * v).abs().sum())
    return float(torch.finfo(v.dtype).eps ** (1 - _ROUNDING)) * size


def _derivatives_agree(head: LinearizedHead, boundary: Tensors, v: Tensor, noise: float) -> bool:
    """Whether ``⟨J u, v⟩ = ⟨u, Jᵀ v⟩`` up to rounding, for ``u = Jᵀ v`` of unit size."""
    gradient = head.vjp(boundary, v)
    _check_finite(head, gradient)
    u = gradient / gradient.abs().max().clamp(min=torch.finfo(gradient.dtype).tiny)
    products = head.jvp(boundary, u) * v
    forward, backward = float(products.sum()), float(u @ gradient)
    bound = torch.finfo(u.dtype).eps ** _ROUNDING * max(backward, float(products.abs().sum()))
    return abs(forward - backward) <= max(bound, noise) or not math.isfinite(bound)


def _disagreeing(network: Network, boundary: Tensors, v: Tensor, noise: float) -> list[str]:
    """Return the parameters whose own derivatives disagree or are missing."""
    found, values = [], tuple(network.parameters.values())
    for i, name in enumerate(network.parameters):

        def one(free: Tensors, z: Tensors, i: int = i) -> Tensor:
            return network.head((*values[:i], *free, *values[i + 1 :]), z)

        try:
            own = LinearizedHead(one, {name: values[i]}, "standard")
            if _derivatives_agree(own, boundary, v, noise):
                continue
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):  # which says nothing of the derivatives
                continue
        found.append(name)
    return found


def _check_finite(head: LinearizedHead, u: Tensor) -> None:
    """Raise an error that names the first parameter with a derivative that is not finite."""
    for name, piece in zip(head.names, head.pieces(u), strict=True):
        if not torch.isfinite(piece).all():
            raise ValueError(
                f"The derivative of the activation in the gradient layer {name!r} is NaN or "
                "infinite for some samples, as that of a square root at zero. Choose other "
                "gradient_layers, set features='activation', or add a small constant to the "
                "argument of that operation in the backbone."
            )
