"""Zeros around the input of a convolution, as its own padding."""

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from sklearn_gradfeat.backbones._capture import capture
from sklearn_gradfeat.backbones._graph import ActivationModule
from sklearn_gradfeat.backbones._padding import merge_padding
from sklearn_gradfeat.backbones._split import extract


class Padded(nn.Module):
    """A convolution after an operator that pads."""

    def __init__(self, layer, *how):
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, x):
        return self.layer(pad(x.tanh(), *self.how))


def merged(network, *shape):
    """Return whether no operator pads any more; the function must stay the same."""
    network = network.double().eval()
    x = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    captured = capture(ActivationModule(network, None), x[:2])
    merge_padding(captured)
    (found,) = extract(captured, [captured.input], [captured.output])(x)
    torch.testing.assert_close(found, network(x).flatten(2).mean(2), rtol=1e-12, atol=1e-12)
    return not any("pad" in str(node.target) for node in captured.used())


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (Padded(nn.Conv1d(2, 3, 3), (2, 2)), (2, 6)),
        (Padded(nn.Conv2d(2, 3, 3), (1, 1, 2, 2)), (2, 6, 5)),
        (Padded(nn.Conv2d(4, 6, 3, 2, (0, 1), 2, 2, bias=False), (3, 3, 2, 2)), (4, 7, 8)),
        (Padded(nn.Conv2d(2, 3, (3, 1)), (1, 1)), (2, 5, 4)),
        (Padded(nn.Conv3d(2, 3, 2), (0, 0, 1, 1, 2, 2)), (2, 4, 3, 4)),
        (nn.Sequential(nn.ZeroPad2d(2), nn.Conv2d(2, 3, 3, padding=1)), (2, 5, 4)),
    ],
    ids=["conv1d", "conv2d", "options", "one axis", "conv3d", "module"],
)
@torch.no_grad()
def test_zeros_become_the_padding_of_the_convolution(network, shape):
    assert merged(network, *shape)


@pytest.mark.parametrize(
    "how",
    [
        ((0, 1, 0, 1),),
        ((1, 1, 1, 1), "constant", 0.5),
        ((1, 1, 1, 1), "reflect"),
        ((-1, -1, 0, 0),),
        ((0, 0, 0, 0, 1, 1),),
    ],
    ids=["one end", "value", "reflected", "crop", "channels"],
)
@torch.no_grad()
def test_other_padding_stays(how):
    layer = nn.Conv2d(4 if len(how[0]) == 6 else 2, 3, 3)
    assert not merged(Padded(layer, *how), 2, 6, 5)
