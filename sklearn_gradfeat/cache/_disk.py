"""The store of boundary tensors on disk, shared by processes."""

from __future__ import annotations

import os
import struct
import threading
import uuid
import warnings
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklearn_gradfeat.cache._disk_file import (
    Layout,
    data_file,
    decode,
    encode,
    file_lock,
    is_full,
    note_state,
    open_environment,
    read_layout,
    refusal,
    write_lock,
)
from sklearn_gradfeat.cache._store import Chunk, HeldChunk, Place, Tensors, TrunkKey

_PLACE = struct.Struct("<16sI")


@dataclass(frozen=True, eq=False)
class DiskChunk:
    """A chunk in a store on disk."""

    store: DiskStore
    number: bytes
    layout: Layout
    lasting = False

    @contextmanager
    def opened(self) -> Iterator[Tensors]:
        """Return views of the file, for the duration of a context."""
        with self.store.reading() as transaction:
            yield decode(transaction.get(self.number), self.layout)


class DiskStore:
    """Chunks in an LMDB file: any number of readers, one writer at a time.

    A record is never changed or deleted, and carries a checksum. A commit is all or nothing,
    whenever the process or the machine stops.

    Parameters
    ----------
    directory : Path
        Holds the file, its locks, and a note of its last known state.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.RLock()
        self._chunks: weakref.WeakValueDictionary[bytes, DiskChunk] = weakref.WeakValueDictionary()
        self._reader: Any = None
        self._warned: set[str] = set()
        self._environment: Any
        self._environment, self._writable = open_environment(directory)

    def find(self, key: TrunkKey, names: Sequence[bytes]) -> list[Place | None]:
        """Return where each sample is, None where it is not."""
        if not key.portable:
            return [None] * len(names)
        with self.reading() as transaction:
            return [self._place(transaction, key.digest, name) for name in names]

    def add(
        self, key: TrunkKey, names: Sequence[bytes], chunk: HeldChunk, used: Collection[Chunk]
    ) -> Chunk:
        """Write a chunk if there is room; return it as kept."""
        import lmdb

        if not key.portable or not self._writable:
            return chunk
        self._reconnect()
        record, number = encode(names, chunk.tensors), uuid.uuid4().bytes
        try:
            with file_lock(write_lock(self.directory)), self._lock:
                with self._begin(write=True) as transaction:
                    transaction.put(number, record)
                    for row, name in enumerate(names):
                        transaction.put(key.digest + name, _PLACE.pack(number, row))
                note_state(self.directory)
        except (lmdb.Error, OSError) as error:
            self._writable = False
            self._warn(f"takes no more ({error})", "what it lacks is computed in every fit")
            return chunk
        with self.reading() as transaction:
            return self._chunk(transaction, number) or chunk

    def computing(self, key: TrunkKey) -> AbstractContextManager[None]:
        """Hold back other threads and processes that would compute samples for the key."""
        if not key.portable or not self._writable:
            return nullcontext()
        return file_lock(self.directory / f"{key.digest.hex()}.lock")

    @contextmanager
    def reading(self) -> Iterator[Any]:
        """Return a read transaction; one within another is the same."""
        import lmdb

        with self._lock:
            if self._reader is not None:
                yield self._reader
                return
            self._reconnect()
            try:
                with self._begin() as self._reader:
                    yield self._reader
            except lmdb.Error as error:
                raise refusal(self.directory, str(error)) from error
            finally:
                self._reader = None

    def hold(self) -> None:
        """Wait for the transaction of another thread, so that a fork does not split it."""
        self._lock.acquire()

    def release(self) -> None:
        """Let transactions go on after a fork."""
        self._lock.release()

    def reopen(self) -> None:
        """Leave the environment of the parent to the parent."""
        self._lock = threading.RLock()
        self._environment.close()
        self._environment = None

    def _reconnect(self) -> None:
        """Open the file again after a fork; not under its lock, which that takes as well."""
        with self._lock:
            if self._environment is None:
                self._environment, self._writable = open_environment(self.directory)

    def _begin(self, write: bool = False) -> Any:
        """Begin a transaction, at the size that other processes may have given the file."""
        import lmdb

        try:
            return self._environment.begin(write=write, buffers=True)
        except lmdb.MapResizedError:
            self._environment.set_mapsize(0)
            return self._environment.begin(write=write, buffers=True)

    def _place(self, transaction: Any, key: bytes, name: bytes) -> Place | None:
        """Return the place of a sample, None if it is not there."""
        entry = transaction.get(key + name)
        if entry is None or len(entry) != _PLACE.size:
            return None
        number, row = _PLACE.unpack(entry)
        chunk = self._chunk(transaction, number)
        return Place(chunk, row) if chunk and chunk.layout.name(row) == name else None

    def _chunk(self, transaction: Any, number: bytes) -> DiskChunk | None:
        """Return a chunk, checked once as long as someone uses it."""
        chunk = self._chunks.get(number)
        if chunk is None:
            record = transaction.get(number)
            layout = None if record is None else read_layout(record)
            if layout is None:
                self._warn("holds damaged records", "their samples are computed again")
                return None
            chunk = self._chunks[number] = DiskChunk(self, number, layout)
        return chunk

    def _warn(self, what: str, consequence: str) -> None:
        """Warn of one thing once."""
        if consequence not in self._warned:
            self._warned.add(consequence)
            text = f"The feature store {str(self.directory)!r} {what}: {consequence}."
            warnings.warn(text, UserWarning, stacklevel=2)


_stores: dict[tuple[int, int], DiskStore] = {}
_lock = threading.RLock()


def disk_store(path: str | os.PathLike[str]) -> DiskStore | None:
    """Return the store in a directory, the same one for everybody in the process.

    On a full disk there is none, with a warning.

    Raises
    ------
    ImportError
        If lmdb is not installed.
    ValueError, OSError
        If the directory cannot be used.
    """
    directory = Path(path).expanduser().absolute()
    with _lock:
        for identity, known in list(_stores.items()):
            if _identity(known.directory) != identity:  # deleted meanwhile
                del _stores[identity]
        try:
            store = _stores.get(_identity(directory)) or DiskStore(directory)
        except OSError as error:
            if not is_full(error):
                raise
            text = f"The feature store {str(directory)!r} cannot be opened, the disk is full"
            warnings.warn(f"{text}: features are computed in every fit.", UserWarning, stacklevel=2)
            return None
        _stores[_identity(directory)] = store
        return store


def _identity(directory: Path) -> tuple[int, int]:
    """Return what tells files apart, however they are called."""
    try:
        status = data_file(directory).stat()
    except OSError:
        return (0, 0)
    return status.st_dev, status.st_ino


def _before_fork() -> None:
    _lock.acquire()
    for store in _stores.values():
        store.hold()


def _after_fork_in_parent() -> None:
    for store in _stores.values():
        store.release()
    _lock.release()


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603
    _lock = threading.RLock()
    for store in _stores.values():
        store.reopen()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
