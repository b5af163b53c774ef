"""The logits of a fitted linear model."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sklearn_gradfeat.cache import NOT_FINITE, Extractor, Store
from sklearn_gradfeat.data import MIN_ROWS
from sklearn_gradfeat.linearized import LinearizedHead, LinearModel, to_numpy


def predict_logits(
    extractor: Extractor,
    model: LinearModel,
    X: Any,
    batch_size: int,
    verbose: bool,
    store: Store | None = None,
) -> npt.NDArray[Any]:
    """Return the logits of every sample.

    Parameters
    ----------
    extractor : Extractor
        The way to the features.
    model : LinearModel
        The linear model, on the device of the extractor.
    X : ndarray or lazy array-like of shape (n_samples, ...)
        Validated input. Few rows of numbers are repeated, so that the result for a row has
        the same bits alone and in company.
    batch_size : int
        Number of samples that pass through the network at once.
    verbose : bool
        Whether to show a progress bar.
    store : Store or None, default=None
        Where the boundary of samples seen before may be.

    Returns
    -------
    ndarray of shape (n_samples, n_outputs)

    Raises
    ------
    ValueError
        If the backbone returns NaN or infinity.
    """
    n_samples = X.shape[0]
    rows_of_numbers = len(X.shape) == 2 and not extractor.takes_indices
    if rows_of_numbers and n_samples < MIN_ROWS:
        X = X[np.arange(MIN_ROWS) % n_samples]
    network = extractor.network(list(model.displacements))
    head = LinearizedHead(network.head, network.parameters, "standard")
    activation, gradient = bool(model.weights.any()), bool(model.displacements)
    u = head.flatten(tuple(model.displacements.values()))
    logits = np.empty((X.shape[0], len(model.intercept)), dtype=to_numpy(model.intercept).dtype)
    for rows, boundary in extractor.batches(X, network, batch_size, verbose, store):
        part = model.intercept
        if activation and gradient:
            features, tangent = head.activation_and_jvp(boundary, u)
            part = part + features @ model.weights.T + tangent @ model.omega.T
        elif activation:
            part = part + head.activation(boundary) @ model.weights.T
        elif gradient:
            part = part + head.jvp(boundary, u) @ model.omega.T
        logits[rows] = to_numpy(part)
    if not np.isfinite(logits).all():
        raise ValueError(NOT_FINITE)
    return logits[:n_samples]
