"""The directory of a store on disk: its files, their locks, and the checks before it is opened.

=================  ==============================================================================
``features.mdb``   An LMDB database: the format, the records of the chunks, and the index.
``...mdb-lock``    LMDB's table of readers.
``write.lock``     Held to write the database, or to open it.
``<key>.lock``     Held to compute samples for a key.
``state``          Inode, size and modification time of the database after the last commit.
=================  ==============================================================================

The database is verified before it is opened. LMDB maps the file into memory and follows the page
numbers in it without a check, so a truncated or damaged file can end the process with a
segmentation fault. Verification reads the whole file, so it is skipped if the file is in the
noted state: then the last change was a complete commit of this package. A file in any other state
was written by another program, or by a process that stopped between a commit and its note.

The locks are advisory ``flock`` locks, which the system releases when a process ends. Where there
are none (Windows), two processes may compute the same samples; LMDB still orders the writes.
A directory without permission to write is opened for reading only.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
_MIN_FILE_BYTES = 2**20
_MAX_READERS = 1024
_READER_TABLE_BYTES = 2**17  # LMDB needs less for _MAX_READERS


def data_file(directory: Path) -> Path:
    """Return the path of the database."""
    return directory / "features.mdb"


def write_lock(directory: Path) -> Path:
    """Return the file to lock to write or open the database."""
    return directory / "write.lock"


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock against other processes and other threads.

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
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may still have the file open


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
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with file_lock(write_lock(directory)):
                return _open(directory, readonly=False), True
        except OSError as error:
            if not data_file(directory).exists():
                reason = (
                    "The feature store does not exist and cannot be created; pass the path of a "
                    f"writable directory as feature_store: {error.strerror}"
                )
                raise type(error)(error.errno, reason, str(directory)) from error
            return _open(directory, readonly=True), False
    except lmdb.Error as error:
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from error
        raise unusable(directory, str(error)) from error


def _open(directory: Path, readonly: bool) -> lmdb.Environment:
    """Verify the database, open it and check its format."""
    import lmdb

    file = data_file(directory)
    exists = file.exists() and file.stat().st_size > 0
    if exists and not _is_in_noted_state(directory):
        _verify_pages(directory)
    if not readonly:
        _reserve_reader_table(file)
    auto = _config.get_config()["store_bytes"] == "auto"
    # Map size 0 means the bound in the file, which other processes share.
    size = 0 if exists and auto else max(_config.store_bytes(), _MIN_FILE_BYTES)
    environment = lmdb.open(
        str(file), map_size=size, subdir=False, readonly=readonly, lock=not readonly,
        metasync=False, max_readers=_MAX_READERS,
    )  # fmt: skip
    try:
        _check_format(directory, environment)
    except BaseException:
        environment.close()
        raise
    if not readonly:
        note_state(directory)
    return environment


def _verify_pages(directory: Path) -> None:
    """Raise an error for a damaged file."""
    from lmdb import verify

    try:
        problems = verify.verify(str(data_file(directory)), subdir=False)
    except verify.VerifyError as error:
        raise unusable(directory, str(error)) from error
    if problems:
        raise unusable(directory, f"it is damaged: {problems[0]}")


def _reserve_reader_table(file: Path) -> None:
    """Allocate the disk space of the table of readers before LMDB maps it into memory.

    On a full disk, the first write to a mapped file without space would end the process.
    """
    table = file.with_name(f"{file.name}-lock")
    if hasattr(os, "posix_fallocate") and not table.exists():
        try:
            with table.open("wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, _READER_TABLE_BYTES)
        except OSError:
            table.unlink(missing_ok=True)
            raise


def _check_format(directory: Path, environment: lmdb.Environment) -> None:
    """Write the format into an empty database, and raise an error for any other format."""
    with environment.begin() as transaction:
        stored = transaction.get(_FORMAT_KEY)
        is_new = stored is None and transaction.stat()["entries"] == 0
    if is_new:
        with environment.begin(write=True) as transaction:
            transaction.put(_FORMAT_KEY, json.dumps(_FORMAT).encode())
        return
    try:
        found = json.loads(stored or b"")
        version = found["version"] if found["name"] == _FORMAT["name"] else None
    except (ValueError, TypeError, KeyError):
        version = None
    if version is None:
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


def note_state(directory: Path) -> None:
    """Write the note of the state of the database, while its lock is held."""
    draft = directory / f"state.{os.getpid()}"
    draft.write_text(_state(directory))
    draft.replace(directory / "state")


def _is_in_noted_state(directory: Path) -> bool:
    """Return whether the database is as the last commit left it."""
    try:
        return (directory / "state").read_text() == _state(directory)
    except OSError:
        return False


def _state(directory: Path) -> str:
    status = data_file(directory).stat()
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"
