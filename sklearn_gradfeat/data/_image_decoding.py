"""Decoding of one image file to an array of uint8.

Files of every kind must give comparable pixels, and a network takes three channels of eight bits,
or one. The steps, in order:

1. Orientation. The EXIF tag 0x0112 has a value from 1 to 8 for the reflection or rotation that
   turns the stored pixels upright.
2. Depth. A channel of b bits has values v from 0 to m = 2ᵇ − 1, and becomes ⌊255 v / m + ½⌋.
   A TIFF file may store m − v ("white is zero"). Pillow clips values above 255 instead.
3. Transparency. A pixel of colour c and opacity a becomes a c + (1 − a) · white.
4. Colour. Palettes, CMYK and grey become RGB or grey, without colour profiles.
5. Size. The image is scaled to cover (height, width) with its aspect ratio, then cropped around its
   centre.

A small file can declare a huge image. Pillow warns above ``PIL.Image.MAX_IMAGE_PIXELS`` and raises
an error above twice this number. Here any image above the limit raises an error, before its pixels
are decoded and before it is enlarged.
"""

from __future__ import annotations

import math
import os
import stat

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, TiffImagePlugin

MODES = {"rgb": "RGB", "grey": "L"}
_PROGRAMS = ("EPS", "WMF")

# ImageOps.exif_transpose also rewrites the other EXIF tags, which fails if a camera wrote some of
# them incorrectly.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(path: str, color: str, size: tuple[int, int] | None) -> npt.NDArray[np.uint8]:
    """Return the first frame of an image file, upright and opaque.

    Parameters
    ----------
    path : str
        A file in any format of pixels that Pillow reads.
    color : {"rgb", "grey"}
        Colour space of the result.
    size : (int, int) or None
        Height and width in pixels. None keeps the size of the image.

    Returns
    -------
    ndarray of shape (height, width, 3) or (height, width)

    Raises
    ------
    OSError
        If the file cannot be decoded. The message has its path.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block, and a device never end
            raise ValueError("it is not a regular file")
        with Image.open(path) as image:
            if image.format in _PROGRAMS:
                raise ValueError(
                    f"its format {image.format} is a program that draws, which Pillow would run. "
                    "Save it as PNG"
                )
            _check_number_of_pixels(image.width, image.height)
            if size is not None:
                _check_resized(image, size)
            pixels = upright(image, color)
        return np.asarray(pixels if size is None else _resize_and_crop(pixels, size))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}. Check the path.") from None
    except Exception as error:  # Pillow does not document the errors of its decoders
        raise OSError(f"{path} cannot be read as an image: {error}") from error


def upright(image: Image.Image, color: str) -> Image.Image:
    """Return an open image in a colour space, rotated as its orientation tag says, and opaque."""
    image.load()
    transpose = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    pixels = _convert(image, MODES[color])
    return pixels if transpose is None else pixels.transpose(transpose)


def _resize_and_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to cover ``size``, and crop around the centre.

    For a square this equals torchvision's ``Resize(side)`` and ``CenterCrop(side)``.
    """
    height, width = size
    resized = _cover(image.width, image.height, size)
    if resized != (image.height, image.width):
        _check_number_of_pixels(resized[1], resized[0])
        image = image.resize((resized[1], resized[0]), Image.Resampling.BILINEAR)
    top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _cover(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of an image after it is scaled to cover ``size``."""
    if size[0] * width >= size[1] * height:
        return size[0], int(size[0] * width / height)
    return int(size[1] * height / width), size[1]


def _check_resized(image: Image.Image, size: tuple[int, int]) -> None:
    """Raise an error if the image is too large after scaling, upright or not.

    An image of 1 × 10000 pixels would cover a square of 224 pixels with gigabytes. Some formats
    store the orientation behind the pixels, so it is unknown here.
    """
    sides = (image.width, image.height), (image.height, image.width)
    smallest = min((_cover(*pair, size) for pair in sides), key=math.prod)
    if smallest != (image.height, image.width):
        _check_number_of_pixels(smallest[1], smallest[0])


def _check_number_of_pixels(width: int, height: int) -> None:
    """Raise an error for an image above Pillow's limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"it needs {width} × {height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {limit}. "
            "Raise this limit if you trust the file"
        )


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert depth, transparency and colour (steps 2 to 4 of the module)."""
    # Pillow scales a PGM file with more than 8 bits to 16 bits, in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = _to_8_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixel values have no known range (Pillow mode {image.mode}). Save it with 8 or "
            "16 bits per channel"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba)
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale the values of a grey image to the range of 8 bits."""
    values = np.asarray(image).astype(np.uint32)
    tags = getattr(image, "tag_v2", {})
    largest = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
        values = largest - values
    return Image.fromarray(((values * 255 + largest // 2) // largest).astype(np.uint8))
