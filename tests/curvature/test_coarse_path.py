"""Minima over the coarse space, against Newton's method on explicit rows."""

from dataclasses import replace

import pytest
import torch

from sklearn_gradfeat.curvature import Inverses
from sklearn_gradfeat.curvature import _coarse_space as coarse_space
from sklearn_gradfeat.linearized import ExplicitTerm
from sklearn_gradfeat.solvers import newton, penalised
from tests.curvature.problems import (
    MLP_LAYERS,
    classes,
    image_objective,
    mlp,
    module_term,
    normal,
    objective,
)


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    monkeypatch.setattr(coarse_space, "_MIN_COST", 0)
    monkeypatch.setattr(coarse_space, "READING", 0)
    monkeypatch.setattr(coarse_space, "_ALONE", 0.5)


def with_penalty(problem, alpha):
    return replace(problem, tangent=replace(problem.tangent, alpha=alpha))


def path_of(problem):
    x = torch.zeros(sum(problem.sizes), dtype=torch.float64)
    whole = Inverses()
    if not (whole.learn_layers(problem, x) and whole.share_of_subspace()):
        return None
    return whole.with_layers().coarse_path(problem, x)


def test_logits_are_those_of_the_minimum_in_the_space():
    problem = image_objective("plain", alpha=1e-2)
    path = path_of(problem)
    identity = torch.eye(sum(path._subspace.sizes), dtype=torch.float64)
    rows = torch.stack([problem.forward(path._subspace.extend(one)) for one in identity], 2)
    for alpha in (1e-1, 1e-3, 1e-2):
        changed = with_penalty(problem, alpha)
        n = path._subspace.sizes[0]
        penalty = torch.cat([changed.penalty[:n], torch.full_like(identity[0, n:], alpha)])
        expected = rows @ newton(problem.loss, rows, penalty, torch.zeros_like(penalty))
        path.minimum(changed, 1e-14)
        assert (path.logits - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("reason", ["exact", "explicit rows", "small"])
def test_no_path_without_a_space(monkeypatch, reason):
    problem = image_objective("plain", n=12)
    if reason == "exact":
        x = normal(12, 3)
        tangent = module_term(mlp(), MLP_LAYERS, x, n_outputs=3)
        problem = objective(classes(12), tangent.head.activation((x,)), tangent)
    if reason == "small":
        monkeypatch.setattr(coarse_space, "_MIN_COST", 2**40)
    if reason == "explicit rows":
        rows = torch.zeros(12, 3, problem.tangent.head.size, dtype=torch.float64)
        tangent = ExplicitTerm.from_rows(problem.tangent, rows)
        problem = replace(problem, tangent=tangent)
    assert path_of(problem) is None


def test_solution_is_the_minimum_over_the_space_through_a_point():
    """The gradient of the whole objective vanishes along the space, and nothing else moves."""
    problem = image_objective("plain", alpha=1e-2)
    subspace = path_of(problem)._subspace
    x = 0.1 * normal(sum(problem.sizes))
    inverses = Inverses()
    inverses.learn_layers(problem, torch.zeros_like(x))
    seen = []
    path = inverses.with_layers().coarse_path(problem, x, problem.forward(x))
    found = path.minimum(problem, 1e-14, 1000, lambda *state: seen.append(state))
    assert found.status == "converged"
    step = found.x - x
    torch.testing.assert_close(subspace.extend(subspace.restrict(step)), step)
    logits = problem.forward(found.x)
    torch.testing.assert_close(path.logits, logits)
    value = problem.loss.value(logits) + penalised(problem, found.x, found.x) / 2
    assert found.objective_path[-1] == pytest.approx(value, rel=1e-10)
    assert [state[1] for state in seen] == found.objective_path[1:]
    assert torch.equal(path.whole(seen[-1][2]), found.x)
    along, at_start = (
        subspace.restrict(problem.adjoint(problem.loss.gradient(z)) + problem.penalty * at)
        for z, at in ((logits, found.x), (problem.forward(x), x))
    )
    assert along.norm() < 1e-5 * at_start.norm()
