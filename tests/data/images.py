"""Pixels, and image files that hold them or cannot be read."""

import numpy as np
from PIL import Image

from sklearn_gradfeat import ImageFiles


def random_pixels(high, *shape):
    return np.random.default_rng(0).integers(0, high, shape, dtype=np.min_scalar_type(high - 1))


COLORS = random_pixels(256, 6, 9, 3)
GREYS = random_pixels(256, 6, 9)
DEEP = random_pixels(65536, 6, 9)
EIGHT_BITS = np.rint(DEEP / 257).astype(np.uint8)


def written(path, image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return path


def read(path, **options):
    return ImageFiles([path], **options)[0]


def truncated(path):
    content = written(path, random_pixels(256, 64, 64, 3)).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def bad_checksum(path):
    content = bytearray(written(path, COLORS, format="PNG").read_bytes())
    content[40] ^= 255
    path.write_bytes(content)


# Makes the file, the error, and a part of its message.
BROKEN = {
    "truncated.jpg": (truncated, OSError, "truncated"),
    "truncated.png": (truncated, OSError, "truncated"),
    "text.jpg": (lambda path: path.write_text("text"), OSError, "cannot identify"),
    "empty.png": (lambda path: path.touch(), OSError, "cannot identify"),
    "checksum.png": (bad_checksum, OSError, "cannot be read as an image"),
    "folder.png": (lambda path: path.mkdir(), OSError, "cannot be read as an image"),
    "missing.png": (lambda path: None, FileNotFoundError, "There is no file"),
}
