"""Passing samples through the frozen trunk, once."""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterator, MutableSet, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx
from tqdm.auto import tqdm

from sklearn_gradfeat.backbones import influenced, threads_for
from sklearn_gradfeat.cache._config import memory_bytes
from sklearn_gradfeat.cache._rounding import rounded, unrounded
from sklearn_gradfeat.cache._sample_files import (
    FileBoundary,
    SampleFile,
    folder_for,
    mapped_tensor,
)
from sklearn_gradfeat.cache._store import (
    Boundary,
    Chunk,
    Place,
    Store,
    Tensors,
    TrunkKey,
    held,
    sample_names,
)
from sklearn_gradfeat.data import (
    MIN_ROWS,
    BatchSize,
    Result,
    Samples,
    free_bytes,
    is_lazy,
    rows_at,
    rows_on_device,
    slices,
    to_device,
    unless_out_of_memory,
)

# Operators whose result depends on the strides of their input.
_BY_STRIDES = ("aten.as_strided", "aten.view_as_complex", "aten.view.dtype")

# Explicit gradients take at most a quarter of the memory: folds have some of their own.
_SHARE = 4
# Largest number of fits to folds that have rows of layers at the same time.
_FOLDS = 8

NOT_FINITE = (
    "The backbone returned NaN or infinity for some samples. Check its weights, the scale of X "
    "and `preprocess`; set precision='float32' if it overflows in bfloat16."
)


@dataclass(frozen=True)
class CachedSamples:
    """The training samples after the frozen layers.

    Attributes
    ----------
    activation : tensor of shape (n_samples, n_features)
        The activations, on the computing device.
    boundary : Boundary, FileBoundary or Samples
        The inputs of the head, perhaps in bfloat16. If the head is the whole network, they are
        the samples themselves, and nothing is kept.
    batch_size : BatchSize
        Number of samples in a batch.
    names : ndarray of shape (n_samples,), uint64
        A hash of the content of every sample.
    part_of : (CachedSamples, tensor or None) or None
        The samples of which these are some rows, and the numbers of these rows, or None for all.
    folder : Path or None
        The folder with the files of arrays with one row for each sample, or None where these are
        in memory.
    """

    activation: Tensor
    boundary: Boundary | FileBoundary | Samples
    batch_size: BatchSize
    names: npt.NDArray[np.uint64]
    part_of: tuple[CachedSamples, Tensor | None] | None = None
    folder: Path | None = None

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor with one row for each sample, like the activations."""
        return _empty(shape, self.activation, self.folder)

    @property
    def room(self) -> int:
        """The bytes that explicit gradients of the samples may take on the device."""
        device = self.activation.device
        room = free_bytes(device) if device.type == "cuda" else memory_bytes()
        return room // _SHARE

    @property
    def room_for_rows(self) -> int:
        """The bytes that the rows of layers may take, less for a subset."""
        is_subset = self.part_of is not None and self.part_of[1] is not None
        return self.room // _FOLDS if is_subset else self.room

    def with_activation(self, activation: Tensor) -> CachedSamples:
        """Return the samples with the activations of another head."""
        return replace(self, activation=activation, part_of=self.part_of or (self, None))

    def subset(self, rows: npt.NDArray[np.intp]) -> CachedSamples:
        """Return some of the samples, without a copy of the inputs of the head."""
        chosen = torch.from_numpy(rows).to(self.activation.device)
        whole, of = self.part_of or (self, None)
        activation = self.empty(len(rows), self.activation.shape[1])
        return CachedSamples(
            torch.index_select(self.activation, 0, chosen, out=activation),
            self.boundary.subset(rows),
            self.batch_size,
            self.names[rows],
            (whole, chosen if of is None else of[chosen]),
            self.folder,
        )

    def first(self, n: int) -> Tensors:
        """Return the boundary tensors of the first ``n`` samples, or of a batch if that is less."""
        rows = slice(0, min(n, len(self.activation), self.batch_size.size))
        if isinstance(self.boundary, Samples):
            return (self.boundary.batch(rows),)
        return unrounded(self._moved(rows), self.activation.dtype)

    def batches(self, stride: int = 1) -> Iterator[tuple[slice, Tensors]]:
        """Iterate over (rows, boundary tensors on the device) of every ``stride``-th sample."""
        for rows, boundary in self._stored(stride):
            yield rows, unrounded(boundary, self.activation.dtype)

    def _stored(self, stride: int) -> Iterator[tuple[slice, Tensors]]:
        """Iterate over the batches in the dtypes in which they are kept."""
        spans = slices(len(self.activation), self.batch_size.size, stride)
        if isinstance(self.boundary, Samples):
            for rows, raw in _read_samples(self.boundary, spans):
                yield rows, (self.boundary.prepare(raw),)
            return
        whole, chosen = self.part_of or (self, None)
        if self.batch_size.reduced:  # free the memory of the copy on the device
            vars(whole).pop("kept", None)
        in_file = isinstance(self.boundary, FileBoundary)
        if in_file and (self.batch_size.reduced or whole.kept is None):
            for rows, boundary in _read_ahead(self.boundary.take, spans):
                yield rows, tuple(to_device(z, self.activation.device) for z in boundary)
            return
        for rows in spans:
            if self.batch_size.reduced or whole.kept is None:
                yield rows, self._moved(rows)
            else:
                yield rows, tuple(z[rows if chosen is None else chosen[rows]] for z in whole.kept)

    @functools.cached_property
    def kept(self) -> Tensors | None:
        """All inputs of the head in a device's own memory, if they take at most half of it.

        None also if memory runs out all the same.
        """
        assert not isinstance(self.boundary, Samples)
        n_samples, device = len(self.activation), self.activation.device
        room = free_bytes(device) // 2
        if not room or sum(z.nbytes for z in self.boundary.take(slice(1))) * n_samples > room:
            return None
        return unless_out_of_memory(self._all_moved)

    def _all_moved(self) -> Tensors:
        """Return the inputs of the head for all samples, on the device."""
        whole: Tensors = ()
        n_samples = len(self.activation)
        for rows in slices(n_samples, self.batch_size.size):
            part = self._moved(rows)
            whole = whole or tuple(z.new_empty(n_samples, *z.shape[1:]) for z in part)
            for z, some in zip(whole, part, strict=True):
                z[rows] = some
        return whole

    def _moved(self, rows: slice) -> Tensors:
        """Return the inputs of the head for some samples, on the device."""
        assert not isinstance(self.boundary, Samples)
        return tuple(to_device(z, self.activation.device) for z in self.boundary.take(rows))


class Batch(NamedTuple):
    """Some samples: rows, boundary tensors on the device, hashes, and where those are kept."""

    rows: slice
    boundary: Tensors
    names: Sequence[bytes]
    places: Sequence[Place]


class _Bar:
    """A progress bar that appears before the first sample that has to be computed.

    Every bar of tqdm, also a disabled one, takes a lock that forks share. A process that is killed
    holds it for ever, and then all others wait. So a silent fit makes no bar.
    """

    def __init__(self, n_samples: int, verbose: bool) -> None:
        self._total, self._verbose = n_samples, verbose
        self._bar: Any = None

    def show(self) -> None:
        """Show the bar."""
        if self._bar is None and self._verbose:
            self._bar = tqdm(desc="frozen layers", total=self._total, unit="sample")

    def update(self, n_samples: int, n_computed: int) -> None:
        """Count the samples of a batch."""
        self._total -= n_samples - n_computed
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.update(n_computed)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


@dataclass(frozen=True)
class Trunk:
    """The frozen part of a network, applied to the samples that are not in a store.

    Parameters
    ----------
    samples : Samples
        The input.
    function : callable or None
        Maps a batch to boundary tensors. None where the head is the whole network.
    dtype : torch.dtype
        Floating dtype of the boundary tensors.
    half : bool
        Run under bfloat16 autocast.
    batch_size : BatchSize
        Number of samples in a batch.
    store : Store or None
        Holds samples that were computed before, and keeps those that are computed now.
    key : TrunkKey or None
        The key of the samples in the store; None computes all samples.
    check : callable or None
        Takes a batch and three of its samples, whose results differ without the others. It raises
        an error unless rounding is the reason. None compares no results.
    rounds : bool, default=False
        Whether floating boundary tensors are rounded to bfloat16, and kept and returned so.
    """

    samples: Samples
    function: Callable[[Tensor], Tensors] | None
    dtype: torch.dtype
    half: bool
    batch_size: BatchSize
    store: Store | None = None
    key: TrunkKey | None = None
    check: Callable[[Tensor, list[int]], None] | None = None
    rounds: bool = False

    def batches(self, *, verbose: bool, keep: bool) -> Iterator[Batch]:
        """Iterate over all samples.

        Parameters
        ----------
        verbose : bool
            Whether to show a progress bar of the samples that have to be computed. There is none
            if the store has all samples.
        keep : bool
            Whether to keep all boundary tensors, and to return their places.
        """
        used: weakref.WeakSet[Chunk] = weakref.WeakSet()  # chunks that nobody keeps are freed
        with _Bar(len(self.samples), verbose) as bar, torch.no_grad():
            spans = slices(len(self.samples), self.batch_size.size)
            for rows, raw in _read_samples(self.samples, spans):
                names = sample_names(raw)
                first = rows.start == 0
                boundary, places, n_computed = self._look_up(raw, names, used, keep, bar, first)
                if keep:
                    used.update(place.chunk for place in places)
                bar.update(len(raw), n_computed)
                yield Batch(rows, boundary, names, places)

    def _look_up(
        self,
        raw: Tensor,
        names: Sequence[bytes],
        used: MutableSet[Chunk],
        keep: bool,
        bar: _Bar,
        first: bool,
    ) -> tuple[Tensors, Sequence[Place], int]:
        """Return a batch, where it is kept, and how many of its samples were computed."""
        if self.store is None or self.key is None:
            bar.show()
            boundary = self._compute(raw)
            if first:
                self._compare(raw, boundary)
            boundary = self._as_kept(boundary)
            chunk = held(boundary) if keep else None
            return boundary, [Place(chunk, i) for i in range(len(raw))] if chunk else [], len(raw)
        key = self.key.for_samples(raw)
        found = self.store.find(key, names)
        new: dict[bytes, int] = {}
        if None in found:
            with self.store.computing(key):
                found = self.store.find(key, names)  # another thread may have added some
                new = {name: i for i, name in enumerate(names) if found[i] is None}
                if new:
                    bar.show()
                    boundary = self._compute_some(raw, list(new.values()))
                    if first:
                        self._compare(rows_at(raw, list(new.values())), boundary)
                    boundary = self._as_kept(boundary)
                    kept = self.store.add(key, list(new), held(boundary), used)
        if len(new) == len(raw):
            return boundary, [Place(kept, i) for i in range(len(raw))], len(raw)
        made = {name: i for i, name in enumerate(new)}
        places = [p or Place(kept, made[name]) for p, name in zip(found, names, strict=True)]
        return Boundary(places).take(slice(None)), places, len(new)

    def _as_kept(self, boundary: Tensors) -> Tensors:
        """Return boundary tensors in the dtypes in which they are kept."""
        return rounded(boundary) if self.rounds else boundary

    def _compute_some(self, raw: Tensor, rows: list[int]) -> Tensors:
        """Return the boundary of some samples of a batch."""
        if len(rows) == len(raw):
            return self._compute(raw)
        few = raw.ndim == 2 and not self.samples.indices and len(rows) < MIN_ROWS
        repeated = [rows[i % len(rows)] for i in range(MIN_ROWS)] if few else rows
        return tuple(z[: len(rows)] for z in self._compute(rows_at(raw, repeated)))

    def _compare(self, raw: Tensor, boundary: Tensors) -> None:
        """Raise an error if the boundary of samples depends on their batch."""
        if self.check is not None:
            device = boundary[0].device
            rows = influenced(
                boundary, lambda rows: [z.to(device) for z in self._pass(rows_at(raw, rows))]
            )
            if rows:
                self.check(raw, rows)

    @functools.cached_property
    def _ignores_strides(self) -> bool:
        """Whether the trunk is a graph without operators whose result depends on strides."""
        return isinstance(self.function, fx.GraphModule) and not any(
            str(node.target).startswith(_BY_STRIDES) for node in self.function.graph.nodes
        )

    def _compute(self, raw: Tensor) -> Tensors:
        """Return the boundary of samples as they were read.

        Where memory runs out, it is computed in parts, and returned in host memory.
        """

        def compute(rows: slice) -> Tensors:
            boundary = self._pass(raw[rows])
            if rows.stop - rows.start == len(raw):
                return boundary
            return tuple(z.cpu() for z in boundary)  # the device has no memory for all of them

        with threads_for(math.inf):
            parts = self.batch_size.run(compute, len(raw))
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    def _pass(self, raw: Tensor) -> Tensors:
        """Return the boundary of samples from one pass of the trunk."""
        x = self.samples.prepare(raw)
        if x.ndim == 4 and x.device.type == "cpu" and self._ignores_strides:
            x = x.contiguous(memory_format=torch.channels_last)  # faster there
        with _autocast(x.device, self.half):
            outputs = (x,) if self.function is None else self.function(x)
            boundary = tuple(z.contiguous() for z in outputs)
        if self.samples.preprocess is not None:  # it may return the same memory every time
            boundary = tuple(z.clone() if _overlap(z, x) else z for z in boundary)
        return tuple(map(self._converted, boundary))

    def _converted(self, tensor: Tensor) -> Tensor:
        """Return a boundary tensor in the precision of the head."""
        if tensor.is_complex():
            return tensor.to(self.dtype.to_complex())
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def cache_samples(
    trunk: Trunk, activation: Callable[[Tensors], Tensor], *, verbose: bool, keep_boundary: bool
) -> CachedSamples:
    """Pass all samples through the network, and keep activations and inputs of the head.

    Parameters
    ----------
    trunk : Trunk
        The samples and the frozen layers.
    activation : callable
        Maps boundary tensors to activations of shape (n_samples, n_features).
    verbose : bool
        Whether to show a progress bar.
    keep_boundary : bool
        Whether passes over the head follow.

    Returns
    -------
    CachedSamples

    Raises
    ------
    ValueError
        If some activations are not finite, or their squares are not.
    """
    n_samples, whole_is_head = len(trunk.samples), trunk.function is None
    keep = keep_boundary and not whole_is_head
    places: list[Place] = []
    names = np.empty(n_samples, np.uint64)
    activations: Tensor | None = None
    file = folder = None
    for batch in trunk.batches(verbose=verbose, keep=keep):

        def part(rows: slice | list[int], boundary: Tensors = batch.boundary) -> Tensor:
            return activation(rows_on_device(boundary, rows, trunk.samples.device))

        found = torch.cat(trunk.batch_size.run(part, batch.rows.stop - batch.rows.start))
        if batch.rows.start == 0 and trunk.check is not None:
            rows = influenced((found,), lambda rows: (part(rows),))
            if rows:
                trunk.check(trunk.samples.read(batch.rows), rows)
        if activations is None:
            kept = batch.boundary if keep else ()
            if found.device.type == "cpu":
                kept = (*kept, found)
            size = n_samples * sum(z[0].nbytes for z in kept)
            folder = folder_for(size, trunk.store.directory if trunk.store else None)
            activations = _empty((n_samples, *found.shape[1:]), found, folder)
            if keep and folder is not None:
                file = SampleFile(n_samples, batch.boundary, folder)
        if not torch.isfinite(found).all():
            raise ValueError(NOT_FINITE)
        if (found.abs() > math.sqrt(sys.float_info.max / activations.numel())).any():
            raise ValueError(
                "The activations are huge: their squares are infinite in float64. Scale X, or "
                "normalise the output of the backbone."
            )
        activations[batch.rows] = found
        names[batch.rows] = np.frombuffer(b"".join(batch.names), dtype="<u8")[::2]
        if file is not None:
            file.write(batch.rows.start, batch.boundary)
        elif keep:
            places += batch.places
    assert activations is not None
    boundary: Boundary | FileBoundary | Samples = Boundary(places)
    if file is not None:
        boundary = FileBoundary(file, np.arange(n_samples))
    elif whole_is_head:
        boundary = trunk.samples
    return CachedSamples(activations, boundary, trunk.batch_size, names, folder=folder)


def _empty(shape: Sequence[int], like: Tensor, folder: Path | None) -> Tensor:
    """Return an uninitialised tensor on the device of another: in a file if that is the host."""
    if folder is None or like.device.type != "cpu":
        return like.new_empty(shape)
    return mapped_tensor(shape, like.dtype, folder)


def _read_samples(samples: Samples, spans: Iterator[slice]) -> Iterator[tuple[slice, Tensor]]:
    """Iterate over (rows, batch); of a lazy X, the next batch is read ahead."""
    if is_lazy(samples.X):
        yield from _read_ahead(samples.read, spans)
    else:
        yield from ((rows, samples.read(rows)) for rows in spans)


def _read_ahead(
    read: Callable[[slice], Result], spans: Iterator[slice]
) -> Iterator[tuple[slice, Result]]:
    """Iterate over (rows, batch); a thread reads the next batch ahead."""
    todo = list(spans)
    # One thread for all batches: each new one may get another arena of malloc, which keeps memory.
    # The end of the block waits for it, so that no thread outlives a fit that fails.
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        ahead = thread.submit(read, todo[0])
        for number, rows in enumerate(todo, 1):
            batch = ahead.result()
            if number < len(todo):
                ahead = thread.submit(read, todo[number])
            yield rows, batch


def _autocast(device: torch.device, half: bool) -> AbstractContextManager[object]:
    """Return the autocast context of the trunk."""
    return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are in the same memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
