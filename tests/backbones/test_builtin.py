"""The networks of the package, and their files."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import conv2d, leaky_relu

import sklearn_gradfeat
from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureRegressor, load
from sklearn_gradfeat.backbones import _sources
from sklearn_gradfeat.backbones._builtin import SHIPPED
from sklearn_gradfeat.backbones._sources import resolve_backbone
from sklearn_gradfeat.cache._store import memory_store
from tests.io.test_export import in_onnx_runtime

WEIGHTS = Path(sklearn_gradfeat.__file__).parent / "backbones" / "weights"
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
LABELS = np.arange(12) % 3


def model(backbone=None, **parameters):
    defaults = {"features": "activation", "alpha": 1e-2}
    return GradientFeatureClassifier(backbone, **defaults | parameters, activation_layer=None)


def activations(name, X):
    resolved = resolve_backbone(name, X.shape[1:], 0)
    with torch.no_grad():
        return resolved.module(resolved.preprocess(torch.from_numpy(X)))


# --- the files -------------------------------------------------------------------------------


def test_every_file_has_a_card_and_a_name():
    assert {path.name for path in WEIGHTS.iterdir()} == {
        f"{name}{suffix}" for name in SHIPPED for suffix in (".md", ".safetensors")
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_file_is_the_one_that_its_card_describes(name):
    content = (WEIGHTS / f"{name}.safetensors").read_bytes()
    (digest,) = re.findall(r"\b[0-9a-f]{64}\b", (WEIGHTS / f"{name}.md").read_text())
    assert hashlib.sha256(content).hexdigest() == digest
    assert {tensor.dtype for tensor in load_file(WEIGHTS / f"{name}.safetensors").values()} == {
        torch.float16
    }


# --- what they compute -----------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_activations_are_those_of_five_convolutions(name):
    """Written out in float64, on pixels from -1 to 1."""
    weights = load_file(WEIGHTS / f"{name}.safetensors")
    x = torch.from_numpy(PIXELS).double() / 127.5 - 1
    for i, stride in enumerate((1, 2, 1, 2, 1), start=1):
        kernel, bias = weights[f"conv{i}.weight"].double(), weights[f"conv{i}.bias"].double()
        x = leaky_relu(conv2d(x, kernel, bias, stride), 0.01)
    expected = x.flatten(1).float()
    scale = expected.abs().max()
    torch.testing.assert_close(activations(name, PIXELS) / scale, expected / scale)


@pytest.mark.parametrize(
    "same",
    [
        lambda X: X.transpose(0, 2, 3, 1),
        lambda X: (X / 255).astype(np.float32),
        lambda X: (X / 255).transpose(0, 2, 3, 1),
    ],
    ids=["channels last", "float", "float, channels last"],
)
def test_layout_and_number_range_do_not_matter(same):
    expected = activations(SHIPPED[0], PIXELS)
    torch.testing.assert_close(activations(SHIPPED[0], same(PIXELS)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("axis", [1, -1, None])
def test_grey_images_have_three_equal_channels(axis):
    grey = PIXELS[:, 0]
    given = grey if axis is None else np.expand_dims(grey, axis)
    expected = activations(SHIPPED[0], np.stack([grey] * 3, 1))
    assert torch.equal(activations(SHIPPED[0], given), expected)


@pytest.mark.parametrize("shape", [(8, 8), (48, 40), (20, 64)])
def test_other_sizes_are_resized_as_pillow_does(shape):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    planes = [127 + 120 * np.sin(rows / 3 + c) * np.cos(columns / 4 - c) for c in range(3)]
    image = np.stack(planes, -1).astype(np.uint8)
    resized = np.array(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR))
    resolved = resolve_backbone(SHIPPED[0], image.shape, 0)
    found, expected = (resolved.preprocess(torch.from_numpy(x[None])) for x in (image, resized))
    assert (found - expected).abs().max() < 2 * 1.01 / 255  # Pillow rounds to bytes, twice


# --- which one is taken ----------------------------------------------------------------------


@pytest.mark.parametrize("X", [PIXELS, PIXELS[:, 0] / 255], ids=["colour", "grey"])
def test_none_is_the_first_network_for_images(X):
    default, named = (model(name).fit(X, LABELS) for name in (None, SHIPPED[0]))
    assert default.coef_.shape == (3, 512)
    assert np.array_equal(default.coef_, named.coef_)
    assert not np.allclose(default.coef_, model(SHIPPED[1]).fit(X, LABELS).coef_)


def test_none_is_the_random_network_for_tabular_data():
    rows = np.random.default_rng(0).random((12, 3072))
    assert model().fit(rows, LABELS).coef_.shape == (3, 256)


def test_regression_on_images():
    regressor = GradientFeatureRegressor(
        features="activation", alpha=1e-4, activation_layer=None
    ).fit(PIXELS, LABELS)
    assert regressor.score(PIXELS, LABELS) > 0.9


@pytest.mark.parametrize(
    ("X", "match"),
    [
        (np.zeros((12, 3, 40, 3)), r"channels first or last.*Pass preprocess"),
        (PIXELS[:, :, :, 0] / 255, r"\(3, 32\) may be grey images, or lack an axis.*pass backbone"),
        (np.zeros((12, 50, 1)), r"\(50, 1\) may be grey images, or lack an axis.*pass backbone"),
        (np.zeros((12, 2, 40, 40)), "neither 1 nor 3 channels.*Convert"),
        (PIXELS.astype(int), r"dtype torch.int64.*astype\(numpy.uint8\).*set preprocess"),
        (PIXELS / 1.0, r"must lie in \[0, 1\], X has values from 0 to 255.*Scale X"),
        (PIXELS[:, None], r"tabular data.*or images.*\(1, 3, 32, 32\). Pass backbone"),
    ],
    ids=["layout", "one image", "series", "channels", "dtype", "range", "video"],
)
def test_what_is_no_image_or_could_be_two(X, match):
    with pytest.raises(ValueError, match=match):
        model().fit(X, LABELS)


def test_names_are_suggested():
    with pytest.raises(ValueError, match="The closest names are 'convnet-vae'"):
        model("convnet_vae").fit(PIXELS, LABELS)


# --- what becomes of a fitted model ----------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    return model().fit(PIXELS, LABELS)


def test_file_holds_no_weights_and_keeps_the_choice(fitted, tmp_path, monkeypatch):
    """Not even where a later version has another network for images."""
    fitted.save(tmp_path / "model.safetensors")
    assert not any("backbone" in key for key in load_file(tmp_path / "model.safetensors"))
    monkeypatch.setattr(_sources, "SHIPPED", SHIPPED[::-1])
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.backbone is None
    assert np.array_equal(loaded.predict_proba(PIXELS), fitted.predict_proba(PIXELS))


@pytest.mark.parametrize(
    ("X", "features"),
    [(PIXELS[:, 0, :20], "full"), (np.float32(PIXELS / 255).transpose(0, 2, 3, 1), "activation")],
    ids=["grey", "float"],
)
def test_exported_model_takes_the_images_themselves(X, features, tmp_path):
    pytest.importorskip("onnx")
    few = {"gradient_layers": ["conv1"], "max_iter": 3, "tol": 1.0}
    estimator = model(features=features, **few).fit(X, LABELS)
    run = in_onnx_runtime(estimator.to_torch(), X, tmp_path / "model.onnx")
    np.testing.assert_allclose(run(X[:5]), estimator.predict_proba(X[:5]), rtol=1e-3, atol=1e-5)


def test_features_are_kept(fitted):
    before = memory_store().nbytes
    other = PIXELS[::-1].copy()
    estimator = model().fit(other ^ 1, LABELS)
    grown = memory_store().nbytes
    assert grown > before
    estimator.predict(other ^ 1)
    assert memory_store().nbytes == grown
