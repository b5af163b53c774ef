"""The file of a fit that is not finished: its checkpoint.

The JSON document of the archive holds

- ``checkpoint``: what the fit depends on, by name, each with a digest and a short text;
- ``entries``: a text for each journal, with one line for each of its entries: its name and those of
  its vectors.

The arrays are the numbers of all entries, one after the other, with their lengths; and the vectors,
each once, though several entries may have it.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sklearn_gradfeat.cache import get_config
from sklearn_gradfeat.data import (
    accumulation_device,
    gather_over_ranks,
    is_first_rank,
    of_first_rank,
    on_all_ranks,
)
from sklearn_gradfeat.io._archive import Arrays, read_archive, write_archive
from sklearn_gradfeat.training import Entry, Journal

_ADVICE = "Delete the file, or pass another path as checkpoint, to start anew."


class Described(NamedTuple):
    """A digest of a value on which a fit depends, and the value as a short text, or nothing."""

    digest: str
    text: str = ""


class Checkpoint:
    """The file of one fit that is not finished. Rank 0 reads and writes it.

    Parameters
    ----------
    path : str or path-like
        The file. It need not exist.

    Raises
    ------
    ValueError
        If the file is not a checkpoint, or is damaged.
    OSError
        If no file can be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.fspath(path):
            raise ValueError("checkpoint is an empty path. Pass the path of a file.")
        self._path = Path(os.path.realpath(path))
        self._header: dict[str, Described] = {}
        self._document: dict[str, Any] = {}
        self._arrays: Arrays = {}
        self._is_ours = self._warned = False
        self._parts: list[list[Entry]] = []  # of several journals
        self._written, self._writing = time.monotonic(), threading.Lock()
        if is_first_rank():
            self._open()

    def _open(self) -> None:
        folder = self._path.parent
        if not folder.is_dir():
            raise FileNotFoundError(
                errno.ENOENT, "checkpoint: create the folder of this file first", str(self._path)
            )
        if not os.access(folder, os.W_OK):
            raise PermissionError(
                errno.EACCES, "checkpoint: the folder of this file is read-only", str(self._path)
            )
        if not self._path.exists():
            return
        if not self._path.is_file():
            raise ValueError(
                f"checkpoint={str(self._path)!r} is not a regular file. Pass the path of a new "
                "file."
            )
        try:
            self._document, self._arrays = read_archive(self._path)
        except ValueError as error:
            raise ValueError(
                f"checkpoint={str(self._path)!r} is a file that was not written as a checkpoint, "
                f"or is damaged: {error} {_ADVICE}"
            ) from error
        if "checkpoint" not in self._document:
            raise ValueError(
                f"checkpoint={str(self._path)!r} is the file of a saved model. Pass another path "
                "as checkpoint."
            )
        self._is_ours = True

    def check(self, header: Mapping[str, Described]) -> None:
        """Add to what the fit depends on; raise an error if the file is of another fit."""
        self._header |= header
        if not self._is_ours:
            return
        stored: dict[str, list[str]] = self._document["checkpoint"]
        differing = [
            f"{name} ({text} here, {there[1]} there)" if text and there[1] else name
            for name, (digest, text) in header.items()
            if (there := stored.get(name, ["", "nothing"]))[0] != digest
        ]
        if differing:
            raise ValueError(
                f"checkpoint={str(self._path)!r} was written by another fit. They differ in "
                f"{', '.join(differing)}. Pass what that fit had, to go on with it. {_ADVICE}"
            )

    def journals(self, like: Tensor, n: int = 1) -> list[Journal]:
        """Return the results in the file; vectors get the device of ``like``.

        The ``n`` journals write the file, each from one thread at a time. :meth:`check` must have
        been called with the whole header.
        """
        texts, arrays = _of_first_rank(self._document.get("entries", [""] * n), self._arrays)
        self._document, self._arrays = {}, {}
        try:
            found = _decoded(texts, arrays, like)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{self._path} is damaged: {error!r}. {_ADVICE}") from error
        first = is_first_rank()
        journals = [
            Journal(entries, partial(self._note, number) if first else None)
            for number, entries in enumerate(found)
        ]
        self._parts = [journal.contents() for journal in journals] if n > 1 else []
        return journals

    def _note(self, number: int, contents: Callable[[], list[Entry]]) -> None:
        """Take note of the contents of a journal; write those of all journals if it is time."""
        due = time.monotonic() - self._written >= get_config()["checkpoint_seconds"]
        if self._parts:
            self._parts[number] = contents()
        if due and self._writing.acquire(blocking=False):
            try:
                self._write(list(self._parts) or [contents()])
                self._written = time.monotonic()
            finally:
                self._writing.release()

    def _write(self, parts: Sequence[Sequence[Entry]]) -> None:
        """Replace the file; where that fails, the fit goes on without."""
        texts, arrays = _encoded(parts)
        try:
            if self._path.exists() and not self._is_ours:
                raise FileExistsError(errno.EEXIST, "another program has written this file")
            write_archive(self._path, {"checkpoint": self._header, "entries": texts}, arrays)
            self._is_ours = True
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"checkpoint={str(self._path)!r} cannot be written: {error}. The fit goes on, "
                    "and tries again. If it is killed, a part of the results is lost.",
                    UserWarning,
                    stacklevel=2,
                )

    def remove(self) -> None:
        """Remove the file of a fit that is finished on all ranks."""
        if on_all_ranks(True) and self._is_ours:
            self._path.unlink(missing_ok=True)


def _encoded(journals: Sequence[Sequence[Entry]]) -> tuple[list[str], Arrays]:
    """Return the lines of the entries of each journal, and their arrays."""
    entries, lines = list(itertools.chain(*journals)), []
    arrays: Arrays = {
        "lengths": np.array([len(entry.numbers) for entry in entries], dtype=np.int64),
        "numbers": np.concatenate([np.empty(0), *(entry.numbers for entry in entries)]),
    }
    known: dict[tuple[int, ...], str] = {}
    for entry in entries:
        parts = [entry.name]
        for name, vectors in entry.vectors.items():
            if not vectors:
                continue
            key = tuple(map(id, vectors))
            if key not in known:
                known[key] = f"vectors.{len(known)}"
                arrays[known[key]] = np.stack([x.detach().cpu().numpy() for x in vectors])
            parts += [name, known[key]]
        lines.append("\t".join(parts))
    following = iter(lines)
    return ["\n".join(itertools.islice(following, len(part))) for part in journals], arrays


def _decoded(texts: list[str], arrays: Arrays, like: Tensor) -> list[list[Entry]]:
    """Return the entries of each journal from their lines and arrays."""
    if not any(texts):
        return [[] for _ in texts]

    def tensors(array: npt.NDArray[Any]) -> list[Tensor]:
        wide = array.dtype == np.float64
        device = accumulation_device(like.device) if wide else like.device
        # Each in memory of its own: the last digits of a product depend on the alignment.
        return [torch.tensor(row, device=device) for row in array]

    vectors = {name: tensors(of) for name, of in arrays.items() if name.startswith("vectors.")}
    ends = np.cumsum(arrays["lengths"])
    numbers = np.split(arrays["numbers"], ends[:-1])[::-1]

    def entry(line: str) -> Entry:
        name, *parts = line.split("\t")
        named = dict(zip(parts[::2], parts[1::2], strict=True))
        return Entry(name, numbers.pop(), {key: vectors[at] for key, at in named.items()})

    journals = [[entry(line) for line in text.split("\n")] if text else [] for text in texts]
    if numbers:
        raise ValueError("numbers without a line")
    return journals


def _of_first_rank(texts: list[str], arrays: Arrays) -> tuple[list[str], Arrays]:
    """Return the contents of the file on all ranks."""
    kinds = [(name, array.dtype.str) for name, array in arrays.items()]
    texts, kinds = gather_over_ranks((texts, kinds))[0]
    found = {}
    for name, kind in kinds:
        array = arrays.get(name, np.zeros(1, kind))
        found[name] = of_first_rank(torch.from_numpy(array)).numpy()
    return texts, found
