"""A fitted model as a plain torch module, for ``torch.export`` and ONNX."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from sklearn_gradfeat.cache import Extractor
from sklearn_gradfeat.linearized import (
    LinearModel,
    Tensors,
    UntraceableError,
    linear_logits,
    linearized_graph,
)


class TwoClasses(nn.Module):
    """The probabilities of two classes from the logit of the second."""

    def forward(self, logits: Tensor) -> Tensor:
        """Return probabilities of shape (n_samples, 2)."""
        return torch.sigmoid(torch.cat([-logits, logits], dim=1))


class _Plain(nn.Module):
    """A head without its derivative, as a function of the boundary alone."""

    def __init__(self, graph: fx.GraphModule, parameters: Tensors) -> None:
        super().__init__()
        self.graph = graph
        self.values = nn.ParameterList(parameters)

    def forward(self, *boundary: Tensor) -> tuple[Tensor, ...]:
        """Return a tuple of the activation alone."""
        outputs: tuple[Tensor, ...] = self.graph(*self.values, *boundary)
        return outputs


class LinearizedNetwork(nn.Module):
    """A fitted model without any differentiation: trunk, head with its derivative, output.

    Parameters
    ----------
    extractor : Extractor
        The frozen network, with its transform and precision.
    model : LinearModel
        The linear model, on the device of the extractor.
    output : nn.Module
        Maps the logits, of shape (n_samples, n_outputs), to what is returned.

    Raises
    ------
    ValueError
        If there is no graph of the network or of its derivative.
    """

    weights: Tensor
    intercept: Tensor
    omega: Tensor

    def __init__(self, extractor: Extractor, model: LinearModel, output: nn.Module) -> None:
        super().__init__()
        network = model.network(extractor)
        graph = network.graph
        if graph is None:
            raise ValueError(
                "The backbone cannot be exported: torch.export refuses it, so there is no graph "
                "of it."
            )
        self.dtypes = extractor.backbone.dtype, extractor.dtype
        self.takes_indices = extractor.takes_indices
        transform = extractor.preprocess
        self.preprocess: nn.Module = nn.Identity()
        if isinstance(transform, nn.Module):
            self.preprocess = copy.deepcopy(transform).to(extractor.backbone.example.device)
        self.trunk = network.trunk
        self.gradient = model.moves
        self.activation = bool(model.weights.any()) or not self.gradient  # one has the samples
        self.head: nn.Module = _Plain(graph, tuple(network.parameters.values()))
        self.output = output
        for name in ("weights", "intercept", "omega"):
            self.register_buffer(name, getattr(model, name))
        if self.gradient:
            boundary = self.boundary(extractor.backbone.example)
            tangents = tuple(model.displacements.values())
            values = tuple(network.parameters.values())
            try:
                self.head = linearized_graph(graph, values, tangents, boundary)
            except UntraceableError as error:
                raise ValueError(
                    f"The backbone cannot be exported: {error}. Fewer gradient_layers, or "
                    "others, may avoid the operator in question."
                ) from error

    def boundary(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the output of the trunk, which is the input of the head."""
        trunk_dtype, head_dtype = self.dtypes
        x = x.to(torch.int64 if self.takes_indices and not x.is_floating_point() else trunk_dtype)
        boundary = (x,) if self.trunk is None else self.trunk(x)
        return tuple(z.to(head_dtype) if z.is_floating_point() else z for z in boundary)

    def forward(self, x: Tensor) -> Tensor:
        """Return the predictions for a batch."""
        outputs = self.head(*self.boundary(self.preprocess(x)))
        predictions: Tensor = self.output(
            linear_logits(
                outputs[0] if self.activation else None,
                outputs[1] if self.gradient else None,
                weights=self.weights,
                intercept=self.intercept,
                omega=self.omega,
            )
        )
        return predictions

    def frozen(self) -> nn.Module:
        """Return an independent copy for inference."""
        return copy.deepcopy(self).eval().requires_grad_(False)
