"""Colour images of 32 x 32 pixels, which are decoded once and kept in memory."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad
from torchvision.datasets import CIFAR10

from sklearn_gradfeat import ImageFiles

SIDE = 32


def load_images(data, split="train"):
    """Return the images as a uint8 tensor (n, 3, 32, 32), and the names of their classes.

    ``data`` is a zip file or a folder of ``train/<class>/*.jpg``, or the folder where torchvision
    keeps CIFAR-10. Pretraining ignores the classes; the linear probe needs them. Images of another
    size are resized and cropped around the centre.
    """
    if (data / CIFAR10.base_folder).is_dir():
        dataset = CIFAR10(data, train=split == "train")
        pixels, classes = dataset.data, [dataset.classes[i] for i in dataset.targets]
    else:
        pixels, classes = _decoded(data, split)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), np.array(classes)


def _decoded(data, split):
    """Return the pixels and the classes of image files, sorted by class and name."""
    with tempfile.TemporaryDirectory() as unpacked:
        if data.is_file():
            shutil.unpack_archive(data, unpacked)
        root = Path(unpacked) if data.is_file() else data
        try:
            images, classes = ImageFiles.from_folder(root / split, size=SIDE)
        except FileNotFoundError:
            sys.exit(f"{data} holds no {split}/<class>/*.jpg and no {CIFAR10.base_folder}.")
        return np.asarray(images), classes


def to_network(pixels):
    """Return uint8 images as floats between -1 and 1, the input of the networks."""
    return pixels.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def augment(pixels, margin=4):
    """Flip images with probability ½, and shift all of them by up to ``margin`` pixels.

    The border is filled by reflection. A constant border would reveal the shift.
    """
    n, device = len(pixels), pixels.device
    padded = pad(pixels.float(), [margin] * 4, mode="reflect")
    positions = torch.arange(SIDE, device=device)
    rows, columns = torch.randint(0, 2 * margin + 1, (2, n, 1), device=device) + positions
    flipped = torch.rand(n, 1, device=device) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    sample = torch.arange(n, device=device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)
