"""A tiny language model in the manner of BERT, and texts, with a tokenizer of letters."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from sklearn_gradfeat import MaskedMean
from sklearn_gradfeat.backbones._frozen import FrozenBackbone
from sklearn_gradfeat.linearized._jacobian import LinearizedHead
from tests.curvature.problems import network_factors


def letters(texts, padding, truncation, max_length):
    assert padding == "max_length" and truncation
    cut = [[1 + ord(c) % 20 for c in text[:max_length]] for text in texts]
    rest = [[0] * (max_length - len(ids)) for ids in cut]
    return {
        "input_ids": [ids + zeros for ids, zeros in zip(cut, rest, strict=True)],
        "attention_mask": [[1] * len(ids) + zeros for ids, zeros in zip(cut, rest, strict=True)],
    }


class Layer(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x, mask):
        q, k, v = (
            f(x).unflatten(2, (2, 4)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(gelu(self.up(x))))


class Encoder(nn.Module):
    """Like those of transformers: a square mask for every text, and an object as output."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(21, 8), nn.Embedding(16, 8)
        self.layer = nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids, attention_mask):
        length = input_ids.shape[1]
        x = self.words(input_ids) + self.places(torch.arange(length, device=input_ids.device))
        square = attention_mask[:, None, None, :].bool().expand(-1, 1, length, length)
        for layer in self.layer:
            x = layer(x, square)
        return SimpleNamespace(last_hidden_state=x)


def masked_mean():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MaskedMean(Encoder())


NET = masked_mean()
TEXTS = ["ab", "badcab", "abba", "xyz", "zyxwzy", "wxyx", "", "mno", "ommn", "onnomm"] * 3
LABELS = np.array(
    ["first", "first", "first", "last", "last", "last", "mid", "mid", "mid", "mid"] * 3
)


def check_split(net, X, last, width):
    """The head is the last layer, fed with its input and a mask, and K-FAC sees its layers."""
    example = torch.from_numpy(X)
    backbone = FrozenBackbone(net, example[:2], torch.float32, None)
    names = backbone.choose("last")
    expected = [n for n, _ in net.named_parameters() if n.startswith(last)]
    assert sorted(names) == sorted(expected)
    network = backbone.network(names)
    boundary = network.trunk(example)
    length = X.shape[2]
    assert (length, width) in [z.shape[1:] for z in boundary]
    assert sum(z[0].nbytes for z in boundary) <= length * (4 * width + 8)  # no square mask
    head = LinearizedHead(network.head, network.parameters, "ntk")
    with torch.no_grad():
        torch.testing.assert_close(head.activation(boundary), backbone.module(example))
    u = torch.randn(head.size, generator=torch.Generator().manual_seed(0))
    tangent = head.jvp(boundary, u)
    assert head._forward_mode
    head._forward_mode = False
    torch.testing.assert_close(tangent, head.jvp(boundary, u), rtol=1e-4, atol=1e-4)
    n = len(X)
    columns = torch.ones(1, tangent.shape[1])
    found, _ = network_factors(head, [(slice(0, n), boundary)], columns, torch.ones(n) / n, n)
    matrices = [i for i, value in enumerate(head.values) if value.ndim == 2]
    assert sorted(found) == matrices
    assert all(factor.bias is not None for factor in found.values())
