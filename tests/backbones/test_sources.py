"""The module for ``backbone=``: names, modules, factories, and None."""

import re
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from sklearn_gradfeat.backbones._sources import load_named, seeded, timm_transform
from tests.tiny import X, Y, estimator, tiny_net

IMAGES = np.random.default_rng(1).integers(0, 256, (24, 3, 8, 8)).astype(np.uint8)


def same(first, second):
    """Whether two fitted estimators are equal to the last bit."""
    return (
        np.array_equal(first.coef_, second.coef_)
        and np.array_equal(first.intercept_, second.intercept_)
        and all(
            np.array_equal(first.gradient_coef_[n], v) for n, v in second.gradient_coef_.items()
        )
    )


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet81", "'resnet81' is not known. The closest names are 'resnet18'"),
        ("torchvision/resnet81", "'torchvision/resnet81' is not known.* 'resnet18'"),
        ("ResNet18", "'resnet18'"),
        ("efficientnet", "'efficientnet_"),
        ("keras/resnet18", "from 'torchvision/', 'timm/' or 'hf/', not 'keras'.* Use one of these"),
        ("a/b/resnet18", "from 'torchvision/', 'timm/' or 'hf/', not 'a/b'"),
    ],
)
def test_unknown_name(name, match):
    with pytest.raises(ValueError, match=match):
        estimator(name).fit(IMAGES, Y)


def test_a_name_for_samples_that_are_no_images():
    with pytest.raises(ValueError, match=r"backbone='resnet81': A named backbone takes images"):
        estimator("resnet81").fit(IMAGES.reshape(len(IMAGES), -1), Y)


@pytest.mark.parametrize(
    ("name", "path"), [("model", "./model"), ("./model", "./model"), ("models/own", "./models/own")]
)
def test_folder_without_a_prefix(name, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=re.escape(f"pass backbone='hf/{path}'.")):
        load_named(name)
    absolute = str(tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(f"pass backbone='hf/{absolute}'.")):
        load_named(absolute)


@pytest.mark.parametrize("name", ["qqqqqq", "", "torchvision/", "timm/qqqqqq", "timm/"])
def test_unknown_name_that_resembles_nothing(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match="is not known") as caught:
        load_named(name)
    assert "names are ." not in str(caught.value)


def test_unknown_timm_name():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"'timm/resnet81' is not known.*'timm/resnet18'"):
        estimator("timm/resnet81").fit(IMAGES, Y)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match=r"'timm/resnet18' needs timm. .*pip install"):
        load_named("timm/resnet18")


@pytest.mark.parametrize(
    "failure",
    [urllib.error.URLError("no route"), TimeoutError("timed out"), RuntimeError("invalid hash")],
    ids=["URLError", "timeout", "hash"],
)
@pytest.mark.parametrize("name", ["resnet18", "torchvision/squeezenet1_1"])
def test_weights_that_cannot_be_downloaded(monkeypatch, name, failure):
    def get_model(*_args, **_kwargs):
        raise failure

    load_named.cache_clear()
    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    with pytest.raises(OSError, match=f"backbone='{name}' could not be downloaded.*local file"):
        estimator(name).fit(IMAGES, Y)


def test_named_network(monkeypatch):
    """A torchvision network without its classifier, with the transform of its weights."""

    def get_model(name, weights):
        torch.manual_seed(0)
        assert weights.transforms().crop_size == [224]
        return original(name, weights=None)

    original = torchvision.models.get_model
    load_named.cache_clear()
    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    try:
        network, preprocess = load_named("torchvision/squeezenet1_1")
        assert isinstance(network.classifier, nn.Identity)
        assert preprocess(torch.zeros(2, 3, 300, 260, dtype=torch.uint8)).shape == (2, 3, 224, 224)
        network, _ = load_named("resnet18")
        assert isinstance(network.fc, nn.Identity)
        assert load_named("resnet18")[0] is network
    finally:
        load_named.cache_clear()


# --- the transforms of timm ------------------------------------------------------------------


CONFIG = {
    "input_size": (3, 32, 32),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_mode": "center",
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interpolation": "bilinear"},
        {"crop_pct": 1.0},
        {"crop_pct": 0.95, "mean": (0.5,) * 3, "std": (0.5,) * 3},
        {"crop_mode": "squash"},
        {"input_size": (3, 32, 24)},
    ],
    ids=["default", "bilinear", "whole", "half", "squash", "oblong"],
)
@pytest.mark.parametrize("size", [(48, 48), (64, 40), (20, 24)], ids=["square", "wide", "small"])
def test_timm_transform(changes, size):
    """The tensor transform is timm's own on a PIL image, up to rounding to uint8."""
    timm_data = pytest.importorskip("timm.data")
    from PIL import Image

    config = CONFIG | changes
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    image = np.stack(
        [127 + 120 * np.sin(rows / 7 + c) * np.cos(columns / 5 - c) for c in range(3)], -1
    ).astype(np.uint8)
    of_timm = timm_data.create_transform(**config)
    if config["interpolation"] not in str(of_timm):  # timm 1.0.3 of oblong images, not 1.0.31
        pytest.skip("this version of timm does not interpolate as the network asks")
    expected = of_timm(Image.fromarray(image))
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    ours = timm_transform(config)(batch)[0]
    assert ours.shape == expected.shape
    step = 1 / 255 / min(config["std"])
    assert (ours - expected).abs().max() <= 2.5 * step
    floats = timm_transform(config)(batch / 255)[0]
    assert (floats - expected).abs().max() <= 4 * step


# --- factories -------------------------------------------------------------------------------


def net_of_the_moment():
    """Draw the weights from the global generator, as torch's layers do."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(2))


@pytest.mark.parametrize("factory", [nn.Linear, lambda width: nn.Linear(width, 3)])
def test_factory_that_needs_arguments(factory):
    with pytest.raises(TypeError, match=r"backbone=.*cannot be called without arguments: missing"):
        estimator(factory).fit(X, Y)


@pytest.mark.parametrize("result", [3, None, nn.Linear])
def test_factory_that_returns_no_module(result):
    with pytest.raises(
        TypeError, match=r"factory must return a torch\.nn\.Module, it returned.* Pass a module"
    ):
        estimator(lambda: result).fit(X, Y)


def test_seeds_of_threads_do_not_mix():
    """Threads share torch's generators."""

    def drawn(seed):
        with seeded(seed):
            first = float(torch.rand(1))
            time.sleep(0.01)
            return first, float(torch.rand(1))

    state = torch.random.get_rng_state()
    expected = [drawn(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(drawn, range(8))) == expected
    assert torch.equal(torch.random.get_rng_state(), state)


def test_factory_follows_random_state():
    first = estimator(net_of_the_moment, random_state=3).fit(X, Y)
    torch.rand(5)  # the state of the global generator does not matter
    again = estimator(net_of_the_moment, random_state=3).fit(X, Y)
    other = estimator(net_of_the_moment, random_state=4).fit(X, Y)
    assert same(first, again)
    assert not same(first, other)
    assert np.array_equal(first.predict_proba(X), again.predict_proba(X))


def test_factory_is_called_once_per_fit():
    calls = []

    def factory():
        calls.append(1)
        return tiny_net()

    model = estimator(factory).fit(X, Y)
    model.predict(X)
    assert len(calls) == 1
    assert same(model, estimator().fit(X, Y))


def test_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    estimator(net_of_the_moment, random_state=0).fit(X, Y)
    assert torch.equal(torch.get_rng_state(), before)


# --- lazy modules ----------------------------------------------------------------------------


def lazy_net():
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(5, 3), nn.Flatten(2)
    )


def test_lazy_factory():
    first = estimator(lazy_net, random_state=0, activation_layer=None).fit(X, Y)
    assert same(first, estimator(lazy_net, random_state=0, activation_layer=None).fit(X, Y))
    assert first.coef_.shape == (3, 5)
    assert not same(first, estimator(lazy_net, random_state=1, activation_layer=None).fit(X, Y))


def test_lazy_module():
    net = lazy_net()
    model = estimator(net, random_state=0).fit(X, Y)
    assert isinstance(net[0], nn.LazyConv2d)
    assert isinstance(net[0].weight, nn.UninitializedParameter)
    assert same(model, estimator(lazy_net(), random_state=0).fit(X, Y))


def test_lazy_module_forgets_the_seed_of_a_former_fit():
    used, fresh = lazy_net(), lazy_net()
    estimator(used, random_state=0).fit(X, Y)
    second = estimator(used, random_state=1).fit(X, Y)
    assert same(second, estimator(fresh, random_state=1).fit(X, Y))


# --- no backbone -----------------------------------------------------------------------------


def test_no_backbone_for_tabular_data():
    rows = X.reshape(24, -1)[:, :4].astype(float)
    first = estimator(None, random_state=0, activation_layer=None).fit(rows, Y)
    assert first.coef_.shape == (3, 256)
    assert first.coef_.dtype == np.float64
    assert first.gradient_layers_ == ["2.weight", "2.bias"]
    assert same(first, estimator(None, random_state=0, activation_layer=None).fit(rows, Y))
    assert not same(first, estimator(None, random_state=1, activation_layer=None).fit(rows, Y))


# --- indices ---------------------------------------------------------------------------------


class Words(nn.Module):
    """Embedded words, mixed by position, and their mean."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 5)

    def forward(self, ids):
        assert ids.dtype == torch.int64
        return torch.tanh(self.mix(self.embedding(ids))).mean(1)


IDS = np.random.default_rng(0).integers(0, 11, (24, 5))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_embedding(dtype):
    model = estimator(Words()).fit(IDS.astype(dtype), Y)
    assert model.coef_.shape == (3, 5)
    assert model.predict_proba(IDS.astype(dtype)).shape == (24, 3)
    reference = estimator(Words()).fit(IDS, Y)
    np.testing.assert_allclose(model.predict_proba(IDS), reference.predict_proba(IDS), atol=1e-3)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_embedding_precision(precision):
    model = estimator(Words(), precision=precision).fit(IDS, Y)
    assert model.coef_.dtype == precision
    assert all(value.dtype == precision for value in model.gradient_coef_.values())


def test_embedding_takes_gradients():
    model = estimator(Words(), gradient_layers="all").fit(IDS, Y)
    assert set(model.gradient_layers_) == {"embedding.weight", "mix.weight", "mix.bias"}
    assert model.gradient_coef_["embedding.weight"].shape == (11, 6)


def test_index_out_of_range():
    with pytest.raises(ValueError, match=r"(?s)failed on a batch of shape \(2, 5\).*index"):
        estimator(Words()).fit(IDS + 11, Y)
