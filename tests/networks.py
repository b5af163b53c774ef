"""Tiny networks of every kind, in float64."""

import functools

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.block = nn.ModuleList([ResidualBlock(4), ResidualBlock(4)])

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        for block in self.block:
            x = block(x)
        return x.mean((2, 3))


class ResidualBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


class Tokens(nn.Module):
    """A transformer on the pixels of an image."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.embed(x.flatten(2).mT)).mean(1)


def plain(size=2):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.1), nn.Conv2d(4, 5, size), nn.LeakyReLU(0.1)
    )


def whole():
    """The upper kernel is as large as its input."""
    return plain(3)


def grouped():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, groups=2, padding=1, dilation=2),
        nn.GELU(),
    )


def normed():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(50, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 6), nn.LayerNorm(6)
    )


NETWORKS = {
    "plain": (plain, ["2.weight", "2.bias"]),
    "whole": (whole, ["2.weight", "2.bias"]),
    "grouped": (grouped, ["2.weight", "2.bias"]),
    "normed": (normed, ["3.weight", "3.bias", "4.weight", "4.bias", "5.weight", "5.bias"]),
    "residual": (Residual, ["block.1.conv1.weight", "block.1.conv2.weight"]),
    "transformer": (
        Tokens,
        [
            f"encoder.layers.1.{n}"
            for n in (
                "self_attn.in_proj_weight",
                "self_attn.in_proj_bias",
                "linear1.weight",
                "linear2.bias",
                "norm1.weight",
            )
        ],
    ),
}


@functools.cache
def build(kind, seed=0):
    """Return a network in evaluation mode with trained-looking batch norms, and θ₂.

    All tests share it, and so its captured graph. Change a copy only.
    """
    factory, names = NETWORKS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = factory().double()
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
                layer.weight.data.uniform_(0.5, 2)
                layer.bias.data.normal_()
    return module.eval(), names
