"""Labelled images for the benchmarks, from files or from the data sets of torchvision."""

from __future__ import annotations

import io
import json
import sys
import zipfile

import numpy as np
from PIL import Image
from sklearn.model_selection import PredefinedSplit, train_test_split
from sklearn.preprocessing import LabelEncoder, MultiLabelBinarizer
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, VOCDetection

from sklearn_gradfeat import ImageFiles

# Data sets in the formats of torchvision, and the file or folder that each is recognised by. The
# first match counts.
PHOTOGRAPHS = {"VOC07": "VOCdevkit", "COCO14": "annotations"}
IMAGES = {
    "CIFAR-10": CIFAR10.base_folder,
    "CIFAR-100": CIFAR100.base_folder,
    "SVHN": "train_32x32.mat",
}
CIFAR10_CLASSES = {
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
}  # fmt: skip


def need_data(path):
    """End the program with a message unless the path exists."""
    if path is None or not path.exists():
        sys.exit(print("--data must name a zip file or folder of images: nothing to measure."))


def read_images(path, split, n_images=None):
    """Return the first images of every class, and the names of their classes.

    Parameters
    ----------
    path : Path
        A zip file or a folder of ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``, all of a
        size; or the folder where torchvision keeps CIFAR-10, CIFAR-100 or SVHN.
    split : {"train", "test"}
        The part of the data.
    n_images : int or None, default=None
        Their number, up to rounding, divided equally between the classes; None is all.

    Returns
    -------
    (ndarray of shape (n_images, height, width, 3), ndarray of str of shape (n_images,))
    """
    sources, labels = _sources(path, split)
    classes, members = np.unique(labels, return_inverse=True)
    rows = [np.flatnonzero(members == i) for i in range(len(classes))]
    if n_images is not None:
        rows = [of_class[: max(1, n_images // len(classes))] for of_class in rows]
    chosen = np.concatenate(rows)
    if isinstance(sources, np.ndarray):
        return sources[chosen], labels[chosen]
    return np.stack([_decode(sources[row]()) for row in chosen]), labels[chosen]


def _sources(path, split):
    """Return all images, or functions that read their files, and the names of their classes."""
    held = _held(path, IMAGES)
    if held == "SVHN":
        found = SVHN(path, split=split)
        return found.data.transpose(0, 2, 3, 1), found.labels.astype(str)
    if held is not None:
        found = (CIFAR10 if held == "CIFAR-10" else CIFAR100)(path, train=split == "train")
        return found.data, np.array(found.classes)[found.targets]
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file.read_bytes for file in path.glob("*/*/*")}
    else:
        archive = zipfile.ZipFile(path)
        files = {name: lambda n=name: archive.read(n) for name in archive.namelist()}
    names = [n for n in sorted(files) if n.startswith(f"{split}/") and n.endswith(".jpg")]
    if not names:
        sys.exit(
            f"--data {path}: there are no {split}/<class>/*.jpg, and torchvision keeps none of "
            "CIFAR-10, CIFAR-100 and SVHN there."
        )
    return [files[name] for name in names], np.array([name.split("/")[1] for name in names])


def _held(path, known):
    """Return the name of the known data set in a folder, None for other files."""
    return next((name for name, mark in known.items() if (path / mark).exists()), None)


def _name(path, classes, known=IMAGES):
    """Return the name of the data in the paper, or else that of the file."""
    files = "CIFAR-10" if set(classes) == CIFAR10_CLASSES else path.stem
    return _held(path, known) or files


def _decode(content):
    """Return the pixels of an image file."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


class Task:
    """Training and test images, and a split of the training images into nine tenths and one tenth.

    ``source`` is the name of the data, which the paper may have figures for.
    """

    multilabel = False

    def __init__(self, arguments):
        self.X, labels = read_images(arguments.data, "train", arguments.n_train)
        self.X_test, test_labels = read_images(arguments.data, "test", arguments.n_test)
        encoder = LabelEncoder().fit(labels)
        self.y, self.y_test = encoder.transform(labels), encoder.transform(test_labels)
        self.source = _name(arguments.data, encoder.classes_)
        self._hold_out(arguments.seed, self.y)

    def _hold_out(self, seed, classes):
        """Draw the tenth of the images on which penalties and learning rates are selected."""
        self.rows, self.held_out = train_test_split(
            np.arange(len(self.y)), test_size=0.1, stratify=classes, random_state=seed
        )
        folds = np.full(len(self.y), -1)
        folds[self.held_out] = 0
        self.held_out_fold = PredefinedSplit(folds)


class MultiLabelTask(Task):
    """Multilabel photographs; ``y`` is an indicator matrix.

    The images of torchvision's VOCDetection and CocoDetection are cropped to squares around the
    centre. Of any other data, four images make one tile.
    """

    multilabel = True

    def __init__(self, arguments):
        labels = {}
        for split, n in (("train", arguments.n_train), ("test", arguments.n_test)):
            X, found = read_photographs(arguments.data, split, arguments.side, arguments.seed)
            setattr(self, "X" if split == "train" else "X_test", X[:n])
            labels[split] = found[:n]
        encoder = MultiLabelBinarizer().fit(labels["train"])
        known = set(encoder.classes_)
        self.y, self.y_test = (
            encoder.transform([row & known for row in rows]) for rows in labels.values()
        )
        self.source = _name(arguments.data, encoder.classes_, PHOTOGRAPHS | IMAGES)
        self._hold_out(arguments.seed, None)


def read_photographs(path, split, side, seed):
    """Return images and the set of classes in each of them.

    Parameters
    ----------
    path : Path
        The ``root`` of torchvision's VOCDetection for 2007, the folder of COCO's
        ``annotations/``, ``train2014/`` and ``val2014/``, or a path for :func:`read_images`.
    split : {"train", "test"}
        The part of the data.
    side : int
        Height and width of photographs.
    seed : int
        Seeds the choice of the images that share a tile.

    Returns
    -------
    (array-like of shape (n_images, height, width, 3), list of set)
    """
    held = _held(path, PHOTOGRAPHS)
    if held == "VOC07":
        found = VOCDetection(path, year="2007", image_set="trainval" if split == "train" else split)
        trees = (VOCDetection.parse_voc_xml(node) for node in map(_root, found.annotations))
        return ImageFiles(found.images, size=side), [_easy(tree) for tree in trees]
    if held == "COCO14":
        return _coco(path, "train" if split == "train" else "val", side)
    return tiles(*read_images(path, split), seed)


def _root(file):
    """Return the root element of an XML file."""
    from xml.etree import ElementTree

    return ElementTree.parse(file).getroot()


def _easy(tree):
    """Return the classes of all objects except those marked as difficult."""
    objects = tree["annotation"].get("object", [])
    return {found["name"] for found in objects if found.get("difficult", "0") == "0"}


def _coco(path, split, side):
    """Return the images of COCO, in the order of their numbers, and the classes in each."""
    (annotations,) = sorted(path.glob(f"annotations/instances_{split}*.json"))[:1]
    content = json.loads(annotations.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    present = {image["id"]: set() for image in content["images"]}
    for found in content["annotations"]:
        present[found["image_id"]].add(names[found["category_id"]])
    folder = path / annotations.stem.removeprefix("instances_")
    files = {image["id"]: folder / image["file_name"] for image in content["images"]}
    numbers = sorted(present)
    return ImageFiles([files[n] for n in numbers], size=side), [present[n] for n in numbers]


def tiles(X, labels, seed):
    """Return tiles of two by two images, with every image in one tile, and the classes in each."""
    four = np.random.default_rng(seed).permutation(len(X))[: len(X) // 4 * 4].reshape(-1, 4)
    n, (height, width, colours) = len(four), X.shape[1:]
    square = X[four].reshape(n, 2, 2, height, width, colours).transpose(0, 1, 3, 2, 4, 5)
    return square.reshape(n, 2 * height, 2 * width, colours), [set(labels[row]) for row in four]
