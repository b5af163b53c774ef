"""The choice of the gradient layers: blocks, names and patterns."""

import pytest
import torch
from torch import nn

from sklearn_gradfeat.backbones._blocks import blocks, choose_parameters
from sklearn_gradfeat.backbones._frozen import FrozenBackbone
from tests.networks import NETWORKS, Residual, Tokens


def frozen(network, *shape):
    return FrozenBackbone(network.double(), torch.zeros(2, *shape).double(), torch.float64, None)


class Dense(nn.Module):
    """Two blocks that append their output to their input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Appending(2), Appending(4)])
        self.classifier = nn.Linear(6, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x.mean((2, 3)))


class Appending(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.narrow, self.conv = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        return torch.cat([x, self.conv(torch.relu(self.narrow(x)))], 1)


class Mixed(nn.Module):
    """A block without its skip connection, between two that have it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = Skipping(True), Skipping(False), Skipping(True)

    def forward(self, x):
        return self.three(self.two(self.one(x)))


class Shared(nn.Module):
    """Two blocks with a common layer, which the network holds by other names too."""

    def __init__(self):
        super().__init__()
        self.common = nn.Conv2d(2, 2, 1)
        self.layers = nn.ModuleList([Skipping(True), Skipping(True)])
        for layer in self.layers:
            layer.a = self.common

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


class Skipping(nn.Module):
    def __init__(self, skip):
        super().__init__()
        self.skip = skip
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        return x + y if self.skip else y


def both(*paths):
    return [f"{path}.{name}" for path in paths for name in ("weight", "bias")]


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (NETWORKS["plain"][0], [both("0"), both("2")]),
        (
            Residual,
            [
                both("stem"),
                *(
                    [
                        f"block.{i}.{name}"
                        for name in ("conv1.weight", "bn1.bias", "conv2.weight", "bn2.bias")
                    ]
                    for i in (0, 1)
                ),
            ],
        ),
        (
            Dense,
            [both("layers.0.narrow", "layers.0.conv"), both("layers.1.narrow", "layers.1.conv")],
        ),
        (Mixed, [both(f"{name}.a", f"{name}.b") for name in ("one", "two", "three")]),
        (Shared, [both("common", f"layers.{i}.b") for i in (0, 1)]),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(50, 8), nn.Tanh(), nn.Linear(8, 6)),
            [both("1"), both("3")],
        ),
    ],
    ids=["layers", "residual", "dense", "one without a skip connection", "shared", "linear"],
)
def test_blocks(network, expected):
    backbone = frozen(network(), 2, 5, 5)
    found = list(blocks(backbone.captured).values())
    assert [sorted(block) for block in found] == [sorted(block) for block in expected]
    assert backbone.choose("last") == backbone.choose(1)
    assert sorted(backbone.choose("last")) == sorted(expected[-1])
    assert sorted(backbone.choose(2)) == sorted({*expected[-2], *expected[-1]})


def test_layers_of_a_transformer_are_blocks():
    backbone, last = frozen(Tokens(), 2, 5, 5), "encoder.layers.1"
    names = backbone.choose("last")
    assert all(name.startswith(f"{last}.") for name in names)
    assert {"norm1.weight", "linear2.bias"} <= {n.removeprefix("encoder.layers.1.") for n in names}
    after = both(*(f"{last}.{name}" for name in ("self_attn.out_proj", "linear1", "linear2")))
    assert backbone.choose("after_attention") == [name for name in names if name in after]
    assert set(after) < set(names)


def test_block_without_attention():
    with pytest.raises(
        ValueError, match=r"needs a transformer.* 'block\.1', has none\. Pass 'last'"
    ):
        frozen(Residual(), 2, 5, 5).choose("after_attention")


class Attending(nn.Module):
    """A block that reads the number of samples, which nothing below it has read."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


def test_sizes_belong_to_no_block():
    backbone = frozen(nn.Sequential(nn.Linear(6, 4), Attending()), 5, 6)
    assert list(blocks(backbone.captured)) == ["0", "1"]
    assert all(name.startswith("1.") for name in backbone.choose("last"))
    assert len(backbone.choose("last")) == 6


class Layer(nn.Module):
    """A layer like those of BERT: the attention has a skip connection of its own."""

    def __init__(self):
        super().__init__()
        self.attention = Attending()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        x = self.attention(x)
        return x + self.linear(x).relu()


def test_skip_connections_inside_of_repeated_layers():
    backbone = frozen(nn.Sequential(Layer(), Layer(), Layer()), 5, 4)
    assert list(blocks(backbone.captured)) == ["0", "1", "2"]
    for k in (1, 2):
        assert {name.split(".")[0] for name in backbone.choose(k)} == {"0", "1", "2"} - set(
            map(str, range(3 - k))
        )


def test_skip_connections_inside_of_a_single_layer():
    backbone = frozen(Layer(), 5, 4)
    assert list(blocks(backbone.captured)) == ["attention", "linear"]
    backbone = frozen(nn.Sequential(Layer()), 5, 4)
    assert list(blocks(backbone.captured)) == ["0.attention", "0"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("all", ["a.0.weight", "a.0.bias", "a.1.weight", "b.weight"]),
        ("a", ["a.0.weight", "a.0.bias", "a.1.weight"]),
        ("a.0", ["a.0.weight", "a.0.bias"]),
        ("*.bias", ["a.0.bias"]),
        (["b", "a.?.weight"], ["a.0.weight", "a.1.weight", "b.weight"]),
        (("b",), ["b.weight"]),
        (1, ["b.weight"]),
        (2, ["a.0.weight", "b.weight"]),
        ("after_attention", ["a.0.bias"]),
    ],
)
def test_names_and_patterns(pattern, expected):
    names = ["a.0.weight", "a.0.bias", "a.1.weight", "b.weight"]
    found = choose_parameters(
        pattern, names, lambda: [["a.0.weight"], [], ["b.weight"]], lambda: {"a.0.bias"}, {}
    )
    assert found == expected


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("c", r"gradient_layers='c' matches no parameter.* nearest names are '"),
        ("Last", r"nearest names are 'last'"),
        ([], r"gradient_layers=\[\] must list one or more strings"),
        ([1], r"gradient_layers=\[1\] must list one or more strings"),
        (3, r"gradient_layers=3 asks for more blocks.* has: 2\. Pass a smaller number"),
        ("old", r"gradient_layers='old' matches only parameters.* 'old\.weight' is gone"),
    ],
)
def test_choices_that_are_refused(pattern, match):
    names = ["a.0.weight", "b.weight"]
    gone = {"old.weight": "is gone"}
    with pytest.raises(ValueError, match=match):
        choose_parameters(pattern, names, lambda: [["a.0.weight"], ["b.weight"]], set, gone)


def test_network_without_parameters():
    with pytest.raises(ValueError, match=r"backbone has no parameters.* Pass"):
        choose_parameters("all", [], list, set, {})
