"""Opening a store on disk, or saying why not."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sklearn_gradfeat import _config
from sklearn_gradfeat.features._locks import file_lock

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
