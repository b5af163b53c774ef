"""The leading subspace: its map against the whole one, and what it does for the solver."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureRegressor
from sklearn_gradfeat.backbones._frozen import FrozenBackbone
from sklearn_gradfeat.curvature import _coarse_space as subspaces
from sklearn_gradfeat.curvature._inverses import Inverses
from sklearn_gradfeat.curvature._layer_rows import LayerRecorder
from sklearn_gradfeat.curvature._preconditioner import Preconditioner
from sklearn_gradfeat.linearized._jacobian import LinearizedHead
from sklearn_gradfeat.linearized._losses import Multinomial, Squared
from sklearn_gradfeat.linearized._objective import TangentObjective, TangentTerm
from sklearn_gradfeat.solvers._lbfgs import minimize
from tests.networks import NETWORKS, build

N, CLASSES = 40, 3
X = torch.tensor(np.random.RandomState(0).randn(N, 2, 5, 5))
generator = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def every_size_is_worth_it(monkeypatch):
    """Let tiny layers have a subspace of more than one direction."""
    monkeypatch.setattr(subspaces, "_MIN_COST", 0)
    monkeypatch.setattr(subspaces, "_READING", 0)
    monkeypatch.setattr(subspaces, "_SHARE", 0.5)


def batches(boundary, stride=1):
    """Iterate over batches of unequal size."""
    for start in range(0, N, 16 * stride):
        rows = slice(start, min(start + 16 * stride, N), stride)
        yield rows, tuple(z[rows] for z in boundary)


def objective_of(kind, loss=None, alpha=1e-4):
    """Return the objective of a tiny network."""
    module, names = build(kind)
    network = FrozenBackbone(module, X[:2], torch.float64, None).network(names)
    boundary = network.trunk(X)
    head = LinearizedHead(network.head, network.parameters, "ntk")

    features = head.activation(boundary)
    omega = torch.randn(CLASSES, features.shape[1], generator=generator, dtype=torch.float64)
    loss = loss or Multinomial(torch.arange(N) % CLASSES, torch.full((N,), 1 / N).double(), CLASSES)
    tangent = TangentTerm(head, partial(batches, boundary), omega, alpha)
    return TangentObjective(loss, features, tangent, 1e-3, True, N, X[:0, 0, 0, 0], X.device)


def subspace_of(objective):
    zero = torch.zeros(sum(objective.sizes), dtype=torch.float64)
    inverse = Preconditioner(objective, objective.forward(zero))
    return subspaces.leading_subspace(objective, inverse.curvature)


# Layers with groups have none: in "grouped" they are all that there is.
KINDS = [kind for kind in NETWORKS if kind != "grouped"]


@pytest.mark.parametrize("kind", KINDS)
def test_map_is_that_of_the_objective(kind):
    objective = objective_of(kind)
    subspace = subspace_of(objective)
    assert all(min(block.curvature.shape) > 0 for block in subspace.blocks)
    x = torch.randn(sum(subspace.sizes), generator=generator, dtype=torch.float64)
    logits = subspace.forward(x)
    torch.testing.assert_close(logits, objective.forward(subspace.extend(x)), rtol=1e-9, atol=1e-9)
    cotangent = torch.randn(N, CLASSES, generator=generator, dtype=torch.float64)
    pulled = subspace.adjoint(cotangent)
    torch.testing.assert_close(pulled @ x, (cotangent * logits).sum())
    torch.testing.assert_close(pulled, subspace.restrict(objective.adjoint(cotangent)))


def test_rows_are_summed_where_that_is_less_to_keep():
    blocks = [block for kind in KINDS for block in subspace_of(objective_of(kind)).blocks]
    for block in blocks:
        (g, a), n = block.curvature.shape, block.n_positions
        assert block.summed == (CLASSES * g * a <= n * (a + CLASSES * g))
    assert {block.summed for block in blocks} == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_restriction_is_the_orthogonal_projection(kind):
    objective = objective_of(kind)
    subspace = subspace_of(objective)
    x = torch.randn(sum(subspace.sizes), generator=generator, dtype=torch.float64)
    y = torch.randn(sum(objective.sizes), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(subspace.restrict(subspace.extend(x)), x)
    torch.testing.assert_close(subspace.extend(x) @ y, x @ subspace.restrict(y))


def test_none_for_groups_and_where_a_pass_is_as_good_as_free(monkeypatch):
    assert subspace_of(objective_of("grouped")) is None
    objective = objective_of("plain")
    assert subspace_of(objective) is not None
    monkeypatch.setattr(subspaces, "_MIN_COST", 2**15)
    assert subspace_of(objective) is None


def tied(values, boundary):
    (w,), (x,) = values, boundary
    return torch.tanh(linear(x, w)) @ w


def bias_in_two_places(values, boundary):
    (w, b), (x,) = values, boundary
    return torch.tanh(linear(x, w, b)) * (1 + b)


def time_first(values, boundary):
    (w, b), (x,) = values, boundary
    rows = x.view(len(x), 2, -1).transpose(0, 1).reshape(2 * len(x), -1)
    return torch.tanh(linear(rows, w, b)).view(2, len(x), -1).mean(0)


def silent(values, boundary):
    (w, b), (x,) = values, boundary
    return torch.relu(linear(x, w, b) - 1e4) + x[:, :6]


def the_same_for_all_samples(values, boundary):
    (w, b), (x,) = values, boundary
    rows = torch.arange(192, dtype=x.dtype).view(16, 12) / 192
    return torch.tanh(linear(rows, w, b)).mean(0) * x[:, :6]


def beside_a_tied_one(values, boundary):
    return tied(values[:1], boundary)[:, :6] + torch.tanh(linear(boundary[0], *values[1:]))


@pytest.mark.parametrize(
    ("head", "shapes", "kept"),
    [
        (tied, [(6, 12)], None),
        (bias_in_two_places, [(6, 12), (6,)], None),
        (time_first, [(6, 6), (6,)], None),
        (silent, [(6, 12), (6,)], None),
        (the_same_for_all_samples, [(6, 12), (6,)], None),
        (beside_a_tied_one, [(6, 12), (6, 12), (6,)], [1]),
    ],
)
def test_only_layers_with_the_right_map(head, shapes, kept):
    values = {
        str(i): torch.randn(shape, generator=generator, dtype=torch.float64)
        for i, shape in enumerate(shapes)
    }
    boundary = (torch.randn(N, 12, generator=generator, dtype=torch.float64),)
    linearized = LinearizedHead(head, values, "standard")
    features = linearized.activation(boundary)
    omega = torch.randn(CLASSES, features.shape[1], generator=generator, dtype=torch.float64)

    loss = Multinomial(torch.arange(N) % CLASSES, torch.full((N,), 1 / N).double(), CLASSES)
    tangent = TangentTerm(linearized, partial(batches, boundary), omega, 1e-3)
    objective = TangentObjective(loss, features, tangent, 1e-3, True, N, X[:0, 0, 0, 0], X.device)
    subspace = subspace_of(objective)
    assert (subspace and [block.weight for block in subspace.blocks]) == kept
    inverses, x = Inverses(), torch.zeros(sum(objective.sizes), dtype=torch.float64)
    inverse, coarse = inverses.at(objective), inverses.coarse(objective)
    solution = minimize(objective, x, inverse, tolerance=1e-6, max_iter=50, coarse=coarse)
    value = objective.loss.value(objective.forward(solution.x))
    value += float(objective.penalty * solution.x @ solution.x) / 2
    assert solution.objective_path[-1] == pytest.approx(value, rel=1e-9)


def test_flattened_weights_are_layers_only_where_they_are_matrices():
    w, x = torch.randn(4, 5, 3), torch.randn(7, 3)
    with LayerRecorder([w]) as recorder:
        linear(x, torch.flatten(input=w, start_dim=0, end_dim=1))
        linear(x, w.flatten(0, 1))
        linear(torch.randn(7, 15), w.flatten(1))
    assert [call.inputs.shape[1] for call in recorder.calls] == [15]


def test_many_outputs_have_none(monkeypatch):
    monkeypatch.setattr(subspaces, "_MAX_OUTPUTS", CLASSES - 1)
    assert subspace_of(objective_of("plain")) is None


def test_memory_is_bounded(monkeypatch):
    objective = objective_of("residual")
    size = n_bytes(subspace_of(objective))
    monkeypatch.setattr(subspaces, "_MAX_BYTES", size // 2)
    fewer = subspace_of(objective)
    assert 0 < n_bytes(fewer) <= size // 2


def n_bytes(subspace):
    return sum(part.nbytes for rows in subspace.rows for part in rows)


@pytest.mark.parametrize("loss", ["multinomial", "squared"])
@pytest.mark.parametrize("kind", ["plain", "transformer"])
def test_same_optimum_in_fewer_iterations(kind, loss):
    targets = torch.randn(N, CLASSES, generator=generator, dtype=torch.float64)
    chosen = Squared(targets, torch.full((N,), 1 / N).double()) if loss == "squared" else None
    objective = objective_of(kind, chosen, alpha=1e-2)
    x = torch.zeros(sum(objective.sizes), dtype=torch.float64)
    solutions = []
    for corrected in (True, False):
        inverses = Inverses()
        inverse = inverses.at(objective)
        coarse = inverses.coarse(objective) if corrected else None
        solution = minimize(objective, x, inverse, tolerance=1e-9, max_iter=500, coarse=coarse)
        assert solution.status == "converged"
        assert all(np.diff(solution.objective_path) <= 1e-15)
        value = objective.loss.value(objective.forward(solution.x))
        value += float(objective.penalty * solution.x @ solution.x) / 2
        assert solution.objective_path[-1] == pytest.approx(value, rel=1e-12)
        solutions.append(solution)
    torch.testing.assert_close(solutions[0].x, solutions[1].x, rtol=0, atol=1e-6)
    assert solutions[0].n_iter < solutions[1].n_iter


def test_a_good_start_makes_no_subspace():
    objective = objective_of("plain")
    inverses = Inverses()
    x = torch.zeros(sum(objective.sizes), dtype=torch.float64)

    def unwanted(inverse):
        raise AssertionError

    x = minimize(objective, x, inverses.at(objective), tolerance=1e-9, max_iter=500).x
    minimize(objective, x, inverses.at(objective), tolerance=1e-8, max_iter=5, coarse=unwanted)


@pytest.mark.parametrize("estimator", [GradientFeatureClassifier, GradientFeatureRegressor])
def test_estimators_use_it(estimator, monkeypatch):
    made = []
    monkeypatch.setattr(
        "sklearn_gradfeat.curvature._inverses.leading_subspace",
        lambda *args: made.append(subspaces.leading_subspace(*args)) or made[-1],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 2), nn.Tanh())
    y = np.arange(N) % CLASSES
    model = estimator(network, preprocess=None, alpha=1e-3, gradient_alpha=1e-4)
    model.fit(X.numpy().astype(np.float32), y)
    assert [subspace is not None for subspace in made] == [True]
