"""Opening a store on disk, or saying why not."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import xxhash

from sklearn_gradfeat.cache import _config
from sklearn_gradfeat.cache._store import Tensors

try:
    import fcntl
except ImportError:  # Windows: samples may be computed by two processes at once
    fcntl = None  # type: ignore[assignment]


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold back other processes, and other threads of this one.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    with path.open("ab") as file:
        if fcntl is None:
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may have the file open still


# Checksum of all that follows, length of the layout, number of samples.
_HEAD = struct.Struct("<16sII")
_ALIGNMENT = 64
NAME_BYTES = 16


class Layout(NamedTuple):
    """What a record holds and where.

    Attributes
    ----------
    names : bytes
        The names of the samples, one after the other.
    tensors : list of (str, list of int, int)
        Dtype, shape and offset of every tensor.
    """

    names: bytes
    tensors: list[tuple[str, list[int], int]]

    def name(self, row: int) -> bytes:
        """Return the name of a sample, nothing for rows that there are not."""
        return self.names[NAME_BYTES * row : NAME_BYTES * (row + 1)]


def encode(names: Sequence[bytes], tensors: Tensors) -> bytearray:
    """Return the record of a chunk."""
    kinds = [(str(z.dtype).removeprefix("torch."), list(z.shape)) for z in tensors]
    layout = json.dumps(kinds).encode()
    head = _HEAD.size + len(layout) + NAME_BYTES * len(names)
    offsets = []
    for tensor in tensors:
        offsets.append(_ALIGNMENT * math.ceil(head / _ALIGNMENT))
        head = offsets[-1] + tensor.nbytes
    record = bytearray(head)
    body = layout + b"".join(names)
    record[_HEAD.size : _HEAD.size + len(body)] = body
    for tensor, offset in zip(tensors, offsets, strict=True):
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        record[offset : offset + tensor.nbytes] = flat.data
    _HEAD.pack_into(record, 0, bytes(16), len(layout), len(names))
    record[:16] = _checksum(record)
    return record


def read_layout(record: memoryview) -> Layout | None:
    """Return the layout of a record, None if the record is damaged."""
    if len(record) < _HEAD.size or bytes(record[:16]) != _checksum(record):
        return None
    _, length, n_names = _HEAD.unpack_from(record)
    start = _HEAD.size + length
    head = start + NAME_BYTES * n_names
    tensors = []
    for dtype, shape in json.loads(bytes(record[_HEAD.size : start])):
        tensors.append((dtype, shape, _ALIGNMENT * math.ceil(head / _ALIGNMENT)))
        head = tensors[-1][2] + math.prod(shape) * getattr(torch, dtype).itemsize
    return Layout(bytes(record[start : start + NAME_BYTES * n_names]), tensors)


def decode(record: memoryview, layout: Layout) -> Tensors:
    """Return views of the tensors of a record; nobody may write to them."""
    data = torch.from_numpy(np.asarray(_Borrowed(record)))
    if data.data_ptr() % 8:  # a short record, which may lie anywhere
        data = data.clone()
    tensors = []
    for dtype, shape, offset in layout.tensors:
        kind = getattr(torch, dtype)
        part = data[offset : offset + math.prod(shape) * kind.itemsize]
        tensors.append(part.view(kind).reshape(shape))
    return tuple(tensors)


class _Borrowed:
    """Memory that cannot be written to, as an array that torch takes without a warning."""

    def __init__(self, record: memoryview) -> None:
        self.array = np.frombuffer(record, np.uint8)
        interface = self.array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _checksum(record: memoryview | bytearray) -> bytes:
    """Return the checksum of a record after its place for one."""
    return xxhash.xxh3_128_digest(memoryview(record)[16:])


if TYPE_CHECKING:
    import lmdb

_FORMAT_KEY = b"format"
_FORMAT = {"name": "sklearn-gradfeat features", "version": 1}
_SMALLEST = 2**20
_READERS = 1024
# More than LMDB's table of that many readers takes.
_LOCK_BYTES = 2**17
_FULL = (errno.ENOSPC, errno.EDQUOT)


def data_file(directory: Path) -> Path:
    """Return the file that a store is in."""
    return directory / "features.mdb"


def write_lock(directory: Path) -> Path:
    """Return the file to lock while a store is written or checked."""
    return directory / "write.lock"


def open_environment(directory: Path) -> tuple[lmdb.Environment, bool]:
    """Open the store in a directory; make one where there is none.

    Returns
    -------
    (lmdb.Environment, bool)
        The environment, and whether it may be written to.

    Raises
    ------
    ValueError
        If what is there is damaged, or no store, or one of another version.
    OSError
        If there is none and none can be made.
    """
    try:
        import lmdb
    except ImportError as error:
        raise ImportError(
            "A feature store on disk needs lmdb 3 or newer. Install it with "
            "pip install 'sklearn-gradfeat[disk]', or set feature_store='auto'."
        ) from error
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with file_lock(write_lock(directory)):
                return _open(directory, readonly=False), True
        except OSError as error:
            if not data_file(directory).exists():
                reason = f"There is no feature store and none can be made: {error.strerror}"
                raise type(error)(error.errno, reason, str(directory)) from error
            return _open(directory, readonly=True), False
    except lmdb.Error as error:
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from error
        raise refusal(directory, str(error)) from error


def is_full(error: OSError) -> bool:
    """Whether the disk has no room."""
    return error.errno in _FULL


def _reserve_locks(file: Path) -> None:
    """Take the room for LMDB's table of readers before it is mapped into memory.

    On a full disk the first write there would end the process.
    """
    table = file.with_name(f"{file.name}-lock")
    if hasattr(os, "posix_fallocate") and not table.exists():
        try:
            with table.open("wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, _LOCK_BYTES)
        except OSError:
            table.unlink(missing_ok=True)
            raise


def _open(directory: Path, readonly: bool) -> lmdb.Environment:
    """Open the file of a store after a check of its pages and of its version."""
    import lmdb

    file = data_file(directory)
    exists = file.exists() and file.stat().st_size > 0
    if exists and not _is_as_noted(directory):
        _check_pages(directory)
    if not readonly:
        _reserve_locks(file)
    auto = _config.get_config()["store_bytes"] == "auto"
    # Zero is the size that the file was made for, which other processes go by, too.
    size = 0 if exists and auto else max(_config.store_bytes(), _SMALLEST)
    environment = lmdb.open(
        str(file), map_size=size, subdir=False, readonly=readonly, lock=not readonly,
        metasync=False, max_readers=_READERS,
    )  # fmt: skip
    try:
        _check_format(directory, environment, exists)
    except BaseException:
        environment.close()
        raise
    if not readonly:
        note_state(directory)
    return environment


def _check_pages(directory: Path) -> None:
    """Refuse a file whose pages would lead LMDB astray; it follows them without a check."""
    from lmdb import verify

    try:
        problems = verify.verify(str(data_file(directory)), subdir=False)
    except verify.VerifyError as error:
        raise refusal(directory, str(error)) from error
    if problems:
        raise refusal(directory, f"it is damaged: {problems[0]}")


def _check_format(directory: Path, environment: lmdb.Environment, exists: bool) -> None:
    """Refuse what is no store or of another version; stamp a new one."""
    with environment.begin() as transaction:
        stamp = transaction.get(_FORMAT_KEY)
        foreign = stamp is None and transaction.stat()["entries"] > 0
    if stamp is None and not foreign:
        with environment.begin(write=True) as transaction:
            transaction.put(_FORMAT_KEY, json.dumps(_FORMAT).encode())
        return
    try:
        found = json.loads(stamp or b"")
        version = found["version"] if found["name"] == _FORMAT["name"] else None
    except (ValueError, TypeError, KeyError):
        version = None
    if version is None:
        raise refusal(directory, "it was not made by sklearn-gradfeat")
    if version != _FORMAT["version"]:
        raise refusal(
            directory, f"its format is {version}, this version reads {_FORMAT['version']}"
        )


def refusal(directory: Path, reason: str) -> ValueError:
    """Return the error for a store that cannot be used."""
    return ValueError(
        f"The feature store {str(data_file(directory))!r} cannot be used: {reason}. Delete the "
        "file, and what was in it is computed again; or choose another path."
    )


def note_state(directory: Path) -> None:
    """Note the state of a file after a commit, under its lock.

    Pages are checked again only if someone else has changed the file since, or if the process
    was stopped in between.
    """
    note = directory / "state"
    draft = directory / f"state.{os.getpid()}"
    draft.write_text(_state(directory))
    draft.replace(note)


def _is_as_noted(directory: Path) -> bool:
    """Whether a file is in the state that was noted last."""
    try:
        return (directory / "state").read_text() == _state(directory)
    except OSError:
        return False


def _state(directory: Path) -> str:
    """Return what any change of a file changes."""
    status = data_file(directory).stat()
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"
