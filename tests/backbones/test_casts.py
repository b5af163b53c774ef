"""The warning of networks that cast float64 numbers to lower precision."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tests.tiny import X, Y, estimator

ROWS = np.random.default_rng(0).normal(size=(24, 5))


class Applied(nn.Module):
    """A linear layer after a function."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(5, 4), function

    def forward(self, x):
        return self.layer(self.function(x))


def softmax(x):
    return torch.softmax(x, 1, dtype=torch.float32).to(x.dtype)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        (lambda x: x.float().type_as(x), "torch.Tensor.float"),
        (lambda x: x.half().to(x), "torch.Tensor.half"),
        (softmax, "torch.softmax"),
    ],
)
@pytest.mark.parametrize("graph", [True, False])
def test_casts_are_told_in_float64(function, call, graph):
    def branching(x):
        return function(x) if graph or float(x.sum()) < 1e9 else x

    network = nn.Sequential(nn.Linear(5, 5), nn.Sequential(Applied(branching)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # every fit, although they share the frozen network
            estimator(network, features="activation").fit(ROWS, Y)
    found = [str(w.message) for w in caught if "casts to lower precision" in str(w.message)]
    assert len(found) == 2
    assert f"the first cast is {call} in the layer '1.0'" in found[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator(network, features="activation", precision="float32").fit(ROWS, Y)


def test_numbers_that_do_not_come_from_the_samples_may_be_narrow():
    def positions(x):
        return x + torch.arange(5, dtype=torch.float32).cos() + (x > 0).float()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator(Applied(positions), features="activation").fit(ROWS, Y)


def test_images_are_float32_anyway():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), Applied(lambda x: x.float()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator(network, features="activation").fit(X.astype(np.float64), Y)
