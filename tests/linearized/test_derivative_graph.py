"""The derivative of a head as a graph, against forward mode."""

import numpy as np
import pytest
import torch
from torch import fx, nn

from sklearn_gradfeat.backbones import freeze
from sklearn_gradfeat.linearized import (
    LinearizedHead,
    UntraceableError,
    _derivative_graph,
    linearized_graph,
)
from tests.networks import NETWORKS, build


def check_graph(module, x, names, sizes=(1, 2, 5), **tolerance):
    """Compare a linearised graph with forward mode, for batches of several sizes."""
    backbone = freeze(module.eval(), x[:2], x.dtype, None)
    network = backbone.network(names or backbone.choose("all"))
    values = tuple(network.parameters.values())
    generator = torch.Generator().manual_seed(0)
    tangents = tuple(torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values)
    head = LinearizedHead(network.head, network.parameters, "standard")

    def boundary(batch):
        return (batch,) if network.trunk is None else network.trunk(batch)

    graph = linearized_graph(network.graph, values, tangents, boundary(x[:2]))
    tolerance = {"rtol": 1e-9, "atol": 1e-11} | tolerance
    for n in sizes:
        z = boundary(x[:n])
        expected = head.activation_and_jvp(z, head.flatten(tangents))
        for found, wanted in zip(graph(*z), expected, strict=True):
            torch.testing.assert_close(found, wanted, **tolerance)
    return graph


def test_memory_that_runs_out_is_no_operator_without_a_graph(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    module, names = build("plain")
    monkeypatch.setattr(_derivative_graph, "_trace", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA"):
        check_graph(module, torch.zeros(5, 2, 5, 5, dtype=torch.float64), names)


@pytest.mark.parametrize("kind", NETWORKS)
def test_graph_of_every_kind_of_network(kind):
    module, names = build(kind)
    check_graph(module, torch.from_numpy(np.random.default_rng(0).normal(size=(5, 2, 5, 5))), names)


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("Conv1d", {"padding": "same"}, None),
        ("Conv2d", {"groups": 2, "dilation": 2, "bias": False}, None),
        ("Conv3d", {"padding": 1, "stride": 2}, None),
        ("Conv3d", {"padding": 1, "stride": 2}, ["0.bias"]),
        ("ConvTranspose1d", {"stride": 2}, None),
        ("ConvTranspose2d", {"output_padding": 1, "stride": 2}, None),
        ("ConvTranspose2d", {"output_padding": 1, "stride": 2}, ["0.bias"]),
        ("ConvTranspose3d", {}, None),
    ],
)
def test_graph_of_convolutions(kind, options, names):
    torch.manual_seed(0)
    dims = int(kind[-2])
    layer = getattr(nn, kind)(2, 4, 3, **options)
    net = nn.Sequential(layer, nn.SiLU(), getattr(nn, f"Conv{dims}d")(4, 3, 1)).double()
    check_graph(net, torch.randn(5, 2, *[5] * dims, dtype=torch.float64), names)


class Several(nn.Module):
    """Operators with several outputs or inputs, and a parameter that is used twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x):
        a, b = (x @ self.weight).chunk(2, 1)
        variance, mean = torch.var_mean(x * self.scale, 1, keepdim=True)
        y = torch.cat(
            [
                a * b,
                x,
                (variance + 1).rsqrt() * mean,
                nn.functional.glu(x * a.sum(1, keepdim=True)),
            ],
            1,
        )
        top, _ = (nn.functional.pad(y, (1, 2)) + 1).sort(1)
        return torch.where(top > 0, top, y.logsumexp(1, keepdim=True)) * self.scale[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unflatten(1, (1, 6)).expand(-1, 2, -1).to(x.dtype))[0][:, -1]


def normalised():
    return nn.Sequential(
        nn.Linear(6, 16), nn.Unflatten(1, (4, 2, 2)), nn.GroupNorm(2, 4), nn.Hardsigmoid(),
        nn.InstanceNorm2d(4), nn.Hardswish(), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2),
    )  # fmt: skip


class ChannelsLast(nn.Module):
    """Pools what lies in memory pixel by pixel, as ConvNeXt does."""

    def __init__(self, size):
        super().__init__()
        self.mix = nn.Linear(3, 4)
        self.pool = nn.AdaptiveAvgPool2d(size)

    def forward(self, x):
        return self.pool(self.mix(x.permute(0, 2, 3, 1)).tanh().permute(0, 3, 1, 2)).flatten(1)


@pytest.mark.parametrize("size", [1, (2, 3)])
def test_graph_of_pooling(size):
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, 6, dtype=torch.float64)
    graph = check_graph(ChannelsLast(size).double(), x, None)
    assert size != 1 or not any("as_strided" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("network", [Several, Recurrent, normalised])
def test_graph_of_operators_that_need_care(network):
    torch.manual_seed(0)
    # torch's own derivative of the hard sigmoid holds 1/6 in float32.
    tolerance = {"rtol": 1e-6} if network is normalised else {}
    check_graph(network().double(), torch.randn(5, 6, dtype=torch.float64), None, **tolerance)


def linearized(operation):
    weight, x = torch.ones(3, 3), torch.ones(2, 3)
    head = fx.symbolic_trace(lambda weight, x: (operation(x @ weight, x),))
    linearized_graph(head, (weight,), (weight,), (x,))


def test_operators_without_a_derivative():
    with pytest.raises(UntraceableError, match="derivative for 'zeta' is not implemented"):
        linearized(torch.special.zeta)


def test_networks_of_one_batch_size():
    with pytest.raises(UntraceableError, match="Constraints violated"):
        linearized(lambda y, _: y + torch.ones(2, 3))


def test_derivatives_of_one_batch_size(monkeypatch):
    monkeypatch.setattr("torch.export.default_decompositions", dict)  # conv3d stays what it is
    module = nn.Sequential(nn.Conv3d(2, 3, 1), nn.Tanh())
    with pytest.raises(UntraceableError, match=r"fixes the batch size|symbolic sizes"):
        check_graph(module, torch.ones(5, 2, 2, 2, 2), None)
