"""The logits of a fitted linear model for new samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sklearn_gradfeat.cache import NOT_FINITE, Extractor, Store
from sklearn_gradfeat.data import MIN_ROWS, BatchSize
from sklearn_gradfeat.linearized._jacobian import LinearizedHead
from sklearn_gradfeat.linearized._model import LinearModel, to_numpy


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
    n_samples = X.shape[0]
    tabular = len(X.shape) == 2 and not extractor.takes_indices
    if tabular and n_samples < MIN_ROWS:
        X = X[np.arange(MIN_ROWS) % n_samples]
    network = extractor.network(list(model.displacements))
    head = LinearizedHead(network.head, network.parameters, "standard")
    logits = np.empty((X.shape[0], len(model.intercept)), dtype=to_numpy(model.intercept).dtype)
    for rows, boundary in extractor.batches(X, network, batch_size, verbose, store):

        def part(some: slice, boundary: tuple[torch.Tensor, ...] = boundary) -> torch.Tensor:
            return model.logits(head, tuple(z[some] for z in boundary))

        logits[rows] = to_numpy(torch.cat(batch_size.run(part, rows.stop - rows.start)))
    if not np.isfinite(logits).all():
        raise ValueError(NOT_FINITE)
    return logits[:n_samples]
