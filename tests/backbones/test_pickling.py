"""Modules pickled as their structure and one array."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat.backbones import Pickled
from tests.tiny import estimator, tiny_net


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    net[1].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    return net


def of_many_kinds():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16())
    net.register_buffer("counts", torch.arange(3))
    net.register_buffer("number", torch.tensor(2.5, dtype=torch.float64))
    net.register_buffer("complex", torch.randn(3, dtype=torch.complex64).conj())
    net.register_buffer("transposed", torch.randn(2, 5).T, persistent=False)
    net.register_buffer("part", torch.randn(8)[2:5])
    net.register_buffer("empty", torch.empty(0, 3))
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    net.register_buffer("nothing", None)
    net.held = net[0].bias
    return net


@pytest.mark.parametrize(
    "network",
    [tied, of_many_kinds, tiny_net, lambda: nn.LazyLinear(3), lambda: nn.LSTM(3, 3)],
    ids=["tied", "kinds", "convolutions", "lazy", "lstm"],
)
def test_module_is_the_same_after_a_pickle(network):
    module = network()
    loaded = pickle.loads(pickle.dumps(Pickled(module)))
    assert type(loaded) is type(module)
    pairs = list(zip(tensors(module), tensors(loaded), strict=True))
    assert pairs
    for (name, a), (other, b) in pairs:
        assert (name, type(a), a.requires_grad) == (other, type(b), b.requires_grad)
        if not nn.parameter.is_lazy(a):
            assert (a.dtype, a.layout, a.shape) == (b.dtype, b.layout, b.shape)
            assert torch.equal(a.to_dense(), b.to_dense())
            assert a.is_sparse or not a.numel() or a.data_ptr() != b.data_ptr()


class Derived(nn.Linear):
    """A layer that computes a number from its weight when it is unpickled."""

    def __setstate__(self, state):
        super().__setstate__(state)
        self.total = float(self.weight.detach().sum())


class Doubled(nn.Module):
    """Runs a layer from a function that it holds."""

    def __init__(self):
        super().__init__()
        self.layer = layer = nn.Linear(3, 3)
        self.forward = lambda x: 2 * layer(x)


def test_state_is_restored_with_the_numbers():
    layer = Derived(3, 2)
    loaded = pickle.loads(pickle.dumps(Pickled(layer)))
    assert loaded.total == float(layer.weight.detach().sum()) != 0


def test_module_whose_copy_refers_to_it_is_pickled_as_it_is():
    module = Doubled()
    assert Pickled(module).__reduce__()[1][0] is module


@pytest.mark.parametrize("kind", ["computed", "lazy buffers"])
def test_module_without_a_deep_copy_is_pickled(kind):
    net = nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d() if kind != "computed" else nn.ReLU())
    net.held = 2 * net[0].weight
    loaded = pickle.loads(pickle.dumps(Pickled(net)))
    assert torch.equal(loaded.held, net.held) and torch.equal(loaded[0].bias, net[0].bias)


def tensors(module):
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def test_tensors_that_are_one_stay_one():
    loaded = pickle.loads(pickle.dumps(Pickled(tied())))
    assert loaded[0].weight is loaded[1].weight
    loaded = pickle.loads(pickle.dumps(Pickled(of_many_kinds())))
    assert loaded.held is loaded[0].bias


def test_equal_numbers_are_one_array_and_others_another():
    net = tiny_net()
    first, second = (Pickled(net).__reduce__()[1][-1] for _ in range(2))
    assert first is second
    with torch.no_grad():
        net[0].bias += 1
    third = Pickled(net).__reduce__()[1][-1]
    assert third is not first and not np.array_equal(third, first)


def test_copies_of_an_estimator_hold_a_module():
    net = tiny_net()
    assert copy.copy(estimator(net)).backbone is net
    copied = copy.deepcopy(estimator(net)).backbone
    assert copied is not net
    assert all(map(torch.equal, net.parameters(), copied.parameters()))
