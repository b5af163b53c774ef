"""Image files as a lazy array, decoded where it is read."""

from __future__ import annotations

import copy
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from types import EllipsisType
from typing import Any, TypeVar

import joblib
import numpy as np
import numpy.typing as npt
import xxhash

from sklearn_gradfeat.data._image_decoding import MODES, decode

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")

# Part of the decoding is Python code, which runs in one thread at a time.
_MAX_THREADS = 16
_MAX_LISTED = 5
_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}

Result = TypeVar("Result")


class ImageFiles:
    """Image files as a lazy array of shape (n_samples, height, width, 3).

    The array holds paths and decodes an image when it is read. Slices, index arrays and masks
    return another ``ImageFiles`` without opening a file, so ``train_test_split`` and
    ``GridSearchCV`` copy only paths. An integer index returns one image as an array.
    ``np.asarray`` decodes all images. The estimators of this package decode one batch while the
    network processes the previous one.

    Every image is rotated as its EXIF orientation tag says. Transparent images are placed on a
    white background. 16 bits per channel are scaled to 8. Palettes and CMYK are converted without a
    colour profile. Of an image with several frames the first is used.

    Parameters
    ----------
    paths : iterable of str or path-like
        The files, in any format of pixels that Pillow reads. Relative paths are made absolute.
    size : int, (int, int) or None, default=None
        Height and width of the images, in pixels; an integer is both. Images are resized
        (bilinear, antialiased) to cover this size with their aspect ratio, and cropped around the
        centre, like torchvision's ``Resize`` and ``CenterCrop``. None keeps the images as they
        are; all must then have the size of the first one.
    color : {"rgb", "grey"}, default="rgb"
        Colour space of the images. Grey images have shape (height, width).
    channels : {"last", "first"}, default="last"
        Position of the channel axis. With ``"first"`` images have shape (3, height, width), or
        (1, height, width) if grey, as torch modules and torchvision's ``weights.transforms()``
        expect.
    on_error : {"raise", "skip"}, default="raise"
        With ``"raise"``, decoding a file that cannot be read raises ``OSError``. With ``"skip"``,
        the constructor decodes all files, leaves out those that cannot be read, and warns. Select
        the targets of the remaining files with ``y[X.kept]``.
    n_threads : int or None, default=None
        Number of files to decode at the same time. None is the number of CPU cores, at most 16.

    Attributes
    ----------
    paths : ndarray of str of shape (n_samples,)
        The absolute paths of the files.
    kept : ndarray of int of shape (n_samples,)
        Index of each file in the ``paths`` passed to the constructor.
    skipped : list of (str, str)
        Path and error message of each file that was left out.
    shape : tuple of int
        (n_samples, height, width, 3), or the shape that ``color`` and ``channels`` imply.
    ndim : int
        Number of dimensions of the array.
    dtype : dtype
        uint8, with values from 0 to 255.

    Raises
    ------
    ValueError
        If a parameter is invalid, or ``paths`` is empty and ``size`` is None. Decoding raises it
        if ``size`` is None and the files differ in size.
    TypeError
        If ``paths`` is a single path.
    OSError
        If a file cannot be read, is not an image, or has more pixels than
        ``PIL.Image.MAX_IMAGE_PIXELS``, the limit of Pillow against decompression bombs.

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
                "folder with one subfolder per class use ImageFiles.from_folder."
            )
        absolute = [os.path.abspath(os.fsdecode(path)) for path in paths]
        self.paths = np.array(absolute, dtype=object)
        self._color, self._channels, self._n_threads = color, channels, n_threads
        self._resize = _height_and_width(size)
        self.kept = np.arange(len(absolute))
        self.skipped: list[tuple[str, str]] = []
        if on_error == "skip":
            self._skip_unreadable()
        self._height, self._width = self._resize or self._size_of_first()
        self._reference = self.paths[0] if len(self.paths) else ""

    @classmethod
    def from_folder(
        cls, root: str | os.PathLike[str], **options: Any
    ) -> tuple[ImageFiles, npt.NDArray[np.str_]]:
        """Return the images in a folder that has one subfolder per class, and their classes.

        Parameters
        ----------
        root : str or path-like
            The folder. Images are ``root/<class>/**/*.jpg``, and likewise .jpeg, .png, .webp,
            .tif, .tiff, .bmp, .gif, .ppm and .pgm. Names that start with a dot are ignored.
            Links to files and to folders outside of ``root`` are followed. Every file and every
            folder is read once: links to folders inside of ``root`` are ignored, and so are
            further links to the same file. :meth:`duplicates` finds equal files.
        **options
            The parameters ``size``, ``color``, ``channels``, ``on_error`` and ``n_threads`` of
            the class.

        Returns
        -------
        X : ImageFiles
            The images, sorted by class and then by path.
        y : ndarray of str of shape (n_samples,)
            The name of the subfolder of each image.

        Raises
        ------
        FileNotFoundError
            If the folder has no subfolders, or a subfolder has no images.

        Warns
        -----
        UserWarning
            If links place a file in two classes. It keeps the class of the file itself, or else
            the first class. If there is one subfolder, or all are named as parts of a data set,
            such as "train" and "test", and have the folders of the classes in them.
        """
        classes = sorted(
            entry.name
            for entry in os.scandir(root)
            if entry.is_dir() and not entry.name.startswith(".")
        )
        if not classes:
            raise FileNotFoundError(
                f"root={os.fspath(root)!r} has no subfolders. Pass a folder with one subfolder per "
                "class; for images without classes pass a list of files to ImageFiles."
            )
        visited: set[str] = set()
        found = [
            (label, path)
            for label in classes
            for path in _images_below(os.fsdecode(os.path.join(root, label)), root, visited)
        ]
        found = _each_file_once(found)
        missing = [label for label in classes if label not in dict(found)]
        if missing:
            raise FileNotFoundError(
                f"{os.path.join(root, missing[0])} has no images ({', '.join(EXTENSIONS)}) except "
                "those that also are in another class. Add images to this class, or remove its "
                "folder."
            )
        _warn_of_parts(root, found)
        images = cls([path for _, path in found], **options)
        return images, np.array([label for label, _ in found])[images.kept]

    def duplicates(self) -> npt.NDArray[np.intp]:
        """Return the index of the first sample whose file has the same bytes, for each sample.

        Equal files in training and test data make scores too high. The result can be passed as
        ``groups`` to splitters such as :class:`~sklearn.model_selection.GroupKFold`, which keep
        equal files in one fold. Files are compared by a 128-bit hash of their bytes. A file that
        cannot be read equals only itself.

        Returns
        -------
        first : ndarray of int of shape (n_samples,)
            ``first[i] == i`` for samples without an equal one before them, so
            ``(first != np.arange(len(X))).sum()`` is the number of duplicates.
        """
        names = [os.path.realpath(path) for path in self.paths]
        sizes = {name: _size(name) for name in names}
        n_of_size = Counter(sizes.values())
        ambiguous = [name for name, size in sizes.items() if n_of_size[size] > 1]
        hashes = dict(zip(ambiguous, self._in_threads(_content_hash, ambiguous), strict=True))
        contents = [hashes.get(name) or name for name in names]
        first: dict[Any, int] = {}
        for row, content in enumerate(contents):
            first.setdefault(content, row)
        return np.array([first[content] for content in contents], dtype=np.intp)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        n_channels = {"rgb": 3, "grey": 1}[self._color]
        if self._channels == "first":
            return len(self), n_channels, self._height, self._width
        grey = len(self), self._height, self._width
        return grey if n_channels == 1 else (*grey, n_channels)

    @property
    def ndim(self) -> int:
        """Number of dimensions of the array."""
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"<ImageFiles of shape {self.shape}>"

    def __getitem__(self, rows: Any) -> Any:
        """Return one image as an array, or several images as ``ImageFiles``."""
        if isinstance(rows, tuple) and len(rows) == 2 and isinstance(rows[1], EllipsisType):
            rows = rows[0]  # scikit-learn writes X[rows, ...]
        chosen = np.empty(()) if isinstance(rows, tuple) else self.paths[rows]
        if isinstance(chosen, str):
            return self._image(chosen)
        if chosen.ndim != 1:
            raise IndexError("ImageFiles have one axis to index. Write X[rows].")
        part = copy.copy(self)
        part.paths, part.kept = chosen, self.kept[rows]
        return part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Decode all images."""
        if copy is False:
            raise ValueError(
                "ImageFiles cannot become an array without a copy, since they are decoded. Pass "
                "copy=None or copy=True."
            )
        images = np.empty(self.shape, self.dtype)

        def fill(row: int) -> None:
            images[row] = self._image(self.paths[row])

        self._in_threads(fill, range(len(self)))
        return images if dtype is None else images.astype(dtype)

    def _image(self, path: str) -> npt.NDArray[np.uint8]:
        """Decode one image, and check its size."""
        image = decode(path, self._color, self._resize)
        if image.shape[:2] != (self._height, self._width):
            if path == self._reference:
                raise ValueError(
                    f"{path} has changed: it was {self._height} × {self._width} (height × width), "
                    f"and is {image.shape[0]} × {image.shape[1]} now. Create the ImageFiles again, "
                    "or pass size= to resize all images to one size."
                )
            raise ValueError(
                f"Images of different sizes: {self._reference} is {self._height} × {self._width} "
                f"(height × width), {path} is {image.shape[0]} × {image.shape[1]}. Pass "
                "ImageFiles(paths, size=224), for example, to resize all images to one size."
            )
        if self._channels == "first":
            return np.moveaxis(np.atleast_3d(image), 2, 0)
        return image

    def _size_of_first(self) -> tuple[int, int]:
        """Return the height and width of the first file."""
        if not len(self.paths):
            raise ValueError("paths has no files, so the image size is unknown. Pass size=.")
        height, width = decode(self.paths[0], self._color, None).shape[:2]
        return height, width

    def _skip_unreadable(self) -> None:
        """Decode every file, and keep the files without an error."""

        def error_message(path: str) -> str:
            try:
                decode(path, self._color, self._resize)
            except OSError as error:
                return str(error)
            return ""

        errors = self._in_threads(error_message, self.paths)
        self.skipped = [(path, text) for path, text in zip(self.paths, errors, strict=True) if text]
        if not self.skipped:
            return
        self.kept = np.array([row for row, text in enumerate(errors) if not text], dtype=int)
        listed = "\n".join(f"  {text}" for _, text in self.skipped[:_MAX_LISTED])
        n_more = len(self.skipped) - _MAX_LISTED
        more = f"\n  and {n_more} more" if n_more > 0 else ""
        message = f"{len(self.skipped)} of {len(errors)} files cannot be read:\n{listed}{more}"
        if not len(self.kept):
            raise OSError(message)
        self.paths = self.paths[self.kept]
        warnings.warn(
            f"{message}\nThey are left out. The attribute `skipped` lists them, and y[X.kept] has "
            "the other targets.",
            stacklevel=3,
        )

    def _in_threads(self, work: Callable[[Any], Result], items: Iterable[Any]) -> list[Result]:
        """Return the results in order; the threads end here, so pickles contain none."""
        n_threads = self._n_threads or min(joblib.cpu_count(), _MAX_THREADS)
        with ThreadPoolExecutor(n_threads, "decode") as pool:
            return list(pool.map(work, items))


def _images_below(folder: str, root: str | os.PathLike[str], visited: set[str]) -> list[str]:
    """Return the sorted image files in a folder and its subfolders.

    A link to a folder is followed unless this folder lies in ``root``, or ``root`` in it: those
    files have places of their own, and a cycle of links passes through such a link. ``visited``
    has the real paths of all folders of all classes so far, so each folder is read once.
    """
    inside = os.path.realpath(os.fsdecode(root))

    def is_new(path: str) -> bool:
        real = os.path.realpath(path)
        if real in visited or (os.path.islink(path) and _nested(real, inside)):
            return False
        visited.add(real)
        return True

    found = []
    for parent, folders, files in os.walk(folder, followlinks=True) if is_new(folder) else ():
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".") and is_new(os.path.join(parent, name))
        ]
        found += [
            os.path.join(parent, name)
            for name in files
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    if not found:
        raise FileNotFoundError(
            f"{folder} has no images ({', '.join(EXTENSIONS)}). Add images to this class, or "
            "remove its folder."
        )
    return sorted(found)


def _warn_of_parts(root: str | os.PathLike[str], found: list[tuple[str, str]]) -> None:
    """Warn if there is one class or the parts of a data set, with folders below them."""
    classes = sorted({label for label, _ in found})
    if len(classes) > 1 and not all(label.lower() in _PARTS for label in classes):
        return
    for label, path in found:
        folder = os.path.join(os.fsdecode(root), label)
        inside = os.path.relpath(path, folder).split(os.sep)
        if len(inside) > 1:
            warnings.warn(
                f"The subfolders of {os.fsdecode(root)} give the classes "
                f"{', '.join(map(repr, classes))}. If the classes are one level deeper, such as "
                f"{inside[0]!r}, pass ImageFiles.from_folder({folder!r}), and likewise for each "
                "part.",
                stacklevel=3,
            )
            return


def _nested(folder: str, other: str) -> bool:
    """Whether one of two real paths lies in the other."""
    return any(
        os.path.join(inner, "").startswith(os.path.join(outer, ""))
        for inner, outer in ((folder, other), (other, folder))
    )


def _each_file_once(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return pairs of class and path without links to files that are in the list otherwise."""
    chosen: dict[str | tuple[int, int], tuple[bool, int]] = {}
    reals = [_identity(path) for _, path in found]
    for row, (real, (_, path)) in enumerate(zip(reals, found, strict=True)):
        place = os.path.islink(path), row
        chosen[real] = min(chosen.get(real, place), place)
    kept = {row for _, row in chosen.values()}
    moved = [
        path
        for row, (label, path) in enumerate(found)
        if row not in kept and found[chosen[reals[row]][1]][0] != label
    ]
    if moved:
        warnings.warn(
            f"Links place {len(moved)} files in two classes, such as {moved[0]}. Each has one "
            "class: that of the file itself, or else the first. Remove the links, or their files.",
            stacklevel=3,
        )
    return [pair for row, pair in enumerate(found) if row in kept]


def _identity(path: str) -> str | tuple[int, int]:
    """Return the device and the number of a file, which its links share; else its real path."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def _size(path: str) -> int | None:
    """Return the size of a regular file, None for anything else."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _content_hash(path: str) -> bytes | None:
    """Return a hash of the bytes of a regular file, None if it cannot be read."""
    if _size(path) is None:
        return None
    state = xxhash.xxh3_128()
    try:
        with open(path, "rb") as stream:
            while block := stream.read(2**20):
                state.update(block)
    except OSError:
        return None
    return state.digest()


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
            "size must be None, a positive integer or a pair (height, width) of positive integers, "
            f"got {size!r}."
        )
    return int(sides[0]), int(sides[1])
