"""Where the logits of a fitted model come from: its terms, its layers, its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sklearn_gradfeat._arrays import Samples
from sklearn_gradfeat._attention import differentiable_attention
from sklearn_gradfeat._extractor import Extractor
from sklearn_gradfeat._model import Model, to_numpy
from sklearn_gradfeat.backbones import Network
from sklearn_gradfeat.tangent import LinearizedHead, Tensors

Groups = Mapping[str, Sequence[str]]


@torch.inference_mode(False)
def logit_parts(
    extractor: Extractor, model: Model, X: Any, batch_size: int, groups: Groups
) -> tuple[npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
    """Return the logits in parts.

    Parameters
    ----------
    extractor : Extractor
        The way to the features.
    model : Model
        The linear model, on the device of the extractor.
    X : ndarray or lazy array-like of shape (n_samples, ...)
        Validated input.
    batch_size : int
        Number of samples that pass through the network at once.
    groups : dict of str to list of str
        The displaced parameters, each in one group.

    Returns
    -------
    (ndarray, dict of str to ndarray), all of shape (n_samples, n_outputs)
        ``W f(x)``; and ``Ω J w₂`` with the displacements of one group alone. With the
        intercept they add up to the logits.
    """
    network = extractor.network(list(model.displacements))
    head = LinearizedHead(network.head, network.parameters, "standard")
    shape, dtype = (X.shape[0], len(model.intercept)), to_numpy(model.intercept).dtype
    activation = np.empty(shape, dtype)
    parts = {group: np.empty(shape, dtype) for group in groups}
    for rows, boundary in extractor.batches(X, network, batch_size, verbose=False):
        activation[rows] = to_numpy(head.activation(boundary) @ model.weights.T)
        for group, names in groups.items():
            moves = [d if n in names else d * 0 for n, d in model.displacements.items()]
            tangent = head.jvp(boundary, head.flatten(tuple(moves)))
            parts[group][rows] = to_numpy(tangent @ model.omega.T)
    return activation, parts


@torch.inference_mode(False)
def relative_displacements(extractor: Extractor, model: Model, groups: Groups) -> dict[str, float]:
    """Return ``‖w₂‖ / ‖θ₂‖`` of every group of parameters.

    The parameters are those of the network with its batch norms folded, in which the
    displacements are.
    """
    values = extractor.network(list(model.displacements)).parameters

    def norm(tensors: Mapping[str, Tensor], names: Sequence[str]) -> float:
        return float(torch.cat([tensors[name].flatten().cpu().double() for name in names]).norm())

    ratios = {}
    for group, names in groups.items():
        moved, size = norm(model.displacements, names), norm(values, names)
        ratios[group] = moved / size if size else (np.inf if moved else 0.0)
    return ratios


class InputGradients:
    """Derivatives of single logits in the input of the network.

    ``Ω J(x) w₂`` is the derivative of ``Ω f`` along ``w₂``, hence the inner product of
    ``w₂`` and the gradient of ``Ω f``; its own gradient is a second backward pass. That
    needs no forward mode. Trunk and head both run in the precision of the head here.

    Parameters
    ----------
    extractor : Extractor
        The way to the features.
    model : Model
        The linear model, on the device of the extractor.
    term : {"gradient", "activation", "full"}
        The terms of the logits that are followed.
    """

    @torch.inference_mode(False)
    def __init__(self, extractor: Extractor, model: Model, term: str) -> None:
        self.extractor, self.model, self.term = extractor, model, term
        device = extractor.backbone.example.device
        backbone = extractor.backbone.to(device, extractor.dtype)
        self.network: Network = backbone.network(list(model.displacements))

    @torch.inference_mode(False)
    def inputs(self, X: Any) -> Tensor:
        """Return the samples as the network receives them."""
        extractor = self.extractor
        device = extractor.backbone.example.device
        return Samples(
            X, extractor.preprocess, extractor.dtype, device, extractor.takes_indices
        ).batch(slice(None))

    @torch.inference_mode(False)
    def __call__(self, x: Tensor, outputs: Tensor, signs: Tensor) -> Tensor:
        """Return the gradient of one logit of every sample, in the shape of ``x``.

        Parameters
        ----------
        x : tensor of shape (n_samples, ...)
            Input of the network, floating point.
        outputs : tensor of shape (n_samples,)
            The index of the logit of every sample.
        signs : tensor of shape (n_samples,)
            What the logit is multiplied by.
        """
        with torch.enable_grad(), differentiable_attention():
            x = x.detach().clone().requires_grad_()
            total = self._total(x, outputs, signs)
            if not total.requires_grad:
                return torch.zeros_like(x)
            (gradient,) = torch.autograd.grad(total, x, materialize_grads=True)
        return gradient

    def _total(self, x: Tensor, outputs: Tensor, signs: Tensor) -> Tensor:
        """Return the sum of the logits over the samples, without intercepts."""
        trunk = self.network.trunk
        boundary: Tensors = (x,) if trunk is None else trunk(x)
        values = [value.detach().requires_grad_() for value in self.network.parameters.values()]
        activation = self.network.head(tuple(values), boundary)
        total = activation.new_zeros(())
        if self.term != "gradient":
            total = total + (signs * (activation * self.model.weights[outputs]).sum(1)).sum()
        if self.term != "activation" and values:
            logits = signs * (activation * self.model.omega[outputs]).sum(1)
            pulled = torch.autograd.grad(
                logits.sum(), values, create_graph=True, materialize_grads=True
            )
            moves = self.model.displacements.values()
            total = total + sum((p * move).sum() for p, move in zip(pulled, moves, strict=True))
        return total
