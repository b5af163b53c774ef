"""Decoding of one file: formats, depth, transparency, orientation, size and errors."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2 as transforms

from sklearn_gradfeat import ImageFiles
from tests.data.images import (
    BROKEN,
    COLORS,
    DEEP,
    EIGHT_BITS,
    GREYS,
    random_pixels,
    read,
    written,
)


@pytest.mark.parametrize(
    ("extension", "options"),
    [
        ("png", {}),
        ("webp", {"lossless": True}),
        ("tiff", {}),
        ("tif", {"compression": "tiff_lzw"}),
        ("bmp", {}),
        ("ppm", {}),
    ],
)
def test_lossless_formats(tmp_path, extension, options):
    path = written(tmp_path / f"a.{extension}", COLORS, **options)
    assert np.array_equal(read(path), COLORS)
    grey = Image.fromarray(COLORS).convert("L")
    assert np.array_equal(read(path, color="grey"), np.asarray(grey))


def test_jpeg(tmp_path):
    smooth = np.add.outer(np.arange(0, 160, 5), np.arange(0, 90, 3)).astype(np.uint8)
    path = written(tmp_path / "a.JPG", np.stack([smooth, smooth[::-1], smooth], 2), quality=95)
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(read(path), expected)
    assert abs(read(path)[..., 0].astype(int) - smooth).max() < 16


def test_grey_becomes_rgb(tmp_path):
    path = written(tmp_path / "a.png", GREYS)
    assert np.array_equal(read(path), np.repeat(GREYS[..., None], 3, 2))
    assert np.array_equal(read(path, color="grey"), GREYS)


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("extension", ["png", "tiff"])
def test_16_bit_grey_is_scaled(tmp_path, extension, byte_order):
    image = Image.fromarray(DEEP)
    if extension == "tiff" and byte_order == ">":
        image = Image.frombytes("I;16B", image.size, DEEP.astype(">u2").tobytes())
    path = written(tmp_path / f"a.{extension}", image)
    assert np.array_equal(read(path, color="grey"), EIGHT_BITS)
    assert np.array_equal(read(path), np.repeat(EIGHT_BITS[..., None], 3, 2))


def png_chunk(kind, content):
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def test_16_bit_rgb_png_is_scaled(tmp_path):
    deep = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], 2)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in deep)
    header = struct.pack(">IIBBBBB", 9, 6, 16, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(lines))
        + png_chunk(b"IEND", b"")
    )
    assert np.abs(read(path) - deep / 257).max() <= 1  # Pillow keeps the upper eight bits


def write_tiff(path, photometric, bits, pixels):
    """Write an uncompressed TIFF of 6 lines and 9 columns, ``bits`` for each channel."""
    n_tags, short, long, channels = 9, 3, 4, len(bits)
    end = 8 + 2 + 12 * n_tags + 4
    tags = [
        (256, short, 1, 9), (257, short, 1, 6),
        (258, short, channels, bits[0] if channels == 1 else end), (259, short, 1, 1),
        (262, short, 1, photometric), (273, long, 1, end + 2 * channels),
        (277, short, 1, channels), (278, short, 1, 6), (279, long, 1, len(pixels)),
    ]  # fmt: skip
    directory = struct.pack("<H", n_tags) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    more = struct.pack(f"<{channels}H", *bits)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + b"\0" * 4 + more + pixels)
    return path


def test_16_bit_rgb_tiff_is_scaled(tmp_path):
    deep = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], 2)
    path = write_tiff(tmp_path / "a.tif", 2, (16, 16, 16), deep.astype("<u2").tobytes())
    assert np.abs(read(path) - deep / 257).max() <= 1  # Pillow keeps the upper eight bits


def test_16_bit_tiff_with_white_as_zero(tmp_path):
    path = write_tiff(tmp_path / "a.tif", 0, (16,), DEEP.astype("<u2").tobytes())
    assert np.array_equal(read(path, color="grey"), 255 - EIGHT_BITS)


def test_12_bit_tiff_is_scaled(tmp_path):
    numbers = DEEP >> 4
    # Three bytes for two pixels; a line of nine ends with four bits of nothing.
    bits = np.unpackbits(numbers.astype(">u2").view(np.uint8).reshape(6, 9, 2), axis=2)[:, :, 4:]
    pixels = np.packbits(np.pad(bits.reshape(6, -1), ((0, 0), (0, 4))), axis=1).tobytes()
    path = write_tiff(tmp_path / "a.tif", 1, (12,), pixels)
    assert np.array_equal(read(path, color="grey"), np.rint(numbers / 4095 * 255))


def test_16_bit_pgm_is_scaled(tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 9 6 65535\n" + DEEP.astype(">u2").tobytes())
    assert np.array_equal(read(path, color="grey"), EIGHT_BITS)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_without_a_known_range_raise(tmp_path, dtype):
    path = written(tmp_path / "a.tiff", DEEP.astype(dtype))
    with pytest.raises(OSError, match=r"a\.tiff.*no known range.*8 or 16 bits"):
        read(path)


@pytest.mark.parametrize("extension", ["jpg", "tiff"])
def test_cmyk(tmp_path, extension):
    inks = Image.new("CMYK", (9, 6), (255, 0, 0, 0))  # cyan
    pixels = read(written(tmp_path / f"a.{extension}", inks))
    assert np.abs(pixels.astype(int) - (0, 255, 255)).max() < 6


def test_palette(tmp_path):
    image = Image.fromarray(COLORS).quantize(8)
    for extension in ("png", "gif"):
        path = written(tmp_path / f"a.{extension}", image)
        assert np.array_equal(read(path), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])], ids=["index", "bytes"])
def test_transparent_palette_becomes_white(tmp_path, transparency):
    image = Image.new("P", (9, 6), 1)
    image.putpalette([255, 0, 0, 0, 0, 200])
    image.paste(0, (0, 0, 4, 6))
    pixels = read(written(tmp_path / "a.png", image, transparency=transparency))
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == (0, 0, 200)).all()


@pytest.mark.parametrize("color", ["rgb", "grey"])
def test_alpha_is_blended_with_white(tmp_path, color):
    alpha = np.array([0, 128, 255], np.uint8).repeat(18).reshape(6, 9)
    expected = np.rint(GREYS * (alpha / 255) + 255 - alpha)
    grey_alpha = Image.merge("LA", [Image.fromarray(GREYS), Image.fromarray(alpha)])
    for image in (grey_alpha, grey_alpha.convert("RGBA")):
        pixels = read(written(tmp_path / "a.png", image), color=color)
        each = pixels[..., None] if color == "grey" else pixels
        assert np.abs(each - expected[..., None]).max() <= 1


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation, extension):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255  # a white corner, whose place tells the orientations apart
    path = written(tmp_path / f"a.{extension}", stored, exif=exif)
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.swapaxes(0, 1), 6: stored.swapaxes(0, 1)[:, ::-1],
        7: stored[::-1, ::-1].swapaxes(0, 1), 8: stored.swapaxes(0, 1)[::-1],
    }[orientation]  # fmt: skip
    pixels = read(path)
    assert pixels.shape == upright.shape
    assert np.array_equal(pixels > 128, upright > 128)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_malformed_exif_is_ignored(tmp_path):
    path = written(tmp_path / "a.png", COLORS, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert np.array_equal(read(path), COLORS)


def test_first_frame(tmp_path):
    frames = [Image.fromarray(GREYS), Image.fromarray(255 - GREYS)]
    path = written(tmp_path / "a.tiff", frames[0], save_all=True, append_images=frames[1:])
    assert np.array_equal(read(path, color="grey"), GREYS)


@pytest.mark.parametrize("sides", [(40, 61), (61, 40), (33, 33), (7, 5), (32, 50), (3, 200)])
def test_square_equals_torchvision(tmp_path, sides):
    stored = random_pixels(256, *sides, 3)
    expected = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])(
        Image.fromarray(stored)
    )
    assert np.array_equal(read(written(tmp_path / "a.png", stored), size=32), np.asarray(expected))


@pytest.mark.parametrize("size", [(20, 50), (50, 20), (3, 2), [5, 5]])
def test_height_and_width(tmp_path, size):
    path = written(tmp_path / "a.png", np.full((40, 61, 3), 7, np.uint8))
    pixels = read(path, size=size)
    assert pixels.shape == (*size, 3)
    assert (pixels == 7).all()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named(tmp_path, name):
    make, error, match = BROKEN[name]
    make(tmp_path / name)
    X = ImageFiles([written(tmp_path / "good.png", COLORS), tmp_path / name], size=8)
    with pytest.raises(error, match=f"(?s){name}.*{match}|{match}.*{name}"):
        np.asarray(X)


@pytest.mark.parametrize("share", [0.6, 3])
def test_decompression_bomb_raises(tmp_path, monkeypatch, share):
    path = written(tmp_path / "bomb.png", np.zeros((10, 10, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 / (1 + share)))
    with pytest.raises(OSError, match=r"bomb\.png cannot be read .*(?i:pixels)"):
        read(path, size=4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read(path, size=4).shape == (4, 4, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_size_for_which_pillow_only_warns_raises(tmp_path, monkeypatch):
    path = written(tmp_path / "bomb.png", np.zeros((10, 10, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(OSError, match=r"needs 10 × 10 pixels.*MAX_IMAGE_PIXELS = 99.*trust"):
        read(path, size=4)


def test_narrow_image_that_would_need_gigabytes_raises(tmp_path):
    path = written(tmp_path / "line.png", np.zeros((1, 10000, 3), np.uint8))
    with pytest.raises(OSError, match=r"line\.png cannot be read .*2240000 × 224 pixels"):
        read(path, size=224)
