"""The solver on dense problems with known optima."""

import math
from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from sklearn_gradfeat.solvers import _curvature_pairs, minimize, preconditioned_norm
from tests.solvers.dense import LOSSES, Dense, normal, problem


def identity(logits):
    return torch.clone


def solve(objective, precondition=identity, x=None, **options):
    norm = options.pop("tolerance", 1e-9)  # of the gradient
    options = {"tolerance": lambda value: norm**2 / 2, "max_iter": 500, **options}
    start = torch.zeros_like(objective.penalty) if x is None else x
    return minimize(objective, start, precondition, **options)


@pytest.mark.parametrize("preconditioned", [True, False])
@pytest.mark.parametrize("kind", LOSSES)
def test_optimum_is_that_of_scipy(kind, preconditioned):
    objective = problem(kind)
    solution = solve(objective, objective.inverse if preconditioned else identity)
    assert solution.status == "converged"
    assert solution.norm <= 1e-9
    assert solution.n_passes == objective.passes - 1  # the logits at the start are for free
    assert solution.n_iter == len(solution.objective_path) - 1
    assert (np.diff(solution.objective_path) <= 0).all()
    assert solution.objective_path[-1] == pytest.approx(objective.value(solution.x), rel=1e-12)
    torch.testing.assert_close(solution.x, objective.optimum(), rtol=1e-5, atol=1e-6)


def test_newton_step_solves_a_quadratic():
    objective = problem("squared")
    solution = solve(objective, objective.inverse)
    assert solution.n_iter == 1
    assert solution.n_passes == 2
    residual = objective.loss.weights[:, None] * objective.loss.targets
    b = torch.einsum("ncp,nc->p", objective.matrix, residual)
    torch.testing.assert_close(
        solution.x, torch.linalg.solve(objective.hessian(objective.loss.targets), b)
    )


def test_norm_is_the_newton_decrement():
    """Half its square is the decrease over a Newton step, exactly so for a quadratic."""
    objective, x = problem("squared"), normal(8)
    inverse = objective.inverse(objective.matrix @ x)
    decrement = preconditioned_norm(objective.gradient(x), inverse) ** 2 / 2
    decrease = objective.value(x) - objective.value(x - inverse(objective.gradient(x)))
    assert decrement == pytest.approx(decrease, rel=1e-10)


def test_units_of_the_unknowns_do_not_matter():
    objective = problem("multinomial")
    units = torch.logspace(-3, 3, 8, dtype=torch.float64)
    scaled = Dense(objective.loss, objective.matrix * units, objective.penalty * units**2)
    one, other = (solve(o, o.inverse, tolerance=1e-7) for o in (objective, scaled))
    assert one.n_iter == other.n_iter
    torch.testing.assert_close(one.x, other.x * units, rtol=1e-6, atol=1e-8)


def test_repetition_and_order_of_samples_do_not_matter():
    objective = problem("multinomial")
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)) % 30
    loss = objective.loss
    repeated = type(loss)(loss.targets[order], loss.weights[order] / 2, loss.n_outputs)
    again = Dense(repeated, objective.matrix[order], objective.penalty)
    torch.testing.assert_close(solve(objective).x, solve(again).x, rtol=0, atol=1e-7)


def test_stops_at_the_largest_number_of_iterations():
    solution = solve(problem("multinomial"), max_iter=3)
    assert (solution.status, solution.n_iter) == ("max_iter", 3)


def test_stalls_where_rounding_allows_no_progress():
    assert solve(problem("multinomial"), tolerance=0.0, max_iter=10_000).status == "stalled"


def test_callback_sees_every_iteration_and_may_stop():
    seen = []

    def callback(iteration, value, x, decrement, tolerance):
        seen.append((iteration, value))
        return iteration == 4

    solution = solve(problem("multinomial"), callback=callback)
    assert solution.status == "interrupted"
    assert seen == list(enumerate(solution.objective_path))[1:]
    assert len(seen) == 4


def test_optimal_start_takes_no_iteration():
    objective = problem("multinomial")
    solution = solve(objective)
    again = solve(objective, x=solution.x, tolerance=1e-8)
    assert (again.status, again.n_iter, again.n_passes) == ("converged", 0, 1)


def test_preconditioner_is_built_anew_when_the_curvature_changes():
    """At logits of 20, a sigmoid has nearly no curvature."""
    objective = problem("bernoulli", n_outputs=1)
    built = []

    def precondition(logits):
        built.append(float(objective.loss.curvatures(logits).sum()))
        return objective.inverse(logits)

    solution = solve(objective, precondition, x=20 * normal(8))
    assert solution.status == "converged"
    assert len(built) > 1
    assert all(max(a, b) > 2 * min(a, b) for a, b in pairwise(built))


def test_curvature_pairs_serve_another_penalty():
    objective = problem("squared")
    first = solve(objective)
    other = Dense(objective.loss, objective.matrix, objective.penalty * 1.5)
    cold = solve(other, x=first.x)
    warm = solve(other, x=first.x, curvature_pairs=first.curvature_pairs)
    torch.testing.assert_close(warm.x, cold.x, rtol=0, atol=1e-7)
    assert warm.n_iter < cold.n_iter


def coarse_of(objective, size):
    """Minimise exactly over the first coordinates of a quadratic."""
    H = objective.hessian(objective.loss.targets)[:size, :size]

    def solve(x, logits, norm):
        moved = x.clone()
        moved[:size] -= torch.linalg.solve(H, objective.gradient(x)[:size])
        gain = objective.value(moved) - objective.value(x)
        return moved, objective.matrix @ moved, gain

    return solve


def test_few_curvature_pairs_for_many_unknowns(monkeypatch):
    objective = problem("multinomial")
    full = solve(objective)
    monkeypatch.setattr(_curvature_pairs, "_ELEMENTS", 2 * len(objective.penalty) * 4)
    some = solve(objective)
    monkeypatch.setattr(_curvature_pairs, "_ELEMENTS", 1)
    fewest = solve(objective)
    assert [len(s.curvature_pairs.pairs) for s in (some, fewest)] == [4, 2]
    assert len(full.curvature_pairs.pairs) > 4
    for solution in (some, fewest):
        assert solution.status == "converged"
        torch.testing.assert_close(solution.x, full.x, rtol=1e-6, atol=1e-8)


def test_coarse_space_solves():
    objective = problem("squared", size=20)
    alone = solve(objective)
    before, made = objective.passes, []

    def coarse(inverse):
        made.append(inverse)
        return coarse_of(objective, 15)

    solution = solve(objective, coarse=coarse)
    assert len(made) == 1
    assert solution.status == "converged"
    assert solution.n_passes == objective.passes - before - 1
    assert solution.n_iter < alone.n_iter
    torch.testing.assert_close(solution.x, alone.x, rtol=0, atol=1e-7)
    assert solve(objective, coarse=lambda inverse: None).n_iter == alone.n_iter


def test_gradient_that_is_not_finite():
    objective = problem("multinomial")
    objective.matrix[0, 0, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"not finite\. Scale X .* or increase alpha"):
        solve(objective)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_run_goes_on_from_the_state_of_another(kind):
    objective, states = problem(kind), []
    precondition = objective.inverse if kind == "multinomial" else identity
    whole = solve(objective, precondition, keep=states.append)
    assert len(states) == whole.n_iter
    for state in states[:: max(1, len(states) // 4)]:
        rest = solve(objective, precondition, state=state)
        assert (rest.n_iter, rest.n_passes) == (whole.n_iter, whole.n_passes)
        np.testing.assert_allclose(rest.objective_path, whole.objective_path, rtol=1e-12)
        torch.testing.assert_close(rest.x, whole.x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_unknowns", [101, 64])
@pytest.mark.parametrize("matrix", [2**22, 0])
def test_a_run_goes_on_with_the_same_bits(matrix, n_unknowns, monkeypatch):
    """Also with as many pairs as there may be, some of them dropped before."""
    monkeypatch.setattr(_curvature_pairs, "_MATRIX", matrix)
    objective, states = problem("squared", size=n_unknowns), []
    objective.matrix *= torch.logspace(0, 3, n_unknowns, dtype=torch.float64)
    options = {"tolerance": 1e-6, "max_iter": 120}
    whole = solve(objective, identity, keep=states.append, **options)
    assert len(states) > 60
    for state in [*states[10:70:7], states[-2]]:
        rest = solve(objective, identity, state=state, **options)
        assert rest.objective_path == whole.objective_path
        assert torch.equal(rest.x, whole.x)


@pytest.mark.parametrize("matrix", [2**22, 0])
def test_pairs_have_memory_of_their_own(matrix, monkeypatch):
    """So a fit that starts from them has the bits of one with pairs from a file."""
    monkeypatch.setattr(_curvature_pairs, "_MATRIX", matrix)
    pairs = solve(problem("squared", size=101)).curvature_pairs.pairs
    assert len(pairs) > 2
    for vector in chain(*pairs):
        assert vector.untyped_storage().nbytes() == vector.nbytes


def test_a_coarse_space_that_moves_nothing_is_no_end():
    objective = problem("squared", size=20)
    still = [lambda x, logits, norm: (x, logits, 0.0)]
    solution = solve(objective, coarse=lambda inverse: still[0])
    assert solution.status == "converged"
    torch.testing.assert_close(solution.x, objective.optimum(), rtol=1e-5, atol=1e-6)
