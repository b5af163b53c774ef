"""The feature store in memory, which keeps the output of the frozen layers.

The trunk, the frozen part of a network below the gradient layers, maps each sample to one or more
tensors, its *boundary*. A store keeps them, and all fits and predictions share them:

* The *name* of a sample is a hash of its bytes. A *key* is a hash of all else that the boundary
  depends on: the network and its cut, the preprocessing, the precision, and the dtype and shape
  of the samples. Equal key and name mean equal boundary, up to rounding.
* A *chunk* holds the boundary of the samples that one batch added; a *place* is a row of a chunk.
  The index maps key and name to a place.
* Before a thread computes samples, it holds the lock of the key and looks again, so two
  threads never compute the same sample.

Eviction. The size of the chunks and of the index stays within ``memory_store_bytes()``. A look-up
marks a chunk as recently used. A new chunk evicts the least recently used chunks, except those
which the same pass over the samples has used. If that does not make enough room, nothing is evicted
and the new chunk is not kept. Otherwise a pass over more samples than fit would evict its first
chunks before the next pass can read them. Readers of an evicted chunk hold a reference and go on.

Lifetime. A key belongs to the networks that have asked for it. When the last of them is garbage
collected, its chunks are removed. Finalizers may run at any moment, even in a thread that
holds the lock, so they append to a queue, which the next holder of the lock empties.

Forks. A fork waits for the lock, so the child inherits a consistent index. The child replaces
the locks, since the threads that held them do not exist there.
"""

from __future__ import annotations

import copy
import itertools
import os
import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from sklearn_gradfeat.backbones import digest
from sklearn_gradfeat.cache import _config

Tensors: TypeAlias = tuple[Tensor, ...]


class Chunk(Protocol):
    """The boundary tensors of some samples. Nobody may write to them."""

    def opened(self) -> AbstractContextManager[Tensors]:
        """Return a context manager with the tensors."""

    @property
    def lasting(self) -> bool:
        """Whether the tensors remain valid after that context."""


class Place(NamedTuple):
    """The row of a chunk with the boundary of one sample."""

    chunk: Chunk
    row: int


@dataclass(frozen=True, eq=False)
class HeldChunk:
    """A chunk in host memory."""

    tensors: Tensors
    lasting = True

    def opened(self) -> AbstractContextManager[Tensors]:
        """Return the tensors."""
        return nullcontext(self.tensors)


def held(tensors: Tensors) -> HeldChunk:
    """Return tensors as a chunk in host memory, copied if they are views of a larger storage."""

    def own(tensor: Tensor) -> Tensor:
        host = tensor.detach().to("cpu").contiguous()
        return host if host.untyped_storage().nbytes() == host.nbytes else host.clone()

    return HeldChunk(tuple(own(tensor) for tensor in tensors))


class Boundary:
    """The boundary tensors of many samples, as references to chunks.

    Parameters
    ----------
    places : sequence of Place
        The place of each sample, in order.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.chunks = list(dict.fromkeys(place.chunk for place in places))
        number = {chunk: i for i, chunk in enumerate(self.chunks)}
        self._numbers = np.array([number[place.chunk] for place in places])
        self._rows = np.array([place.row for place in places])

    def subset(self, samples: npt.NDArray[np.intp]) -> Boundary:
        """Return the boundary of the selected samples; without places it stays empty."""
        part = copy.copy(self)
        if self.chunks:
            part._numbers, part._rows = self._numbers[samples], self._rows[samples]
        return part

    def take(self, samples: slice) -> Tensors:
        """Return the tensors of some samples: views if they are consecutive rows of one chunk."""
        runs = list(_runs(self._numbers[samples], self._rows[samples]))
        with ExitStack() as stack:
            opened = {
                number: stack.enter_context(self.chunks[number].opened())
                for number in dict.fromkeys(number for number, _ in runs)
            }
            if len(runs) == 1 and self.chunks[runs[0][0]].lasting:
                return tuple(z[runs[0][1]] for z in opened[runs[0][0]])
            parts = [[z[run] for z in opened[number]] for number, run in runs]
            return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _runs(numbers: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]) -> Iterator[tuple[int, slice]]:
    """Iterate over (chunk, rows) of the longest runs of consecutive rows."""
    breaks = np.flatnonzero((np.diff(numbers) != 0) | (np.diff(rows) != 1)) + 1
    starts = [0, *breaks.tolist()]
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        first = int(rows[start])
        yield int(numbers[start]), slice(first, first + stop - start)


# Size of an index entry: two dictionary slots, a name, a place.
_ENTRY_BYTES = 256


@dataclass(frozen=True)
class TrunkKey:
    """All that the boundary of a sample depends on, except the sample.

    Attributes
    ----------
    digest : bytes
        Hash of the network, its cut, the preprocessing and the precision.
    portable : bool
        Whether the digest is valid in other processes.
    owner : object
        The network. The store in memory frees the chunks with it.
    """

    digest: bytes
    portable: bool
    owner: object

    def for_samples(self, raw: Tensor) -> TrunkKey:
        """Return the key for samples with the dtype and shape of a batch."""
        kind = digest(self.digest, raw.dtype, tuple(raw.shape[1:]))
        return TrunkKey(kind, self.portable, self.owner)


def sample_names(raw: Tensor) -> list[bytes]:
    """Return the hash of each sample of a batch."""
    rows = raw.numpy().reshape(len(raw), -1).view("u1")
    return [xxhash.xxh3_128_digest(row.data) for row in rows]


class Store(Protocol):
    """Keeps boundary tensors between fits and predictions."""

    @property
    def directory(self) -> Path | None:
        """The directory that the user chose, or None."""

    def find(self, key: TrunkKey, names: Sequence[bytes]) -> list[Place | None]:
        """Return the place of each sample, None for samples that are not stored."""

    def add(
        self, key: TrunkKey, names: Sequence[bytes], chunk: HeldChunk, used: Collection[Chunk]
    ) -> Chunk:
        """Store a chunk if there is room without evicting ``used``, and return it as stored."""

    def computing(self, key: TrunkKey) -> AbstractContextManager[None]:
        """Return a lock that others must hold, too, to compute samples for the key."""


class MemoryStore:
    """Chunks in host memory, evicted by the rules at the top of this module."""

    directory = None

    def __init__(self) -> None:
        self._places: defaultdict[bytes, dict[bytes, Place]] = defaultdict(dict)
        self._entries: OrderedDict[HeldChunk, tuple[bytes, Sequence[bytes], int]] = OrderedDict()
        self.nbytes = 0
        self._tokens: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._counter = itertools.count()
        self._used_by: dict[int, set[bytes]] = {}
        self._dead: deque[int] = deque()
        self._lock = threading.Lock()
        self._computing: defaultdict[bytes, threading.RLock] = defaultdict(threading.RLock)
        _config.on_change(self.trim)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._before_fork,
                after_in_parent=self._after_fork_in_parent,
                after_in_child=self._after_fork_in_child,
            )

    def find(self, key: TrunkKey, names: Sequence[bytes]) -> list[Place | None]:
        """Return the place of each sample, None for samples that are not stored."""
        with self._locked():
            self._attach(key)
            known = self._places.get(key.digest, {})
            found = [known.get(name) for name in names]
            for chunk in {place.chunk for place in found if place is not None}:
                self._entries.move_to_end(chunk)  # type: ignore[arg-type]
        return found

    def add(
        self, key: TrunkKey, names: Sequence[bytes], chunk: HeldChunk, used: Collection[Chunk]
    ) -> Chunk:
        """Store a chunk if there is room without evicting ``used``, and return it."""
        size = sum(z.nbytes for z in chunk.tensors) + _ENTRY_BYTES * len(names)
        with self._locked():
            if self._make_room(_config.memory_store_bytes() - size, used):
                self._entries[chunk] = (key.digest, names, size)
                self._places[key.digest] |= {n: Place(chunk, i) for i, n in enumerate(names)}
                self.nbytes += size
        return chunk

    @contextmanager
    def computing(self, key: TrunkKey) -> Iterator[None]:
        """Hold the lock of the threads that compute samples for the key."""
        with self._locked():
            lock = self._computing[key.digest]
        with lock:
            yield

    def trim(self) -> None:
        """Evict chunks until the store is within its bound."""
        with self._locked():
            self._make_room(_config.memory_store_bytes(), ())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, and remove the chunks of collected networks before its release."""
        with self._lock:
            yield
            self._remove_dead()

    def _make_room(self, bound: int, used: Collection[Chunk]) -> bool:
        """Evict least recently used chunks to meet a bound; evict none if that is impossible."""
        leaving, left = [], self.nbytes
        for chunk, (_, _, size) in self._entries.items():
            if left <= bound:
                break
            if chunk not in used:
                leaving.append(chunk)
                left -= size
        if left > bound:
            return False
        for chunk in leaving:
            self._remove(chunk)
        return True

    def _remove(self, chunk: HeldChunk) -> None:
        """Remove a chunk and its samples from the index."""
        key, names, size = self._entries.pop(chunk)
        self.nbytes -= size
        places = self._places[key]
        for name in names:
            if name in places and places[name].chunk is chunk:  # a later chunk may have replaced it
                del places[name]
        if not places:
            del self._places[key]

    def _attach(self, key: TrunkKey) -> None:
        """Record that a network uses a key."""
        if key.owner not in self._tokens:
            token = self._tokens[key.owner] = next(self._counter)
            self._used_by[token] = set()
            weakref.finalize(key.owner, self._gone, token).atexit = False
        self._used_by[self._tokens[key.owner]].add(key.digest)

    def _gone(self, token: int) -> None:
        """Queue a collected network, and remove its chunks now if the lock is free."""
        self._dead.append(token)
        if self._lock.acquire(blocking=False):
            try:
                self._remove_dead()
            finally:
                self._lock.release()

    def _remove_dead(self) -> None:
        """Remove the chunks of keys that no living network uses."""
        while self._dead:
            keys = self._used_by.pop(self._dead.popleft()).difference(*self._used_by.values())
            for chunk in [c for c, (key, _, _) in self._entries.items() if key in keys]:
                self._remove(chunk)
            for key in keys:
                self._computing.pop(key, None)

    def _before_fork(self) -> None:
        """Wait until no thread changes the index."""
        self._lock.acquire()

    def _after_fork_in_parent(self) -> None:
        """Release the lock in the parent after a fork."""
        self._lock.release()

    def _after_fork_in_child(self) -> None:
        """Replace the locks in the child after a fork."""
        self._lock = threading.Lock()
        self._computing.clear()


_memory = MemoryStore()


def memory_store() -> MemoryStore:
    """Return the store in the memory of this process."""
    return _memory
