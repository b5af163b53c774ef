"""Where the logits of a fitted model come from: its terms, its layers, its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sklearn_gradfeat.backbones import (
    Network,
    differentiable_attention,
    is_recurrent,
    neutral_state,
    without_cudnn,
)
from sklearn_gradfeat.cache import Extractor
from sklearn_gradfeat.data import BatchSize, Samples, rows_on_device
from sklearn_gradfeat.linearized import LinearizedHead, LinearModel, Tensors, to_numpy

Groups = Mapping[str, Sequence[str]]


@neutral_state()
def logit_parts(
    extractor: Extractor, model: LinearModel, X: Any, batch_size: int, groups: Groups
) -> tuple[npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
    """Return the logits in parts.

    Parameters
    ----------
    extractor : Extractor
        The fitted network.
    model : LinearModel
        The linear model, on the device of the extractor.
    X : ndarray or lazy array-like of shape (n_samples, ...)
        Validated input.
    batch_size : int
        Number of samples that pass through the network at once.
    groups : dict of str to list of str
        The displaced parameters, each in one group.

    Returns
    -------
    activation : ndarray of shape (n_samples, n_outputs)
        ``W f(x)``.
    parts : dict of str to ndarray of shape (n_samples, n_outputs)
        ``Ω J w₂`` with the displacements of one group alone. Together with the intercept, all
        parts add up to the logits.
    """
    network = model.network(extractor)
    head = LinearizedHead.from_network(network)
    model = replace(model, intercept=torch.zeros_like(model.intercept))
    gradient = model.term("gradient")
    terms = {name: gradient.displaced_in(names) for name, names in groups.items()}
    shape, dtype = (X.shape[0], len(model.intercept)), to_numpy(model.intercept).dtype
    activation = np.empty(shape, dtype)
    parts = {name: np.empty(shape, dtype) for name in groups}
    size, device = BatchSize(batch_size), extractor.backbone.example.device

    def in_parts(term: LinearModel, rows: slice, boundary: Tensors) -> npt.NDArray[Any]:
        logits = size.run(
            lambda part: term.logits(head, rows_on_device(boundary, part, device)),
            rows.stop - rows.start,
        )
        return np.concatenate([to_numpy(part) for part in logits])

    for rows, boundary in extractor.batches(X, network, size, verbose=False, store=None):
        activation[rows] = in_parts(model.term("activation"), rows, boundary)
        for name, term in terms.items():
            parts[name][rows] = in_parts(term, rows, boundary)
    return activation, parts


@neutral_state()
def relative_displacements(
    extractor: Extractor, model: LinearModel, groups: Groups
) -> dict[str, float]:
    """Return the displacement of every group of parameters in units of its norm.

    Both are relative to the pretrained network with its batch norms folded.
    """
    values = extractor.network(list(model.displacements)).parameters

    def norm(tensors: Mapping[str, Tensor], names: Sequence[str]) -> float:
        return float(torch.cat([tensors[name].flatten().cpu().double() for name in names]).norm())

    ratios = {}
    for group, names in groups.items():
        moved, size = norm(model.total, names), norm(values, names)
        ratios[group] = moved / size if size else (np.inf if moved else 0.0)
    return ratios


class InputTerm:
    """One term of the logits as a function of the network's input, with its derivative.

    Trunk and head both run in the precision of the head here.

    Parameters
    ----------
    extractor : Extractor
        The frozen network, with its transform and precision.
    model : LinearModel
        The linear model, on the device of the extractor.
    term : {"gradient", "activation", "full"}
        ``Ω J(x) w₂``, ``W f(x)``, or their sum.
    """

    @neutral_state()
    def __init__(self, extractor: Extractor, model: LinearModel, term: str) -> None:
        self.extractor = extractor
        self.model = replace(model.term(term), intercept=torch.zeros_like(model.intercept))
        device = extractor.backbone.example.device
        backbone = extractor.backbone.to(device, extractor.dtype)
        self.network: Network = model.network(replace(extractor, backbone=backbone))
        self.linearized = LinearizedHead.from_network(self.network)

    @neutral_state()
    def inputs(self, X: Any) -> Tensor:
        """Return samples as the network receives them."""
        extractor = self.extractor
        device = extractor.backbone.example.device
        return Samples(
            X, extractor.preprocess, extractor.dtype, device, extractor.takes_indices
        ).batch(slice(None))

    @neutral_state()
    def values(self, x: Tensor) -> Tensor:
        """Return the term, of shape (n_samples, n_outputs)."""
        with torch.no_grad():
            boundary = self.network.boundary(x)
        return self.model.logits(self.linearized, boundary)

    @neutral_state()
    def gradient(self, x: Tensor, outputs: Sequence[int]) -> Tensor:
        """Return the derivative of one logit of every sample in its input, shaped like ``x``.

        ``Ω J(x) w₂`` is the derivative of ``Ω f`` along ``w₂``, hence the inner product of
        ``w₂`` with the gradient of ``Ω f`` in the parameters; so its own derivative takes
        a second backward pass, and no forward mode.
        """
        values = self.linearized.values
        recurrent = without_cudnn() if is_recurrent(self.network.trunk) else nullcontext()
        with torch.enable_grad(), differentiable_attention(), recurrent:
            x = x.detach().clone().requires_grad_()
            leaves = [value.detach().requires_grad_() for value in values]
            activation = self.network.head(tuple(leaves), self.network.boundary(x))
            total = (activation * self.model.weights[list(outputs)]).sum()
            moves = tuple(self.model.displacements.values())
            if moves:
                logits = (activation * self.model.omega[list(outputs)]).sum()
                pulled = torch.autograd.grad(
                    logits, leaves, create_graph=True, materialize_grads=True
                )
                pairs = zip(pulled, moves, strict=True)
                total = total + torch.stack([(g * move).sum() for g, move in pairs]).sum()
            (gradient,) = torch.autograd.grad(total, x, materialize_grads=True)
        return gradient
