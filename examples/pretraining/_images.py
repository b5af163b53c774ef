"""Unlabelled colour images of 32 x 32 pixels, decoded once and kept in memory."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad
from torchvision.datasets import CIFAR10
from tqdm.auto import tqdm

SIDE = 32


def load_images(data, split="train"):
    """Return the images as a uint8 tensor (n, 3, 32, 32), and the names of their classes.

    ``data`` is a zip file or a folder with ``train/<class>/*.jpg``, or a folder where
    torchvision keeps CIFAR-10. Pretraining ignores the classes, the linear probe needs them.
    """
    if (data / CIFAR10.base_folder).is_dir():
        dataset = CIFAR10(data, train=split == "train")
        pixels, classes = dataset.data, [dataset.classes[i] for i in dataset.targets]
    else:
        files = _files(data, split)
        if not files:
            sys.exit(f"{data} holds no {split}/<class>/*.jpg and no {CIFAR10.base_folder}.")
        pixels = np.stack([_decode(read()) for _, read in tqdm(files, f"{split} images")])
        classes = [name for name, _ in files]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), np.array(classes)


def _files(data, split):
    """List the class of every image with a function that reads it, sorted by path."""
    if data.is_dir():
        found = {path.relative_to(data): path.read_bytes for path in data.glob("*/*/*.jpg")}
    else:
        archive = zipfile.ZipFile(data)
        found = {Path(name): lambda n=name: archive.read(n) for name in archive.namelist()}
    wanted = [p for p in sorted(found) if p.match(f"{split}/*/*.jpg") and len(p.parts) == 3]
    return [(path.parent.name, found[path]) for path in wanted]


def _decode(content):
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return np.asarray(image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE)))


def to_network(pixels):
    """Return bytes as the floats between -1 and 1 that the networks are trained with."""
    return pixels.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def augment(pixels, margin=4):
    """Flip every second image at random, and move all of them by up to ``margin`` pixels.

    Reflections fill the border: a constant one would tell where an image was before it moved.
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
