"""Explicit rows, against dense Jacobians: what they hold, when they are used, their inverse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat.curvature import Inverses, _explicit_rows, with_rows_if_cheap
from sklearn_gradfeat.curvature._explicit_rows import SampledRows
from sklearn_gradfeat.data import BatchSize
from sklearn_gradfeat.linearized import Bernoulli, ExplicitTerm, Squared
from tests.curvature.problems import (
    classes,
    dense_map,
    dense_operator,
    image_term,
    module_term,
    normal,
    objective,
    unequal_weights,
)
from tests.networks import NETWORKS
from tests.oracles import dense_jacobian, ntk_scales

N = 20


@pytest.fixture
def free(monkeypatch):
    """Rows cost nothing."""
    monkeypatch.setattr(_explicit_rows, "_NUMBER", 0)
    monkeypatch.setattr(_explicit_rows, "_LOGIT", 0)


def explicit_term(kind="plain", n=N, n_outputs=3, alpha=1e-4, dtype=torch.float64):
    term, boundary = image_term(kind, n, n_outputs, alpha)
    term = with_rows_if_cheap(term, n, 2**30)
    assert isinstance(term, ExplicitTerm)
    return replace(term, rows=term.rows.to(dtype), omega=term.omega.to(dtype)), boundary


def explicit_objective(loss, penalty=0.01, **options):
    term, boundary = explicit_term(alpha=penalty, n=len(loss.weights), **options)
    activation = term.head.activation(boundary).to(term.omega)
    problem = objective(loss, activation, term, penalty)
    return replace(problem, like=term.omega.new_empty(0))


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("kind", NETWORKS)
def test_rows_are_gradients_of_single_samples(kind):
    term, boundary = explicit_term(kind)
    for i in (0, 11, N - 1):
        sample = tuple(z[i : i + 1] for z in boundary)
        expected = torch.stack([term.head.vjp(sample, row[None]) for row in term.omega])
        torch.testing.assert_close(term.rows[i], expected)


@pytest.mark.usefixtures("free")
def test_none_where_memory_runs_out(monkeypatch):
    """Half a batch has rows as large, so the size of a batch stays."""
    term = replace(image_term("plain", N)[0], batch_size=BatchSize(16))
    assert isinstance(with_rows_if_cheap(term, N, 2**30), ExplicitTerm)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(_explicit_rows, "_fill", full)
    assert with_rows_if_cheap(term, N, 2**30) is term
    assert (term.batch_size.size, term.batch_size.reduced) == (16, False)


class Twice(nn.Module):
    """Uses the weight of a layer outside of the layer as well."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 3).double()

    def forward(self, x):
        seldom = torch.relu(x[:, :1] - 9)
        return torch.tanh(self.layer(x)) + seldom * (x @ self.layer.weight)


@pytest.mark.usefixtures("free")
def test_none_where_a_parameter_has_another_use_for_a_single_sample():
    x, names = normal(N, 3), ["layer.weight", "layer.bias"]
    alike = module_term(Twice(), names, x)
    assert isinstance(with_rows_if_cheap(alike, N, 2**30), ExplicitTerm)
    x[N - 2] = 10
    term = module_term(Twice(), names, x)
    assert with_rows_if_cheap(term, N, 2**30) is term


@pytest.mark.usefixtures("free")
def test_rows_of_a_layer_that_is_used_twice():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(3, 3).double()
    module, names, x = nn.Sequential(layer, nn.Tanh(), layer), ["0.weight", "0.bias"], normal(N, 3)
    term = with_rows_if_cheap(module_term(module, names, x, 2), N, 2**30)
    J = dense_jacobian(module, names, x) * ntk_scales(module, names)
    np.testing.assert_allclose(term.rows, np.einsum("cd,ndp->ncp", term.omega, J), atol=1e-12)


def convolutions(size):
    """Two convolutions, of which the lower one has few weights and many positions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 40, 3), nn.Flatten(2)
        ).double()
    return nn.Sequential(module, nn.AdaptiveAvgPool1d(1), nn.Flatten()), normal(4, 1, size, size)


def test_rows_of_few_parameters_below_many_multiplications():
    module, x = convolutions(12)
    below = module_term(module, ["0.0.weight", "0.0.bias"], x, 2)
    found = _explicit_rows.multiplications(below.head, (x,))
    assert found == 4 * (100 * 2 * 9 + 64 * 40 * 2 * 9)
    assert isinstance(with_rows_if_cheap(below, 4, 2**30), ExplicitTerm)
    above = module_term(module, ["0.2.weight", "0.2.bias"], x, 20)
    many = module_term(module, ["0.0.weight", "0.0.bias"], x, 30)
    for term in (above, many):
        assert with_rows_if_cheap(term, 4, 2**30) is term


@pytest.mark.usefixtures("free")
def test_rows_and_their_copies_fit_into_memory():
    term, _ = image_term("plain", N)
    n_bytes = 2 * N * 3 * term.head.size * 8
    assert isinstance(with_rows_if_cheap(term, N, n_bytes), ExplicitTerm)
    assert with_rows_if_cheap(term, N, n_bytes - 1) is term


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("kind", [Squared, Bernoulli])
def test_inverse_is_that_of_the_dense_hessian(kind):
    loss = kind((normal(N, 3) > 0).double(), unequal_weights(N))
    problem = explicit_objective(loss)
    inverses, logits = Inverses(), normal(N, 3, seed=1)
    inverse = inverses.at(problem)(logits)
    A = dense_map(problem).flatten(0, 1)
    H = A.T @ (loss.curvatures(logits).reshape(-1, 1) * A) + torch.diag(problem.penalty)
    H.diagonal()[problem.penalty == 0] += 1e-6  # the intercept, which has no penalty
    found = dense_operator(inverse, len(H)) @ H
    torch.testing.assert_close(found, torch.eye(len(H)).double(), atol=1e-7, rtol=0)
    assert inverses.exact_for(problem) == (kind is Squared)
    assert inverses.coarse(problem)(inverse) is None


@pytest.mark.usefixtures("free")
def test_inverse_has_the_digits_of_float64_for_rows_in_float32():
    loss = Squared(normal(N, 3), unequal_weights(N))
    problem = explicit_objective(loss, penalty=1e-9, dtype=torch.float32)
    term = replace(problem.tangent, rows=problem.tangent.rows.double(), omega=normal(3, 5))
    wide = replace(problem, activation=problem.activation.double(), tangent=term, like=normal(0))
    x, logits = normal(sum(problem.sizes)), normal(N, 3)
    found = Inverses().at(problem)(logits)(x.float())
    expected = Inverses().at(wide)(logits)(x.float().double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max()
    )


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("weighted", range(3))
def test_some_samples_stand_for_all(monkeypatch, weighted):
    """Of three copies of every sample, the inverse sees the one that has a weight."""
    monkeypatch.setattr(_explicit_rows, "_FEWEST", 3 * N)
    monkeypatch.setattr(_explicit_rows, "_SHARE", 0)
    loss, repeats = classes(N), torch.arange(3 * N) // 3
    whole = explicit_objective(loss)
    weights = loss.weights[repeats] * (torch.arange(3 * N) % 3 == weighted)
    copies = replace(
        whole,
        loss=replace(loss, targets=loss.targets[repeats], weights=weights),
        activation=whole.activation[repeats],
        tangent=replace(whole.tangent, rows=whole.tangent.rows[repeats]),
        n_samples=3 * N,
    )
    logits, x = normal(N, 3), normal(sum(whole.sizes))
    found = SampledRows(copies).inverse(copies, logits[repeats])(x)
    torch.testing.assert_close(found, SampledRows(whole).inverse(whole, logits)(x))
    assert not SampledRows(copies).is_whole


@pytest.mark.usefixtures("free")
def test_penalties_share_the_gram_matrix():
    problem, inverses = explicit_objective(classes(N)), Inverses()
    first = inverses.at(problem)(normal(N, 3))
    other = replace(problem, tangent=replace(problem.tangent, alpha=0.5))
    second = inverses.at(other)(normal(N, 3))
    assert first.objective.tangent.rows is second.objective.tangent.rows
    assert float(second.penalty[-1]) == 0.5
