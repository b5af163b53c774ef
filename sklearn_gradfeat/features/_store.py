"""The store of boundary tensors in memory, one for the process."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import xxhash
from torch import Tensor

from sklearn_gradfeat import _config
from sklearn_gradfeat._digest import digest
from sklearn_gradfeat.features._chunks import Chunk, HeldChunk, Place

# What an entry of the index takes, in bytes: two dictionary slots, a key, a place.
_ENTRY = 256


@dataclass(frozen=True)
class FeatureKey:
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

    def of(self, raw: Tensor) -> FeatureKey:
        """Return the key for samples of the dtype and shape of a batch."""
        kind = digest(self.digest, raw.dtype, tuple(raw.shape[1:]))
        return FeatureKey(kind, self.portable, self.owner)


def sample_names(raw: Tensor) -> list[bytes]:
    """Return a hash of the bytes of every sample of a batch."""
    rows = raw.numpy().reshape(len(raw), -1).view("u1")
    return [xxhash.xxh3_128_digest(row.data) for row in rows]


class Store(Protocol):
    """Where boundary tensors are kept between fits and predictions."""

    def find(self, key: FeatureKey, names: Sequence[bytes]) -> list[Place | None]:
        """Return where each sample is, None where it is not."""

    def add(
        self, key: FeatureKey, names: Sequence[bytes], chunk: HeldChunk, used: Collection[Chunk]
    ) -> Chunk:
        """Keep a chunk if there is room, without giving up those in use; return it as kept."""

    def computing(self, key: FeatureKey) -> AbstractContextManager[None]:
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

    def find(self, key: FeatureKey, names: Sequence[bytes]) -> list[Place | None]:
        """Return where each sample is, None where it is not."""
        with self._locked():
            self._attach(key)
            known = self._places.get(key.digest, {})
            found = [known.get(name) for name in names]
            for chunk in {place.chunk for place in found if place is not None}:
                self._entries.move_to_end(chunk)  # type: ignore[arg-type]
        return found

    def add(
        self, key: FeatureKey, names: Sequence[bytes], chunk: HeldChunk, used: Collection[Chunk]
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
    def computing(self, key: FeatureKey) -> Iterator[None]:
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

    def _attach(self, key: FeatureKey) -> None:
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
