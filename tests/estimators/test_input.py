"""Invalid parameters, weights and backbones raise an error; a fit changes no other state."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
)
from sklearn_gradfeat.backbones._attention import differentiable_attention
from tests.tiny import NET, X, Y, estimator, tiny_net


class Then(nn.Module):
    """The tiny network followed by a function."""

    def __init__(self, function):
        super().__init__()
        self.net = tiny_net()
        self.function = function

    def forward(self, x):
        return self.function(self.net(x))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.fixture(scope="module")
def fitted():
    return estimator().fit(X, Y)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (np.zeros(24), "(?i)sample.weight.*zero"),
        (np.arange(24) - 1.0, "Negative values in data passed to `sample_weight`"),
        (np.ones(20), "sample_weight.shape"),
        (np.ones((24, 2)), "(?i)sample.weight"),
        (np.full(24, np.nan), "sample_weight contains NaN"),
        (np.full(24, np.inf), "sample_weight contains infinity"),
    ],
)
def test_bad_weights(weights, match):
    with pytest.raises(ValueError, match=match):
        estimator().fit(X, Y, sample_weight=weights)


def test_weights_of_a_class_may_be_zero():
    model = estimator().fit(X, Y, sample_weight=(Y != 1).astype(float))
    assert list(model.classes_) == [0, 1, 2]
    assert not (model.predict(X) == 1).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -1),
        ("alpha", np.nan),
        ("alpha", np.inf),
        ("gradient_alpha", -1e-3),
        ("tol", -1.0),
        ("features", "both"),
        ("parametrization", "mup"),
        ("precision", "float16"),
        ("store_dtype", "float16"),
        ("device", "tpu"),
        ("device", "cpux:0"),
        ("max_iter", 0),
        ("batch_size", 0),
        ("gradient_layers", 0),
        ("gradient_layers", 1.5),
        ("gradient_layers", []),
        ("gradient_layers", [1]),
        ("activation_layer", 0),
        ("activation_layer", 3),
        ("activation_layer", 1.5),
        ("activation_layer", []),
        ("preprocess", "none"),
        ("backbone", 3),
        ("class_weight", "unbalanced"),
        ("random_state", "seed"),
    ],
)
def test_bad_parameter_is_named(name, value):
    # class_weight: the message of scikit-learn quotes the value instead of the name.
    named = f"{name}|{value}" if name == "class_weight" else name
    with pytest.raises((ValueError, TypeError), match=named):
        estimator().set_params(**{name: value}).fit(X, Y)


def test_class_weight_without_a_class():
    with pytest.raises(ValueError, match="class_weight"):
        estimator(class_weight={7: 1.0}).fit(X, Y)


def test_gradient_layers_that_match_nothing():
    with pytest.raises(ValueError, match=r"'2\.wieght' matches no .*nearest names are '2\.weight'"):
        estimator(gradient_layers="2.wieght").fit(X, Y)
    with pytest.raises(ValueError, match=r"'9\.\*' matches no"):
        estimator(gradient_layers=["2.weight", "9.*"]).fit(X, Y)


def test_too_many_blocks():
    with pytest.raises(ValueError, match=r"gradient_layers=3 asks for more blocks .*has: 2"):
        estimator(gradient_layers=3).fit(X, Y)


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (lambda z: (z, z), TypeError, "must return one tensor, it returned tuple"),
        (lambda z: {"z": z}, TypeError, "must return one tensor, it returned dict"),
        (lambda z: None, TypeError, "must return one tensor, it returned NoneType"),
        (lambda z: z * float("nan"), ValueError, "returned NaN or infinity"),
        (lambda z: z / 0, ValueError, "returned NaN or infinity"),
        (lambda z: z[:1], ValueError, "one row per sample: it was given 2 samples"),
        (lambda z: torch.cat([z, z]), ValueError, r"one row per sample.*shape \(4, 6\)"),
        (lambda z: z.mean(1), ValueError, r"n_samples, n_activations\).*it returned shape \(2,\)"),
        (lambda z: z.sum(), ValueError, r"\(n_samples, n_activations\).*it returned shape \(\)"),
        (lambda z: z.long(), TypeError, "floating point numbers, it returned torch.int64"),
        (lambda z: z.to_sparse(), TypeError, "it returned torch.float32 with the layout"),
        (lambda z: z[:, :0], ValueError, r"at least one activation .*it returned shape \(2, 0\)"),
        (lambda z: z.detach(), ValueError, "or detaches its output from all of them"),
        (lambda z: z @ torch.ones(5, 2), ValueError, r"failed on a batch of shape \(2, 1, 8, 8\)"),
        (lambda z: z.new_ones(z.shape), ValueError, "does not depend on"),
    ],
    ids=["tuple", "dict", "none", "nan", "inf", "first", "twice", "1-D", "0-D", "int", "sparse",
         "empty", "detached", "raises", "constant"],
)  # fmt: skip
def test_bad_output_of_the_backbone(function, error, match):
    with pytest.raises(error, match=match):
        estimator(Then(function)).fit(X, Y)


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured as a graph")
@pytest.mark.parametrize("graph", [True, False])
def test_output_of_another_precision(graph):
    network = Then(lambda z: z.float() if graph or float(z.detach().sum()) < 1e9 else z)
    with pytest.warns(UserWarning, match="casts to lower precision inside"):
        model = estimator(network, precision="float64", activation_layer=None).fit(X, Y)
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(torch.from_numpy(X).double()).numpy()
    np.testing.assert_allclose(model.transform(X), expected)


@pytest.mark.parametrize("rows", [np.float32, np.float64])
def test_network_that_casts_to_single_precision_in_its_head(rows):
    """The head of a network for tabular data is in float64, if the network can be."""
    network = nn.Sequential(nn.Linear(64, 6), Function(lambda z: z.float()), nn.Linear(6, 4))
    samples = X.reshape(24, 64).astype(rows)
    model = estimator(network, gradient_layers="all", precision="float32").fit(samples, Y)
    assert model.transform(samples).dtype == np.float32
    assert sorted(model.gradient_layers_) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_layers_below_a_detach_have_no_derivative():
    detach = Function(torch.Tensor.detach)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), detach, nn.Conv2d(4, 6, 3))
    model = estimator(network, gradient_layers="all").fit(X, Y)
    assert sorted(model.gradient_layers_) == ["2.bias", "2.weight"]
    with pytest.raises(ValueError, match=r"'0\.weight' .* or is below a detach"):
        estimator(network, gradient_layers="0").fit(X, Y)
    above = nn.Sequential(nn.Conv2d(1, 6, 3), detach, nn.PReLU())
    assert estimator(above, gradient_layers="all").fit(X, Y).gradient_layers_ == ["2.weight"]
    with pytest.raises(ValueError, match="more blocks than the backbone has: 0"):
        estimator(above).fit(X, Y)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpoint():
    """Autograd refuses it, and the graph needs none."""
    model = estimator(Then(lambda z: checkpoint(torch.sin, z, use_reentrant=True))).fit(X, Y)
    plain = estimator(Then(torch.sin)).fit(X, Y)
    np.testing.assert_allclose(model.predict_proba(X), plain.predict_proba(X))


def test_backbone_that_takes_two_arguments():
    with pytest.raises((TypeError, ValueError), match="input2"):
        estimator(nn.Bilinear(8, 8, 2)).fit(X, Y)


def test_samples_that_the_backbone_does_not_take():
    with pytest.raises(
        ValueError, match=r"(?s)failed on a batch of shape \(2, 3, 8, 8\).*preprocess"
    ):
        estimator().fit(np.repeat(X, 3, 1), Y)


def test_batch_norm_without_statistics():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"Layer '1' .*track_running_stats=True"):
        estimator(net).fit(X, Y)


def test_backbone_without_parameters():
    with pytest.raises(ValueError, match="no parameters"):
        estimator(nn.Flatten()).fit(X, Y)
    model = estimator(nn.Flatten(), features="activation").fit(X, Y)
    assert model.coef_.shape == (3, 64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_module_is_unchanged(training, dtype):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).to(dtype)  # fmt: skip
    net.train(training)
    net[1].eval()
    net[4].weight.requires_grad_(False)
    net[0].register_forward_hook(lambda *_: None)
    before = copy.deepcopy(net.state_dict())
    objects = {name: id(value) for name, value in net.named_parameters()}
    modes = [layer.training for layer in net.modules()]
    wanted = [p.requires_grad for p in net.parameters()]
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in net.modules()]
    attributes = [set(layer.__dict__) for layer in net.modules()]

    model = estimator(net, precision="float32", activation_layer="4").fit(X, Y)
    model.predict(X)

    assert model.backbone is net
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(after[name].dtype == value.dtype for name, value in before.items())
    assert all(p.device.type == "cpu" for p in net.parameters())
    assert {name: id(value) for name, value in net.named_parameters()} == objects
    assert [layer.training for layer in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == wanted
    assert all(p.grad is None for p in net.parameters())
    assert hooks == [
        len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in net.modules()
    ]
    assert [set(layer.__dict__) for layer in net.modules()] == attributes


def test_global_state_is_unchanged():
    torch.manual_seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    fast = torch.backends.mha.get_fastpath_enabled()
    estimator(tiny_net, random_state=0).fit(X, Y).predict(X)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)
    estimator(nn.Flatten, features="activation", random_state=0).fit(X, Y).predict(X)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled() == grad
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_works_where_gradients_are_off(fitted):
    with torch.no_grad():
        model = estimator().fit(X, Y)
        proba = model.predict_proba(X)
    assert np.array_equal(proba, fitted.predict_proba(X))


def test_predicts_the_same_in_inference_mode(fitted):
    expected = fitted.predict_proba(X)
    with torch.inference_mode():
        assert np.array_equal(fitted.predict_proba(X), expected)


def test_fits_the_same_in_inference_mode(fitted):
    net = tiny_net()
    with torch.inference_mode():
        inside = estimator(net).fit(X, Y)
    outside = estimator(net).fit(X, Y)
    assert np.array_equal(outside.coef_, fitted.coef_)
    assert np.array_equal(inside.coef_, fitted.coef_)


@pytest.mark.parametrize("shift", [lambda Y: 2 * Y - 1, lambda Y: 2 * Y, lambda Y: Y + 1])
def test_multilabel_targets_are_zeros_and_ones(shift):
    Y = np.random.RandomState(0).randint(0, 2, (30, 3))
    with pytest.raises(ValueError, match="zeros and ones"):
        GradientFeatureClassifier(random_state=0, alpha=1e-4, gradient_alpha=1e-4).fit(
            np.random.RandomState(1).randn(30, 4), shift(Y)
        )


@pytest.mark.parametrize(
    ("y", "kind"),
    [
        (pd.Series(Y, dtype="Int64"), "i"),
        (pd.Series(Y > 0, dtype="boolean"), "b"),
        (pd.Series(Y, dtype="category"), "i"),
        (pd.Series(np.array(["c", "a", "b"])[Y], dtype="category"), "O"),
        (pd.Series(np.array(["c", "a", "b"])[Y], dtype="string"), "O"),
        (pd.Series(Y, dtype=object), "i"),
    ],
    ids=["Int64", "boolean", "category", "category of strings", "string", "object"],
)
def test_classes_of_pandas(y, kind):
    model = estimator(features="activation").fit(X, y)
    assert model.classes_.dtype.kind == kind
    assert model.classes_.tolist() == sorted(set(y))
    accuracy = np.mean(model.predict(X) == np.asarray(y))
    assert accuracy > 0.6
    if y.dtype != object:  # scikit-learn's scores refuse numbers in an array of objects
        assert model.score(X, y) == accuracy
    search = GradientFeatureClassifierCV(NET, alphas=[0.1], features="activation", cv=2)
    assert search.fit(X, y).classes_.dtype.kind == kind


@pytest.mark.parametrize("dtype", ["Int64", "Float64", "boolean"])
def test_numbers_of_pandas(dtype):
    y = pd.Series(Y > 0, dtype=dtype)
    model = GradientFeatureRegressor(NET, features="activation", alpha=0.1)
    expected = model.fit(X, 1.0 * (Y > 0)).coef_
    assert np.array_equal(model.fit(X, y).coef_, expected)


@pytest.mark.parametrize("dtype", ["Int64", "boolean", "category", "string", object])
def test_missing_targets(dtype):
    y = pd.Series([None, *[True, False] * 11, True], dtype=dtype)
    for kind in (GradientFeatureClassifier, GradientFeatureRegressor):
        with pytest.raises(ValueError, match=r"y has missing values|y contains NaN"):
            kind(NET).fit(X, y)


def test_constant_samples_without_information():
    X, y = np.ones((30, 3)), np.arange(30) % 3
    model = GradientFeatureClassifier(random_state=0, alpha=1e-4, gradient_alpha=1e-4).fit(
        X, y
    )  # no ConvergenceWarning
    np.testing.assert_allclose(model.predict_proba(X), 1 / 3, atol=1e-6)


def test_gradient_features_without_intercept_and_zero_weights_between():
    rng = np.random.RandomState(0)
    X = rng.randn(2200, 3)
    y = (X[:, 0] > 0).astype(int)
    model = GradientFeatureClassifier(
        features="gradient",
        fit_intercept=False,
        random_state=0,
        alpha=0.1,
        tol=1e-4,
        gradient_alpha=0.1,
    )
    model.fit(X, y, sample_weight=np.tile([0.0, 1.0], 1100))
    assert model.score(X, y) > 0.9


def test_attention_settings_survive_threads():
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    first, second = differentiable_attention(), differentiable_attention()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    after = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    assert after == before
