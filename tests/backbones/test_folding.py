"""Batch norms folded into the layers before them."""

import pytest
import torch
from torch import nn

from sklearn_gradfeat.backbones._capture import capture
from sklearn_gradfeat.backbones._folding import fold_batch_norms
from sklearn_gradfeat.backbones._frozen import FrozenBackbone
from sklearn_gradfeat.backbones._graph import ActivationModule
from sklearn_gradfeat.backbones._split import extract


def trained(*layers):
    """Return a network in float64 with statistics as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(*layers).double().eval()
        for layer in network.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
                if layer.affine:
                    nn.init.normal_(layer.weight)
                    nn.init.normal_(layer.bias)
    return network


def folded(network, *shape):
    """Return the graph of a network with batch norms folded, and a batch of samples."""
    x = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    captured = capture(ActivationModule(network, None), x[:2])
    fold_batch_norms(captured)
    return captured, x


def check_function(captured, network, x):
    (found,) = extract(captured, [captured.input], [captured.output])(x)
    expected = network(x).flatten(2).mean(2) if network(x).ndim > 2 else network(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def has_batch_norm(captured):
    return any("batch_norm" in str(node.target) for node in captured.used())


CONVOLUTIONS = {
    "conv1d": (lambda bias: (nn.Conv1d(2, 3, 3, bias=bias), nn.BatchNorm1d(3)), (2, 6)),
    "conv2d": (lambda bias: (nn.Conv2d(2, 3, 3, bias=bias), nn.BatchNorm2d(3)), (2, 6, 5)),
    "conv3d": (lambda bias: (nn.Conv3d(2, 3, 2, bias=bias), nn.BatchNorm3d(3)), (2, 4, 3, 4)),
    "grouped": (
        lambda bias: (nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d(6)),
        (4, 5, 5),
    ),
    "same": (
        lambda bias: (nn.Conv2d(2, 3, 3, padding="same", bias=bias), nn.BatchNorm2d(3)),
        (2, 5, 5),
    ),
    "linear": (lambda bias: (nn.Linear(5, 3, bias=bias), nn.BatchNorm1d(3)), (5,)),
}


@pytest.mark.parametrize(
    ("kind", "bias"),
    [*((kind, True) for kind in CONVOLUTIONS), ("grouped", False), ("linear", False)],
)
@torch.no_grad()
def test_folded_layer_follows_the_formula(kind, bias):
    """The weight is s W and the bias s (b - μ) + β, with s = γ / √(σ² + ε)."""
    make, shape = CONVOLUTIONS[kind]
    network = trained(*make(bias), nn.Tanh())
    captured, x = folded(network, *shape)
    check_function(captured, network, x)
    assert not has_batch_norm(captured)
    layer, norm = network[0], network[1]
    s = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    b = layer.bias if bias else 0.0
    names = {"0.weight", "0.bias" if bias else "1.bias"}
    assert set(captured.parameters) == names
    values = [captured.tensors[captured.parameters[name]] for name in sorted(names)]
    weight, offset = sorted(values, key=lambda value: -value.ndim)
    torch.testing.assert_close(weight, layer.weight * s.view(-1, *[1] * (weight.ndim - 1)))
    torch.testing.assert_close(offset, s * (b - norm.running_mean) + norm.bias)
    assert captured.absorbed == {"1.weight": "0.weight"} | ({"1.bias": "0.bias"} if bias else {})


@torch.no_grad()
def test_batch_norm_without_parameters():
    network = trained(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, affine=False))
    captured, x = folded(network, 2, 5, 5)
    check_function(captured, network, x)
    assert not has_batch_norm(captured)
    assert set(captured.parameters) == {"0.weight", "0.bias"}


class Shared(nn.Module):
    """The output of the convolution has a second use."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        hidden = self.conv(x)
        return hidden + self.norm(hidden)


class Twice(nn.Module):
    """The convolution has two batch norms, in turn."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(2), nn.BatchNorm2d(2)])

    def forward(self, x):
        return self.norms[1](self.conv(self.norms[0](self.conv(x))))


@pytest.mark.parametrize(
    ("layers", "shape", "frozen"),
    [
        ((nn.Conv2d(2, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), (2, 4, 4), {"2.weight", "2.bias"}),
        ((nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1)), (2, 4, 4), {"0.weight", "0.bias"}),
        ((Shared(),), (2, 4, 4), {"0.norm.weight", "0.norm.bias"}),
        (
            (Twice(),),
            (2, 4, 4),
            {f"0.norms.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")},
        ),
    ],
    ids=["after ReLU", "first", "second use", "shared weights"],
)
@torch.no_grad()
def test_batch_norm_that_cannot_be_folded_is_frozen(layers, shape, frozen):
    network = trained(*layers)
    captured, x = folded(network, *shape)
    check_function(captured, network, x)
    assert has_batch_norm(captured)
    assert captured.frozen == frozen
    assert not captured.absorbed


def test_choice_says_where_a_parameter_went():
    network = trained(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    backbone = FrozenBackbone(network, torch.zeros(2, 2, 5, 5).double(), torch.float64, None)
    with pytest.raises(ValueError, match=r"'1\.weight' was folded into '0\.weight'"):
        backbone.choose("1.weight")
    with pytest.raises(ValueError, match=r"'3\.weight' belongs to a batch norm that cannot be"):
        backbone.choose("3")


class Absolute(nn.BatchNorm2d):
    """A batch norm whose scale is computed."""

    def forward(self, x):
        scale = self.weight.abs() + self.eps
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, scale, self.bias, False, 0.1, self.eps
        )


class Scaled(nn.BatchNorm2d):
    """A batch norm whose statistics are computed."""

    def forward(self, x):
        mean, variance = self.running_mean * 0.5, self.running_var + 1
        return nn.functional.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)


@pytest.mark.parametrize("norm", [Absolute, Scaled])
def test_computed_scales_and_statistics_stay(norm):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.ReLU()).eval()
    x = torch.randn(3, 1, 8, 8)
    frozen = FrozenBackbone(network, x, torch.float32, None)
    assert set(frozen.choose("all")) == {"0.weight", "0.bias"}
    activation = frozen.network([]).trunk(x)[0]
    torch.testing.assert_close(activation, network(x).mean((2, 3)).detach())
    with pytest.raises(ValueError, match=r"'1\.weight' belongs to a batch norm"):
        frozen.choose("1")


@pytest.mark.parametrize("activation_layer", [None, "1"])
def test_batch_norm_whose_output_is_the_activation(activation_layer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    nn.init.normal_(net[1].running_mean)
    whole = nn.Sequential(*net, nn.Tanh()) if activation_layer else net
    x = torch.randn(3, 4)
    network = FrozenBackbone(whole, x[:2], torch.float32, activation_layer).network(["0.weight"])
    (weight,) = network.parameters.values()
    boundary = network.boundary(x)
    torch.testing.assert_close(network.head((weight,), boundary), net.eval()(x))
