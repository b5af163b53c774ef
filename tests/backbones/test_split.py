"""The graph cut in two, trunk and head."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.backbones._frozen import FrozenBackbone
from sklearn_gradfeat.backbones._graph import WEIGHTED, operator_name
from sklearn_gradfeat.backbones._split import boundary, downstream
from tests.tiny import X, Y


class Codebook(nn.Module):
    """Rows are rounded to indices into a table: a boundary of integers would be smallest."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.below, self.above = nn.Linear(3, 3), nn.Linear(64, 6)
        self.register_buffer("table", torch.randn(16, 32))

    def forward(self, x):
        codes = ((torch.tanh(self.below(x)) + 1) * 8).long().clamp(0, 15)[:, :2]
        return torch.tanh(self.above(self.table[codes].flatten(1)))


def test_trunk_and_head_of_different_precision_share_the_cut():
    rows = X.reshape(24, -1)[:, :3]
    narrow, wide = (
        GradientFeatureClassifier(
            Codebook(), precision=precision, alpha=0.1, gradient_alpha=0.1
        ).fit(rows, Y)
        for precision in ("float32", "float64")
    )
    np.testing.assert_allclose(narrow.predict_proba(rows), wide.predict_proba(rows), atol=1e-4)


# --- the minimum cut ---------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """The values between the layers take 16, then 4, then 64 numbers per sample."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(3, 16), nn.Linear(64, 2)
        self.register_buffer("ones", torch.ones(16))

    def forward(self, x):
        hidden = torch.tanh(self.below(x)).unflatten(1, (4, 4)).mean(2)
        return self.above((hidden[:, :, None] * self.ones).flatten(1))


class Fork(nn.Module):
    """The head reads two functions of the same layer: storing the layer once is smaller."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(3, 8), nn.Linear(16, 2)

    def forward(self, x):
        hidden = self.below(x)
        return self.above(torch.cat([torch.sin(hidden), torch.cos(hidden)], 1))


class Pooled(nn.Module):
    """The pooled output of the ReLU is smaller than its input."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return self.above(nn.functional.max_pool2d(torch.relu(self.below(x)), 2))


class Skip(nn.Module):
    """The head needs the input of the layer below too."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.above(torch.relu(self.below(x)) + x)


def brute_force(captured, chosen):
    """Return the smallest number of bytes of any cut, from all sets of stored nodes."""
    used = captured.used()
    samples, head = downstream(used, [captured.input]), downstream(used, chosen)
    between = [node for node in used if node in samples and node not in head]
    needed = {node for node in between if not head.isdisjoint(node.users)}

    def is_expensive(node):
        weighted = operator_name(node) in WEIGHTED
        return weighted and not samples.issuperset(node.all_input_nodes)

    def computable(stored):
        todo = [node for node in needed if node not in stored]
        while todo:
            node = todo.pop()
            if node is captured.input or is_expensive(node):
                return False
            todo += [n for n in node.all_input_nodes if n in between and n not in stored]
        return True

    sizes = {node: 4 * node.meta["val"][:1].numel() for node in between}
    sets = itertools.chain.from_iterable(
        itertools.combinations(between, n) for n in range(1, 1 + min(len(between), 4))
    )
    return min(sum(sizes[n] for n in stored) for stored in sets if computable(set(stored)))


@pytest.mark.parametrize(
    ("network", "shape", "numbers"),
    [(Bottleneck, (3,), 4), (Fork, (3,), 8), (Pooled, (1, 8, 8), 18), (Skip, (6,), 6)],
)
def test_cut_is_the_smallest(network, shape, numbers):
    module = network().double()
    backbone = FrozenBackbone(module, torch.zeros(2, *shape).double(), torch.float64, None)
    captured = backbone.captured
    chosen = [captured.parameters["above.weight"]]
    cut = boundary(captured, chosen)
    stored = sum(math.prod(node.meta["val"].shape[1:]) for node in cut)
    assert stored == numbers
    assert 4 * stored == brute_force(captured, chosen)


@pytest.mark.parametrize(
    ("network", "shape"), [(Bottleneck, (3,)), (Fork, (3,)), (Pooled, (1, 8, 8)), (Skip, (6,))]
)
@torch.no_grad()
def test_head_of_trunk_is_the_network(network, shape):
    module = network().double()
    x = torch.randn(5, *shape, dtype=torch.float64)
    backbone = FrozenBackbone(module, x[:2], torch.float64, None)
    parts = backbone.network(["above.weight"])
    expected = module(x).flatten(2).mean(2) if len(shape) > 1 else module(x)
    found = parts.head(tuple(parts.parameters.values()), parts.trunk(x))
    torch.testing.assert_close(found, expected)
    whole = backbone.network([])
    torch.testing.assert_close(whole.trunk(x)[0], expected)


def test_parameters_without_effect():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    backbone = FrozenBackbone(module, torch.zeros(2, 3), torch.float32, None)
    captured = backbone.captured
    below = next(
        node for node in captured.used() if captured.parameters["0.weight"] in node.all_input_nodes
    )
    captured.output = below
    with pytest.raises(ValueError, match=r"gradient_layers chooses only parameters.* Choose"):
        boundary(captured, [captured.parameters["1.weight"]])
