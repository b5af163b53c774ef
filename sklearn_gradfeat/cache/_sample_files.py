"""Arrays with one row for each sample, in temporary files.

A fit keeps trunk output and activations in files where they take more than ``memory_bytes``:

* The trunk output: one record for each sample, in the order of the samples. A pass reads batch
  after batch, and a thread reads the next batch ahead. A subset reads the same file, over the
  short gaps between its samples, so that the passes of folds are nearly sequential, too.
* The activations, and the projections onto the coarse space: tensors whose memory is a mapped
  file. A pass over the projections gives their pages back, block by block. Those of the activations
  stay until the system needs the memory.

The files have no name: nothing is left in the folder, however the process ends, and their space is
free with the last reference. It is reserved when a file is created, so that a full disk is an error
at this moment and not at a later write.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import threading
import warnings
import weakref
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sklearn_gradfeat.cache._config import memory_bytes
from sklearn_gradfeat.cache._store import Tensors

# Reading over a gap of this size takes less time than a second request to a disk.
_MAX_GAP = 2**16
# The maps of tensors, by their addresses.
_MAPS: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()


def folder_for(n_bytes: int, folder: Path | None) -> Path | None:
    """Return the folder for arrays of this size, or None to keep them in memory.

    Parameters
    ----------
    n_bytes : int
        The size of the trunk output and the activations.
    folder : Path or None
        The folder that the user chose. Without one, it is the folder of the system for temporary
        files, and a warning names it.
    """
    if n_bytes <= memory_bytes():
        return None
    if folder is not None and os.access(folder, os.W_OK):
        return folder
    folder = Path(tempfile.gettempdir())
    warnings.warn(
        f"The output of the frozen layers takes {_readable(n_bytes)}, more than memory_bytes="
        f"{memory_bytes()}. Temporary files in {str(folder)!r} hold it until the end of the fit. "
        "Pass a folder on a fast local disk as feature_store, or call set_config with a larger "
        "memory_bytes.",
        UserWarning,
        stacklevel=2,
    )
    return folder


def mapped_tensor(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """Return a tensor of zeros whose memory is a temporary file.

    Raises
    ------
    OSError
        If the folder has no room for it.
    """
    n_bytes = prod(shape) * dtype.itemsize
    with _temporary_file(n_bytes, folder) as file:
        mapped = mmap.mmap(file.fileno(), n_bytes)
    tensor = torch.frombuffer(mapped, dtype=dtype).view(*shape)
    _MAPS[tensor.data_ptr()] = mapped
    return tensor


def release_pages(rows: Tensor) -> None:
    """Return the memory of rows of a mapped tensor to the system, which can read them again.

    Nothing happens to rows of other tensors.
    """
    first = rows.untyped_storage().data_ptr()
    mapped = _MAPS.get(first)
    if mapped is not None and rows.nbytes and hasattr(mapped, "madvise"):
        start = (rows.data_ptr() - first) // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, rows.data_ptr() + rows.nbytes - first - start)


class SampleFile:
    """The tensors of all samples in a temporary file, one record for each sample.

    Parameters
    ----------
    n_samples : int
        The number of samples.
    example : tuple of tensors
        The tensors of some samples, for dtypes and shapes.
    folder : Path
        Where the file is.

    Raises
    ------
    OSError
        If the folder has no room for the file.
    """

    def __init__(self, n_samples: int, example: Tensors, folder: Path) -> None:
        self._kinds = [(z.dtype, z.shape[1:]) for z in example]
        sizes = [dtype.itemsize * shape.numel() for dtype, shape in self._kinds]
        self._ends = np.cumsum(sizes).tolist()
        self.record_bytes: int = self._ends[-1]
        self._file = _temporary_file(n_samples * self.record_bytes, folder)
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)

    def write(self, start: int, tensors: Tensors) -> None:
        """Write the tensors of consecutive samples, the first of which has the number ``start``."""
        records = np.empty((len(tensors[0]), self.record_bytes), np.uint8)
        parts = np.split(records, self._ends[:-1], axis=1)
        for part, z in zip(parts, tensors, strict=True):
            part[:] = _as_bytes(z.detach().cpu().contiguous())
        rest = records.data.cast("B")
        with self._lock:
            self._file.seek(start * self.record_bytes)
            while rest:
                rest = rest[self._file.write(rest) :]

    def read(self, rows: npt.NDArray[np.intp]) -> Tensors:
        """Return the tensors of some samples, in the order of ``rows``."""
        records = torch.empty(len(rows), self.record_bytes, dtype=torch.uint8)
        steps = np.diff(rows)
        far = (steps < 0) | ((steps - 1) * self.record_bytes > _MAX_GAP)
        bounds = [0, *(np.flatnonzero(far) + 1).tolist(), len(rows)]
        for start, stop in itertools.pairwise(bounds):
            self._read_run(rows[start:stop], records[start:stop].numpy())
        return tuple(
            _part(records, end, dtype, shape)
            for end, (dtype, shape) in zip(self._ends, self._kinds, strict=True)
        )

    def _read_run(self, rows: npt.NDArray[np.intp], out: npt.NDArray[np.uint8]) -> None:
        """Read some samples in ascending order, together with those between them."""
        n_rows = int(rows[-1] - rows[0]) + 1
        consecutive = n_rows == len(rows) and bool((np.diff(rows) == 1).all())
        span = out if consecutive else np.empty((n_rows, self.record_bytes), np.uint8)
        offset, rest = int(rows[0]) * self.record_bytes, span.data.cast("B")
        while rest:
            n_bytes = self._read_at(offset, rest)
            if not n_bytes:
                raise OSError("The temporary file of the trunk output was truncated.")
            offset, rest = offset + n_bytes, rest[n_bytes:]
        if not consecutive:
            np.take(span, rows - rows[0], axis=0, out=out, mode="clip")

    def _read_at(self, offset: int, buffer: memoryview) -> int:
        """Read into a buffer; return the number of bytes."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:
            self._file.seek(offset)
            return int(self._file.readinto(buffer))  # type: ignore[attr-defined]


class FileBoundary:
    """The boundary tensors of some samples of a file.

    Parameters
    ----------
    file : SampleFile
        The file.
    rows : ndarray of int
        The numbers of the samples in the file.
    """

    def __init__(self, file: SampleFile, rows: npt.NDArray[np.intp]) -> None:
        self._file, self._rows = file, rows

    def subset(self, samples: npt.NDArray[np.intp]) -> FileBoundary:
        """Return the boundary of the selected samples, in the same file."""
        return FileBoundary(self._file, self._rows[samples])

    def take(self, samples: slice) -> Tensors:
        """Return the tensors of some samples."""
        return self._file.read(self._rows[samples])


def _part(records: Tensor, end: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """Return one of the tensors that records hold, as contiguous memory."""
    n_bytes = dtype.itemsize * shape.numel()
    if n_bytes < records.shape[1]:
        # numpy copies in this thread; torch would start a pool of threads for every reader
        part = torch.empty(len(records), n_bytes, dtype=torch.uint8)
        np.copyto(part.numpy(), records.numpy()[:, end - n_bytes : end])
        records = part
    return records.view(dtype).view(len(records), *shape)


def _as_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """Return a contiguous tensor as rows of bytes."""
    return tensor.view(len(tensor), -1).view(torch.uint8).numpy()


def _temporary_file(n_bytes: int, folder: Path) -> IO[bytes]:
    """Return a file without a name, with room for ``n_bytes``."""
    try:
        file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            else:
                file.truncate(n_bytes)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        message = (
            f"The output of the frozen layers needs a temporary file of {_readable(n_bytes)}, "
            f"which cannot be created: {error.strerror}. Free disk space, pass another folder as "
            "feature_store, or call set_config with a larger memory_bytes"
        )
        raise type(error)(error.errno, message, str(folder)) from error
    return file


def _readable(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g} GB"
