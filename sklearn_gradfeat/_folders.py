"""Folders of images, with one subfolder for each class."""

from __future__ import annotations

import os

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
