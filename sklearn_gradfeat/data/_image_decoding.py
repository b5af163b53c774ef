"""One image file as numbers from 0 to 255, whatever its format."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, TiffImagePlugin

MODES = {"rgb": "RGB", "grey": "L"}

# What undoes an EXIF orientation. ImageOps.exif_transpose also rewrites the rest of the EXIF
# data, which fails where a camera left some of it malformed.
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
    """Read an image file, upright and opaque.

    Parameters
    ----------
    path : str
        A file of any format that Pillow reads; of several frames the first.
    color : {"rgb", "grey"}
        What to convert to.
    size : (int, int) or None
        Height and width: the image is resized to cover them, and its centre kept. None
        leaves it as it is.

    Returns
    -------
    ndarray of shape (height, width, 3) or (height, width)

    Raises
    ------
    OSError
        If the file cannot be read or is no image; the message names it.
    """
    try:
        with Image.open(path) as image:
            _refuse_bomb(image.width, image.height)
            image.load()
            turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            pixels = _flat(image, MODES[color])
        pixels = pixels if turn is None else pixels.transpose(turn)
        return np.asarray(pixels if size is None else cover(pixels, size))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}") from None
    except Exception as error:  # what Pillow's many decoders raise is not documented
        raise OSError(f"{path} cannot be read as an image: {error}") from error


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to cover ``size``, keeping the ratio of the sides, and crop around the centre.

    For a square these are torchvision's ``Resize(side)`` and ``CenterCrop(side)``.
    """
    height, width = size
    sides = (int(width * image.height / image.width), width)
    if height * image.width >= width * image.height:
        sides = (height, int(height * image.width / image.height))
    if sides != (image.height, image.width):
        _refuse_bomb(*sides[::-1])  # a line of one pixel by 10000 covers a square with gigabytes
        image = image.resize(sides[::-1], Image.Resampling.BILINEAR)
    top, left = round((sides[0] - height) / 2), round((sides[1] - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _refuse_bomb(width: int, height: int) -> None:
    """Refuse what Pillow only warns of, up to twice its limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"it would take {width} × {height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = "
            f"{limit}; raise that limit if you trust the file"
        )


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """Convert to ``mode``, with 16 bits scaled to 8 and what is transparent on white."""
    # Pillow scales PGM with more than 8 bits to the range of 16, in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = _to_8_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its numbers have no known range (Pillow's mode {image.mode}); save it with 8 or 16 "
            "bits for each channel"
        )
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), opaque)
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale the range of 16 bits, or of a TIFF with fewer, to 0..255, rounded.

    Pillow's own conversion clips at 255, and it leaves it to its users that TIFF may count from
    white.
    """
    numbers = np.asarray(image).astype(np.uint32)
    tags = getattr(image, "tag_v2", {})
    most = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        numbers = most - numbers
    return Image.fromarray(((numbers * 255 + most // 2) // most).astype(np.uint8))
