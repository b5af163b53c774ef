"""Data sets, Pillow images and paths work as X; the error for other containers says what to do."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    ImageFiles,
)
from sklearn_gradfeat.data._containers import to_numpy_input
from tests.data.arrays import Items
from tests.tiny import X, Y, estimator

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
PIXELS[Y == 1, :16] //= 4
IMAGES = [Image.fromarray(pixels) for pixels in PIXELS]
TEXTS = ["a text", "another text"] * 12


def images(**parameters):
    defaults = {"alpha": 0.1, "features": "activation", "max_iter": 40}
    return GradientFeatureClassifier(**{**defaults, **parameters})


def objects(items):
    array = np.empty(len(items), object)
    array[:] = items
    return array


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for row, image in enumerate(IMAGES):
        image.save(folder / f"{row:02}.png")
    return sorted(folder.iterdir())


# --- images ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert", [list, tuple, objects, pd.Series, lambda x: Items(x.__getitem__)]
)
def test_images_equal_their_pixels(convert):
    model = images().fit(convert(IMAGES), Y)
    expected = images().fit(PIXELS, Y)
    assert model.sample_shape_ == (32, 32, 3)
    assert np.array_equal(model.predict_proba(PIXELS), expected.predict_proba(PIXELS))
    assert np.array_equal(model.predict_proba(convert(IMAGES)), expected.predict_proba(PIXELS))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_modes_are_converted_as_in_files(tmp_path, mode):
    image = IMAGES[0].convert("L").convert(mode) if mode == "I;16" else IMAGES[0].convert(mode)
    path = tmp_path / ("1.tif" if mode in ("CMYK", "YCbCr") else "1.png")
    # Pillow cannot read this mode without compression before version 13.
    image.save(path, **({"compression": "tiff_lzw"} if mode == "YCbCr" else {}))
    found = to_numpy_input([image, IMAGES[1]])
    assert found.dtype == np.uint8
    tolerance = 2 if mode == "YCbCr" else 0  # another library converts in the file
    np.testing.assert_allclose(found[0], ImageFiles([path])[0].astype(float), atol=tolerance)
    assert np.array_equal(found[1], PIXELS[1])


def test_images_are_rotated_as_in_files(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS[0, :20]).save(tmp_path / "1.png", exif=exif)
    with Image.open(tmp_path / "1.png") as image:
        assert np.array_equal(to_numpy_input([image])[0], ImageFiles([tmp_path / "1.png"])[0])


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (IMAGES[1].resize((30, 32)), ValueError, r"Item 1 of X has shape \(32, 30, 3\), but item 0 "
         r"has shape \(32, 32, 3\)\. .*ImageFiles\(paths, size=224\)"),
        (IMAGES[1].convert("F"), ValueError, "Item 1 of X cannot be read as an image: its pixel"),
        (None, TypeError, "X holds images, but item 1 is a NoneType"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_one_array(bad, error, match):
    with pytest.raises(error, match=match):
        images().fit([IMAGES[0], bad], [0, 1])
    if bad is not None:
        with pytest.raises(error, match=match):
            images().fit(Items([IMAGES[0], bad].__getitem__, 2), [0, 1])


def test_images_in_a_search():
    grid = GridSearchCV(images(), {"alpha": [0.1, 10.0]}, cv=2, error_score="raise")
    found = grid.fit(IMAGES, Y).cv_results_["mean_test_score"]
    assert np.array_equal(found, clone(grid).fit(PIXELS, Y).cv_results_["mean_test_score"])
    options = {"features": "activation", "cv": 2, "scoring": "accuracy"}
    search = GradientFeatureClassifierCV(alphas=[0.1], **options)
    assert search.fit(IMAGES, Y).scores_.ravel().mean() == found[0]
    regressor = GradientFeatureRegressor(alpha=0.1, features="activation").fit(IMAGES, Y)
    assert np.array_equal(regressor.predict(IMAGES), regressor.predict(PIXELS))


# --- paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        list,
        lambda paths: list(map(str, paths)),
        lambda paths: np.array(list(map(str, paths))),
        np.array,
        lambda paths: pd.DataFrame({"path": list(map(str, paths))})["path"],
        pd.Series,
    ],
    ids=["paths", "strings", "string array", "objects", "column", "column of paths"],
)
def test_paths_are_image_files(paths, convert):
    X = convert(paths)
    assert isinstance(to_numpy_input(X), ImageFiles)
    model = images().fit(X, Y)
    assert np.array_equal(model.predict_proba(X[:3]), model.predict_proba(PIXELS[:3]))


def test_paths_that_cannot_be_read(paths, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*absent\.jpg"):
        images().fit(["absent.jpg"] * 24, Y)
    IMAGES[0].resize((20, 20)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"different sizes.* Pass ImageFiles\(paths, size=224\)"):
        images().fit([*paths[:23], tmp_path / "small.png"], Y)


# --- other containers ------------------------------------------------------------------------

PAIRS = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (DataLoader(PAIRS), r"torch DataLoader\. .*X=\[item\[0\] for item in loader\.dataset\] and "
         r"y=\[item\[1\] for item in loader\.dataset\]"),
        (PAIRS, r"Item 0 of the Dataset X is a tuple\. .*X=\[item\[0\] for item in dataset\]"),
        (list(PAIRS), r"Item 0 of X is a tuple\. .*X=\[item\[0\] for item in X\]"),
        (Items(TEXTS.__getitem__), "X holds texts"),
        (list(zip(IMAGES, Y, strict=True)), r"Item 0 of X is a tuple\. "),
        ([{"image": image, "label": 0} for image in IMAGES],
         r"Item 0 of X is a dict\. .*X=\[item\[KEY\] .*KEY from 'image', 'label'"),
        (Items(lambda row: {"image": X[row]}), r"Dataset X is a dict\. .*KEY from 'image'\."),
        ({"input_ids": X}, "X is a dict with the keys 'input_ids'.*TextTokenizer"),
        ((image for image in IMAGES), r"X is a generator\. .*X=list\(X\)"),
        (IMAGES[0], r"X is one image\. Pass a list"),
        ("photos", r"X is a single str\. .*ImageFiles\.from_folder"),
        (TEXTS, "X holds texts.*TextTokenizer.*MaskedMean"),
        (np.array(TEXTS), "X holds texts"),
        (pd.Series(TEXTS, dtype="string"), "X holds texts"),
        ([None, *TEXTS[1:]], "X holds texts"),
        ([*["1.png"] * 23, "a text"], "X holds texts.*ImageFiles"),
        ([pixels[row:] for row, pixels in enumerate(X)], r"Item 1 of X has shape \(0, 8, 8\)"),
        ([[0] * (1 + row) for row in range(24)], r"Item 1 of X has shape \(2,\).*pad sequences"),
    ],
    ids=["loader", "dataset", "pairs", "dataset of texts", "image pairs", "dicts",
         "dataset of dicts", "dict", "generator", "image", "string", "texts", "text array",
         "text column", "missing text", "path and text", "arrays of different shapes",
         "lists of different lengths"],
)  # fmt: skip
def test_the_error_names_what_to_pass(bad, match):
    with pytest.raises((TypeError, ValueError), match=match):
        estimator().fit(bad, Y)
    if not isinstance(bad, (DataLoader, type(iter([])))):
        with pytest.raises((TypeError, ValueError), match=match.replace("generator", ".*")):
            estimator().fit(X, Y).predict(bad)


@pytest.mark.parametrize(
    "advised", [lambda data: [item[0] for item in data], lambda data: data.tensors[0]]
)
def test_the_advice_for_pairs_works(advised):
    model = estimator().fit(advised(PAIRS), [item[1] for item in PAIRS])
    assert np.array_equal(model.coef_, estimator().fit(X, Y).coef_)


def test_an_object_with_numbered_items_is_a_dataset():
    class Numbered:
        def __len__(self):
            return 24

        def __getitem__(self, row):
            return X[row]

    assert np.array_equal(estimator().fit(Numbered(), Y).coef_, estimator().fit(X, Y).coef_)


# --- data sets -------------------------------------------------------------------------------


def test_dataset_is_read_in_batches():
    read = []
    dataset = Items(lambda row: read.append(row) or X[row])
    model = estimator(batch_size=7)
    model.fit(dataset, Y)
    assert read == [0, 0, 1, *range(24)]  # the shape, an example, and all
    assert np.array_equal(model.predict(X), estimator().fit(X, Y).predict(X))


def test_dataset_of_tabular_data():
    rows = X.reshape(24, -1)[:, :3]
    model = estimator(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), features="activation")
    expected = clone(model).fit(rows, Y).coef_
    assert np.array_equal(model.fit(Items(lambda row: rows[row]), Y).coef_, expected)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize(
    ("dataset", "error", "match"),
    [
        (
            Items(lambda row: (X[row], Y[row])),
            TypeError,
            "Item 0 of the Dataset X is a tuple.*only the inputs",
        ),
        (Items(lambda row: {"image": X[row]}), TypeError, "Item 0 of the Dataset X is a dict"),
        (Items(lambda row: X[row, :, : 8 - row // 5]), ValueError, r"Item 5 of X .*\(1, 7, 8\)"),
        (Items(lambda row: X[row], 0), ValueError, "0 sample"),
        (Stream(), TypeError, "without a length"),
    ],
)
def test_bad_dataset(dataset, error, match):
    with pytest.raises(error, match=match):
        estimator().fit(dataset, Y[: len(dataset)] if hasattr(dataset, "__len__") else Y)
