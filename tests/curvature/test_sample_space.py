"""The inverse Hessian by way of the samples, against a dense one."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

from sklearn_gradfeat import GradientFeatureRegressor
from sklearn_gradfeat.curvature._sample_space import SampleInverse, tangent_gram
from sklearn_gradfeat.linearized._jacobian import LinearizedHead
from sklearn_gradfeat.linearized._losses import Bernoulli, Multinomial, Squared
from sklearn_gradfeat.linearized._objective import TangentObjective, TangentTerm
from tests.oracles import dense_jacobian, ntk_scales

N, WIDTH = 9, 4
generator = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, dtype=torch.float64, generator=generator)
WEIGHTS = torch.rand(N, dtype=torch.float64, generator=generator)
WEIGHTS[0] = 0
WEIGHTS /= WEIGHTS.sum()


def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, WIDTH), nn.Tanh()).double()


def linearized(module, names, inputs=X):
    """Return the term of a module whose head is all of it, in batches of five."""
    parameters = {n: p.detach() for n, p in module.named_parameters() if n in names}
    rest = {n: p.detach() for n, p in module.named_parameters() if n not in names}

    def head(values, boundary):
        state = dict(zip(parameters, values, strict=True)) | rest
        return torch.func.functional_call(module, state, boundary)

    def batches(stride=1):
        for start in range(0, N, 5):
            rows = slice(start, min(start + 5, N))
            yield rows, (inputs[rows],)

    return LinearizedHead(head, parameters, "ntk"), batches


def term(n_outputs, alpha=0.03, names=("0.weight", "0.bias", "2.weight", "2.bias")):
    head, batches = linearized(mlp(), names)
    omega = torch.randn(n_outputs, WIDTH, dtype=torch.float64, generator=generator)
    return TangentTerm(head, batches, omega, alpha)


@pytest.mark.parametrize("names", [["0.weight", "0.bias", "2.weight", "2.bias"], ["2.weight"]])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_gram_is_that_of_the_dense_jacobian(n_outputs, names):
    tangent = term(n_outputs, names=names)
    J = dense_jacobian(mlp(), names, X) * ntk_scales(mlp(), names)
    rows = np.einsum("cd,ndp->ncp", tangent.omega, J).reshape(N * n_outputs, -1)
    np.testing.assert_allclose(tangent_gram(tangent, N), rows @ rows.T, atol=1e-12)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("kind", ["squared", "bernoulli"])
def test_inverse_is_that_of_the_dense_hessian(kind, features, fit_intercept):
    targets = torch.randint(0, 2, (N, 2), generator=generator).double()
    loss = {"squared": Squared, "bernoulli": Bernoulli}[kind](targets, WEIGHTS)
    tangent = term(2)
    f = tangent.head.activation((X,)) if features else None
    objective = TangentObjective(loss, f, tangent, 0.01, fit_intercept, N, X[:0, 0], X.device)
    unit = torch.eye(sum(objective.sizes), dtype=torch.float64)
    A = torch.stack([objective.forward(column).reshape(-1) for column in unit], 1)
    logits = torch.randn(N, 2, dtype=torch.float64, generator=generator)
    H = A.T @ (loss.curvatures(logits).reshape(-1, 1) * A) + torch.diag(objective.penalty)
    H.diagonal()[objective.penalty == 0] += 1e-6  # the intercept, which has no penalty
    inverse = SampleInverse(objective, tangent_gram(tangent, N), logits)
    found = torch.stack([inverse(column) for column in unit], 1)
    torch.testing.assert_close(found @ H, unit, atol=1e-7, rtol=0)


def test_no_penalty_leaves_a_positive_definite_inverse():
    loss = Multinomial(torch.arange(N) % 3, WEIGHTS, 3)
    tangent = term(3, alpha=0.0)
    f = tangent.head.activation((X,))
    objective = TangentObjective(loss, f, tangent, 0.0, True, N, X[:0, 0], X.device)
    inverse = SampleInverse(objective, tangent_gram(tangent, N), torch.zeros(N, 3).double())
    unit = torch.eye(sum(objective.sizes), dtype=torch.float64)
    found = torch.stack([inverse(column) for column in unit], 1)
    assert torch.linalg.eigvalsh(found + found.T).min() > 0


def test_none_where_it_would_not_be_cheap(monkeypatch):
    tangent = term(2)
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
def test_none_for_other_layers(module):
    head, batches = linearized(module, [n for n, _ in module.named_parameters()])
    width = head.activation((X,)).shape[1]
    assert tangent_gram(TangentTerm(head, batches, torch.ones(1, width).double(), 0.1), N) is None


def test_fit_of_tied_weights_reaches_the_optimum():
    y = np.sin(X[:, 0].numpy() * 3)
    model = GradientFeatureRegressor(
        Tied(), gradient_layers="all", alpha=0.01, gradient_alpha=1e-4, tol=1e-10, max_iter=1000
    ).fit(X.numpy(), y)
    names = model.gradient_layers_
    module = model.backbone
    J = dense_jacobian(module, names, X) * ntk_scales(module, names)
    f = module(X).detach().numpy()
    unit = np.sqrt(0.01 / 1e-4)
    columns = np.hstack([f, unit * np.einsum("d,ndp->np", model.omega_[0], J)])
    oracle = Ridge(0.01 * N).fit(columns, y)
    np.testing.assert_allclose(model.predict(X.numpy()), oracle.predict(columns), rtol=1e-4)
