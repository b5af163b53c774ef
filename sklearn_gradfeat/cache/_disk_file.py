"""The directory of a store on disk: its files, their locks, and the checks before it is opened.

=================  ==============================================================================
``features.mdb``   An LMDB database: the format, the records of the chunks, and the index.
``...mdb-lock``    LMDB's table of readers.
``write.lock``     Held to write the database, or to open it. Nothing is written to the file.
``<key>.lock``     Held to compute samples for a key. Nothing is written to the file.
=================  ==============================================================================

No other file is written, and these only if they are what they should be: a database is one of this
package by its format, a table of readers by LMDB's mark. Links in the place of locks are refused.

A new database gets its name when it is complete, so a full disk or a kill leaves no part of one.
A kill may leave a draft with another name, which is removed before the next one is written.

Every database is verified before it is opened. LMDB maps the file into memory and follows the page
numbers in it without a check, so a truncated or damaged file can end the process with a
segmentation fault, and a damaged disk changes pages without a change of size or time. Verification
reads the index and the first page of each record, about 10 microseconds for each sample.

The locks are advisory ``flock`` locks, which the system releases when a process ends. Where there
are none (Windows), two processes may compute the same samples; LMDB still orders the writes.
A directory without permission to write is opened for reading only.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from sklearn_gradfeat.cache import _config

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import lmdb

_FORMAT_KEY = b"format"
_FORMAT = {"name": "sklearn-gradfeat features", "version": 1}
_MAX_FORMAT_BYTES = 1000
_MIN_FILE_BYTES = 2**15  # LMDB needs more than the half for an empty database
_MAX_READERS = 1024
_READER_TABLE_BYTES = 2**17  # LMDB needs less for _MAX_READERS
_READER_TABLE_MARKS = (bytes(4), struct.pack("=I", 0xBEEFC0DE))


def data_file(directory: Path) -> Path:
    """Return the path of the database."""
    return directory / "features.mdb"


def write_lock(directory: Path) -> Path:
    """Return the file to lock to write or open the database."""
    return directory / "write.lock"


def file_lock(path: Path) -> AbstractContextManager[None]:
    """Hold a lock against other processes and other threads.

    Raises
    ------
    OSError
        If the file cannot be created, or is a link, a pipe or a device.
    """
    return _locked(path, os.O_RDWR | os.O_CREAT)


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[None]:
    """Hold a lock on a file, opened with these flags."""
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):  # some are missing on Windows
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "The lock is not a regular file", str(path))
        if fcntl is None:
            yield
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may still have it open
    finally:
        os.close(descriptor)


def open_environment(directory: Path) -> tuple[lmdb.Environment, bool]:
    """Open the store in a directory, or create it.

    Returns
    -------
    environment : lmdb.Environment
        The open database.
    writable : bool
        Whether it may be written to.

    Raises
    ------
    ImportError
        If lmdb is not installed.
    ValueError
        If the file is damaged, is not a store, or has another version.
    OSError
        If there is no store and none can be created.
    """
    try:
        import lmdb
    except ImportError as error:
        raise ImportError(
            "A path as feature_store needs lmdb 3 or newer. Install it with "
            "pip install 'sklearn-gradfeat[disk]', or set feature_store='auto'."
        ) from error
    file = data_file(directory)
    if file.exists() and not file.is_file():
        raise unusable(directory, "it is not a regular file")
    try:
        try:
            directory.mkdir(exist_ok=True)
            with file_lock(write_lock(directory)):
                return _open(directory, readonly=False), True
        except OSError as error:
            if not file.exists():
                reason = (
                    "The feature store does not exist and cannot be created; pass the path of a "
                    "writable directory as feature_store, or of a new one in an existing "
                    f"directory: {error.strerror}"
                )
                raise type(error)(error.errno, reason, str(directory)) from error
        lock = write_lock(directory)
        with _locked(lock, os.O_RDONLY) if os.access(lock, os.R_OK) else nullcontext():
            return _open(directory, readonly=True), False
    except lmdb.Error as error:
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from error
        raise unusable(directory, str(error)) from error


def _open(directory: Path, readonly: bool) -> lmdb.Environment:
    """Verify the database, open it and check its format."""
    import lmdb

    file = data_file(directory)
    is_new = not file.exists() or file.stat().st_size == 0
    if not is_new:
        _verify_pages(directory)
    if not readonly:
        _reserve_reader_table(directory)
        if is_new:
            _create(file)
    auto = _config.get_config()["store_bytes"] == "auto"
    # Map size 0 means the bound in the file, which other processes share.
    size = 0 if is_new or auto else _map_size()
    environment = lmdb.open(
        str(file), map_size=size, subdir=False, readonly=readonly, lock=not readonly,
        metasync=False, max_readers=_MAX_READERS,
    )  # fmt: skip
    try:
        _check_format(directory, environment)
        environment.reader_check()  # frees the entries of killed processes in the table of readers
    except BaseException:
        environment.close()
        raise
    return environment


def is_enabled() -> bool:
    """Whether the bound of the stores leaves room for a file."""
    return _config.store_bytes() >= _MIN_FILE_BYTES


def _map_size() -> int:
    """Return the largest size of the file, which LMDB takes in whole pages."""
    return _config.store_bytes() // _MIN_FILE_BYTES * _MIN_FILE_BYTES


def _create(file: Path) -> None:
    """Write a database that holds the format alone, and then give it its name."""
    import lmdb

    for abandoned in file.parent.glob(f"{file.name}.{'[0-9a-f]' * 32}"):
        abandoned.unlink(missing_ok=True)
    draft = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        with (
            lmdb.open(str(draft), map_size=_map_size(), subdir=False, lock=False) as environment,
            environment.begin(write=True) as transaction,
        ):
            transaction.put(_FORMAT_KEY, json.dumps(_FORMAT).encode())
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _verify_pages(directory: Path) -> None:
    """Raise an error for a damaged file."""
    from lmdb import verify

    try:
        problems = verify.verify(str(data_file(directory)), subdir=False)
    except verify.VerifyError as error:
        raise unusable(directory, str(error)) from error
    if problems:
        raise unusable(directory, f"it is damaged: {problems[0]}")


def _reserve_reader_table(directory: Path) -> None:
    """Allocate the disk space of the table of readers before LMDB maps it into memory.

    On a full disk, the first write to a mapped file without space would end the process.
    """
    table = directory / f"{data_file(directory).name}-lock"
    if os.path.lexists(table) and not (table.is_file() and not table.is_symlink()):
        raise unusable(directory, f"{table.name!r} beside it is not a regular file")
    size = table.stat().st_size if table.exists() else 0
    if size:
        with table.open("rb") as handle:
            if handle.read(4) not in _READER_TABLE_MARKS:
                raise unusable(directory, f"{table.name!r} beside it is not a file of LMDB")
    if hasattr(os, "posix_fallocate") and size < _READER_TABLE_BYTES:
        try:
            with table.open("ab") as handle:
                os.posix_fallocate(handle.fileno(), 0, _READER_TABLE_BYTES)
        except OSError:
            if not size:
                table.unlink(missing_ok=True)
            raise


def _check_format(directory: Path, environment: lmdb.Environment) -> None:
    """Raise an error unless the database has the format of this version."""
    with environment.begin() as transaction:
        stored = transaction.get(_FORMAT_KEY) or b""
    try:
        found = json.loads(stored[:_MAX_FORMAT_BYTES])
        version = found["version"] if found["name"] == _FORMAT["name"] else None
    except (ValueError, TypeError, KeyError, RecursionError):
        version = None
    if not isinstance(version, int):
        raise unusable(directory, "it was not made by sklearn-gradfeat")
    if version != _FORMAT["version"]:
        raise unusable(
            directory, f"its format is {version}, this version reads {_FORMAT['version']}"
        )


def unusable(directory: Path, reason: str) -> ValueError:
    """Return the error for a file that is not a valid store."""
    return ValueError(
        f"The feature store {str(data_file(directory))!r} cannot be used: {reason}. Delete the "
        "file to compute its content again, or pass another path as feature_store."
    )
