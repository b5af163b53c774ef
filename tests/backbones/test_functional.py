"""Graphs without writes, against the modules that write into their tensors."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from sklearn_gradfeat.backbones._capture import _export, _with_tensors
from sklearn_gradfeat.backbones._graph import ActivationModule
from sklearn_gradfeat.backbones._split import extract


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x):
        return self.function(self, x)


def assert_same(function):
    """Compare a network with its graph, at two batch sizes; return the graph."""
    torch.manual_seed(0)
    module = ActivationModule(Function(function).eval(), None).requires_grad_(False)
    captured = _with_tensors(_export(module, torch.randn(2, 2, 4, 4)), module)
    graph = extract(captured, [captured.input], [captured.output])
    for n in (2, 5):
        x = torch.randn(n, 2, 4, 4)
        assert torch.equal(graph(x.clone())[0], module(x.clone()))
    for node in captured.used():
        assert not getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    return captured


def residual(net, x):
    y = nn.functional.relu(net.norm(net.conv(x)), inplace=True)
    identity = y
    y = nn.functional.dropout(net.norm(y), 0.5, training=False)
    y += identity
    return y.relu_().flatten(1)


def written_view(net, x):
    y = net.conv(x).reshape(x.shape[0], 4, 16).transpose(1, 2)
    y.mul_(2).add_(1)
    return y.flatten(1)


def written_twice(net, x):
    y = net.conv(x)
    y.relu_()
    z = y.mean((2, 3))
    y.mul_(3)
    return z + y.sum((2, 3))


def integers_in_place(net, x):
    y = net.conv(x)
    y += torch.arange(4)
    return y.flatten(1).masked_fill_(y.flatten(1) < 0, 0.5)


def view_by_dropout(net, x):
    y = net.conv(x)
    z = nn.functional.dropout(y, 0.5, training=False)
    z.mul_(2)
    return (y + z).flatten(1)


@pytest.mark.parametrize(
    "function",
    [residual, written_view, written_twice, integers_in_place, view_by_dropout],
    ids=lambda f: f.__name__,
)
def test_writes_are_replaced_without_running_operators_again(function, monkeypatch):
    def refuse(*_):
        pytest.fail("run_decompositions was called")

    monkeypatch.setattr(ExportedProgram, "run_decompositions", refuse)
    assert_same(function)


def read_through_a_view(net, x):
    y = net.conv(x)
    rows = y.flatten(1)
    y.relu_()
    return rows + 1


def base_of_a_written_part(net, x):
    y = net.conv(x)
    y[:, 1:3].mul_(2)
    return y.flatten(1)


def part_after_its_base(net, x):
    y = net.conv(x)
    part = y[:, :2]
    y.mul_(2)
    return torch.cat([part, y], 1).flatten(1)


def written_input(net, x):
    x.mul_(2)
    return net.conv(x).flatten(1)


def larger_dtype(net, x):
    y = net.conv(x)
    y += torch.ones(1, dtype=torch.float64) / 3
    return y.flatten(1)


def comparison(net, x):
    y = net.conv(x).clone()
    y.gt_(0)
    return (y + y).flatten(1)


def power(net, x):
    return net.conv(x).clamp_min_(0).pow_(2).flatten(1)


def wrapping_integers(net, x):
    y = x.abs().clamp(0, 1).mul(200).to(torch.uint8)
    y.add_(torch.full((1,), 100, dtype=torch.int64))
    return net.conv(y.to(x.dtype) / 100).flatten(1)


def copied_part(net, x):
    y = net.conv(x)
    z = torch.zeros_like(y)
    z[:, ::2] = y[:, ::2]
    z[:, 1] += y[:, 1]
    return z.flatten(1)


def view_of_dropout(net, x):
    y = net.conv(x)
    z = nn.functional.dropout(y, 0.5, training=False).relu_()
    rows = z.flatten(1)
    y.mul_(-0.5)
    return rows + 1


def dropout_as_output(net, x):
    y = net.conv(x)
    y[:, 1:3].mul_(2)
    return nn.functional.dropout(y.flatten(1), 0.5, training=False)


@pytest.mark.parametrize(
    "function",
    [
        comparison,
        power,
        wrapping_integers,
        copied_part,
        read_through_a_view,
        base_of_a_written_part,
        part_after_its_base,
        written_input,
        larger_dtype,
        view_of_dropout,
        dropout_as_output,
    ],
    ids=lambda f: f.__name__,
)
def test_networks_that_need_the_pass_of_torch(function, monkeypatch):
    calls, original = [], ExportedProgram.run_decompositions

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    assert_same(function)
    assert len(calls) == 1


VIEWS = [
    lambda t: t.transpose(1, 2),
    lambda t: t.reshape(t.shape[0], 16, 4).reshape(t.shape[0], 8, 8),
    lambda t: t.contiguous(),
    lambda t: t[:, :4].repeat(1, 2, 1),
    lambda t: t.view_as(t),
    lambda t: nn.functional.dropout(t, 0.5, training=False),
    lambda t: t + 1,
]
WRITES = [
    lambda t, _: t.relu_(),
    lambda t, _: t.mul_(-0.5),
    lambda t, other: t.add_(other),
    lambda t, _: t[:, 2:].add_(1),
    lambda t, other: t.copy_(other * 2),
]


def random_program(seed):
    """Return a function of views and writes in random order, which reads all values at the end."""
    steps = np.random.default_rng(seed).integers(0, 1000, (6, 4))

    def program(net, x):
        values = [net.conv(x).reshape(x.shape[0], 8, 8)]
        for kind, first, second, choice in steps.tolist():
            a, b = values[first % len(values)], values[second % len(values)]
            if kind % 2:
                values.append(VIEWS[choice % len(VIEWS)](a))
            else:
                WRITES[choice % len(WRITES)](a, b.clone())
        return sum((i + 1) * value.flatten(1) for i, value in enumerate(values))

    return program


@pytest.mark.parametrize("seed", range(6))
def test_random_views_and_writes(seed):
    assert_same(random_program(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 300))
def test_many_random_views_and_writes(seed):
    assert_same(random_program(seed))


@pytest.mark.parametrize("function", [power, copied_part], ids=lambda f: f.__name__)
def test_derivatives_of_networks_that_write(function):
    captured = assert_same(function)
    head = extract(
        captured, [captured.input], [captured.output], [captured.parameters["conv.weight"]]
    )
    weight = captured.tensors[captured.parameters["conv.weight"]]
    module, x = Function(function).eval(), torch.randn(3, 2, 4, 4)

    def original(w):
        return torch.func.functional_call(module, {"conv.weight": w}, (x,))

    module.load_state_dict(
        {name: captured.tensors[node] for node, name in captured.names.items()}, strict=False
    )
    direction = torch.randn_like(weight)
    expected = torch.func.jvp(original, (weight,), (direction,))[1]
    found = torch.func.jvp(lambda w: head(w, x)[0], (weight,), (direction,))[1]
    torch.testing.assert_close(found, expected)
    pulled = torch.func.vjp(lambda w: head(w, x)[0], weight)[1](expected)[0]
    torch.testing.assert_close(pulled, torch.func.vjp(original, weight)[1](expected)[0])
