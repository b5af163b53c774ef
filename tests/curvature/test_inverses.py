"""Inverse Hessians along penalties: which one is used, and what they share."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sklearn_gradfeat.curvature import Inverses, largest_curvature
from sklearn_gradfeat.curvature import _coarse_space as coarse_space
from sklearn_gradfeat.curvature._preconditioner import Preconditioner
from sklearn_gradfeat.curvature._sample_space import SampleInverse
from sklearn_gradfeat.linearized import Squared
from sklearn_gradfeat.solvers import minimize
from tests.curvature.problems import (
    MLP_LAYERS,
    classes,
    dense_map,
    image_objective,
    mlp,
    module_term,
    normal,
    objective,
    unequal_weights,
)

N = 12


def mlp_objective(loss=None):
    x = normal(N, 3)
    tangent = module_term(mlp(), MLP_LAYERS, x, n_outputs=3)
    return objective(loss or classes(N), tangent.head.activation((x,)), tangent)


def zeros(problem):
    return torch.zeros(N, problem.loss.n_outputs, dtype=torch.float64)


def with_penalty(problem, alpha):
    return replace(problem, tangent=replace(problem.tangent, alpha=alpha))


def test_samples_where_that_is_cheap_and_blocks_elsewhere():
    for problem, kind in (
        (mlp_objective(), SampleInverse),
        (image_objective("plain", n=N), Preconditioner),
        (replace(mlp_objective(), tangent=None), Preconditioner),
    ):
        assert isinstance(Inverses().at(problem)(zeros(problem)), kind)


def test_newton_steps_are_exact_for_squares_in_the_space_of_samples():
    squared = Squared(normal(N, 3), unequal_weights(N))
    for problem, exact in (
        (mlp_objective(squared), True),
        (mlp_objective(), False),
        (replace(mlp_objective(squared), tangent=None), True),
        (image_objective("plain", squared, n=N), False),
    ):
        inverses = Inverses()
        inverses.at(problem)
        assert inverses.exact_for(problem) == exact


def test_penalties_share_what_does_not_depend_on_them(monkeypatch):
    for name, value in (("_MIN_COST", 0), ("READING", 0), ("_BETWEEN_STEPS", 0.5), ("_ALONE", 0.5)):
        monkeypatch.setattr(coarse_space, name, value)
    problem, inverses = image_objective("plain", n=N), Inverses()
    other = with_penalty(problem, 0.1)
    first, second = (inverses.at(p)(zeros(problem)) for p in (problem, other))
    assert first.curvature is second.curvature
    far = inverses.at(other)(1e3 * normal(N, 3))  # the softmax is flat there
    assert far.curvature is not first.curvature
    solves = [inverses.coarse(p)(i) for p, i in ((problem, first), (other, second))]
    assert solves[0].subspace is solves[1].subspace

    problem, inverses = mlp_objective(), Inverses()
    exact = [inverses.at(p)(zeros(p)) for p in (problem, with_penalty(problem, 0.1))]
    assert inverses.coarse(problem)(exact[0]) is None
    expected = Inverses().at(with_penalty(problem, 0.1))(zeros(problem))
    x = normal(sum(problem.sizes))
    torch.testing.assert_close(exact[1](x), expected(x))


def test_pairs_are_learned_where_inverses_are_approximate():
    for problem, learned in ((image_objective("plain", n=N), True), (mlp_objective(), False)):
        inverses = Inverses()
        x = torch.zeros_like(problem.penalty)
        solution = minimize(
            problem, x, inverses.at(problem), tolerance=lambda _: 5e-13, max_iter=20
        )
        inverses.learn(solution)
        assert (inverses.curvature_pairs is not None) == learned


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_largest_curvature_against_the_dense_hessian(fit_intercept):
    weights = unequal_weights(N)
    loss = Squared(normal(N, 1), weights)
    problem = objective(loss, normal(N, 4) + 2, None, fit_intercept=fit_intercept)
    A = dense_map(problem)[:, 0, :4]
    if fit_intercept:
        A = A - weights @ A
    expected = float(torch.linalg.eigvalsh(A.T @ (weights[:, None] * A)).max())
    found = largest_curvature(problem)
    assert 0.9 * expected < found < 1.0001 * expected
    assert largest_curvature(objective(loss, torch.zeros(N, 4).double(), None)) == 0
    large = replace(problem, activation=1e90 * problem.activation)
    assert largest_curvature(large) == pytest.approx(1e180 * found)
    with pytest.raises(ValueError, match=r"squares of the activations, .* scale X"):
        largest_curvature(objective(loss, 1e200 * normal(N, 4), None))


def test_factors_and_coarse_space_are_computed_again_where_they_were():
    problem = image_objective("plain", n=N, alpha=1e-6)
    x, records = torch.zeros(sum(problem.sizes), dtype=torch.float64), []

    def run(inverses, **options):
        inverses.x = x

        def follow(_iteration, _value, unknowns, *_decrement):
            inverses.x = unknowns
            return False

        return minimize(
            problem, x, inverses.at(problem), tolerance=lambda _: 5e-9, max_iter=100,
            callback=follow, coarse=inverses.coarse(problem), **options,
        )  # fmt: skip

    def record(state):
        records.append((state, inverses.curvature_at, inverses.subspace_at))

    inverses = Inverses()
    whole = run(inverses, keep=record)
    assert len({id(curvature_at) for _, curvature_at, _ in records}) > 1  # there was a new one
    assert records[-1][2] is not None
    for state, *at in (records[1], records[len(records) // 2]):
        following = Inverses()
        following.recall(problem, None, *at)
        rest = run(following, state=state)
        assert rest.n_iter == whole.n_iter
        np.testing.assert_allclose(rest.objective_path, whole.objective_path, rtol=1e-10)
