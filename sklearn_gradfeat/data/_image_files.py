"""Image files as an array that is decoded where it is read."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from types import EllipsisType
from typing import Any, TypeVar

import joblib
import numpy as np
import numpy.typing as npt

from sklearn_gradfeat.data._image_decoding import MODES, decode

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")


def labelled_files(root: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Return the image files below ``root`` and the subfolder that each is in.

    Both are sorted by class and then by path. Names that start with a dot are passed over,
    and so are files of other types.
    """
    classes = sorted(entry.name for entry in os.scandir(root) if _is_class(entry))
    if not classes:
        raise FileNotFoundError(
            f"{os.fspath(root)} has no subfolders, which name the classes. For images without "
            "classes pass a list of files to ImageFiles."
        )
    files, labels = [], []
    for label in classes:
        of_class = _images_below(os.path.join(root, label))
        files += of_class
        labels += [label] * len(of_class)
    return files, labels


def _is_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _images_below(folder: str) -> list[str]:
    """Return the image files at any depth, sorted."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name)
            for name in files
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    if not found:
        raise FileNotFoundError(f"{folder} has no images ({', '.join(EXTENSIONS)}).")
    return sorted(found)


_MOST_THREADS = 16  # Pillow's Python code, which runs in one thread at a time, limits more
_LISTED = 5  # broken files that a warning spells out

Result = TypeVar("Result")


class ImageFiles:
    """Image files as an array of shape (n_samples, height, width, 3) that is read when needed.

    It holds paths. Slices, index arrays and masks give another ``ImageFiles`` without opening
    a file, so ``train_test_split`` and ``GridSearchCV`` copy paths only. An integer gives
    the image, ``np.asarray`` all of them. Estimators of this package decode one batch ahead
    of the network.

    Images are turned upright as their EXIF orientation says. Transparent ones are put on
    white, 16 bits a channel are scaled to 8, palettes and CMYK are converted without colour
    profile. Of several frames the first is taken.

    Parameters
    ----------
    paths : iterable of str or path-like
        The files, of any format that Pillow reads. Relative paths are made absolute.
    size : int, (int, int) or None, default=None
        Side, or height and width. Images are resized (bilinear, antialiased), larger or
        smaller, until they cover it, keeping the ratio of their sides, and cropped around
        the centre: torchvision's ``Resize`` and ``CenterCrop``. None is for files that all
        have the size of the first.
    color : {"rgb", "grey"}, default="rgb"
        Grey images have shape (height, width).
    channels : {"last", "first"}, default="last"
        ``"first"`` has samples of shape (3, height, width), or (1, height, width) if grey,
        as modules and torchvision's ``weights.transforms()`` take them.
    on_error : {"raise", "skip"}, default="raise"
        ``"raise"``: a file that cannot be read raises ``OSError`` once it is decoded.
        ``"skip"``: all files are decoded now and those that cannot be read are left out,
        with a warning. Align the targets with ``y[X.kept]``.
    n_threads : int or None, default=None
        Number of files decoded at once. None is the number of cores, at most 16.

    Attributes
    ----------
    paths : ndarray of str of shape (n_samples,)
        The files.
    kept : ndarray of shape (n_samples,)
        Their positions in the ``paths`` that were passed first.
    skipped : list of (str, str)
        Files that were left out, and why.
    shape : tuple of int
        (n_samples, height, width, 3) unless ``color`` or ``channels`` say otherwise.
    ndim : int
        Length of ``shape``.
    dtype : dtype
        uint8.

    Raises
    ------
    ValueError
        If a parameter is wrong, or with ``size=None``, when decoding, files differ in size.
    OSError
        If a file cannot be read or is no image, or is larger than Pillow's limit against
        decompression bombs, ``PIL.Image.MAX_IMAGE_PIXELS``.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from sklearn_gradfeat import ImageFiles
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (root / name).mkdir()
    ...     Image.new("RGB", (60, 40)).save(root / name / "1.png")
    >>> X, y = ImageFiles.from_folder(root, size=32)
    >>> X.shape, y.tolist()
    ((2, 32, 32, 3), ['cat', 'dog'])
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        size: int | tuple[int, int] | None = None,
        color: str = "rgb",
        channels: str = "last",
        on_error: str = "raise",
        n_threads: int | None = None,
    ) -> None:
        _check_choice("color", color, tuple(MODES))
        _check_choice("channels", channels, ("last", "first"))
        _check_choice("on_error", on_error, ("raise", "skip"))
        if n_threads is not None and not _is_positive(n_threads):
            raise ValueError(f"n_threads must be None or a positive integer, got {n_threads!r}.")
        if isinstance(paths, (str, bytes, os.PathLike)):
            raise TypeError(
                f"paths must be a list of files, got the single path {os.fspath(paths)!r}. For a "
                "folder with one subfolder for each class use ImageFiles.from_folder."
            )
        absolute = [os.path.abspath(os.fsdecode(path)) for path in paths]
        self.paths = np.array(absolute, dtype=object)
        self._color, self._channels, self._n_threads = color, channels, n_threads
        self._resize = _height_and_width(size)
        self.kept = np.arange(len(absolute))
        self.skipped: list[tuple[str, str]] = []
        if on_error == "skip":
            self._leave_out_broken()
        self._height, self._width = self._resize or self._size_of_first()
        self._reference = self.paths[0] if len(self.paths) else ""

    @classmethod
    def from_folder(
        cls, root: str | os.PathLike[str], **options: Any
    ) -> tuple[ImageFiles, npt.NDArray[np.str_]]:
        """Return the images of a folder that has one subfolder for each class.

        Parameters
        ----------
        root : str or path-like
            The folder, of ``<class>/**/*.jpg`` and so on: .jpg, .jpeg, .png, .webp, .tif,
            .tiff, .bmp, .gif, .ppm and .pgm. Names that start with a dot are passed over.
        **options
            ``size``, ``color``, ``channels``, ``on_error`` and ``n_threads``, as above.

        Returns
        -------
        X : ImageFiles
            The images, sorted by class and then by path.
        y : ndarray of str of shape (n_samples,)
            The name of the subfolder of each.

        Raises
        ------
        FileNotFoundError
            If there are no subfolders, or one has no images.
        """
        files, labels = labelled_files(root)
        images = cls(files, **options)
        return images, np.array(labels)[images.kept]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ``np.asarray`` of this."""
        channels = {"rgb": 3, "grey": 1}[self._color]
        if self._channels == "first":
            return len(self), channels, self._height, self._width
        sides = len(self), self._height, self._width
        return sides if channels == 1 else (*sides, channels)

    @property
    def ndim(self) -> int:
        """Length of ``shape``."""
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"<ImageFiles of shape {self.shape}>"

    def __getitem__(self, rows: Any) -> Any:
        """Return one image as an array, or several as ``ImageFiles``."""
        if isinstance(rows, tuple) and len(rows) == 2 and isinstance(rows[1], EllipsisType):
            rows = rows[0]  # scikit-learn writes X[rows, ...]
        chosen = np.empty(()) if isinstance(rows, tuple) else self.paths[rows]
        if isinstance(chosen, str):
            return self._image(chosen)
        if chosen.ndim != 1:
            raise IndexError("ImageFiles are indexed along the first axis only: X[rows].")
        part = copy.copy(self)
        part.paths, part.kept = chosen, self.kept[rows]
        return part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Decode all images."""
        if copy is False:
            raise ValueError("ImageFiles cannot become an array without a copy: they are decoded.")
        images = np.empty(self.shape, self.dtype)

        def fill(row: int) -> None:
            images[row] = self._image(self.paths[row])

        self._in_threads(fill, range(len(self)))
        return images if dtype is None else images.astype(dtype)

    def _image(self, path: str) -> npt.NDArray[np.uint8]:
        """Decode one image of the common shape."""
        image = decode(path, self._color, self._resize)
        if image.shape[:2] != (self._height, self._width):
            raise ValueError(
                f"Images of different sizes: {self._reference} is {self._height} × {self._width} "
                f"(height × width), {path} is {image.shape[0]} × {image.shape[1]}. Pass size= to "
                "bring all to one size."
            )
        if self._channels == "first":
            return np.moveaxis(np.atleast_3d(image), 2, 0)
        return image

    def _size_of_first(self) -> tuple[int, int]:
        """Return the height and width of the first file."""
        if not len(self.paths):
            raise ValueError("There are no files in paths, so their size is not known: pass size=.")
        height, width = decode(self.paths[0], self._color, None).shape[:2]
        return height, width

    def _leave_out_broken(self) -> None:
        """Decode every file and keep those that can be."""

        def reason(path: str) -> str:
            try:
                decode(path, self._color, self._resize)
            except OSError as error:
                return str(error)
            return ""

        reasons = self._in_threads(reason, self.paths)
        self.skipped = [(path, why) for path, why in zip(self.paths, reasons, strict=True) if why]
        if not self.skipped:
            return
        self.kept = np.array([row for row, why in enumerate(reasons) if not why], dtype=int)
        shown = "\n".join(f"  {why}" for _, why in self.skipped[:_LISTED])
        more = f"\n  and {len(self.skipped) - _LISTED} more" if len(self.skipped) > _LISTED else ""
        message = f"{len(self.skipped)} of {len(reasons)} files cannot be read:\n{shown}{more}"
        if not len(self.kept):
            raise OSError(message)
        self.paths = self.paths[self.kept]
        warnings.warn(f"{message}\nThey are left out; see `skipped`.", stacklevel=3)

    def _in_threads(self, work: Callable[[Any], Result], items: Iterable[Any]) -> list[Result]:
        """Return the results in order; threads end with the call, so that nothing is pickled."""
        n_threads = self._n_threads or min(joblib.cpu_count(), _MOST_THREADS)
        with ThreadPoolExecutor(n_threads, "decode") as pool:
            return list(pool.map(work, items))


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _is_positive(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _height_and_width(size: Any) -> tuple[int, int] | None:
    """Validate ``size``."""
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(map(_is_positive, sides)):
        raise ValueError(
            f"size must be None, a positive integer or a pair of them (height, width), got {size!r}"
        )
    return int(sides[0]), int(sides[1])
