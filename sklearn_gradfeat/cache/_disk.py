"""The feature store on disk, shared by processes.

Keys, names, chunks and places are those of :mod:`sklearn_gradfeat.cache._store`. The LMDB database
has two kinds of entries:

    chunk number, 16 random bytes   ->  record, with the names and tensors of the chunk
    key digest + name of a sample   ->  place: chunk number and row

Writes. One process writes at a time. A transaction adds a record with its places, and a commit is
atomic even if the process or the machine stops. Records are never changed or deleted: a full file
accepts no more, and the process then warns once and computes the other samples in every fit.

Reads. Any number of processes read, each from a consistent snapshot. A chunk opens as views of the
mapped file, valid for one read transaction, so callers copy. LMDB verifies no content, so the
checksum of a record is compared when its chunk is first used, and a place counts only if
the record has the name of the sample at that row. Samples of damaged records are computed again.

Sharing. A process holds the file lock of a key while it computes samples for it, so that the others
wait and find them. Only keys whose digest is valid in other processes are stored.

Forks. LMDB forbids a child to use the environment of its parent. A fork waits for all transactions
of the process; the child closes its copy and opens the file again when it first needs it.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import uuid
import warnings
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklearn_gradfeat.cache._disk_file import (
    data_file,
    file_lock,
    is_enabled,
    open_environment,
    unusable,
    write_lock,
)
from sklearn_gradfeat.cache._disk_record import Layout, decode, encode, read_layout
from sklearn_gradfeat.cache._store import Chunk, HeldChunk, Place, Tensors, TrunkKey

_PLACE = struct.Struct("<16sI")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, eq=False)
class DiskChunk:
    """A chunk on disk."""

    store: DiskStore
    number: bytes
    layout: Layout
    lasting = False

    @contextmanager
    def opened(self) -> Iterator[Tensors]:
        """Return views of the file, valid in the context."""
        with self.store.reading() as transaction:
            record = transaction.get(self.number)
            if record is None:  # LMDB follows damaged keys to another place
                raise unusable(self.store.directory, "it is damaged: a record is missing")
            yield decode(record, self.layout)


class DiskStore:
    """Chunks in an LMDB file.

    Parameters
    ----------
    directory : Path
        The directory with the file and its locks.
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
        """Return the place of each sample, None for samples that are not stored."""
        if not key.portable:
            return [None] * len(names)
        with self.reading() as transaction:
            return [self._place(transaction, key.digest, name) for name in names]

    def add(
        self, key: TrunkKey, names: Sequence[bytes], chunk: HeldChunk, used: Collection[Chunk]
    ) -> Chunk:
        """Store a chunk if there is room, and return it as stored."""
        import lmdb

        if not key.portable or not self._writable:
            return chunk
        self._reconnect()
        record, number = encode(names, chunk.tensors), uuid.uuid4().bytes
        try:
            with (
                file_lock(write_lock(self.directory)),
                self._lock,
                self._begin(write=True) as transaction,
            ):
                transaction.put(number, record)
                for row, name in enumerate(names):
                    transaction.put(key.digest + name, _PLACE.pack(number, row))
        except (lmdb.Error, OSError) as error:
            self._refuse(error)
            return chunk
        with self.reading() as transaction:
            return self._chunk(transaction, number) or chunk

    @contextmanager
    def computing(self, key: TrunkKey) -> Iterator[None]:
        """Hold the lock of the threads and processes that compute samples for the key."""
        with ExitStack() as stack:
            if key.portable and self._writable:
                try:
                    stack.enter_context(file_lock(self.directory / f"{key.digest.hex()}.lock"))
                except OSError as error:
                    self._refuse(error)
            yield

    def _refuse(self, error: Exception) -> None:
        """Store no more samples in this process, and warn."""
        self._writable = False
        self._warn(
            f"accepts no more samples ({error})",
            "others are computed in every fit. Free disk space, or call set_config with a larger "
            "store_bytes before the first fit of a process",
        )

    @contextmanager
    def reading(self) -> Iterator[Any]:
        """Return a read transaction; a nested call returns the outer one."""
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
                raise unusable(self.directory, str(error)) from error
            finally:
                self._reader = None

    def hold(self) -> None:
        """Wait until no thread has a transaction."""
        self._lock.acquire()

    def release(self) -> None:
        """Allow transactions again."""
        self._lock.release()

    def reopen(self) -> None:
        """Close the environment of the parent process in a child; it opens on its next use."""
        self._lock = threading.RLock()
        self._environment.close()
        self._environment = None

    def _reconnect(self) -> None:
        """Open the file again after a fork. This takes ``write_lock``: do not hold it here."""
        with self._lock:
            if self._environment is None:
                self._environment, self._writable = open_environment(self.directory)

    def _begin(self, write: bool = False) -> Any:
        """Begin a transaction; if another process has enlarged the file, adopt its size."""
        import lmdb

        try:
            return self._environment.begin(write=write, buffers=True)
        except lmdb.MapResizedError:
            self._environment.set_mapsize(0)
            return self._environment.begin(write=write, buffers=True)

    def _place(self, transaction: Any, key: bytes, name: bytes) -> Place | None:
        """Return the place of a sample, or None."""
        entry = transaction.get(key + name)
        if entry is None or len(entry) != _PLACE.size:
            return None
        number, row = _PLACE.unpack(entry)
        chunk = self._chunk(transaction, number)
        return Place(chunk, row) if chunk and chunk.layout.name(row) == name else None

    def _chunk(self, transaction: Any, number: bytes) -> DiskChunk | None:
        """Return a chunk, or None if its record is damaged; chunks in use are checked once."""
        chunk = self._chunks.get(number)
        if chunk is None:
            record = transaction.get(number)
            layout = None if record is None else read_layout(record)
            if layout is None:
                self._warn("holds damaged records", "their samples are computed again")
                return None
            chunk = self._chunks[number] = DiskChunk(self, number, layout)
        return chunk

    def _warn(self, problem: str, consequence: str) -> None:
        """Warn once of each consequence."""
        if consequence not in self._warned:
            self._warned.add(consequence)
            text = f"The feature store {str(self.directory)!r} {problem}: {consequence}."
            warnings.warn(text, UserWarning, stacklevel=2)


_stores: dict[tuple[int, int], DiskStore] = {}
_lock = threading.RLock()


def disk_store(path: str | os.PathLike[str]) -> DiskStore | None:
    """Return the store in a directory, the same object for all callers in the process.

    The directory is created, those above it are not. If the disk is too full to open it, warn and
    return None. Return None, and create nothing, if ``store_bytes`` leaves no room for a file.

    Raises
    ------
    ImportError
        If lmdb is not installed.
    ValueError
        If the path is empty or starts with ``~``; or if the file is damaged, is not a store, or
        has another version.
    OSError
        If there is no store and none can be created.
    """
    if not os.fspath(path):
        raise ValueError(
            "feature_store is an empty path. Pass the path of a directory; '.' is the current one."
        )
    directory = Path(path).absolute()
    if str(path).startswith("~") and not directory.exists():
        raise ValueError(
            f"feature_store={str(path)!r} starts with '~', which is not expanded to the home "
            "directory. Pass Path(...).expanduser(), or './~' for a directory of that name."
        )
    if not is_enabled():
        return None
    with _lock:
        for identity, known in list(_stores.items()):
            if _identity(known.directory) != identity:  # deleted since
                del _stores[identity]
        try:
            store = _stores.get(_identity(directory)) or DiskStore(directory)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            text = (
                f"The feature store {str(directory)!r} cannot be opened, the disk is full: all "
                "samples are computed in every fit. Free disk space, or pass another path as "
                "feature_store."
            )
            warnings.warn(text, UserWarning, stacklevel=2)
            return None
        _stores[_identity(directory)] = store
        return store


def _identity(directory: Path) -> tuple[int, int]:
    """Return device and inode of the file, which are equal under all names of the directory."""
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
