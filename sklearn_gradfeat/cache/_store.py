"""The store of boundary tensors in memory, one for the process."""

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
    """The boundary tensors of some samples, to be read and never written."""

    def opened(self) -> AbstractContextManager[Tensors]:
        """Return the tensors, for the duration of a context."""

    @property
    def lasting(self) -> bool:
        """Whether the tensors outlive that context."""


class Place(NamedTuple):
    """Where the boundary of one sample is."""

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
    """Return tensors as a chunk in host memory that holds no more than they need."""

    def own(tensor: Tensor) -> Tensor:
        host = tensor.detach().to("cpu").contiguous()
        return host if host.untyped_storage().nbytes() == host.nbytes else host.clone()

    return HeldChunk(tuple(own(tensor) for tensor in tensors))


class Boundary:
    """The boundary tensors of many samples; it refers to chunks and holds no copy of them.

    Parameters
    ----------
    places : sequence of Place
        Where each sample is, in the order of the samples.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.chunks = list(dict.fromkeys(place.chunk for place in places))
        number = {chunk: i for i, chunk in enumerate(self.chunks)}
        self._numbers = np.array([number[place.chunk] for place in places])
        self._rows = np.array([place.row for place in places])

    def subset(self, samples: npt.NDArray[np.intp]) -> Boundary:
        """Return the boundary of some of the samples, if any is kept."""
        part = copy.copy(self)
        if self.chunks:
            part._numbers, part._rows = self._numbers[samples], self._rows[samples]
        return part

    def take(self, samples: slice) -> Tensors:
        """Return the tensors of some samples: views where a chunk holds them in a row."""
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
    """Iterate over (chunk, rows) of the longest stretches of neighbours."""
    breaks = np.flatnonzero((np.diff(numbers) != 0) | (np.diff(rows) != 1)) + 1
    starts = [0, *breaks.tolist()]
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        first = int(rows[start])
        yield int(numbers[start]), slice(first, first + stop - start)


# What an entry of the index takes, in bytes: two dictionary slots, a key, a place.
_ENTRY = 256


@dataclass(frozen=True)
class TrunkKey:
    """What the boundary of a sample depends on besides the sample.

    Attributes
    ----------
    digest : bytes
        Of the network, its cut, the preprocessing and the precision.
    portable : bool
        Whether the digest means the same in other processes.
    owner : object
        The network; what is in memory is freed with it.
    """

    digest: bytes
    portable: bool
    owner: object

    def for_samples(self, raw: Tensor) -> TrunkKey:
        """Return the key for samples of the dtype and shape of a batch."""
        kind = digest(self.digest, raw.dtype, tuple(raw.shape[1:]))
        return TrunkKey(kind, self.portable, self.owner)


def sample_names(raw: Tensor) -> list[bytes]:
    """Return a hash of the bytes of every sample of a batch."""
    rows = raw.numpy().reshape(len(raw), -1).view("u1")
    return [xxhash.xxh3_128_digest(row.data) for row in rows]


class Store(Protocol):
    """Where boundary tensors are kept between fits and predictions."""

    def find(self, key: TrunkKey, names: Sequence[bytes]) -> list[Place | None]:
        """Return where each sample is, None where it is not."""

    def add(
        self, key: TrunkKey, names: Sequence[bytes], chunk: HeldChunk, used: Collection[Chunk]
    ) -> Chunk:
        """Keep a chunk if there is room, without giving up those in use; return it as kept."""

    def computing(self, key: TrunkKey) -> AbstractContextManager[None]:
        """Hold back whoever else would compute samples for the key."""


class MemoryStore:
    """Chunks in host memory up to a bound, least recently used out first.

    A chunk leaves with the last network that it was computed for, or when there is no room for
    another. Whoever still refers to it keeps it.
    """

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
                before=self._hold, after_in_parent=self._release, after_in_child=self._renew
            )

    def find(self, key: TrunkKey, names: Sequence[bytes]) -> list[Place | None]:
        """Return where each sample is, None where it is not."""
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
        """Keep a chunk if there is room, without giving up those in use; return it as kept."""
        size = sum(z.nbytes for z in chunk.tensors) + _ENTRY * len(names)
        with self._locked():
            if self._make_room(_config.memory_store_bytes() - size, used):
                self._entries[chunk] = (key.digest, names, size)
                self._places[key.digest] |= {n: Place(chunk, i) for i, n in enumerate(names)}
                self.nbytes += size
        return chunk

    @contextmanager
    def computing(self, key: TrunkKey) -> Iterator[None]:
        """Hold back other threads that would compute samples for the key."""
        with self._locked():
            lock = self._computing[key.digest]
        with lock:
            yield

    def trim(self) -> None:
        """Give up what is above the bound."""
        with self._locked():
            self._make_room(_config.memory_store_bytes(), ())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, and forget the networks that are gone by the end."""
        with self._lock:
            yield
            self._forget_dead()

    def _make_room(self, bound: int, used: Collection[Chunk]) -> bool:
        """Give up the chunks unused for longest until the rest is within a bound, if that helps."""
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
        """Take a chunk and its samples out of the index."""
        key, names, size = self._entries.pop(chunk)
        self.nbytes -= size
        places = self._places[key]
        for name in names:
            if name in places and places[name].chunk is chunk:  # and not computed a second time
                del places[name]
        if not places:
            del self._places[key]

    def _attach(self, key: TrunkKey) -> None:
        """Note that a network uses a key, until it is gone."""
        if key.owner not in self._tokens:
            token = self._tokens[key.owner] = next(self._counter)
            self._used_by[token] = set()
            weakref.finalize(key.owner, self._gone, token).atexit = False
        self._used_by[self._tokens[key.owner]].add(key.digest)

    def _gone(self, token: int) -> None:
        """Forget a network; it may end at any moment, also while this thread has the lock."""
        self._dead.append(token)
        if self._lock.acquire(blocking=False):
            try:
                self._forget_dead()
            finally:
                self._lock.release()

    def _forget_dead(self) -> None:
        """Remove what only networks used that are gone."""
        while self._dead:
            keys = self._used_by.pop(self._dead.popleft()).difference(*self._used_by.values())
            for chunk in [c for c, (key, _, _) in self._entries.items() if key in keys]:
                self._remove(chunk)
            for key in keys:
                self._computing.pop(key, None)

    def _hold(self) -> None:
        """Wait for other threads, or a child could inherit a change that is half made."""
        self._lock.acquire()

    def _release(self) -> None:
        """Let other threads go on after a fork."""
        self._lock.release()

    def _renew(self) -> None:
        """Replace the locks that threads of the parent hold."""
        self._lock = threading.Lock()
        self._computing.clear()


_memory = MemoryStore()


def memory_store() -> MemoryStore:
    """Return the store in memory."""
    return _memory
