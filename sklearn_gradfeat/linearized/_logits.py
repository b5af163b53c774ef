"""The logits ``b + W f + Ω J w₂`` of the linear model, and its parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sklearn_gradfeat.backbones import Network
from sklearn_gradfeat.cache import NOT_FINITE, Extractor, Store
from sklearn_gradfeat.data import MIN_ROWS, BatchSize, rows_on_device
from sklearn_gradfeat.linearized._jacobian import LinearizedHead, Tensors


def linear_logits(
    activation: Tensor | None = None,
    tangent: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    intercept: Tensor | None = None,
    omega: Tensor | None = None,
) -> Tensor:
    """Return ``b + W f + Ω J w₂`` for a batch; terms that are None are left out.

    Parameters
    ----------
    activation : tensor of shape (n_samples, n_features), default=None
        The activations ``f``, which need ``weights``.
    tangent : tensor of shape (n_samples, n_features), default=None
        The Jacobian-vector products ``J w₂``, which need ``omega``.
    weights, omega : tensor of shape (n_outputs, n_features), default=None
        ``W`` and ``Ω``.
    intercept : tensor of shape (n_outputs,), default=None
        ``b``.

    Returns
    -------
    tensor of shape (n_samples, n_outputs), or (n_outputs,) for an intercept alone
    """
    logits = intercept
    if activation is not None and weights is not None:
        term = activation @ weights.T
        logits = term if logits is None else logits + term
    if tangent is not None and omega is not None:
        term = tangent @ omega.T
        logits = term if logits is None else logits + term
    assert logits is not None
    return logits


@dataclass(frozen=True)
class LinearModel:
    """The parameters of a fitted linear model.

    Attributes
    ----------
    weights, omega : tensor of shape (n_outputs, n_features)
        ``W`` and ``Ω``. Weights of zero leave the activation term out.
    intercept : tensor of shape (n_outputs,)
        ``b``.
    displacements : dict of str to tensor
        ``w₂`` by parameter, in the shapes and units of the parameters.
    point : dict of str to tensor, default={}
        Where the network is linearised, as displacements from the pretrained parameters. ``f``,
        ``J`` and ``w₂`` belong to this point. It is empty for the pretrained parameters.
    """

    weights: Tensor
    intercept: Tensor
    omega: Tensor
    displacements: dict[str, Tensor]
    point: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_estimator(cls, fitted: Any, device: torch.device, dtype: torch.dtype) -> LinearModel:
        """Return the model in the attributes of a fitted estimator."""

        def tensor(array: Any) -> Tensor:
            return torch.tensor(array, device=device, dtype=dtype)

        point = fitted.linearization_point_
        moves = {
            name: value - point[name] if point else value
            for name, value in fitted.gradient_coef_.items()
        }
        return cls(
            tensor(fitted.coef_),
            tensor(fitted.intercept_),
            tensor(fitted.omega_),
            {name: tensor(value) for name, value in moves.items()},
            {name: tensor(value) for name, value in point.items()},
        )

    def network(self, extractor: Extractor) -> Network:
        """Return the network of an extractor, cut below θ₂ and moved to the point."""
        return extractor.network(list(self.displacements or self.point)).moved(self.point)

    @property
    def total(self) -> dict[str, Tensor]:
        """The displacements from the pretrained parameters."""
        if not self.point:
            return self.displacements
        return {name: move + self.point[name] for name, move in self.displacements.items()}

    @functools.cached_property
    def moves(self) -> bool:
        """Whether some displacement is not zero, so that the model has a gradient term."""
        return any(bool(move.any()) for move in self.displacements.values())

    def shifted(self, offset: npt.NDArray[np.float64]) -> LinearModel:
        """Return the model with ``offset`` added to its intercept."""
        return replace(self, intercept=self.intercept + torch.from_numpy(offset).to(self.intercept))

    def term(self, term: str) -> LinearModel:
        """Return the ``"activation"`` term, the ``"gradient"`` term, or the ``"full"`` model."""
        if term == "activation":
            return replace(self, displacements={})
        return self if term == "full" else replace(self, weights=torch.zeros_like(self.weights))

    def displaced_in(self, names: Collection[str]) -> LinearModel:
        """Return the model with zero displacements, except of the parameters ``names``."""
        return replace(
            self,
            displacements={
                name: move if name in names else torch.zeros_like(move)
                for name, move in self.displacements.items()
            },
        )

    def logits(
        self, head: LinearizedHead, boundary: Tensors, activation: Tensor | None = None
    ) -> Tensor:
        """Return ``b + W f + Ω J w₂`` for a batch.

        Parameters
        ----------
        head : LinearizedHead
            The head, in the standard parametrization.
        boundary : tuple of tensors
            The inputs of the head.
        activation : tensor of shape (n_samples, n_features), default=None
            The activations, if they are known.

        Returns
        -------
        tensor of shape (n_samples, n_outputs)
        """
        tangent = None
        if self.moves:
            u = head.flatten(tuple(self.displacements.values()))
            if activation is None and bool(self.weights.any()):
                activation, tangent = head.activation_and_jvp(boundary, u)
            else:
                tangent = head.jvp(boundary, u)
        elif activation is None:
            activation = head.activation(boundary)
        return linear_logits(
            activation, tangent, weights=self.weights, intercept=self.intercept, omega=self.omega
        )

    def attributes(self) -> dict[str, Any]:
        """Return the model as attributes of a fitted estimator."""
        return {
            "coef_": to_numpy(self.weights),
            "intercept_": to_numpy(self.intercept),
            "omega_": to_numpy(self.omega),
            "gradient_coef_": {name: to_numpy(t) for name, t in self.total.items()},
            "linearization_point_": {name: to_numpy(t) for name, t in self.point.items()},
            "gradient_layers_": list(self.displacements),
        }


def predict_logits(
    extractor: Extractor,
    model: LinearModel,
    X: Any,
    batch_size: BatchSize,
    verbose: bool = False,
    store: Store | None = None,
) -> npt.NDArray[Any]:
    """Return the logits of every sample.

    Parameters
    ----------
    extractor : Extractor
        The fitted network.
    model : LinearModel
        The linear model, on the device of the extractor.
    X : ndarray or lazy array-like of shape (n_samples, ...)
        Validated input. A few rows of tabular data are repeated, so that the result of a sample
        has the same bits alone and in company.
    batch_size : BatchSize
        Number of samples that pass through the network at once.
    verbose : bool, default=False
        Whether to show a progress bar.
    store : Store or None, default=None
        The outputs of the frozen layers for samples that were seen before.

    Returns
    -------
    ndarray of shape (n_samples, n_outputs)

    Raises
    ------
    ValueError
        If the backbone returns NaN or infinity.
    """
    return _predict(
        extractor, model, X, batch_size, verbose, store, model.logits, len(model.intercept)
    )


def predict_activations(
    extractor: Extractor,
    model: LinearModel,
    X: Any,
    batch_size: BatchSize,
    verbose: bool = False,
    store: Store | None = None,
) -> npt.NDArray[Any]:
    """Return the activations ``f`` of every sample, of shape (n_samples, n_features).

    The parameters and errors are those of :func:`predict_logits`. The network is cut where it was
    cut in the fit, so a sample of the fit is in the store.
    """

    def activations(head: LinearizedHead, boundary: Tensors) -> Tensor:
        return head.activation(boundary)

    n_features = model.omega.shape[1]
    return _predict(extractor, model, X, batch_size, verbose, store, activations, n_features)


def _predict(
    extractor: Extractor,
    model: LinearModel,
    X: Any,
    batch_size: BatchSize,
    verbose: bool,
    store: Store | None,
    function: Callable[[LinearizedHead, Tensors], Tensor],
    n_columns: int,
) -> npt.NDArray[Any]:
    """Return the results of a function of the head and its inputs, batch by batch."""
    n_samples = X.shape[0]
    tabular = len(X.shape) == 2 and not extractor.takes_indices
    if tabular and n_samples < MIN_ROWS:
        X = X[np.arange(MIN_ROWS) % n_samples]
    network = model.network(extractor)
    head, device = LinearizedHead.from_network(network), extractor.backbone.example.device
    results = np.empty((X.shape[0], n_columns), dtype=to_numpy(model.intercept).dtype)
    for rows, boundary in extractor.batches(X, network, batch_size, verbose, store):

        def part(some: slice, boundary: Tensors = boundary) -> Tensor:
            return function(head, rows_on_device(boundary, some, device))

        results[rows] = to_numpy(torch.cat(batch_size.run(part, rows.stop - rows.start)))
    if not np.isfinite(results).all():
        raise ValueError(NOT_FINITE)
    return results[:n_samples]


def to_numpy(tensor: Tensor) -> Any:
    """Copy a tensor into an array of its own dtype."""
    return np.array(tensor.detach().cpu().numpy())
