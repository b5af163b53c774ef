"""One file without pickle: arrays in the safetensors format, and a JSON document in its header.

Nothing in such a file can be executed, so reading one from a stranger is safe.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import stat
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from sklearn import model_selection

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

# 2: `negative_slope` replaces `head_leak`; `gradient_backbone` and `omega` are gone.
FORMAT = 2
_DOCUMENT, _DIGEST = "sklearn_gradfeat", "digest"
_LENGTH_BYTES = 8
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.unfinished")
_DAY = 24 * 60 * 60
_STRINGS = re.compile(r"\|?O|T|[<>=]?U(\d{1,9})", re.ASCII)


class NotStorableError(TypeError):
    """A value that neither JSON nor an array can hold."""


def write_archive(path: str | os.PathLike[str], document: dict[str, Any], arrays: Arrays) -> None:
    """Write a file, read it back, and only then give it its name.

    A file of that name is replaced; a symbolic link keeps pointing to its target, which is
    replaced. A process that is killed leaves a hidden file, which the first call a day later
    removes.

    Parameters
    ----------
    path : str or path-like
        The file.
    document : dict
        A dictionary that JSON can hold.
    arrays : dict of str to ndarray
        Arrays of numbers or booleans.

    Raises
    ------
    OSError
        If the file cannot be written, if what was written differs from the arguments, or if
        ``path`` is a device, a pipe or a directory.
    """
    text = json.dumps({"format": FORMAT, **document})
    metadata = {_DOCUMENT: text, _DIGEST: digest(arrays, text)}
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(
            errno.EINVAL, "The model cannot replace this: it is not a regular file", str(target)
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, "The folder of this file does not exist; create it first", str(target)
        )
    _remove_abandoned(target.parent)
    unfinished = target.with_name(f".{uuid.uuid4().hex}.unfinished")
    try:
        with unfinished.open("xb") as stream:
            # safetensors writes the memory of an array in its order there, which is wrong for
            # any other order than that of C.
            contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
            stream.write(save(contiguous, metadata))
            stream.flush()
            os.fsync(stream.fileno())
        _verify(unfinished, text)
        unfinished.replace(target)
        _sync_folder(target.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove the unfinished files of processes that were killed a day ago or earlier."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if _UNFINISHED.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > _DAY:
                os.unlink(entry)


def _verify(path: Path, text: str) -> None:
    """Raise an error unless a file can be read and has this document; its digest is for arrays."""
    try:
        found, _ = read_archive(path)
    except ValueError as error:
        raise OSError(
            f"The model was not saved, since the file that was written cannot be read: {error} "
            "Check the disk, or save to another one."
        ) from error
    if json.dumps(found) != text:
        raise OSError(
            "The model was not saved, since the file that was written has another header. Check "
            "the disk, or save to another one."
        )


def _sync_folder(folder: Path) -> None:
    """Write the new name of a file to the disk, where the system can do this for a folder."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def read_archive(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Arrays]:
    """Read a file that :func:`write_archive` wrote.

    Parameters
    ----------
    path : str or path-like
        The file.

    Returns
    -------
    (document, arrays)

    Raises
    ------
    ValueError
        If the file is damaged, has a newer format, or was not written by this function.
    OSError
        If the file cannot be read, or is a device, a pipe or a directory.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "A model file must be a regular file", os.fspath(path))
    with open(path, "rb") as stream:
        try:
            header = _read_header(stream, status.st_size)
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict) or _DOCUMENT not in metadata:
                raise ValueError(
                    f"{path} is a safetensors file, but not of a model that was saved by "
                    "sklearn-gradfeat."
                )
            arrays = _read_arrays(stream, header, status.st_size)
        except _DamagedError as error:
            raise ValueError(f"{path} is damaged, or no file of a saved model: {error}.") from error
    text = metadata[_DOCUMENT]
    try:
        _check_cost(text, status.st_size)
        document = json.loads(text)
        _check_cost(text, status.st_size, _string_bytes(document))
        written = document["format"]
        if not isinstance(written, int) or isinstance(written, bool):
            raise TypeError
        found = digest(arrays, text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read.") from error
    if written > FORMAT:
        raise ValueError(
            f"{path} has format {written}, written by {str(document.get('versions'))[:200]}. This "
            f"version of sklearn-gradfeat reads formats up to {FORMAT}: upgrade it."
        )
    if metadata.get(_DIGEST) != found:
        raise ValueError(f"{path} is damaged: its contents do not match their digest.")
    return document, arrays


class _DamagedError(Exception):
    """The file is no safetensors file; the message has the reason."""


# Dtypes by their names in the format; numpy lacks the others.
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_SMALL = 2**20  # bytes that a header may cost in a file of any size
_VALUE_BYTES = 100


def _check_cost(text: bytes | str, size: int, n_bytes: int = 0) -> None:
    """Raise an error if a JSON text could take more than three times the file in memory.

    The text is there twice: whole, and as the strings in it. Every value follows one of four
    characters, and takes about 100 bytes as an object of Python. ``n_bytes`` are those of arrays
    that will be made from it.
    """
    if isinstance(text, bytes):
        n_values = sum(map(text.count, (b",", b":", b"[", b"{")))
    else:
        n_values = sum(map(text.count, ",:[{"))
    n_bytes += len(text) * (2 if text.isascii() else 8) + _VALUE_BYTES * n_values
    if n_bytes > 3 * size + _SMALL:
        raise ValueError("its header has too many values for its size")


def _string_bytes(value: Any) -> int:
    """Return the bytes of all arrays of strings in a document."""
    match value:
        case {"strings": list(strings), "dtype": str(dtype)}:
            kind = _STRINGS.fullmatch(dtype)
            return 4 * int((kind and kind.group(1)) or 0) * _n_leaves(strings)
        case list() | dict():
            return sum(map(_string_bytes, value.values() if isinstance(value, dict) else value))
    return 0


def _n_leaves(value: Any) -> int:
    """Return the number of values in nested lists that are no lists."""
    return sum(map(_n_leaves, value)) if isinstance(value, list) else 1


def _read_header(stream: BinaryIO, size: int) -> dict[str, Any]:
    """Return the header of a safetensors file, whose arrays follow in the stream."""
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
    if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
        raise _DamagedError("it is shorter than its header says")
    text = stream.read(length)
    try:
        _check_cost(text, size)
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _DamagedError("its header is not readable") from error
    if not isinstance(header, dict):
        raise _DamagedError("its header is no mapping")
    return header


def _read_arrays(stream: BinaryIO, header: dict[str, Any], size: int) -> Arrays:
    """Return the arrays of a safetensors file, each with memory of its own."""
    entries = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
                entries.append((start, stop, name, kind, shape))
            case _:
                raise _DamagedError("its header has no valid entry for an array")
    position, arrays = stream.tell(), {}
    end = 0
    for start, stop, name, kind, shape in sorted(entries, key=lambda entry: entry[:2]):
        if kind not in _DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise _DamagedError("its header has an array of no known dtype or shape")
        dtype = np.dtype(_DTYPES[kind])
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise _DamagedError("its arrays overlap, or leave gaps")
        end = stop
        if position + end > size:
            raise _DamagedError("it is shorter than its header says")
        array = np.fromfile(stream, dtype, math.prod(shape))
        try:
            arrays[name] = array.reshape(shape)
        except ValueError as error:  # too many dimensions, or too long ones beside one of length 0
            raise _DamagedError("its header has an array of an impossible shape") from error
    if position + end != size:
        raise _DamagedError("it is longer than its header says")
    return arrays


def digest(arrays: Mapping[str, npt.NDArray[Any]], text: str = "") -> str:
    """Return a hash of arrays with their names, and of a text."""
    state = hashlib.blake2b(text.encode(), digest_size=16)
    for name, array in sorted(arrays.items()):
        state.update(f"{name} {array.dtype.str} {array.shape}".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def pack(value: Any, name: str, arrays: Arrays) -> Any:  # noqa: PLR0911
    """Return a value in a form for JSON; its arrays go to ``arrays``, under ``name``.

    Raises
    ------
    NotStorableError
        If neither JSON nor an array can hold the value.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{name}.{i}", arrays) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        keys = [pack(key, name, arrays) for key in value]
        items = [pack(item, f"{name}.{key}", arrays) for key, item in value.items()]
        return {"dict": [list(pair) for pair in zip(keys, items, strict=True)]}
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if _splitters().get(type(value).__name__) is type(value):
        arguments = {n: getattr(value, n) for n in inspect.signature(type(value)).parameters}
        return {"splitter": type(value).__name__, "arguments": pack(arguments, name, arrays)}
    if isinstance(value, np.ma.MaskedArray):
        raise NotStorableError(f"{name} is a masked array, whose mask would be lost")
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.itemsize <= 8:
        name = _unused(name, arrays)
        arrays[name] = value.astype(value.dtype.newbyteorder("="), order="C", copy=False)
        return {"array": name}
    if isinstance(value, np.ndarray) and all(isinstance(item, str) for item in value.flat):
        dtype = "T" if value.dtype.kind == "T" else value.dtype.str
        return {"strings": value.tolist(), "dtype": dtype}
    raise NotStorableError(f"{name} is {value!r}, of type {type(value).__name__}")


def _unused(name: str, arrays: Arrays) -> str:
    """Return the name, with a number if another array has it: keys 1 and "1" look alike."""
    names = itertools.chain([name], (f"{name}~{i}" for i in itertools.count(1)))
    return next(candidate for candidate in names if candidate not in arrays)


def unpack(value: Any, arrays: Arrays) -> Any:
    """Return the value that :func:`pack` was given.

    Raises
    ------
    ValueError
        If :func:`pack` returns nothing like it.
    """
    match value:
        case None | bool() | int() | float() | str():
            result: Any = value
        case list():
            result = [unpack(item, arrays) for item in value]
        case {"tuple": list(items)}:
            result = tuple(unpack(items, arrays))
        case {"dict": list(pairs)}:
            result = _unpack_dict(pairs, arrays)
        case {"splitter": str(name), "arguments": arguments} if name in _splitters():
            try:
                result = _splitters()[name](**unpack(arguments, arrays))
            except Exception as error:  # the constructors of scikit-learn may raise anything
                raise ValueError(f"it has no valid arguments of {name}: {error}") from error
        case {"device": str(device)}:
            try:
                result = torch.device(device)
            except RuntimeError as error:
                raise ValueError("it has no valid name of a device") from error
        case {"array": str(name)} if name in arrays:
            result = arrays[name]
        case {"strings": list(strings), "dtype": str(dtype)}:
            result = _unpack_strings(strings, dtype)
        case _:
            raise ValueError("it has a value of an unknown kind")
    return result


def _unpack_dict(pairs: list[Any], arrays: Arrays) -> dict[Any, Any]:
    """Return a dictionary from its pairs of key and value."""
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("it has a dictionary without pairs")
    keys = [unpack(key, arrays) for key, _ in pairs]
    try:
        n_hashes = len({hash(key) for key in keys})
    except TypeError as error:
        raise ValueError("it has a dictionary with keys that cannot be hashed") from error
    if len(keys) > 2 * n_hashes + 100:  # made up, so that a dictionary takes quadratic time
        raise ValueError("it has a dictionary with too many equal hashes")
    return {key: unpack(item, arrays) for key, (_, item) in zip(keys, pairs, strict=True)}


def _unpack_strings(strings: list[Any], dtype: str) -> npt.NDArray[Any]:
    """Return an array of strings."""
    kind = _STRINGS.fullmatch(dtype)
    try:
        texts = np.array(strings, dtype=object)
    except ValueError as error:
        raise ValueError("it has an array of strings of no shape") from error
    if kind is None or not all(isinstance(text, str) for text in texts.flat):
        raise ValueError("it has an array of strings with other values")
    return texts.astype(np.dtypes.StringDType() if dtype == "T" else dtype)


@functools.cache
def _splitters() -> dict[str, Any]:
    """Return the splitters of scikit-learn that keep their arguments as they are, by name."""
    return {
        name: kind
        for name, kind in vars(model_selection).items()
        if hasattr(kind, "get_n_splits") and not name.startswith(("Base", "Repeated"))
    }
