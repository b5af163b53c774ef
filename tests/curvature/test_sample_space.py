"""The inverse Hessian and leave-one-out predictions in the space of samples, against dense ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sklearn_gradfeat.curvature import leave_one_out, tangent_gram
from sklearn_gradfeat.curvature._sample_space import SampleInverse
from sklearn_gradfeat.linearized import Bernoulli, Squared
from tests.curvature.problems import (
    MLP_LAYERS,
    classes,
    dense_map,
    dense_operator,
    mlp,
    module_term,
    normal,
    objective,
    unequal_weights,
)
from tests.oracles import dense_jacobian, ntk_scales

N = 9


@pytest.fixture(scope="module")
def x():
    return normal(N, 3)


def term(x, n_outputs, alpha=0.03, names=MLP_LAYERS, **options):
    return module_term(mlp(), names, x, n_outputs, alpha, **options)


def inverse_at(problem, logits):
    loss, gram = problem.loss, tangent_gram(problem.tangent, N)
    return SampleInverse(problem, gram, loss.curvatures(logits), loss.weights)


@pytest.mark.parametrize("names", [MLP_LAYERS, ["2.weight"]])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_gram_is_that_of_the_dense_jacobian(x, n_outputs, names):
    tangent = term(x, n_outputs, names=names)
    J = dense_jacobian(mlp(), names, x) * ntk_scales(mlp(), names)
    rows = np.einsum("cd,ndp->ncp", tangent.omega, J).reshape(N * n_outputs, -1)
    np.testing.assert_allclose(tangent_gram(tangent, N), rows @ rows.T, atol=1e-12)


def test_gram_of_layers_that_see_one_token_of_each_sample(x):
    module = nn.Sequential(nn.Unflatten(1, (1, 3)), *mlp(), nn.Flatten())
    names = ["1.weight", "1.bias", "3.weight", "3.bias"]
    tangent = module_term(module, names, x, 2)
    J = dense_jacobian(module, names, x) * ntk_scales(module, names)
    rows = np.einsum("cd,ndp->ncp", tangent.omega, J).reshape(N * 2, -1)
    np.testing.assert_allclose(tangent_gram(tangent, N), rows @ rows.T, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(N)), st.integers(1, N))
def test_gram_does_not_depend_on_batches_and_order(x, order, size):
    gram = tangent_gram(term(x, 2), N)
    moved = tangent_gram(term(x[torch.tensor(order)], 2, batch_size=size), N)
    places = (2 * torch.tensor(order)[:, None] + torch.arange(2)).reshape(-1)
    torch.testing.assert_close(moved, gram[places][:, places])


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("kind", [Squared, Bernoulli])
def test_inverse_is_that_of_the_dense_hessian(x, kind, activation, fit_intercept):
    loss = kind((normal(N, 2) > 0).double(), unequal_weights(N))
    tangent = term(x, 2)
    f = tangent.head.activation((x,)) if activation else None
    problem = objective(loss, f, tangent, 0.01, fit_intercept)
    A = dense_map(problem).flatten(0, 1)
    logits = normal(N, 2, seed=1)
    H = A.T @ (loss.curvatures(logits).reshape(-1, 1) * A) + torch.diag(problem.penalty)
    H.diagonal()[problem.penalty == 0] += 1e-6  # the intercept, which has no penalty
    inverse = inverse_at(problem, logits)
    found = dense_operator(inverse, len(H))
    unit = torch.eye(len(H), dtype=torch.float64)
    torch.testing.assert_close(found @ H, unit, atol=1e-7, rtol=0)
    torch.testing.assert_close(found, found.T)


def test_no_penalty_leaves_a_positive_definite_inverse(x):
    tangent = term(x, 3, alpha=0.0)
    loss = classes(N, 3, unequal_weights(N))
    problem = objective(loss, tangent.head.activation((x,)), tangent, 0.0)
    inverse = inverse_at(problem, torch.zeros(N, 3).double())
    found = dense_operator(inverse, sum(problem.sizes))
    assert torch.linalg.eigvalsh(found + found.T).min() > 0


def test_none_where_it_would_not_be_cheap(x, monkeypatch):
    tangent = term(x, 2)
    monkeypatch.setattr("sklearn_gradfeat.curvature._sample_space.MAX_ROWS", 2 * N - 1)
    assert tangent_gram(tangent, N) is None


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x):
        return torch.tanh(self.layer(x)) @ self.layer.weight


@pytest.mark.parametrize(
    "module",
    [
        Twice(),
        Tied(),
        nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).double(),
        nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Linear(1, 2), nn.Flatten()).double(),
        nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 1, 2), nn.Flatten()).double(),
    ],
    ids=["shared", "tied", "norm", "positions", "convolution"],
)
def test_none_for_other_layers(x, module):
    names = [name for name, _ in module.named_parameters()]
    assert tangent_gram(module_term(module, names, x), N) is None


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("kind", ["full", "gradient", "activation"])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_leave_one_out_against_a_fit_without_each_sample(x, n_outputs, kind, fit_intercept):
    targets, weights = normal(N, n_outputs, seed=1), unequal_weights(N)
    tangent = None if kind == "activation" else term(x, n_outputs)
    f = None if kind == "gradient" else term(x, n_outputs).head.activation((x,))
    problem = objective(Squared(targets, weights), f, tangent, 0.02, fit_intercept)
    columns = dense_map(problem)
    predicted = leave_one_out(problem, None if tangent is None else tangent_gram(tangent, N))
    assert weights[0] == 0
    for i in range(N):
        others = torch.arange(N) != i
        root = weights[others].sqrt()[:, None]
        A = (columns[others] * root[:, :, None]).flatten(0, 1)
        b = (targets[others] * root).flatten()
        solved = torch.linalg.solve(A.T @ A + torch.diag(problem.penalty), A.T @ b)
        torch.testing.assert_close(predicted[i], columns[i] @ solved, rtol=1e-8, atol=1e-10)


def test_leave_one_out_at_penalties_below_rounding(x):
    loss = Squared(normal(N, 1), unequal_weights(N))
    problem = objective(loss, x, None, 1e-20)
    with pytest.raises(ValueError, match="rounding errors at penalties as small as 1e-20"):
        leave_one_out(problem, None)
