"""Where numpy meets torch: reading samples, choosing device and precision."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor

from sklearn_gradfeat.data._batch_size import is_out_of_memory

Preprocess: TypeAlias = Callable[[Tensor], Tensor]

# CPU matrix products round a row differently in a batch with fewer rows than this.
MIN_ROWS = 16

# Numbers in a block of rows; other devices than the CPU need larger blocks to be busy.
_BLOCK, _BLOCK_ON_DEVICE = 2**20, 2**25

_CPU = torch.device("cpu")

_PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.float32,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """Return a torch device with its index; ``"auto"`` prefers cuda, then mps, then the CPU."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise RuntimeError("the tensors of this device have no values")
        return found
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"device={device!r} cannot be used here: {error}. "
            "Pass device='auto' to select the best available device."
        ) from error


def compute_dtypes(
    precision: str, X: Any, device: torch.device, raw: bool
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of the frozen layers, and the dtype of the head, the solver and results.

    ``"auto"`` follows scikit-learn for tabular data: float64, unless ``X`` has a narrower floating
    dtype. It follows torch for all other data: float32. The head of a network for tabular data is
    small and computes in float64, unless the network cannot, as where it casts to float32 inside.
    The device mps has no float64.

    Parameters
    ----------
    precision : {"auto", "float64", "float32", "bfloat16"}
        With ``"bfloat16"`` the tensors are float32 and the caller enables autocast.
    X : ndarray or lazy array-like of shape (n_samples, ...)
        Validated input.
    device : torch.device
        The computing device.
    raw : bool
        Whether ``X`` holds integers that index an embedding, or is for a network with a transform
        of its own. Such data, for example sounds, are not tabular.
    """
    if precision == "float64" and device.type == "mps":
        raise ValueError(
            "precision='float64' is not available on device 'mps'. "
            "Pass device='cpu', or precision='float32'."
        )
    tabular = len(X.shape) == 2 and X.dtype != np.uint8 and not raw
    if precision == "auto":
        wide = tabular and (X.dtype.kind in "iub" or X.dtype.itemsize > 4) and device.type != "mps"
        precision = "float64" if wide else "float32"
    trunk = _PRECISIONS[precision]
    return trunk, torch.float64 if tabular and device.type != "mps" else trunk


def accumulation_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums: ``device`` itself, or the CPU for mps."""
    return torch.device("cpu") if device.type == "mps" else device


# Lazy arrays. Images on disk may need more room than the memory has, so the package reads them
# batch by batch. A lazy array has a numpy ``dtype`` and a ``shape`` of three or more dimensions,
# and a slice of rows returns an array. HDF5 and zarr data sets, ImageFiles, memory maps and the
# items of a torch ``Dataset`` are lazy arrays. Their values are checked when a batch is read, so
# NaN raises an error in the middle of ``fit``. Arrays, tensors, lists, data frames and tabular data
# are converted and validated as a whole, as in scikit-learn.


def is_lazy(X: Any) -> bool:
    """Return whether ``X`` is a lazy array, to be read batch by batch."""
    if isinstance(X, (np.ndarray, Tensor)) or sp.issparse(X) or not hasattr(X, "__getitem__"):
        return False
    return isinstance(getattr(X, "dtype", None), np.dtype) and len(getattr(X, "shape", ())) > 2


class Rows:
    """A lazy selection of rows; slices of it are read from ``X`` on demand.

    Parameters
    ----------
    X : ndarray or lazy array-like of shape (n_samples, ...)
        The array.
    rows : ndarray of int
        The selected rows, in order.
    """

    def __init__(self, X: Any, rows: npt.NDArray[np.intp]) -> None:
        self._X, self._rows = X, rows
        self.shape = (len(rows), *X.shape[1:])
        self.dtype = X.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        chosen = self._rows[rows]
        if isinstance(self._X, np.ndarray):
            return self._X[chosen]
        runs = np.split(chosen, np.flatnonzero(np.diff(chosen) != 1) + 1)
        return np.concatenate([np.asarray(self._X[run[0] : run[-1] + 1]) for run in runs])


class Samples:
    """The samples as batches on a device, ready for the network.

    Parameters
    ----------
    X : ndarray or lazy array-like of shape (n_samples, ...)
        Validated input.
    preprocess : callable or None
        Maps a batch, in the dtype of ``X``, to the input of the network. It receives a batch on the
        device, or one in host memory if it fails there, as with NumPy or tensors of its own.
    dtype : torch.dtype
        Floating dtype of the batches.
    device : torch.device
        The device of the batches.
    indices : bool
        Whether the network indexes an embedding with its input. Integers then become int64
        instead of ``dtype``.
    """

    def __init__(
        self,
        X: Any,
        preprocess: Preprocess | None,
        dtype: torch.dtype,
        device: torch.device,
        indices: bool = False,
    ) -> None:
        self.X = X
        self.preprocess = preprocess
        self.dtype = dtype
        self.device = device
        self.indices = indices
        self._prepared_on_host = False

    def __len__(self) -> int:
        return int(self.X.shape[0])

    def subset(self, rows: npt.NDArray[np.intp]) -> Samples:
        """Return the selected samples, without reading them."""
        some = copy.copy(self)
        some.X = Rows(self.X, rows)
        return some

    def batch(self, rows: slice) -> Tensor:
        """Return some samples as one input of the network, on its device."""
        return self.prepare(self.read(rows))

    def read(self, rows: slice) -> Tensor:
        """Return a copy of some samples in host memory, in the dtype of ``X``."""
        part = self.X[rows]
        if is_lazy(self.X):
            part = np.asarray(part)
            if part.dtype.kind == "f" and not np.isfinite(part).all():
                raise ValueError(
                    "Input X contains NaN or infinity. Replace these values, or leave out these "
                    "samples."
                )
        return _copy_to_tensor(part)

    def prepare(self, raw: Tensor) -> Tensor:
        """Move samples that were read to the device, and apply ``preprocess`` to them."""
        if self.device.type == "mps" and raw.dtype == torch.float64:
            raw = raw.float()  # the device has no float64
        try:
            prepared = self._preprocessed(raw)
        except (RuntimeError, IndexError, AssertionError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"preprocess failed on a batch of shape {tuple(raw.shape)} and dtype {raw.dtype}: "
                f"{error}\nPass X in the shape and dtype that preprocess takes. Transforms of "
                "torchvision take images with their channels first: (n_samples, channels, height, "
                "width)."
            ) from error
        if not isinstance(prepared, Tensor) or prepared.shape[:1] != raw.shape[:1]:
            is_tensor = isinstance(prepared, Tensor)
            got = tuple(prepared.shape) if is_tensor else type(prepared).__name__
            raise ValueError(
                f"preprocess must return a tensor with one row per sample: for a batch of shape "
                f"{tuple(raw.shape)} it returned {got}."
            )
        keep = self.indices and not prepared.is_floating_point()
        return prepared.to(self.device, torch.int64 if keep else self.dtype)

    def _preprocessed(self, raw: Tensor) -> Any:
        if self.preprocess is None:
            return to_device(raw, self.device)
        if self._prepared_on_host or self.device.type == "cpu":
            return self.preprocess(raw)
        try:
            return self.preprocess(to_device(raw, self.device))
        except Exception as error:  # whatever the transform may raise
            if is_out_of_memory(error):
                raise
            try:
                prepared = self.preprocess(raw)
            except Exception:  # no better in host memory
                raise error from None
            self._prepared_on_host = True
            return prepared


class _StructurePickler(pickle.Pickler):
    """Pickles everything except the values of tensors and arrays, which can be large."""

    def persistent_id(self, value: Any) -> str | None:
        """Return a name in place of a tensor or an array."""
        return "values" if isinstance(value, (Tensor, np.ndarray)) else None


def warn_unless_picklable(preprocess: Preprocess | str | None) -> None:
    """Warn of a transform that pickle refuses, such as a lambda."""
    try:
        _StructurePickler(io.BytesIO()).dump(preprocess)
    except Exception as error:  # whatever an object's own pickling may raise
        warnings.warn(
            f"preprocess cannot be pickled, so pickle and joblib.dump will fail for the fitted "
            f"estimator. Define it as a function or a class in a module, or use a transform of "
            f"torchvision. ({error})",
            UserWarning,
            stacklevel=2,
        )


def _copy_to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """Copy an array of any memory layout and byte order into a tensor."""
    dtype = np.dtype(np.float64) if array.dtype == np.longdouble else array.dtype.newbyteorder("=")
    native = array.astype(dtype, order="C", copy=True)
    try:
        return torch.from_numpy(native)
    except TypeError as error:
        raise ValueError(
            f"X must hold numbers, got dtype {array.dtype}. Convert X to a numeric dtype."
        ) from error


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; from the CPU to CUDA asynchronously, through pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def rows_at(tensor: Tensor, rows: list[int]) -> Tensor:
    """Return some rows; torch 2.9 has no ``tensor[rows]`` for unsigned integers."""
    return tensor.index_select(0, torch.arange(len(tensor), device=tensor.device)[rows])


def rows_on_device(
    tensors: Sequence[Tensor], rows: slice | list[int], device: torch.device
) -> tuple[Tensor, ...]:
    """Return some rows of tensors, moved to a device."""
    return tuple(to_device(tensor[rows], device) for tensor in tensors)


def block_size(device: torch.device, on_cpu: int = _BLOCK) -> int:
    """Return how many numbers a temporary array may have."""
    return on_cpu if device.type == "cpu" else _BLOCK_ON_DEVICE


def row_blocks(n_rows: int, n_columns: int, *, device: torch.device = _CPU) -> Iterator[slice]:
    """Iterate over blocks of rows for computations whose temporary arrays are as large as a block.

    The blocks depend on the shape and the device alone, so sums over them do, too.
    """
    return slices(n_rows, max(1, block_size(device) // max(1, n_columns)))


def slices(n_samples: int, batch_size: int, stride: int = 1) -> Iterator[slice]:
    """Yield slices that divide every ``stride``-th sample into batches of about equal size.

    Equal sizes avoid a very small last batch, which matrix products would round differently.
    """
    n_rows = math.ceil(n_samples / stride)
    n_batches = math.ceil(n_rows / batch_size)
    for k in range(n_batches):
        start, stop = (stride * (i * n_rows // n_batches) for i in (k, k + 1))
        yield slice(start, min(stop, n_samples), stride)
