"""Passing samples through the frozen trunk, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sklearn_gradfeat._arrays import Samples, is_lazy, slices

Tensors: TypeAlias = tuple[Tensor, ...]

NOT_FINITE = (
    "The backbone returned NaN or infinity for some samples. Check its weights, the scale of X "
    "and `preprocess`; set precision='float32' if it overflows in bfloat16."
)


@dataclass(frozen=True)
class Features:
    """What the linear model needs of the samples.

    Attributes
    ----------
    activation : tensor of shape (n_samples, n_features)
        The activations, on the computing device.
    boundary : tuple of tensors of shape (n_samples, ...) or Samples
        The input of the head, in host memory; or the samples themselves where the head is
        the whole network, so that there is nothing worth keeping.
    batch_size : int
        Number of samples in a batch.
    """

    activation: Tensor
    boundary: Tensors | Samples
    batch_size: int

    def batches(self, stride: int = 1) -> Iterator[tuple[slice, Tensors]]:
        """Iterate over (rows, boundary tensors on the device) of every ``stride``-th sample."""
        spans = slices(len(self.activation), self.batch_size, stride)
        if isinstance(self.boundary, Samples):
            yield from ((rows, (x,)) for rows, x in _batches(self.boundary, spans))
            return
        for rows in spans:
            yield rows, tuple(z[rows].to(self.activation.device) for z in self.boundary)


def trunk_batches(
    samples: Samples,
    trunk: Callable[[Tensor], Tensors] | None,
    batch_size: int,
    *,
    dtype: torch.dtype,
    half: bool = False,
    verbose: bool = False,
) -> Iterator[tuple[slice, Tensors]]:
    """Iterate over (rows, boundary tensors), computed by the trunk.

    Parameters
    ----------
    samples : Samples
        The input.
    trunk : callable or None
        Maps a batch to boundary tensors. None means that the head is the whole network.
    batch_size : int
        Number of samples in a batch.
    dtype : torch.dtype
        Floating dtype of the boundary tensors.
    half : bool, default=False
        Run the trunk under bfloat16 autocast.
    verbose : bool, default=False
        Show a progress bar.
    """
    bar = tqdm(total=len(samples), desc="trunk", unit="sample", disable=not verbose)
    with bar, torch.no_grad():
        for rows, x in _batches(samples, slices(len(samples), batch_size)):
            with _autocast(x.device, half):
                boundary = (x,) if trunk is None else trunk(x)
            yield rows, tuple(z.to(dtype) if z.is_floating_point() else z for z in boundary)
            bar.update(len(x))


def compute_features(
    n_samples: int,
    batches: Iterable[tuple[slice, Tensors]],
    activation: Callable[[Tensors], Tensor],
    batch_size: int,
    inputs: Samples | None,
    keep_boundary: bool,
) -> Features:
    """Run the network over all samples and keep its activation and its boundary.

    Parameters
    ----------
    n_samples : int
        Number of samples.
    batches : iterable of (slice, tuple of tensors)
        The boundary tensors of every sample, batch by batch.
    activation : callable
        Maps boundary tensors to activations of shape (n_samples, n_features).
    batch_size : int
        Number of samples in a batch of later passes.
    inputs : Samples or None
        The samples where they are what the head takes, so that they need not be kept.
    keep_boundary : bool
        Whether later passes over the head are to come.

    Returns
    -------
    Features
    """
    kept: Tensors = ()
    activations: Tensor | None = None
    for rows, boundary in batches:
        features = activation(boundary)
        if activations is None:
            activations = features.new_empty((n_samples, *features.shape[1:]))
            if inputs is None and keep_boundary:
                kept = tuple(z.new_empty((n_samples, *z.shape[1:]), device="cpu") for z in boundary)
        activations[rows] = features
        for store, z in zip(kept, boundary, strict=False):
            store[rows] = z
    assert activations is not None
    if not torch.isfinite(activations).all():
        raise ValueError(NOT_FINITE)
    return Features(activations, inputs or kept, batch_size)


def _batches(samples: Samples, spans: Iterator[slice]) -> Iterator[tuple[slice, Tensor]]:
    """Iterate over (rows, batch); of a lazy X the next batch is read while this one is used."""
    if not is_lazy(samples.X):
        yield from ((rows, samples.batch(rows)) for rows in spans)
        return
    todo = list(spans)
    thread, ahead = _read_in_thread(samples, todo[0])
    try:
        for number, rows in enumerate(todo, 1):
            raw = ahead.result()
            if number < len(todo):
                thread, ahead = _read_in_thread(samples, todo[number])
            yield rows, samples.prepare(raw)
    finally:
        thread.shutdown()  # waits, so that no thread outlives a fit that fails


def _read_in_thread(samples: Samples, rows: slice) -> tuple[ThreadPoolExecutor, Future[Tensor]]:
    """Read a batch in a thread of its own, which ends with it."""
    thread = ThreadPoolExecutor(1, "read-ahead")
    future = thread.submit(samples.read, rows)
    thread.shutdown(wait=False)
    return thread, future


def _autocast(device: torch.device, half: bool) -> AbstractContextManager[object]:
    """Return the autocast context of the trunk."""
    return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()
