"""Copies of modules: plain parameters, and everything that cannot be copied."""

import copy

import pytest
import torch
from torch import nn

from tests.backbones.test_sources import same
from tests.tiny import X, Y, estimator, tiny_net


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


def test_compiled_module():
    module = tiny_net()
    compiled = torch.compile(module, backend="eager")
    model = estimator(compiled).fit(X, Y)
    assert same(model, estimator(module).fit(X, Y))
