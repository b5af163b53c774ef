"""The warning of networks that cast float64 numbers to lower precision."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat.backbones._casts import first_cast
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
        (lambda x: x[:, 1:].half().sum(1, keepdim=True) + x, "torch.Tensor.half"),
        (softmax, "torch.softmax"),
        (lambda x: x + torch.arange(5, dtype=torch.float32).cos() + (x > 0).float(), None),
    ],
)
def test_the_first_cast_has_a_name(function, call):
    network = nn.Sequential(nn.Linear(5, 5), nn.Sequential(Applied(function))).double()
    expected = None if call is None else f"{call} in the layer '1.0'"
    assert first_cast(network, torch.from_numpy(ROWS)) == expected


def test_every_fit_in_float64_warns():
    network = Applied(softmax)
    for _ in range(2):  # the second one has the frozen network of the first
        with pytest.warns(UserWarning, match=r"first cast is torch\.softmax.* precision='float32'"):
            estimator(network, features="activation").fit(ROWS, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator(network, features="activation", precision="float32").fit(ROWS, Y)


def test_images_are_float32_anyway():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), Applied(lambda x: x.float()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator(network, features="activation").fit(X.astype(np.float64), Y)
