"""The captured graph, and the activation that it computes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torchvision.models import resnet

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.backbones._frozen import FrozenBackbone
from sklearn_gradfeat.backbones._graph import run_once
from sklearn_gradfeat.linearized._jacobian import LinearizedHead
from tests.tiny import NET, X, Y, estimator, tiny_net


# --- the activation --------------------------------------------------------------------------
def test_activation_layer():
    chosen = estimator(activation_layer="3").fit(X, Y)
    assert chosen.coef_.shape == (3, 6)
    expected = estimator(activation_layer=None).fit(X, Y).predict_proba(X)
    np.testing.assert_allclose(chosen.predict_proba(X), expected, atol=1e-3)
    lower = estimator(activation_layer="1").fit(X, Y)
    assert lower.coef_.shape == (3, 4)
    assert lower.gradient_layers_ == ["0.weight", "0.bias"]
    cut = estimator(NET[:2], activation_layer=None).fit(X, Y)
    np.testing.assert_allclose(lower.predict_proba(X), cut.predict_proba(X), atol=1e-5)


def test_unknown_activation_layer():
    net = nn.Sequential()
    net.add_module("stem", nn.Conv2d(1, 4, 3))
    net.add_module("layer4", nn.Conv2d(4, 4, 3))
    with pytest.raises(
        ValueError, match=r"'layer3' is not a submodule.*nearest names are 'layer4'"
    ):
        estimator(net, activation_layer="layer3").fit(X, Y)


def test_activation_layer_that_is_not_used():
    net = tiny_net()
    net[0].extra = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"activation_layer='0\.extra' is not called.* Name a submodule"
    ):
        estimator(net, activation_layer="0.extra").fit(X, Y)


@pytest.mark.parametrize("n_axes", [0, 1, 2])
def test_activation_is_averaged_over_further_axes(n_axes):
    tail = {0: [nn.AdaptiveAvgPool2d(1), nn.Flatten()], 1: [nn.Flatten(2)], 2: []}[n_axes]
    model = estimator(nn.Sequential(*NET[:4], *tail), activation_layer=None).fit(X, Y)
    assert model.coef_.shape == (3, 6)
    expected = estimator(activation_layer=None).fit(X, Y).predict_proba(X)
    np.testing.assert_allclose(model.predict_proba(X), expected, atol=1e-3)


def test_activation_layer_of_a_compiled_module():
    model = estimator(torch.compile(NET, backend="eager"), activation_layer="3").fit(X, Y)
    plain = estimator(activation_layer="3").fit(X, Y)
    assert np.array_equal(model.coef_, plain.coef_)


def test_full_classification_network_by_its_pooling():
    torch.manual_seed(0)
    whole = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    headless = copy.deepcopy(whole)
    headless.fc = nn.Identity()
    images = np.random.default_rng(0).random((12, 3, 32, 32)).astype(np.float32)
    options = {"gradient_layers": "layer2.0.downsample.0", "alpha": 0.1, "gradient_alpha": 0.1}
    by_name = estimator(whole, activation_layer="avgpool", **options).fit(images, Y[:12])
    cut = estimator(headless, activation_layer=None, **options).fit(images, Y[:12])
    assert by_name.gradient_layers_ == cut.gradient_layers_
    np.testing.assert_allclose(by_name.predict_proba(images), cut.predict_proba(images), rtol=1e-5)
    with pytest.raises(ValueError, match=r"'fc\.weight' lies above the activation"):
        estimator(whole, activation_layer="avgpool", gradient_layers="fc").fit(images, Y[:12])


# --- operators that see the layout of memory -------------------------------------------------


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
    model = GradientFeatureClassifier(
        network,
        features="activation",
        max_iter=500,
        alpha=1e-4,
        gradient_alpha=1e-4,
        activation_layer=None,
    ).fit(images, Y[:20] % 2)
    with torch.no_grad():
        activation = network(torch.from_numpy(images)).numpy()
    expected = activation @ model.coef_[0] + model.intercept_
    np.testing.assert_allclose(model.decision_function(images), expected, rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Conv2d(1, 1, 3) for _ in range(3))
        self.third.weight = self.first.weight

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("pattern", ["first.weight", "third.weight"])
def test_tied_parameters_have_the_name_of_named_parameters(pattern):
    net = Tied()
    model = estimator(net, gradient_layers=pattern).fit(X, Y)
    assert model.gradient_layers_ == ["first.weight"]
    every = estimator(net, gradient_layers="all").fit(X, Y).gradient_layers_
    assert sorted(every) == sorted(name for name, _ in net.named_parameters())
    assert set(estimator(net, gradient_layers="third").fit(X, Y).gradient_layers_) == {
        "first.weight",
        "third.bias",
    }


class Keyword(nn.Module):
    def forward(self, *, pixels):
        return pixels


def test_forward_that_takes_no_batch():
    match = r"backbone.forward must take the batch.*'pixels' by keyword only.* module\(pixels=x\)"
    with pytest.raises(TypeError, match=match):
        estimator(Keyword()).fit(X, Y)


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 8)

    def forward(self, x):
        return self.layer(x.float())


def test_network_that_casts_to_single_precision():
    rows = np.random.default_rng(0).normal(size=(24, 5))
    with pytest.raises(ValueError, match=r"itself casts to float32, set precision='float32'"):
        estimator(Casting()).fit(rows, Y)
    estimator(Casting(), features="activation", precision="float32").fit(rows, Y)


class Bags(nn.Module):
    """A mean, sum or maximum of rows of a table, by bags of the same size."""

    def __init__(self, mode, padding_idx=None, form="matrix"):
        super().__init__()
        torch.manual_seed(0)
        last = form == "offsets"
        self.table = nn.EmbeddingBag(
            9, 6, mode=mode, padding_idx=padding_idx, include_last_offset=last
        )
        self.form, self.top = form, nn.Linear(6, 4)

    def forward(self, ids):
        if self.form == "offsets":
            n, length = ids.shape
            hidden = self.table(ids.flatten(), torch.arange(0, n * length + length, length))
        else:
            weights = (ids / 9.0).to(self.top.weight) if self.form == "weights" else None
            hidden = self.table(ids, per_sample_weights=weights)
        return self.top(hidden.tanh())


@pytest.mark.parametrize(
    "arguments",
    [("mean",), ("mean", 3), ("sum", 3, "weights"), ("max", 3), ("sum", None, "offsets")],
)
def test_embedding_bags_have_both_derivatives(arguments):
    network = Bags(*arguments).double()
    ids = torch.randint(0, 9, (6, 5), generator=torch.Generator().manual_seed(0))
    ids[0, :2] = ids[1] = 3  # repeated, and in the second bag nothing but padding
    backbone = FrozenBackbone(network, ids[2:4], torch.float64, None)
    names = backbone.choose("table")
    parts = backbone.network(names)
    head, boundary = LinearizedHead(parts.head, parts.parameters, "standard"), parts.boundary(ids)
    with torch.no_grad():
        torch.testing.assert_close(head.activation(boundary), network(ids))
    weight = network.table.weight.detach()

    def activation(table):
        return functional_call(network, {"table.weight": table}, (ids,))

    J = torch.autograd.functional.jacobian(activation, weight).flatten(2)
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(weight.numel(), generator=generator, dtype=torch.float64)
    v = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(head.jvp(boundary, u), J @ u)
    torch.testing.assert_close(head.vjp(boundary, v), torch.einsum("no,nop->p", v, J))


# --- the device ------------------------------------------------------------------------------
def test_tensors_on_another_device_than_the_batch_are_explained():
    with pytest.raises(ValueError, match=r"On meta, the tensors of the network must be param"):
        run_once(lambda x: torch.cat([x, torch.ones(2, 4)]), torch.empty(2, 4, device="meta"))
    with pytest.raises(ValueError, match=r"precision='float32'\.$"):
        run_once(lambda x: x[:, 9], torch.empty(2, 4))
