"""The gradient term from rows of layers, against the same term through the network."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from sklearn_gradfeat.curvature import FactoredTerm, _factored_term, _kfac, with_rows_if_cheap
from sklearn_gradfeat.curvature._factored_term import factored
from sklearn_gradfeat.curvature._preconditioner import _layer_factors
from sklearn_gradfeat.data import BatchSize
from tests.curvature.problems import batches, image_term, module_term, normal, unequal_weights
from tests.curvature.test_explicit_rows import Twice

N = 20


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    """Let tiny layers have rows."""
    monkeypatch.setattr(_factored_term, "READING", 0)
    monkeypatch.setattr(_factored_term, "_PASSES", 10**6)


class MaskedBlock(nn.Module):
    """The upper part of a transformer layer, and a mean over the tokens that are not padded."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.norm, self.upper = nn.LayerNorm(6), nn.LayerNorm(6)
            self.wide, self.narrow = nn.Linear(6, 9), nn.Linear(9, 6)
        self.double()

    def forward(self, x):
        padded = (x[:, :, 0] > 0) & (torch.arange(x.shape[1]) > 0)
        mixed = self.attention(x, x, x, key_padding_mask=padded, need_weights=False)[0]
        x = self.norm(x + mixed)
        x = self.upper(x + self.narrow(torch.relu(self.wide(x))))
        read = (~padded).to(x)[..., None]
        return (x * read).sum(1) / read.sum(1)


TOKENS = normal(N, 7, 6)
UPPER = [
    f"{name}.{of}" for name in ("norm", "upper", "wide", "narrow") for of in ("weight", "bias")
]


def masked_term():
    return module_term(MaskedBlock(), UPPER, TOKENS, n_outputs=3)


TERMS = {
    "masked": masked_term,
    "norms alone": lambda: module_term(MaskedBlock(), UPPER[:4], TOKENS, n_outputs=3),
    "plain": lambda: image_term("plain", N)[0],
    "whole": lambda: image_term("whole", N)[0],
    "grouped": lambda: image_term("grouped", N)[0],
    "normed": lambda: image_term("normed", N)[0],
    "residual": lambda: image_term("residual", N)[0],
}


@pytest.mark.parametrize("kind", TERMS)
def test_products_are_those_of_the_network(kind):
    term = TERMS[kind]()
    found = factored(term, N, 2**30)
    u, logits, cotangent = normal(term.head.size), normal(N, 3, seed=1), normal(N, 3, seed=2)

    def cotangent_of(rows, moved):
        return cotangent[rows] + moved.square()

    torch.testing.assert_close(found.add_forward(u, logits), term.add_forward(u, logits))
    torch.testing.assert_close(found.adjoint(cotangent), term.adjoint(cotangent))
    both = found.add_forward_adjoint(u, logits, cotangent_of)
    torch.testing.assert_close(both, term.add_forward_adjoint(u, logits, cotangent_of))


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("least", [N, 5])
def test_factors_of_the_curvature_are_those_of_the_network(kind, least, monkeypatch):
    monkeypatch.setattr(_kfac, "_MIN_SAMPLES", least)
    monkeypatch.setattr(_kfac, "_MAX_SAMPLES", least)
    term = TERMS[kind]()
    term.omega[2] = -term.omega[:2].sum(0)
    kept, weights, curvature = factored(term, N, 2**30), unequal_weights(N), normal(3, 3)
    assert kept.rest is None
    curvature = curvature @ curvature.T
    found, expected = (_layer_factors(of, curvature, weights) for of in (kept, term))
    for of in (found, expected):
        for factor in of[0].values():
            factor.sum_rows()
    for i, factor in expected[0].items():
        torch.testing.assert_close(found[0][i].inputs, factor.inputs)
        torch.testing.assert_close(found[0][i].output, factor.output)
    torch.testing.assert_close(found[1], expected[1])


def test_rows_of_padded_tokens_are_left_out():
    wide = factored(masked_term(), N, 2**30).kept[0][1][0]
    n_read = int((TOKENS[:5, 1:, 0] <= 0).sum()) + 5
    assert len(wide.inputs) == wide.gradients.shape[1] == n_read < 5 * 7


def test_columns_span_the_output_weights():
    term = masked_term()
    term.omega[2] = -term.omega[:2].sum(0)
    found = factored(term, N, 2**30)
    assert found.outer.shape == (3, 2)
    u, logits = normal(term.head.size), normal(N, 3, seed=1)
    torch.testing.assert_close(found.add_forward(u, logits), term.add_forward(u, logits))


@pytest.mark.parametrize("sample", range(N))
def test_none_where_a_parameter_has_another_use_for_a_single_sample(sample):
    x, names = normal(N, 3), ["layer.weight", "layer.bias"]
    assert factored(module_term(Twice(), names, x), N, 2**30) is not None
    x[sample] = 10
    assert factored(module_term(Twice(), names, x), N, 2**30) is None


class NormTwice(nn.Module):
    """Uses a vector of a layer norm outside of the norm as well, for some samples."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.norm = nn.LayerNorm(3).double()

    def forward(self, x):
        seldom = torch.relu(x[:, :1] - 9)
        return torch.tanh(self.norm(x)) + seldom * getattr(self.norm, self.name)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_none_where_a_vector_of_a_norm_has_another_use_for_a_single_sample(name):
    x, names = normal(N, 3), ["norm.weight", "norm.bias"]
    assert factored(module_term(NormTwice(name), names, x), N, 2**30) is not None
    x[N - 3, 0] = 10
    assert factored(module_term(NormTwice(name), names, x), N, 2**30) is None


def linear(width=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(width, width).double()


class Packed(nn.Module):
    """Applies a layer to the tokens that are not padded, one after the other."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x):
        read = x[:, :, 0] != 0
        tokens = torch.zeros_like(x)
        tokens[read] = torch.tanh(self.layer(x[read]))
        return tokens.sum(1)


def test_none_where_two_samples_of_a_packed_batch_have_other_lengths():
    x, names = normal(N, 4, 3), ["layer.weight", "layer.bias"]
    x[:, -1, 0] = 0
    term = module_term(Packed(), names, x, batch_size=10)
    u, logits = normal(term.head.size), normal(N, 1, seed=1)
    found = factored(term, N, 2**30)
    torch.testing.assert_close(found.add_forward(u, logits), term.add_forward(u, logits))
    x[14, -1, 0], x[15, 0, 0] = 1, 0  # as many tokens in total
    assert factored(module_term(Packed(), names, x, batch_size=10), N, 2**30) is None


class SequenceFirst(nn.Module):
    """Applies a layer to tokens along the first axis."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x):
        return torch.tanh(self.layer(x.transpose(0, 1))).sum(0)


@pytest.mark.parametrize(("n_tokens", "is_known"), [(3, True), (5, False), (10, False)])
def test_none_where_samples_are_taken_for_tokens(n_tokens, is_known):
    x, names = normal(N, n_tokens, 3), ["layer.weight", "layer.bias"]
    term = module_term(SequenceFirst(), names, x)
    assert (factored(term, N, 2**30) is not None) == is_known


class Root(nn.Module):
    """Has no derivative where the layer returns zero."""

    def __init__(self):
        super().__init__()
        self.layer = linear()
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return self.layer(x).abs().sqrt()


def test_none_where_the_derivative_of_a_single_sample_is_not_finite():
    x, names = normal(N, 3), ["layer.weight", "layer.bias"]
    assert factored(module_term(Root(), names, x), N, 2**30) is not None
    x[N - 3] = 0
    assert factored(module_term(Root(), names, x), N, 2**30) is None


def test_none_where_a_parameter_is_outside_of_layers():
    module = nn.Sequential(nn.Linear(6, 6), nn.PReLU(6), nn.Flatten()).double()
    names = ["0.weight", "0.bias", "1.weight"]
    assert factored(module_term(module, names, normal(N, 6)), N, 2**30) is None


def test_samples_for_which_memory_is_too_small_pass_the_network():
    term = masked_term()
    size = sum(z.nbytes for layer in factored(term, N, 2**30).kept[0][1] for z in layer.tensors)
    found = factored(term, N, int(2.5 * size))
    assert 0 < found.kept[-1][0].stop < N
    u, logits, cotangent = normal(term.head.size), normal(N, 3, seed=1), normal(N, 3, seed=2)
    torch.testing.assert_close(found.add_forward(u, logits), term.add_forward(u, logits))
    torch.testing.assert_close(found.adjoint(cotangent), term.adjoint(cotangent))
    both = found.add_forward_adjoint(u, logits, lambda rows, moved: moved.square())
    expected = term.add_forward_adjoint(u, logits, lambda rows, moved: moved.square())
    torch.testing.assert_close(both, expected)
    rest = [rows for rows, _ in _factored_term._after(partial(batches, (TOKENS,), 6), 8)]
    assert [(rows.start, rows.stop) for rows in rest] == [(8, 12), (12, 18), (18, N)]


def test_none_where_memory_runs_out(monkeypatch):
    """Half a batch has rows as large, so the size of a batch stays."""
    term = replace(masked_term(), batch_size=BatchSize(5))

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(_factored_term, "_keep", full)
    assert factored(term, N, 2**30) is None
    assert with_rows_if_cheap(term, N, 0, 2**30) is term
    assert (term.batch_size.size, term.batch_size.reduced) == (5, False)


def test_none_where_padding_has_a_name():
    module = nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.Flatten()).double()
    term = module_term(module, ["0.weight", "0.bias"], normal(N, 1, 4, 4))
    assert factored(term, N, 2**30) is None


def test_none_where_the_output_weights_vanish():
    term = masked_term()
    term.omega.zero_()
    assert factored(term, N, 2**30) is None


def test_none_where_memory_or_time_is_short(monkeypatch):
    term = masked_term()
    assert factored(term, N, 1000) is None
    monkeypatch.setattr(_factored_term, "_PASSES", 0)
    assert factored(term, N, 2**30) is None


def test_takes_the_place_of_explicit_rows_that_are_too_large():
    assert isinstance(with_rows_if_cheap(masked_term(), N, 1000, 2**30), FactoredTerm)
    term = masked_term()
    assert with_rows_if_cheap(term, N, 1000, 1000) is term
