"""Image files are read as people have them, lazily, in order, and in bounded memory."""

import os
import pickle
import random
import struct
import threading
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import GridSearchCV, cross_val_predict, train_test_split
from sklearn.pipeline import Pipeline
from torchvision.transforms import v2 as transforms

from sklearn_gradfeat import ImageFiles
from sklearn_gradfeat.cache._runner import Trunk
from sklearn_gradfeat.data import _image_files
from sklearn_gradfeat.data._batches import Samples, is_lazy
from tests.tiny import estimator

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREYS = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
EIGHT_BITS = np.rint(DEEP / 257).astype(np.uint8)


def written(path, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def read(path, **options):
    return ImageFiles([path], **options)[0]


@pytest.fixture
def folder(tmp_path):
    """Twelve files of different sizes in two classes that are easy to tell apart."""
    for number in range(12):
        name, low = [("cat", 0), ("dog", 120)][number % 2]
        (tmp_path / name).mkdir(exist_ok=True)
        pixels = RNG.integers(low, low + 120, (12 + number, 30 - number, 3), dtype=np.uint8)
        written(tmp_path / name / f"{number:02}.png", pixels)
    return tmp_path


@pytest.fixture
def decoded(monkeypatch):
    """The paths that were decoded, as they come."""
    paths = []

    def counting(path, color, size):
        paths.append(path)
        return decode(path, color, size)

    decode = _image_files.decode
    monkeypatch.setattr(_image_files, "decode", counting)
    return paths


def tiny_images(folder):
    return ImageFiles.from_folder(folder, size=8, color="grey", channels="first")


# --- formats ---------------------------------------------------------------------------------


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


def test_16_bit_tiff_that_counts_from_white(tmp_path):
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
def test_numbers_without_a_range_are_refused(tmp_path, dtype):
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
def test_transparent_palette_is_put_on_white(tmp_path, transparency):
    image = Image.new("P", (9, 6), 1)
    image.putpalette([255, 0, 0, 0, 0, 200])
    image.paste(0, (0, 0, 4, 6))
    pixels = read(written(tmp_path / "a.png", image, transparency=transparency))
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == (0, 0, 200)).all()


@pytest.mark.parametrize("color", ["rgb", "grey"])
def test_alpha_is_put_on_white(tmp_path, color):
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
def test_malformed_exif_does_not_matter(tmp_path):
    path = written(tmp_path / "a.png", COLORS, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert np.array_equal(read(path), COLORS)


def test_first_frame(tmp_path):
    frames = [Image.fromarray(GREYS), Image.fromarray(255 - GREYS)]
    path = written(tmp_path / "a.tiff", frames[0], save_all=True, append_images=frames[1:])
    assert np.array_equal(read(path, color="grey"), GREYS)


# --- size ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(40, 61), (61, 40), (33, 33), (7, 5), (32, 50), (3, 200)])
def test_a_square_is_what_torchvision_makes_of_it(tmp_path, sides):
    pixels = RNG.integers(0, 256, (*sides, 3), dtype=np.uint8)
    expected = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])(
        Image.fromarray(pixels)
    )
    assert np.array_equal(read(written(tmp_path / "a.png", pixels), size=32), np.asarray(expected))


@pytest.mark.parametrize("size", [(20, 50), (50, 20), (3, 2), [5, 5]])
def test_height_and_width(tmp_path, size):
    path = written(tmp_path / "a.png", np.full((40, 61, 3), 7, np.uint8))
    pixels = read(path, size=size)
    assert pixels.shape == (*size, 3)
    assert (pixels == 7).all()


def test_without_size_all_files_have_one(tmp_path):
    same = [written(tmp_path / f"{i}.png", COLORS) for i in range(2)]
    X = ImageFiles([*same, written(tmp_path / "odd.png", COLORS[:4])])
    assert X.shape == (3, 6, 9, 3)
    with pytest.raises(ValueError, match=r"0\.png is 6 × 9 .*odd\.png is 4 × 9\. Pass size="):
        np.asarray(X)
    assert np.array_equal(X[:2], np.stack([COLORS, COLORS]))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (1, 6, 9, 3)),
        ({"color": "grey"}, (1, 6, 9)),
        ({"channels": "first"}, (1, 3, 6, 9)),
        ({"channels": "first", "color": "grey"}, (1, 1, 6, 9)),
    ],
)
def test_layout(tmp_path, options, shape):
    X = ImageFiles([written(tmp_path / "a.png", COLORS)], **options)
    grey = np.asarray(Image.fromarray(COLORS).convert("L"))
    expected = COLORS if "color" not in options else grey
    if "channels" in options:
        expected = expected.reshape(6, 9, -1).transpose(2, 0, 1)
    assert (X.shape, X.ndim, X.dtype, len(X)) == (shape, len(shape), np.uint8, 1)
    assert np.array_equal(np.asarray(X)[0], expected)


# --- files that cannot be read ---------------------------------------------------------------


def truncated(path):
    pixels = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = written(path, pixels).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def bad_checksum(path):
    content = bytearray(written(path, COLORS, format="PNG").read_bytes())
    content[40] ^= 255
    path.write_bytes(content)


BROKEN = {
    "truncated.jpg": (truncated, OSError, "truncated"),
    "truncated.png": (truncated, OSError, "truncated"),
    "text.jpg": (lambda path: path.write_text("text"), OSError, "cannot identify"),
    "empty.png": (lambda path: path.touch(), OSError, "cannot identify"),
    "checksum.png": (bad_checksum, OSError, "cannot be read as an image"),
    "folder.png": (lambda path: path.mkdir(), OSError, "cannot be read as an image"),
    "missing.png": (lambda path: None, FileNotFoundError, "There is no file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named(tmp_path, name):
    make, error, match = BROKEN[name]
    make(tmp_path / name)
    X = ImageFiles([written(tmp_path / "good.png", COLORS), tmp_path / name], size=8)
    with pytest.raises(error, match=f"(?s){name}.*{match}|{match}.*{name}"):
        np.asarray(X)


@pytest.mark.parametrize("share", [0.6, 3])
def test_decompression_bomb_is_refused(tmp_path, monkeypatch, share):
    path = written(tmp_path / "bomb.png", np.zeros((10, 10, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 / (1 + share)))
    with pytest.raises(OSError, match=r"bomb\.png cannot be read .*(?i:pixels)"):
        read(path, size=4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read(path, size=4).shape == (4, 4, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_pillow_only_warns_of_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path / "bomb.png", np.zeros((10, 10, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(OSError, match=r"needs 10 × 10 pixels.*MAX_IMAGE_PIXELS = 99.*trust"):
        read(path, size=4)


def test_a_line_that_would_fill_the_memory(tmp_path):
    path = written(tmp_path / "line.png", np.zeros((1, 10000, 3), np.uint8))
    with pytest.raises(OSError, match=r"line\.png cannot be read .*2240000 × 224 pixels"):
        read(path, size=224)


def test_broken_files_are_left_out(tmp_path):
    good = [written(tmp_path / f"good{i}.png", COLORS) for i in range(2)]
    paths, y = [good[0]], ["a"]
    for name, (make, _, _) in BROKEN.items():
        make(tmp_path / name)
        paths.append(tmp_path / name)
        y.append("broken")
    paths.append(good[1])
    y = np.array([*y, "b"])
    with pytest.warns(UserWarning, match=r"7 of 9 files.*\n.*truncated\.jpg(.*\n)+  and 2 more"):
        X = ImageFiles(paths, on_error="skip")
    assert list(X.paths) == [str(path) for path in good]
    assert [os.path.basename(path) for path, _ in X.skipped] == list(BROKEN)
    assert all(os.path.basename(path) in reason for path, reason in X.skipped)
    assert y[X.kept].tolist() == ["a", "b"]
    assert y[X[1:].kept].tolist() == ["b"]
    assert np.array_equal(X, np.stack([COLORS, COLORS]))


def test_nothing_but_broken_files(tmp_path):
    with pytest.raises(OSError, match=r"1 of 1 files cannot be read.*\n.*missing\.png"):
        ImageFiles([tmp_path / "missing.png"], size=8, on_error="skip")


def test_all_files_are_good(folder):
    X, y = ImageFiles.from_folder(folder, size=8, on_error="skip")
    assert (X.skipped, X.kept.tolist(), len(y)) == ([], list(range(12)), 12)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"size": 0}, ValueError, "size must be .*got 0"),
        ({"size": 2.5}, ValueError, r"size must be .*got 2\.5"),
        ({"size": (1, 2, 3)}, ValueError, r"size must be .*got \(1, 2, 3\)"),
        ({"color": "cmyk"}, ValueError, "color must be one of 'rgb', 'grey', got 'cmyk'"),
        ({"channels": 3}, ValueError, "channels must be one of"),
        ({"on_error": "ignore"}, ValueError, "on_error must be one of 'raise', 'skip'"),
        ({"n_threads": 0}, ValueError, "n_threads must be None or a positive integer, got 0"),
        ({"paths": "a.png"}, TypeError, r"single path 'a\.png'.*from_folder"),
        ({"paths": []}, ValueError, "paths has no files.*Pass size="),
        ({"paths": [3]}, TypeError, "int"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        ImageFiles(**{"paths": ["a.png"], **options})


# --- folders and paths -----------------------------------------------------------------------


def test_folder(folder):
    (folder / "cat" / "more").mkdir()
    written(folder / "cat" / "more" / "a b ü.PNG", COLORS)
    written(folder / "cat" / ".hidden.png", COLORS)
    (folder / "cat" / "notes.txt").touch()
    (folder / ".cache").mkdir()
    written(folder / "stray.png", COLORS)
    X, y = ImageFiles.from_folder(str(folder), size=8)
    names = [os.path.relpath(path, folder).replace(os.sep, "/") for path in X.paths]
    assert names == [f"cat/{i:02}.png" for i in range(0, 12, 2)] + ["cat/more/a b ü.PNG"] + [
        f"dog/{i:02}.png" for i in range(1, 12, 2)
    ]
    assert y.tolist() == ["cat"] * 7 + ["dog"] * 6
    assert y.dtype.kind == "U"


def test_folder_with_broken_files(folder):
    (folder / "cat" / "05.png").write_text("text")
    with pytest.warns(UserWarning, match=r"1 of 13 files cannot be read:\n.*05\.png"):
        X, y = ImageFiles.from_folder(folder, size=8, on_error="skip")
    assert len(X) == len(y) == 12
    assert [os.path.basename(os.path.dirname(path)) for path in X.paths] == y.tolist()


def test_folders_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageFiles.from_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no subfolders.*list of files"):
        ImageFiles.from_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=r"cat has no images \(\.jpg"):
        ImageFiles.from_folder(tmp_path)


def test_kinds_of_paths(tmp_path, monkeypatch):
    path = written(tmp_path / "ein Bild ü 猫.png", COLORS)
    monkeypatch.chdir(tmp_path)
    X = ImageFiles((p for p in [path, str(path), os.fsencode(path), path.name]), size=8)
    monkeypatch.chdir("/")  # relative paths are those of the time when they were given
    assert set(X.paths) == {str(path)}
    assert len(np.unique(np.asarray(X), axis=0)) == 1


# --- an array --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        slice(None), slice(2, 9, 3), slice(None, None, -1), slice(5, 5), [3, 1, 1], [],
        np.array([0, -1]), np.arange(12) % 3 == 0, [True, False] * 6, ...,
    ],
    ids=str,
)  # fmt: skip
def test_rows_are_chosen_without_decoding(folder, decoded, rows):
    X, _ = tiny_images(folder)
    part, again = X[rows], X[rows, ...]
    assert not decoded
    assert isinstance(part, ImageFiles)
    expected = np.asarray(X)[rows]
    assert part.shape == again.shape == expected.shape
    assert np.array_equal(part, expected)
    assert np.array_equal(part.kept, np.arange(12)[rows])
    assert list(again.paths) == list(part.paths)


@pytest.mark.parametrize("row", [0, -1, np.int64(3)])
def test_one_row_is_an_array(folder, row):
    X, _ = tiny_images(folder)
    assert isinstance(X[row], np.ndarray)
    assert np.array_equal(X[row], np.asarray(X)[row])


@pytest.mark.parametrize("rows", [12, -13, [12], [True], (0, 0), (slice(2), 0), None, "0", 1.0])
def test_bad_rows(folder, rows):
    with pytest.raises(IndexError):
        tiny_images(folder)[0][rows]


def test_conversion(folder):
    X, _ = tiny_images(folder)
    assert np.asarray(X).dtype == np.uint8
    assert np.asarray(X, dtype=np.float32).dtype == np.float32
    assert len(list(X)) == 12
    assert repr(X) == "<ImageFiles of shape (12, 1, 8, 8)>"
    with pytest.raises(ValueError, match="without a copy"):
        X.__array__(copy=False)


def test_pickle_holds_paths_only(folder):
    X, _ = tiny_images(folder)
    stored = pickle.dumps(X[2:7])
    assert len(stored) < 2000
    assert np.array_equal(pickle.loads(stored), X[2:7])


def test_order_does_not_depend_on_the_threads(folder, monkeypatch):
    X, _ = tiny_images(folder)
    expected = np.stack([X[row] for row in range(12)])
    decode = _image_files.decode

    def slow(*arguments):
        time.sleep(random.random() / 50)
        return decode(*arguments)

    monkeypatch.setattr(_image_files, "decode", slow)
    for n_threads in (1, 3, 12):
        X, _ = ImageFiles.from_folder(
            folder, size=8, color="grey", channels="first", n_threads=n_threads
        )
        assert np.array_equal(X, expected)


def test_the_first_broken_file_is_named(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("text")
    for _ in range(5):
        with pytest.raises(OSError, match=r"a\.png cannot be read"):
            np.asarray(ImageFiles([tmp_path / "a.png", tmp_path / "b.png"], size=8))


# --- in an estimator -------------------------------------------------------------------------


def test_fit_is_that_of_the_decoded_images(folder):
    X, y = tiny_images(folder)
    assert is_lazy(X)
    assert not is_lazy(np.asarray(X))
    lazy, plain = estimator().fit(X, y), estimator().fit(np.asarray(X), y)
    assert np.array_equal(lazy.coef_, plain.coef_)
    assert np.array_equal(lazy.predict_proba(X), plain.predict_proba(np.asarray(X)))
    assert lazy.score(X, y) == 1
    assert lazy.classes_.tolist() == ["cat", "dog"]


def test_splitting_decodes_nothing_and_a_search_what_it_fits(folder, decoded):
    X, y = tiny_images(folder)
    X_train, X_test, y_train, y_test = train_test_split(X, y, stratify=y, random_state=0)
    assert not decoded
    assert all(os.sep + label + os.sep in path for path, label in zip(X_test.paths, y_test))  # noqa: B905
    search = GridSearchCV(estimator(), {"alpha": [0.1, 1.0]}, cv=3, error_score="raise")
    search.fit(X_train, y_train)
    # 2 × 3 fits on 6 files and a final one on 9, each after an example of 2, and 6 scores of 3
    assert len(decoded) == 6 * (2 + 6) + (2 + 9) + 6 * 3
    decoded.clear()
    search.predict(X_test)
    assert sorted(decoded) == sorted(X_test.paths)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_pipelines_and_cross_validation(folder, n_jobs):
    X, y = tiny_images(folder)
    pipeline = Pipeline([("model", estimator())])
    expected = cross_val_predict(pipeline, np.asarray(X), y, cv=2)
    assert np.array_equal(cross_val_predict(pipeline, X, y, cv=2, n_jobs=n_jobs), expected)


def reading_threads():
    names = ("read-ahead", "decode")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def test_a_broken_file_ends_fit_and_threads(folder):
    X, y = tiny_images(folder)
    (folder / "dog" / "09.png").write_bytes(b"")
    with pytest.raises(OSError, match=r"09\.png cannot be read"):
        estimator(batch_size=2).fit(X, y)
    assert not reading_threads()


def test_no_thread_outlives_a_failing_network(folder):
    X, y = tiny_images(folder)
    n_batches = 0

    def preprocess(batch):
        nonlocal n_batches
        n_batches += 1
        if n_batches == 3:
            raise RuntimeError("on purpose")
        return batch

    with pytest.raises(RuntimeError, match="on purpose"):
        estimator(batch_size=2, preprocess=preprocess).fit(X, y)
    assert not reading_threads()


def batches_of(X, batch_size):
    samples = Samples(X, None, torch.float32, torch.device("cpu"))
    trunk = Trunk(samples, lambda x: (x,), torch.float32, half=False)
    return trunk.batches(batch_size, verbose=False, keep=False)


def test_one_batch_is_decoded_ahead(folder, decoded):
    X, _ = tiny_images(folder)
    ready = []
    for rows, *_ in batches_of(X, 3):
        deadline = time.monotonic() + 10
        while len(decoded) < min(rows.stop + 3, 12) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # were it to go on, it would now
        ready.append(len(decoded))
    assert ready == [6, 9, 12, 12]


def test_memory_is_that_of_a_few_batches(tmp_path):
    path = written(tmp_path / "a.png", np.zeros((64, 64, 3), np.uint8))
    X = ImageFiles([path] * 200, n_threads=2)
    batch = 4 * 64 * 64 * 3
    tracemalloc.start()
    for _ in batches_of(X, 4):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * batch  # of 50
