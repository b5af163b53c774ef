"""Where numpy meets torch: reading samples, choosing device and precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.utils.data import Dataset

Preprocess: TypeAlias = Callable[[Tensor], Tensor]

# Matrix products round the rows of a smaller batch in another way.
MIN_ROWS = 16

_PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.float32,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn ``device`` into a torch device; ``"auto"`` is cuda, then mps, then cpu."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(0, device=device).device  # with its index
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device!r} cannot be used here: {error}. "
            "Pass device='auto' to take the best device that is present."
        ) from error


def compute_dtypes(
    precision: str, X: Any, device: torch.device, indices: bool
) -> tuple[torch.dtype, torch.dtype]:
    """Choose the dtypes of the trunk, and of the head with the solver and the results.

    ``"auto"`` follows scikit-learn for rows of numbers (float64 unless they are of a narrower
    floating type) and torch for everything else (float32). The head of a network for rows is
    small, so it computes in float64 in any case.
    """
    if precision == "float64" and device.type == "mps":
        raise ValueError(
            "precision='float64' is not available on device 'mps'. "
            "Pass device='cpu', or precision='float32'."
        )
    rows = len(X.shape) == 2 and X.dtype != np.uint8 and not indices
    if precision == "auto":
        wide = rows and (X.dtype.kind in "iub" or X.dtype.itemsize > 4) and device.type != "mps"
        precision = "float64" if wide else "float32"
    trunk = _PRECISIONS[precision]
    return trunk, torch.float64 if rows and device.type != "mps" else trunk


def accumulation_device(device: torch.device) -> torch.device:
    """Where float64 sums live: on ``device`` unless it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def is_lazy(X: Any) -> bool:
    """Whether ``X`` is read batch by batch: it looks like an array of images but is none.

    That takes a numpy ``dtype``, a ``shape`` of more than two dimensions, and slices: HDF5 and
    zarr data sets, :class:`ImageFiles`, items of a torch ``Dataset``. What is in memory, or
    has rows, is converted as a whole, as scikit-learn does.
    """
    if isinstance(X, (np.ndarray, Tensor)) or sp.issparse(X) or not hasattr(X, "__getitem__"):
        return False
    return isinstance(getattr(X, "dtype", None), np.dtype) and len(getattr(X, "shape", ())) > 2


def without_torch(X: Any) -> Any:
    """Turn tensors, lists of tensors and map-style datasets into what numpy can read.

    Tensors become arrays without a copy where they can, a dataset of images stays on disk.
    Anything else passes through.
    """
    if isinstance(X, Dataset):
        items = _DatasetItems(X)
        return items if is_lazy(items) else items[:]
    if isinstance(X, (list, tuple)) and any(isinstance(item, Tensor) for item in X):
        return [without_torch(item) for item in X]
    if not isinstance(X, Tensor):
        return X
    host = X.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).numpy()


class _DatasetItems:
    """The items of a map-style dataset as a lazy array."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        if not hasattr(dataset, "__len__"):
            raise TypeError("X is a torch Dataset without a length; it must be a map-style one.")
        self._dataset = dataset
        first = self._item(0) if len(dataset) else np.empty(0)
        self.shape = (len(dataset), *first.shape)
        self.dtype = first.dtype

    def _item(self, row: int) -> npt.NDArray[Any]:
        item = self._dataset[row]
        if isinstance(item, (tuple, list, dict)):
            raise TypeError(
                f"Item {row} of X is a {type(item).__name__}. Pass a Dataset whose items are the "
                "inputs alone, as tensors or arrays, and the targets as y."
            )
        return np.asarray(without_torch(item))

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        items = []
        for row in range(*rows.indices(self.shape[0])):
            items.append(self._item(row))
            if items[-1].shape != self.shape[1:]:
                raise ValueError(
                    f"Item {row} of X has shape {items[-1].shape}, the first has {self.shape[1:]}."
                )
        return np.array(items).reshape(len(items), *self.shape[1:])


def to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """Copy an array of any layout, byte order or writability into a tensor."""
    dtype = np.dtype(np.float64) if array.dtype == np.longdouble else array.dtype.newbyteorder("=")
    native = array.astype(dtype, order="C", copy=True)
    try:
        return torch.from_numpy(native)
    except TypeError as error:
        raise ValueError(f"X must hold numbers, its dtype is {array.dtype}.") from error


class Rows:
    """Some rows of an array, read in slices as it is itself: nothing is copied before.

    Parameters
    ----------
    X : ndarray or lazy array-like of shape (n_samples, ...)
        The array.
    rows : ndarray of int
        Which rows, in what order.
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
    """The rows of ``X`` as batches on a device, ready for the network.

    Parameters
    ----------
    X : ndarray or lazy array-like of shape (n_samples, ...)
        Validated input.
    preprocess : callable or None
        Applied to every batch in its own dtype before the cast to ``dtype``.
    dtype : torch.dtype
        Floating dtype of the batches.
    device : torch.device
        Where the batches go.
    indices : bool
        Whether the network takes integers as indices (it has an embedding), so that
        they must reach it as int64 instead of as floating point numbers.
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

    def __len__(self) -> int:
        return int(self.X.shape[0])

    def subset(self, rows: npt.NDArray[np.intp]) -> Samples:
        """Return some of the samples."""
        return Samples(Rows(self.X, rows), self.preprocess, self.dtype, self.device, self.indices)

    def batch(self, rows: slice) -> Tensor:
        """Return the rows as one tensor of the network's dtype on its device."""
        return self.prepare(self.read(rows))

    def read(self, rows: slice) -> Tensor:
        """Return the rows as they are, in host memory."""
        part = self.X[rows]
        if is_lazy(self.X):
            part = np.asarray(part)
            if part.dtype.kind == "f" and not np.isfinite(part).all():
                raise ValueError("Input X contains NaN or infinity.")
        return to_tensor(part)

    def prepare(self, raw: Tensor) -> Tensor:
        """Bring what was read to the device, through ``preprocess``."""
        if self.device.type == "mps" and raw.dtype == torch.float64:
            raw = raw.float()  # the device has no float64
        raw = to_device(raw, self.device)
        cooked = raw if self.preprocess is None else self.preprocess(raw)
        if not isinstance(cooked, Tensor) or cooked.shape[:1] != raw.shape[:1]:
            got = tuple(cooked.shape) if isinstance(cooked, Tensor) else type(cooked).__name__
            raise ValueError(
                f"preprocess must return a tensor with one row per sample: it was given a "
                f"batch of shape {tuple(raw.shape)} and returned {got}."
            )
        keep = self.indices and not cooked.is_floating_point()
        return cooked.to(self.device, torch.int64 if keep else self.dtype)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor; from host memory to CUDA by way of locked pages, so that nobody waits."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def slices(n_samples: int, batch_size: int, stride: int = 1) -> Iterator[slice]:
    """Yield slices of about equally many of every ``stride``-th row, ``batch_size`` at most.

    Matrix products round the rows of a very small last batch in another way than its others.
    """
    n_rows = math.ceil(n_samples / stride)
    n_batches = math.ceil(n_rows / batch_size)
    for k in range(n_batches):
        start, stop = (stride * (i * n_rows // n_batches) for i in (k, k + 1))
        yield slice(start, min(stop, n_samples), stride)
