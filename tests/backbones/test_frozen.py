"""The frozen copy: how often it runs, and how it follows changes of the module."""

import copy
import pickle
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.backbones._frozen import _in_worker
from tests.backbones.test_sources import same
from tests.tiny import NET, X, Y, estimator, tiny_net


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
    # Two samples show the shape of a batch, and must be mapped alike together and alone. Three of
    # the first batch must be mapped alike without the others.
    assert Counting.seen == len(X) + 2 + 2 + 3 + 3 + 3
    assert features == "activation" or model.n_passes_ > 2
    Counting.seen = 0
    model.predict(X)
    assert Counting.seen == len(X)


def test_network_that_overflows_at_predict():
    class Exponential(nn.Module):
        def forward(self, x):
            return x.exp()

    rows = X.reshape(24, -1)[:, :3]
    model = estimator(nn.Sequential(nn.Linear(3, 4), Exponential())).fit(rows, Y)
    with pytest.raises(ValueError, match="returned NaN or infinity"):
        model.predict(rows * 1e4)


def test_unpickled_where_the_device_is_missing():
    model = estimator().fit(X, Y)
    expected = model.predict_proba(X)
    model.device = "cuda:7"
    restored = pickle.loads(pickle.dumps(model))
    assert np.array_equal(restored.predict_proba(X), expected)


@pytest.mark.parametrize("backbone", [None, "convnet-vae", tiny_net])
def test_fits_leave_the_global_generator_alone(backbone):
    shape = (20, 11) if backbone is None else (20, 3, 8, 8)
    samples = np.random.default_rng(0).random(shape, np.float32)
    if backbone is tiny_net:
        samples = X[:20]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    GradientFeatureClassifier(
        backbone,
        features="activation",
        random_state=8,
        alpha=1e-4,
        gradient_alpha=1e-4,
        activation_layer=None,
    ).fit(samples, Y[:20] % 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_tasks_of_dask_in_threads_are_those_of_a_worker():
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 1, "processes": False, "dashboard_address": None}
    with (
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert client.submit(_in_worker).result()
        assert not _in_worker()


def test_other_modules_with_the_names_of_engines(monkeypatch):
    for name in ("ray", "distributed"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert not _in_worker()


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
    model = estimator(module, activation_layer=None).fit(X, Y)
    coef, proba = model.coef_.copy(), model.predict_proba(X)
    edit(module)
    assert np.array_equal(model.predict_proba(X), proba)
    refitted = estimator(module, activation_layer=None).fit(X, Y)
    assert not np.array_equal(refitted.coef_, coef)
    with torch.no_grad():
        activation = module(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(refitted.transform(X), activation, atol=1e-5)
    assert np.array_equal(model.predict_proba(X), proba)


def test_result_is_that_of_a_deep_copy():
    assert same(estimator(NET).fit(X, Y), estimator(copy.deepcopy(NET)).fit(X, Y))


def test_shapes_and_precisions_share_a_module():
    module = tiny_net()
    first = estimator(module).fit(X, Y)
    wider = estimator(module).fit(np.pad(X, ((0, 0), (0, 0), (1, 1), (1, 1))), Y)
    double = estimator(module, precision="float64").fit(X, Y)
    assert first.sample_shape_ == (1, 8, 8)
    assert wider.sample_shape_ == (1, 10, 10)
    assert double.coef_.dtype == np.float64
    assert same(first, estimator(NET).fit(X, Y))


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
    options = {"alpha": 0.1, "gradient_alpha": 0.1, "tol": 1e-4}
    first = (
        GradientFeatureClassifier(module, **options, activation_layer=None)
        .fit(X, y)
        .decision_function(X)
    )
    module.act, module.factors = torch.sin, [3.0]
    second = (
        GradientFeatureClassifier(module, **options, activation_layer=None)
        .fit(X, y)
        .decision_function(X)
    )
    module.linear.register_forward_hook(lambda _m, _i, output: output * 3)
    third = (
        GradientFeatureClassifier(module, **options, activation_layer=None)
        .fit(X, y)
        .decision_function(X)
    )
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(second - third).max() > 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_that_are_rounding_errors_do_not_warn(dtype):
    """A norm over all positions subtracts what the bias below it adds."""
    torch.manual_seed(0)
    around = {"padding": 1, "padding_mode": "circular"}
    net = nn.Sequential(
        nn.Conv1d(2, 2, 3, padding=1),
        nn.BatchNorm1d(2),  # its folding changes the last bits
        nn.GELU(),
        nn.Conv1d(2, 2, 3, **around),
        nn.Conv1d(2, 4, 3, **around),
        nn.GroupNorm(4, 4),
        nn.Flatten(),
    )
    nn.init.normal_(net[1].running_mean)
    nn.init.uniform_(net[1].running_var, 0.5, 2.0)
    X = np.random.default_rng(0).normal(size=(12, 2, 9)).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The gradient term is zero")
        estimator(net, gradient_layers=["3.bias"]).fit(X, np.arange(12) % 2)
