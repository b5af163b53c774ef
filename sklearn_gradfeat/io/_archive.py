"""One file without pickle: arrays in the safetensors format, and a JSON document in its header.

Nothing in such a file can be executed, so reading one from a stranger is safe.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import inspect
import itertools
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from sklearn import model_selection

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

# 2: `negative_slope` replaces `head_leak`; `gradient_backbone` and `omega` are gone.
FORMAT = 2
_DOCUMENT, _DIGEST = "sklearn_gradfeat", "digest"


class NotStorableError(TypeError):
    """A value that neither JSON nor an array can hold."""


def write_archive(path: str | os.PathLike[str], document: dict[str, Any], arrays: Arrays) -> None:
    """Write a file, read it back, and only then give it its name.

    A file of that name is replaced; a symbolic link keeps pointing to its target, which is
    replaced.

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
    """
    try:
        with safe_open(path, framework="numpy") as archive:
            metadata = archive.metadata() or {}
            if _DOCUMENT not in metadata:
                raise ValueError(
                    f"{path} is a safetensors file, but not of a model that was saved by "
                    "sklearn-gradfeat."
                )
            arrays = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no file of a saved model ({error}).") from error
    try:
        document = json.loads(metadata[_DOCUMENT])
        written = int(document["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read.") from error
    if written > FORMAT:
        raise ValueError(
            f"{path} has format {written}, written by {document.get('versions')}. This version of "
            f"sklearn-gradfeat reads formats up to {FORMAT}: upgrade it."
        )
    if metadata.get(_DIGEST) != digest(arrays, metadata[_DOCUMENT]):
        raise ValueError(f"{path} is damaged: its contents do not match their digest.")
    return document, arrays


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
        return {"strings": value.tolist(), "dtype": value.dtype.str}
    raise NotStorableError(f"{name} is {value!r}, of type {type(value).__name__}")


def _unused(name: str, arrays: Arrays) -> str:
    """Return the name, with a number if another array has it: keys 1 and "1" look alike."""
    names = itertools.chain([name], (f"{name}~{i}" for i in itertools.count(1)))
    return next(candidate for candidate in names if candidate not in arrays)


def unpack(value: Any, arrays: Arrays) -> Any:
    """Return the value that :func:`pack` was given."""
    match value:
        case list():
            result: Any = [unpack(item, arrays) for item in value]
        case {"tuple": items}:
            result = tuple(unpack(items, arrays))
        case {"dict": pairs}:
            result = {unpack(key, arrays): unpack(item, arrays) for key, item in pairs}
        case {"splitter": name, "arguments": arguments}:
            result = _splitters()[name](**unpack(arguments, arrays))
        case {"device": device}:
            result = torch.device(device)
        case {"array": name}:
            result = arrays[name]
        case {"strings": strings, "dtype": dtype}:
            result = np.array(strings, dtype=dtype)
        case _:
            result = value
    return result


@functools.cache
def _splitters() -> dict[str, Any]:
    """Return the splitters of scikit-learn that keep their arguments as they are, by name."""
    return {
        name: kind
        for name, kind in vars(model_selection).items()
        if hasattr(kind, "get_n_splits") and not name.startswith(("Base", "Repeated"))
    }
