"""What ``backbone=`` may be: names, modules, factories, and nothing."""

import copy
import urllib.error
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.backbones._images import ImagePreprocess
from sklearn_gradfeat.backbones._named import load_named, timm_transform
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
        ("keras/resnet18", "from 'torchvision/' or 'timm/', not 'keras'"),
        ("a/b/resnet18", "from 'torchvision/' or 'timm/', not 'a/b'"),
    ],
)
def test_unknown_name(name, match):
    with pytest.raises(ValueError, match=match):
        estimator(name).fit(IMAGES, Y)


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


# --- the transforms of named networks --------------------------------------------------------


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


@pytest.fixture(params=["plain", "torchvision", "timm"])
def preprocess(request):
    if request.param == "plain":
        return ImagePreprocess(
            lambda images: images / 255 if images.dtype == torch.uint8 else images
        )
    if request.param == "torchvision":
        return ImagePreprocess(torchvision.models.ResNet18_Weights.DEFAULT.transforms())
    return ImagePreprocess(timm_transform(CONFIG))


def smooth_images(channels=3):
    rows, columns = torch.meshgrid(torch.arange(36.0), torch.arange(40.0), indexing="ij")
    planes = [
        torch.stack(
            [127 + 120 * torch.sin(rows / (7 + n) + columns / 9 + c) for c in range(channels)]
        )
        for n in range(2)
    ]
    return torch.stack(planes).to(torch.uint8)


def test_images_uint8_or_float(preprocess):
    images = smooth_images()
    # Resizing rounds uint8 to whole grey levels; 0.224 is the smallest standard deviation.
    tolerance = 2.5 / 255 / 0.224
    expected = preprocess(images)
    assert expected.dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        floats = preprocess(images.to(dtype) / 255)
        assert floats.dtype == torch.float32
        torch.testing.assert_close(floats, expected, atol=tolerance, rtol=0)


def test_images_channels_last(preprocess):
    images = smooth_images()
    assert torch.equal(preprocess(images.permute(0, 2, 3, 1).contiguous()), preprocess(images))


def test_images_grey(preprocess):
    grey = smooth_images(1)
    expected = preprocess(grey.repeat(1, 3, 1, 1))
    assert torch.equal(preprocess(grey), expected)
    assert torch.equal(preprocess(grey[:, 0]), expected)
    assert torch.equal(preprocess(grey.permute(0, 2, 3, 1)), expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "match"),
    [
        ((2, 3, 8, 3), torch.uint8, "channels first or last.*preprocess"),
        ((2, 1, 8, 3), torch.uint8, "channels first or last"),
        ((2, 4, 8, 8), torch.uint8, "neither 1 nor 3 channels"),
        ((2, 8, 8, 2), torch.uint8, "neither 1 nor 3 channels"),
        ((2, 8), torch.uint8, r"takes images.*have shape \(8,\)"),
        ((2, 3, 8, 8, 8), torch.uint8, r"takes images.*have shape \(3, 8, 8, 8\)"),
        ((2, 3, 8, 8), torch.int64, r"uint8, or floating point in \[0, 1\].*torch.int64"),
        ((2, 3, 8, 8), torch.bool, r"uint8, or floating point in \[0, 1\].*torch.bool"),
    ],
)
def test_images_that_cannot_be_used(preprocess, shape, dtype, match):
    with pytest.raises(ValueError, match=match):
        preprocess(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1.0, 1.0), (0.0, 1.01)])
def test_images_out_of_range(preprocess, low, high):
    images = torch.linspace(low, high, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    with pytest.raises(
        ValueError, match=rf"lie in \[0, 1\], X has values from {low:g} to {high:g}"
    ):
        preprocess(images)


# --- factories -------------------------------------------------------------------------------


def net_of_the_moment():
    """Draw the weights from the global generator, as torch's layers do."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(2))


@pytest.mark.parametrize("result", [3, None, nn.Linear])
def test_factory_that_returns_no_module(result):
    with pytest.raises(TypeError, match=r"factory must return a torch\.nn\.Module, it returned"):
        estimator(lambda: result).fit(X, Y)


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
    assert same(model, estimator(tiny_net()).fit(X, Y))


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
    first = estimator(lazy_net, random_state=0).fit(X, Y)
    assert same(first, estimator(lazy_net, random_state=0).fit(X, Y))
    assert first.coef_.shape == (3, 5)
    assert not same(first, estimator(lazy_net, random_state=1).fit(X, Y))


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


def test_no_backbone_for_rows():
    rows = X.reshape(24, -1)[:, :4].astype(float)
    first = estimator(None, random_state=0).fit(rows, Y)
    assert first.coef_.shape == (3, 256)
    assert first.coef_.dtype == np.float64
    assert first.gradient_layers_ == ["2.weight", "2.bias"]
    assert same(first, estimator(None, random_state=0).fit(rows, Y))
    assert not same(first, estimator(None, random_state=1).fit(rows, Y))


# --- the activation --------------------------------------------------------------------------


def test_activation_layer():
    net = tiny_net()
    chosen = estimator(net, activation_layer="3").fit(X, Y)
    assert chosen.coef_.shape == (3, 6)
    np.testing.assert_allclose(  # the two differ by who takes the mean
        chosen.predict_proba(X), estimator(net).fit(X, Y).predict_proba(X), atol=1e-3
    )
    lower = estimator(net, activation_layer="1").fit(X, Y)
    assert lower.coef_.shape == (3, 4)
    assert lower.gradient_layers_ == ["0.weight", "0.bias"]
    cut = estimator(tiny_net()[:2]).fit(X, Y)
    np.testing.assert_allclose(lower.predict_proba(X), cut.predict_proba(X), atol=1e-5)


def test_unknown_activation_layer():
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(1, 4, 3))
    net.add_module("layer4", nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"'layer3' is no submodule.*nearest names are 'layer4'"):
        estimator(net, activation_layer="layer3").fit(X, Y)


def test_activation_layer_that_is_not_used():
    net = tiny_net()
    net[0].extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"activation_layer='0\.extra' is not used"):
        estimator(net, activation_layer="0.extra").fit(X, Y)


@pytest.mark.parametrize("n_axes", [0, 1, 2])
def test_activation_is_averaged_over_further_axes(n_axes):
    net = tiny_net()[:4]
    tail = {0: [nn.AdaptiveAvgPool2d(1), nn.Flatten()], 1: [nn.Flatten(2)], 2: []}[n_axes]
    model = estimator(nn.Sequential(*net, *tail)).fit(X, Y)
    assert model.coef_.shape == (3, 6)
    expected = estimator(tiny_net()).fit(X, Y).predict_proba(X)
    np.testing.assert_allclose(model.predict_proba(X), expected, atol=1e-3)


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


# --- modules that cannot be captured ---------------------------------------------------------


class Branching(nn.Module):
    """The tiny network, with a branch on the data that is never taken."""

    def __init__(self):
        super().__init__()
        self.net = tiny_net()

    def forward(self, x):
        if x.abs().sum() > 1e9:
            return self.net(x) * 2
        return self.net(x)


def test_module_that_cannot_be_captured():
    with pytest.warns(UserWarning, match="cannot be captured as a graph") as caught:
        model = estimator(Branching(), precision="float64", tol=1e-10, max_iter=200).fit(X, Y)
    assert len(caught) == 1
    plain = estimator(tiny_net(), precision="float64", tol=1e-10, max_iter=200).fit(X, Y)
    assert model.gradient_layers_ == [f"net.{name}" for name in plain.gradient_layers_]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(model.predict_proba(X), plain.predict_proba(X), atol=1e-5)


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
@pytest.mark.parametrize(
    ("gradient_layers", "expected"),
    [
        (1, ["net.2.weight", "net.2.bias"]),
        (2, ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]),
        ("all", ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]),
        ("net.0", ["net.0.weight", "net.0.bias"]),
        ("*.bias", ["net.0.bias", "net.2.bias"]),
    ],
)
def test_gradient_layers_without_a_graph(gradient_layers, expected):
    model = estimator(Branching(), gradient_layers=gradient_layers, batch_size=10).fit(X, Y)
    assert model.gradient_layers_ == expected
    assert list(model.gradient_coef_) == expected


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
def test_too_many_blocks_without_a_graph():
    with pytest.raises(ValueError, match="more blocks than the backbone has: 2"):
        estimator(Branching(), gradient_layers=3).fit(X, Y)


def test_activation_alone_needs_no_graph():
    model = estimator(Branching(), features="activation").fit(X, Y)
    plain = estimator(tiny_net(), features="activation").fit(X, Y)
    np.testing.assert_allclose(model.predict_proba(X), plain.predict_proba(X), atol=1e-5)


# --- changes of the module -------------------------------------------------------------------


class Scaled(nn.Module):
    """The tiny network with state of every kind."""

    def __init__(self):
        super().__init__()
        self.net = tiny_net()
        self.register_buffer("kept", torch.ones(6))
        self.register_buffer("lost", torch.ones(6), persistent=False)
        self.factor = 1.0

    def forward(self, x):
        return self.net(x) * self.kept * self.lost * self.factor


def edit_weight(module):
    with torch.no_grad():
        module.net[2].weight.mul_(-1.5)


def edit_data(module):
    module.net[2].weight.data.mul_(-1.5)


def edit_buffer(module):
    module.kept.mul_(3)


def edit_hidden_buffer(module):
    module.lost.mul_(3)


def edit_number(module):
    module.factor = 3.0


def replace_layer(module):
    module.net[1] = nn.Sigmoid()


@pytest.mark.parametrize(
    "edit", [edit_weight, edit_data, edit_buffer, edit_hidden_buffer, edit_number, replace_layer]
)
def test_module_that_is_edited_after_fit(edit):
    module = Scaled()
    model = estimator(module).fit(X, Y)
    coef, proba = model.coef_.copy(), model.predict_proba(X)
    edit(module)
    assert np.array_equal(model.predict_proba(X), proba)
    refitted = estimator(module).fit(X, Y)
    fresh = Scaled()
    edit(fresh)
    assert not np.array_equal(refitted.coef_, coef)
    assert same(refitted, estimator(fresh).fit(X, Y))
    assert np.array_equal(model.predict_proba(X), proba)


def test_result_is_that_of_a_deep_copy():
    module = tiny_net()
    assert same(estimator(module).fit(X, Y), estimator(copy.deepcopy(module)).fit(X, Y))


def test_compiled_module():
    module = tiny_net()
    compiled = torch.compile(module, backend="eager")
    model = estimator(compiled).fit(X, Y)
    assert same(model, estimator(module).fit(X, Y))


def test_shapes_and_precisions_share_a_module():
    module = tiny_net()
    first = estimator(module).fit(X, Y)
    wider = estimator(module).fit(np.pad(X, ((0, 0), (0, 0), (1, 1), (1, 1))), Y)
    double = estimator(module, precision="float64").fit(X, Y)
    assert first.sample_shape_ == (1, 8, 8)
    assert wider.sample_shape_ == (1, 10, 10)
    assert double.coef_.dtype == np.float64
    assert same(first, estimator(tiny_net()).fit(X, Y))


def test_changed_attributes_and_hooks_are_seen_by_a_refit():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 8)
            self.act, self.factors = torch.relu, [1.0]

        def forward(self, x):
            return self.act(self.linear(x)) * self.factors[0]

    rng = np.random.RandomState(0)
    X, y = rng.randn(40, 3), rng.randint(0, 2, 40)
    module = Module()
    options = {"alpha": 0.1, "tol": 1e-4}
    first = GradientFeatureClassifier(module, **options).fit(X, y).decision_function(X)
    module.act, module.factors = torch.sin, [3.0]
    second = GradientFeatureClassifier(module, **options).fit(X, y).decision_function(X)
    module.linear.register_forward_hook(lambda _m, _i, output: output * 3)
    third = GradientFeatureClassifier(module, **options).fit(X, y).decision_function(X)
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(second - third).max() > 1e-3
