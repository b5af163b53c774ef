"""Networks whose activations are no function of single samples, in evaluation mode."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sklearn_gradfeat.backbones._independence import check_independence
from tests.tiny import X, Y, estimator


class Applied(nn.Module):
    """A function between two layers."""

    def __init__(self, function):
        super().__init__()
        self.lower, self.function, self.upper = nn.Conv2d(1, 4, 3), function, nn.Conv2d(4, 6, 3)

    def forward(self, x):
        return self.upper(self.function(self.lower(x)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Counter(nn.Module):
    """A layer with state that changes in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


RANDOM = {
    "torch.nn.functional.dropout": Function(F.dropout),
    "torch.rand": Function(lambda x: x * (torch.rand(len(x), 1, 6, 6) > 0.3)),
    "torch.nn.functional.rrelu": Function(lambda x: F.rrelu(x, training=True)),
    "torch.Tensor.mul": Counter(),
    "torch.Tensor.multiply": Function(lambda x: x.multiply(np.random.default_rng().normal())),
}
BATCH = {
    "torch.nn.functional.batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "torch.Tensor.mean": lambda x: x - x.mean(0),
    "torch.Tensor.cumsum": lambda x: x.cumsum(0),
    "torch.Tensor.flip": lambda x: x + x.flip(0),
    "torch.Tensor.div": lambda x: x / len(x),
    "torch.Tensor.__getitem__": lambda x: x - x[:1],
    "torch.nn.functional.softmax": lambda x: F.softmax(x, 0),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_networks_are_refused(name):
    match = rf"another activation in every run.*The cause is {name} in the layer 'function'"
    with pytest.raises(ValueError, match=match):
        estimator(Applied(RANDOM[name])).fit(X, Y)


@pytest.mark.parametrize("name", BATCH)
@pytest.mark.parametrize("equal", [False, True])
def test_networks_that_depend_on_the_batch_are_refused(name, equal):
    samples = X.copy()
    if equal:
        samples[:2] = 0
    match = rf"depends on the rest of its batch.*The cause is {name} in the layer 'function'"
    with pytest.raises(ValueError, match=match):
        estimator(Applied(Function(BATCH[name]))).fit(samples, Y)


def test_random_numbers_above_the_activation_do_no_harm():
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), Function(F.dropout))
    before = torch.get_rng_state()
    estimator(network, activation_layer="1").fit(X, Y)
    assert torch.equal(torch.get_rng_state(), before)


def test_rounding_in_low_precision_is_no_dependence():
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))).bfloat16()
    network = Function(lambda x: layers(x.bfloat16()).float())
    check_independence(network, torch.randn(2, 64))


def test_networks_outside_of_their_domain_are_left_to_later_checks():
    check_independence(Function(lambda x: torch.log(x) * 1.0), -torch.ones(2, 3))
