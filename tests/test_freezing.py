"""The frozen copy: what it must resolve before the network is read, and how often it runs."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier
from tests.test_backbones import Branching
from tests.tiny import X, Y, estimator, tiny_net

Y20 = np.arange(20) % 2


class Counting:
    """A transform that counts the samples that pass through it."""

    seen = 0

    def __call__(self, batch):
        Counting.seen += len(batch)
        return batch

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("features", ["activation", "gradient", "full"])
def test_the_trunk_sees_every_sample_once(features):
    Counting.seen = 0
    model = estimator(
        features=features, preprocess=Counting(), batch_size=7, feature_store=None
    ).fit(X, Y)
    assert Counting.seen == len(X) + 2  # two samples show the shape of a batch
    assert features == "activation" or model.n_passes_ > 2
    Counting.seen = 0
    model.predict(X)
    assert Counting.seen == len(X)


@pytest.mark.parametrize(
    "normalize",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        pytest.param(
            nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")
        ),
        pytest.param(
            nn.utils.spectral_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")
        ),
    ],
)
def test_reparametrized_weights_are_plain_ones(normalize):
    network = tiny_net()
    normalize(network[2])
    network.eval()
    with torch.no_grad():
        network(torch.from_numpy(X))
    before = copy.deepcopy({name: value.detach() for name, value in network.state_dict().items()})
    model = estimator(network).fit(X, Y)
    assert sorted(model.gradient_layers_) == ["2.bias", "2.weight"]
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_refused():
    with pytest.raises(TypeError, match=r"TorchScript module.* Pass the torch.nn.Module"):
        estimator(torch.jit.trace(tiny_net(), torch.from_numpy(X))).fit(X, Y)


def test_activation_layer_of_a_compiled_module():
    network = tiny_net()
    model = estimator(torch.compile(network, backend="eager"), activation_layer="3").fit(X, Y)
    plain = estimator(network, activation_layer="3").fit(X, Y)
    assert np.array_equal(model.coef_, plain.coef_)


def test_refused_capture_prints_nothing(capfd):
    with pytest.warns(UserWarning, match="cannot be captured"):
        estimator(Branching()).fit(X, Y)
    assert capfd.readouterr() == ("", "")


def test_network_that_overflows_at_predict():
    class Exponential(nn.Module):
        def forward(self, x):
            return x.exp()

    rows = X.reshape(24, -1)[:, :3]
    model = estimator(nn.Sequential(nn.Linear(3, 4), Exponential())).fit(rows, Y)
    with pytest.raises(ValueError, match="returned NaN or infinity"):
        model.predict(rows * 1e4)


class Codebook(nn.Module):
    """Rows are rounded to indices into a table: a boundary of integers would be smallest."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.below, self.above = nn.Linear(3, 3), nn.Linear(64, 6)
        self.register_buffer("table", torch.randn(16, 32))

    def forward(self, x):
        codes = ((torch.tanh(self.below(x)) + 1) * 8).long().clamp(0, 15)[:, :2]
        return torch.tanh(self.above(self.table[codes].flatten(1)))


def test_trunk_and_head_of_different_precision_share_the_cut():
    rows = X.reshape(24, -1)[:, :3]
    narrow, wide = (
        GradientFeatureClassifier(Codebook(), precision=precision, alpha=0.1).fit(rows, Y)
        for precision in ("float32", "float64")
    )
    np.testing.assert_allclose(narrow.predict_proba(rows), wide.predict_proba(rows), atol=1e-4)


def test_unpickled_where_the_device_is_missing():
    model = estimator().fit(X, Y)
    expected = model.predict_proba(X)
    model.device = "cuda:7"
    restored = pickle.loads(pickle.dumps(model))
    assert np.array_equal(restored.predict_proba(X), expected)


def test_full_classification_network_by_its_pooling():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    whole = resnet18(num_classes=5)
    headless = copy.deepcopy(whole)
    headless.fc = nn.Identity()
    images = np.random.default_rng(0).random((12, 3, 32, 32)).astype(np.float32)
    options = {"gradient_layers": "layer2.1.conv2", "alpha": 0.1}
    by_name = estimator(whole, activation_layer="avgpool", **options).fit(images, Y[:12])
    cut = estimator(headless, **options).fit(images, Y[:12])
    assert by_name.gradient_layers_ == cut.gradient_layers_
    np.testing.assert_allclose(by_name.predict_proba(images), cut.predict_proba(images), rtol=1e-5)
    with pytest.raises(ValueError, match=r"'fc\.weight' lies above the activation"):
        estimator(whole, activation_layer="avgpool", gradient_layers="fc").fit(images, Y[:12])


class Strided(nn.Module):
    """Reads its hidden layer in the order of memory."""

    def __init__(self, view):
        super().__init__()
        self.view = view
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        return self.view(torch.relu(self.conv(x)).contiguous())


def by_strides(h):
    return h.as_strided((h.shape[0], 256), (256, 1))


def as_complex(h):
    return torch.view_as_complex(h.reshape(-1, 4, 16, 2, 2).contiguous()).abs().flatten(1)


@pytest.mark.parametrize("view", [by_strides, as_complex])
def test_operators_that_see_the_layout_of_memory(view):
    images = np.random.default_rng(0).random((20, 3, 4, 8), np.float32)
    network = Strided(view)
    model = GradientFeatureClassifier(network, features="activation", max_iter=500).fit(images, Y20)
    with torch.no_grad():
        activation = network(torch.from_numpy(images)).numpy()
    expected = activation @ model.coef_[0] + model.intercept_
    np.testing.assert_allclose(model.decision_function(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", [None, "convnet-vae", tiny_net])
def test_fits_leave_the_global_generator_alone(backbone):
    shape = (20, 11) if backbone is None else (20, 3, 8, 8)
    samples = np.random.default_rng(0).random(shape, np.float32)
    if backbone is tiny_net:
        samples = X[:20]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    GradientFeatureClassifier(backbone, features="activation", random_state=8).fit(samples, Y20)
    assert torch.equal(torch.get_rng_state(), before)
