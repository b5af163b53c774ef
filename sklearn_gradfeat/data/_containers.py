"""``X`` in the containers that users have: tensors, data sets, lists of images and of paths."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sklearn_gradfeat.data._batches import is_lazy
from sklearn_gradfeat.data._image_decoding import upright
from sklearn_gradfeat.data._image_files import EXTENSIONS, ImageFiles

_ONE_SHAPE = (
    "Pass samples of one shape: resize images, or pass ImageFiles(paths, size=224), for example; "
    "pad sequences."
)


def to_numpy_input(X: Any) -> Any:
    """Convert ``X`` to an array or a lazy array, as far as scikit-learn does not do so.

    Tensors become arrays, without a copy if possible. Images of Pillow become an array of shape
    (n_samples, height, width, 3) with the values that ``ImageFiles`` decodes. Paths become
    ``ImageFiles``. A data set of images becomes a lazy array, a data set of tabular data becomes
    an array. Memory maps of images become lazy arrays. Other arrays, data frames and lists of
    numbers are returned unchanged.

    Parameters
    ----------
    X : object
        The samples as the user passes them.

    Returns
    -------
    object
        Input for scikit-learn's validation, or a lazy array.

    Raises
    ------
    TypeError, ValueError
        If the container needs a step of the user. The message names this step.
    """
    if isinstance(X, Tensor):
        return to_numpy(X)
    check_not_masked(X, "X")
    _check_container(X)
    if _is_dataset(X):
        dataset = _DatasetItems(X)
        return dataset if is_lazy(dataset) else to_numpy_input(dataset[:])
    items = _items(X)
    if not items:
        return _MappedArray(X) if isinstance(X, np.memmap) and X.ndim > 2 else X
    if any(isinstance(item, Image.Image) for item in items):
        return _images(items)
    if all(map(_is_path, items)):
        return ImageFiles(items)
    if any(isinstance(item, (str, bytes, os.PathLike)) for item in items):
        raise ValueError(
            "X holds texts, but must hold numbers. For texts, put a TextTokenizer before the "
            "estimator in a pipeline, with MaskedMean(model) as backbone. For image files, pass "
            "ImageFiles(paths)."
        )
    if isinstance(items[0], Mapping) or _is_pair(items[0]):
        _raise_for_structure(items[0], "X", "X")
    if any(isinstance(item, Tensor) for item in items):
        items = to_numpy(items)
    _check_one_shape(items)
    return items if isinstance(X, Sequence) else X


def check_not_masked(values: Any, name: str) -> None:
    """Raise an error for an array with masked values, which numpy and torch would use."""
    if np.ma.is_masked(values):
        raise ValueError(
            f"{name} has masked values, and their mask would be ignored. Leave these samples out, "
            f"or replace the values, as {name}.filled(0) does."
        )


def to_numpy(X: Any) -> Any:
    """Convert tensors, and sequences with tensors, to arrays; return other input unchanged."""
    if isinstance(X, (list, tuple)) and any(isinstance(item, Tensor) for item in X):
        return [to_numpy(item) for item in X]
    if not isinstance(X, Tensor):
        return X
    if X.is_meta:
        raise ValueError("A tensor on the meta device has no values. Pass one with values.")
    host = X.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).numpy()


def _check_container(X: Any) -> None:
    """Raise an error for an object that is not one sequence of samples."""
    if isinstance(X, DataLoader):
        raise TypeError(
            "X is a torch DataLoader. Pass its samples in order: X=[item[0] for item in "
            "loader.dataset] and y=[item[1] for item in loader.dataset]; or X=loader.dataset, if "
            "its items are inputs without targets."
        )
    if isinstance(X, Image.Image):
        raise TypeError("X is one image. Pass a list of images; for one sample, X=[image].")
    if isinstance(X, (str, bytes, os.PathLike)):
        raise TypeError(
            f"X is a single {type(X).__name__}. Pass a list; for a folder of images with one "
            "subfolder per class, X, y = ImageFiles.from_folder(folder)."
        )
    if isinstance(X, Mapping) and not sp.issparse(X):  # scikit-learn refuses sparse matrices
        raise TypeError(
            f"X is a {type(X).__name__} with the keys {_listed(X)}. Pass one array with one row "
            "per sample. For texts, put a TextTokenizer before the estimator in a pipeline."
        )
    if isinstance(X, (Iterator, set, frozenset)):
        raise TypeError(f"X is a {type(X).__name__}. Pass a list or an array: X=list(X).")


def _is_dataset(X: Any) -> bool:
    """Return whether ``X`` is a torch ``Dataset``, or another object with numbered items."""
    if isinstance(X, Dataset):
        return True
    numbered = hasattr(X, "__len__") and hasattr(X, "__getitem__")
    is_array = any(hasattr(X, name) for name in ("__array__", "__dataframe__", "dtype", "dtypes"))
    return numbered and not is_array and not isinstance(X, Sequence)


def _items(X: Any) -> list[Any]:
    """Return the items of a sequence or of an array of objects; an empty list for other input."""
    is_column = getattr(X, "ndim", 0) == 1 and getattr(X.dtype, "kind", "O") in "OSTU"
    return list(X) if is_column or isinstance(X, Sequence) else []


def _is_path(item: Any) -> bool:
    """Return whether an item is the path of a file, or a string that ends as one of an image."""
    if isinstance(item, str):
        return item.lower().endswith(EXTENSIONS)
    return isinstance(item, os.PathLike)


def _is_pair(item: Any) -> bool:
    """Return whether an item is an input with its target, such as an image and a number."""
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        return False
    first, second = item[:2]
    if isinstance(first, (np.ndarray, Tensor)):
        return first.shape != getattr(second, "shape", ())
    return isinstance(first, Image.Image)


def _raise_for_structure(item: Any, found: str, dataset: str) -> NoReturn:
    """Raise an error that says how to take the inputs from items with several parts."""
    advice = f"X=[item[0] for item in {dataset}] and y=[item[1] for item in {dataset}]"
    if isinstance(item, Mapping):
        advice = f"X=[item[KEY] for item in {dataset}] with a KEY from {_listed(item)}"
    raise TypeError(
        f"Item 0 of {found} is a {type(item).__name__}. Pass only the inputs as X, and the "
        f"targets as y: {advice}. For images in one folder per class, X, y = "
        "ImageFiles.from_folder(folder)."
    )


def _listed(keys: Any) -> str:
    return ", ".join(repr(key) for key in keys)


def _pixels(image: Image.Image, row: int) -> npt.NDArray[np.uint8]:
    """Return an image of Pillow as ``ImageFiles`` decodes it."""
    try:
        return np.asarray(upright(image, "rgb"))
    except Exception as error:  # Pillow does not document the errors of its decoders
        raise ValueError(f"Item {row} of X cannot be read as an image: {error}.") from error


def _images(items: list[Any]) -> npt.NDArray[np.uint8]:
    """Return images of Pillow as one array."""
    for row, item in enumerate(items):
        if not isinstance(item, Image.Image):
            raise TypeError(
                f"X holds images, but item {row} is a {type(item).__name__}. Pass images alone."
            )
    arrays = [_pixels(image, row) for row, image in enumerate(items)]
    _check_one_shape(arrays)
    return np.array(arrays)


def _check_one_shape(items: list[Any]) -> None:
    """Raise an error if arrays differ in shape, or lists in length."""
    if all(isinstance(item, (list, tuple)) for item in items):
        shapes = [(len(item),) for item in items]
    else:
        shapes = [tuple(getattr(item, "shape", ())) for item in items]
    for row, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"Item {row} of X has shape {shape}, but item 0 has shape {shapes[0]}. {_ONE_SHAPE}"
            )


class _MappedArray:
    """A memory map as a lazy array, which does not keep the pages that it has read."""

    def __init__(self, array: np.memmap[Any, Any]) -> None:
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        view = self._array[rows]
        part = np.array(view)
        # The pages of copy-on-write maps may hold changes that are nowhere else.
        if view.flags.c_contiguous and self._array.mode != "c":
            _release_pages(view)
        return part


def _release_pages(view: npt.NDArray[Any]) -> None:
    """Return the pages of a part of a memory map to the system, which can read them again."""
    mapped: Any = view
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    if not hasattr(mapped, "madvise"):
        return
    start = view.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    if start + view.nbytes > first:
        mapped.madvise(mmap.MADV_DONTNEED, first, start + view.nbytes - first)


class _DatasetItems:
    """The items of a map-style dataset as a lazy array."""

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__len__"):
            raise TypeError(
                "X is a torch Dataset without a length. Pass a map-style Dataset, with `__len__` "
                "and `__getitem__`."
            )
        self._dataset = dataset
        first = self._item(0) if len(dataset) else np.empty(0)
        self.shape = (len(dataset), *first.shape)
        self.dtype = first.dtype

    def _item(self, row: int) -> npt.NDArray[Any]:
        item = self._dataset[row]
        if isinstance(item, Image.Image):
            return _pixels(item, row)
        if isinstance(item, (tuple, list, Mapping)):
            _raise_for_structure(item, "the Dataset X", "dataset")
        return np.asarray(to_numpy(item))

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        items = []
        for row in range(*rows.indices(self.shape[0])):
            items.append(self._item(row))
            if items[-1].shape != self.shape[1:]:
                raise ValueError(
                    f"Item {row} of X has shape {items[-1].shape}, but item 0 has shape "
                    f"{self.shape[1:]}. {_ONE_SHAPE}"
                )
        return np.array(items).reshape(len(items), *self.shape[1:])
