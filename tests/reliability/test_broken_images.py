"""Broken and hostile images: the pixels that Pillow decodes, or an error that names the file."""

import contextlib
import io
import itertools
import os
import resource
import signal
import socket
import struct
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from sklearn_gradfeat import ImageFiles
from tests.reliability.mutations import damaged
from tests.reliability.processes import run

MAX_PIXELS = 10**6
# Several copies of an image with the most pixels, and the memory of the decoders.
ROOM = 2**26
SECONDS = 10


# --- whole images -----------------------------------------------------------------------------


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def whole_images():
    """Return the bytes of images of many formats, modes and options."""
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(0, 160, 5), np.arange(0, 90, 2))[..., None] + [0, 30, 60]
    color = Image.fromarray((smooth + rng.integers(0, 9, smooth.shape)).astype(np.uint8))
    alpha = color.copy()
    alpha.putalpha(color.convert("L"))
    deep = Image.fromarray(rng.integers(0, 2**16, (20, 30), dtype=np.uint16))
    palette = color.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "A camera"
    Image.init()
    written = [kind for kind in ("PCX", "SGI", "QOI", "DDS") if kind in Image.SAVE]
    frames = {"save_all": True, "append_images": [ImageOps.invert(color), color.rotate(90)]}
    return [
        *(encoded(color, kind) for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM")),
        *(encoded(color.convert("L"), kind) for kind in ("JPEG", "PNG", "TIFF", "BMP", "PPM")),
        *(encoded(color.convert("1"), kind) for kind in ("PNG", "TIFF", "BMP", "PPM")),
        *(encoded(alpha, kind) for kind in ("PNG", "WEBP", "TIFF", "ICO", "TGA", "JPEG2000")),
        *(encoded(alpha.convert("LA"), kind) for kind in ("PNG", "TIFF")),
        *(encoded(color.convert("CMYK"), kind) for kind in ("JPEG", "TIFF")),
        *(encoded(deep, kind) for kind in ("PNG", "TIFF", "PPM")),
        *(encoded(palette, kind) for kind in ("PNG", "GIF", "TIFF", "BMP", "TGA")),
        *(encoded(palette, kind, transparency=2) for kind in ("PNG", "GIF")),
        encoded(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        encoded(color, "PNG", transparency=(0, 30, 60)),
        *(encoded(color, kind, **frames) for kind in ("GIF", "TIFF", "WEBP", "PNG", "MPO")),
        *(encoded(color, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")),
        encoded(color, "JPEG", exif=b"Exif\0\0MM\0*" + rng.bytes(60)),
        encoded(color, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0" + rng.bytes(60)),
        encoded(color, "JPEG", progressive=True, quality=30),
        *(
            encoded(color, "TIFF", compression=how)
            for how in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
        ),
        encoded(Image.new("F", (9, 6), 0.5), "TIFF"),
        encoded(Image.new("I", (9, 6), 70_000), "TIFF"),
        *(encoded(color, kind) for kind in written),  # Pillow reads QOI, and writes it since 11.3
        encoded(color, "EPS"),
    ]  # fmt: skip


def png(width, height, depth=8, kind=2, body=b""):
    """Return a PNG file that declares a size, with any body."""

    def part(name, content):
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    data = part(b"IDAT", zlib.compress(body))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + data + part(b"IEND", b"")


def declared_sizes():
    """Return files that declare sizes of which they have no pixels, or too many."""
    sides = (0, 1, 2, 1000, 1001, 2**15, 2**16, 10**6, 2**31 - 1, 2**31, 2**32 - 1)
    found = []
    for width, height in itertools.product(sides, sides):
        found += [png(width, height), png(width, height, 16, 6, bytes(1000))]
        gif = b"GIF89a" + struct.pack("<HH", width % 2**16, height % 2**16) + b"\0\0\0"
        found.append(gif + b"," + struct.pack("<HHHHB", 0, 0, width % 2**16, height % 2**16, 0))
        sizes = struct.pack("<II", width, height)
        bitmap = struct.pack("<I", 40) + sizes + struct.pack("<HH", 1, 24) + bytes(24)
        found.append(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + bitmap + bytes(100))
        found.append(b"P5 %d %d 65535\n" % (width, height) + bytes(100))
        tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1),
                (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height),
                (279, 4, 1, 100)]  # fmt: skip
        directory = struct.pack("<H", 9) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        found.append(b"II*\0" + struct.pack("<I", 8) + directory + bytes(100))
        # An icon of 16 × 16 pixels, whose image has another size.
        inner = png(width, height, body=bytes(100))
        icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22)
        found.append(icon + inner)
    found.append(png(1000, 1000, body=bytes(3001 * 1000)))
    found.append(png(1000, 1001, body=bytes(3001 * 1001)))
    found.append(png(10, 10, body=bytes(10**8)))
    return found


# --- the oracle -------------------------------------------------------------------------------


def decoded(path):
    """Return the upright image on white, as Pillow decodes it; raise any error if it does not."""
    with Image.open(path) as image:
        image.load()
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("too large")
        if image.format == "EPS" or (image.mode in ("I", "F") and image.format != "PPM"):
            raise ValueError("refused")
        upright = image
        with contextlib.suppress(Exception):  # the tag cannot be read
            upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            numbers = np.asarray(upright).astype(np.float64)
            tags = getattr(image, "tag_v2", {})
            largest = 2 ** tags.get(258, (16,))[0] - 1
            numbers = largest - numbers if tags.get(262) == 0 else numbers
            grey = Image.fromarray(np.floor(numbers * 255 / largest + 0.5).astype(np.uint8))
            return grey.convert("RGB")
        if upright.has_transparency_data:
            white = Image.new("RGBA", upright.size, "white")
            white.alpha_composite(upright.convert("RGBA"))
            upright = white
        return upright.convert("RGB")


def outcome(path):
    """Read a file, and compare it with the oracle; return the kind of the result."""
    try:
        expected = np.asarray(decoded(path))
    except Exception:
        expected = None
    signal.alarm(SECONDS)
    try:
        found = ImageFiles([path])[0]
    except (OSError, ValueError) as error:
        assert str(path) in str(error), repr(error)
        assert expected is None, repr(error)
        return "an error"
    finally:
        signal.alarm(0)
    assert expected is not None
    assert found.shape == expected.shape
    assert np.array_equal(found, expected)
    with contextlib.suppress(OSError):  # a thin image would become too large
        assert ImageFiles([path], size=8, color="grey", channels="first")[0].shape == (1, 8, 8)
    return "the same pixels"


def broken(folder, seed, n_files):
    """Read broken images; count what happened."""
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS, before = MAX_PIXELS, Image.MAX_IMAGE_PIXELS
    rng, found, wholes = np.random.default_rng(seed), Counter(), whole_images()
    path = Path(folder) / "image.png"
    try:
        for content in (*wholes, *declared_sizes()) if seed == 1 else ():
            path.write_bytes(content)
            found[outcome(path)] += 1
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(n_files):
            content = damaged(wholes[rng.integers(len(wholes))], rng)
            path.write_bytes(content)
            print(f"{seed=} {i=}", file=sys.stderr, flush=True)  # the last, if the process ends
            try:
                found[outcome(path)] += 1
            except Exception as error:
                raise AssertionError(f"{seed=} {i=}") from error
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        assert grown * 1024 < ROOM, grown
    finally:
        Image.MAX_IMAGE_PIXELS = before
    return found


def test_broken_images(tmp_path):
    found = broken(tmp_path, 0, 100)
    assert min(found["an error"], found["the same pixels"]) > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_broken_images(tmp_path, seed):
    found = run(broken, tmp_path, seed, 1000, timeout=600)  # a crash or a hang ends the process
    assert min(found["an error"], found["the same pixels"]) > 200


@pytest.mark.parametrize("name", ["folder.png", "socket.png", "pipe.png", "empty.png", "none.png"])
def test_files_without_an_image(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = Path(name)
    with socket.socket(socket.AF_UNIX) as server:
        {
            "folder.png": path.mkdir,
            "socket.png": lambda: server.bind(name),
            "pipe.png": lambda: os.mkfifo(path),
            "empty.png": path.touch,
            "none.png": lambda: None,
        }[name]()
        signal.alarm(SECONDS)
        try:
            with pytest.raises(OSError, match=name):
                ImageFiles([path])
        finally:
            signal.alarm(0)
