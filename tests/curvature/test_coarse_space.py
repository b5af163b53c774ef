"""The coarse space: its map against that of the objective, and its effect on the solver."""

import functools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from sklearn_gradfeat.curvature import _coarse_space as coarse_space
from sklearn_gradfeat.curvature import _factored_term
from sklearn_gradfeat.curvature._coarse_rows import ChannelRows, Layout, ProjectedRows, SummedRows
from sklearn_gradfeat.curvature._inverses import Inverses
from sklearn_gradfeat.curvature._preconditioner import Preconditioner
from sklearn_gradfeat.linearized import LinearizedHead, Squared, TangentTerm
from sklearn_gradfeat.solvers import minimize
from tests.curvature.problems import (
    batches,
    classes,
    dense_map,
    image_objective,
    image_term,
    normal,
    objective,
)
from tests.curvature.test_factored_term import masked_term
from tests.networks import NETWORKS

N, CLASSES = 40, 3


@pytest.fixture(autouse=True)
def every_size_is_worth_it(monkeypatch):
    """Let tiny layers have a subspace of more than one direction."""
    monkeypatch.setattr(coarse_space, "_MIN_COST", 0)
    monkeypatch.setattr(coarse_space, "READING", 0)
    monkeypatch.setattr(coarse_space, "_ALONE", 0.5)
    monkeypatch.setattr(coarse_space, "_BETWEEN_STEPS", 0.5)


def subspace_of(problem):
    curvature = Preconditioner(
        problem, torch.zeros(N, CLASSES, dtype=torch.float64)[: problem.n_samples]
    ).curvature
    return coarse_space.leading_subspace(problem, curvature)


# Layers with groups have none: in "grouped" they are all that there is.
KINDS = [kind for kind in NETWORKS if kind != "grouped"]


@functools.cache
def problem_and_subspace(kind):
    problem = image_objective(kind)
    return problem, subspace_of(problem)


@pytest.mark.parametrize("kind", KINDS)
def test_map_is_that_of_the_objective(kind):
    problem, subspace = problem_and_subspace(kind)
    assert all(min(block.curvature.shape) > 0 for block in subspace.blocks)
    x = normal(sum(subspace.sizes))
    logits = subspace.forward(x)
    torch.testing.assert_close(logits, problem.forward(subspace.extend(x)), rtol=1e-9, atol=1e-9)
    cotangent = normal(N, CLASSES)
    pulled = subspace.adjoint(cotangent)
    torch.testing.assert_close(pulled @ x, (cotangent * logits).sum())
    torch.testing.assert_close(pulled, subspace.restrict(problem.adjoint(cotangent)))


def test_map_against_the_dense_one():
    problem = image_objective("normed", n=8)
    subspace = subspace_of(problem)
    unit = torch.eye(sum(subspace.sizes), dtype=torch.float64)
    basis = torch.stack([subspace.extend(column) for column in unit], 1)
    torch.testing.assert_close(basis.T @ basis, unit)
    expected = dense_map(problem) @ basis
    found = torch.stack([subspace.forward(column) for column in unit], 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("layout", "ranks", "n_outputs", "kind"),
    [
        (Layout(9, 8, True), (4, 5), 1, SummedRows),
        (Layout(2, 8, False), (4, 5), 6, ProjectedRows),
        (Layout(2, 8, True), (4, 5), 6, ChannelRows),
        (Layout(9, 8, False), (1, 1), 90, SummedRows),
    ],
)
def test_the_fastest_rows_are_kept(monkeypatch, layout, ranks, n_outputs, kind):
    monkeypatch.setattr(coarse_space, "READING", 16)
    cost, chosen = coarse_space._cheapest(layout, ranks, n_outputs, many=False)
    assert chosen is kind
    rows = kind(torch.zeros(layout.n_channels, ranks[0]), ranks[1], layout.n_positions)
    kept = rows.empty(torch.empty, 3, n_outputs)
    assert sum(part.numel() for part in kept) == 3 * cost.numbers


@pytest.mark.parametrize("kind", KINDS)
def test_restriction_is_the_orthogonal_projection(kind):
    problem, subspace = problem_and_subspace(kind)
    x, y = normal(sum(subspace.sizes)), normal(sum(problem.sizes), seed=1)
    torch.testing.assert_close(subspace.restrict(subspace.extend(x)), x)
    torch.testing.assert_close(subspace.extend(x) @ y, x @ subspace.restrict(y))


@pytest.fixture(scope="module", params=["plain", "whole"])
def curvature_and_term(request):
    tangent, boundary = image_term(request.param, n=12)
    activation = tangent.head.activation(boundary)
    curvature = Preconditioner(objective(classes(12), activation, tangent), normal(12, 3)).curvature
    return curvature, activation, tangent, boundary


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(-3, 3))
def test_linear_adjoint_and_independent_of_the_batches(curvature_and_term, seed, size, factor):
    curvature, activation, term, boundary = curvature_and_term
    tangent = TangentTerm(term.head, partial(batches, boundary, size), term.omega, term.alpha)
    found = coarse_space.layouts(tangent, boundary, 12)
    blocks = [
        coarse_space.Block.from_layer(layer, (2, 3), found[layer.weight].n_positions, kind)
        for layer in curvature.layers
        for kind in (SummedRows, ProjectedRows, *[ChannelRows] * found[layer.weight].channelwise)
    ]
    problem, cotangent = objective(classes(12), activation, tangent), normal(12, 3, seed=seed)
    for block in blocks:
        subspace = coarse_space.Subspace(problem, [block], curvature.total)
        x, y = normal(2, sum(subspace.sizes), seed=seed)
        ax, ay = subspace.forward(x), subspace.forward(y)
        torch.testing.assert_close(subspace.forward(x + factor * y), ax + factor * ay)
        torch.testing.assert_close((ax * cotangent).sum(), x @ subspace.adjoint(cotangent))
        torch.testing.assert_close(ax, problem.forward(subspace.extend(x)))


def test_none_for_groups_and_where_a_pass_is_as_good_as_free(monkeypatch):
    assert subspace_of(image_objective("grouped")) is None
    problem = image_objective("plain")
    assert subspace_of(problem) is not None
    monkeypatch.setattr(coarse_space, "_MIN_COST", 2**15)
    assert subspace_of(problem) is None


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
    values = {str(i): normal(*shape, seed=i) for i, shape in enumerate(shapes)}
    boundary = (normal(N, 12, seed=9),)
    linearized = LinearizedHead(head, values, "standard")
    activation = linearized.activation(boundary)
    omega = normal(CLASSES, activation.shape[1], seed=8)
    tangent = TangentTerm(linearized, partial(batches, boundary, 16), omega, 1e-3)
    problem = objective(classes(N), activation, tangent)
    subspace = subspace_of(problem)
    assert (subspace and [block.weight for block in subspace.blocks]) == kept
    inverses, x = Inverses(), torch.zeros(sum(problem.sizes), dtype=torch.float64)
    inverse, coarse = inverses.at(problem), inverses.coarse(problem)
    solution = minimize(problem, x, inverse, tolerance=lambda _: 5e-13, max_iter=50, coarse=coarse)
    assert solution.objective_path[-1] == pytest.approx(value_of(problem, solution.x), rel=1e-9)


def value_of(problem, x):
    value = problem.loss.value(problem.forward(x))
    return value + float(problem.penalty * x @ x) / 2


@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_more_outputs_than_activations(kind):
    tangent, boundary = image_term(kind, n_outputs=20)
    activation = tangent.head.activation(boundary)
    assert activation.shape[1] < 20
    problem = objective(classes(N, 20), activation, tangent)
    curvature = Preconditioner(problem, torch.zeros(N, 20, dtype=torch.float64)).curvature
    subspace = coarse_space.leading_subspace(problem, curvature)
    assert subspace.blocks
    x, cotangent = normal(sum(subspace.sizes)), normal(N, 20)
    logits = subspace.forward(x)
    torch.testing.assert_close(logits, problem.forward(subspace.extend(x)), rtol=1e-9, atol=1e-9)
    pulled = subspace.restrict(problem.adjoint(cotangent))
    torch.testing.assert_close(subspace.adjoint(cotangent), pulled)


def test_no_backward_pass_for_an_output_that_follows_from_others():
    """With a softmax the weights of all classes add up to zero."""
    tangent, boundary = image_term("residual")
    tangent = replace(tangent, omega=tangent.omega - tangent.omega.mean(0))
    problem = objective(classes(N), tangent.head.activation(boundary), tangent)
    subspace = subspace_of(problem)
    assert subspace.outer.shape == (CLASSES, CLASSES - 1)
    x, cotangent = normal(sum(subspace.sizes)), normal(N, CLASSES)
    expected = problem.forward(subspace.extend(x))
    torch.testing.assert_close(subspace.forward(x), expected, rtol=1e-9, atol=1e-9)
    pulled = subspace.restrict(problem.adjoint(cotangent))
    torch.testing.assert_close(subspace.adjoint(cotangent), pulled)


def test_output_weights_of_zero_at_another_point():
    problem, subspace = problem_and_subspace("residual")
    term = replace(problem.tangent, omega=torch.zeros_like(problem.tangent.omega))
    found = coarse_space.Subspace(replace(problem, tangent=term), subspace.blocks, subspace.total)
    n_affine = found.sizes[0]
    x, cotangent = normal(sum(found.sizes)), normal(N, CLASSES)
    torch.testing.assert_close(found.forward(x), found.affine.forward(x[:n_affine]))
    assert not found.adjoint(cotangent)[n_affine:].any()


@pytest.mark.parametrize(("kind", "kept"), [("plain", {True}), ("transformer", set())])
def test_many_outputs_leave_layers_that_need_a_backward_pass_for_each(monkeypatch, kind, kept):
    problem = image_objective(kind)
    monkeypatch.setattr(coarse_space, "_MAX_OUTPUTS", 0)
    monkeypatch.setattr(coarse_space, "READING", 0.01)
    subspace = subspace_of(problem)
    assert {block.rows.channelwise for block in subspace.blocks} == kept
    x = normal(sum(subspace.sizes))
    expected = problem.forward(subspace.extend(x))
    torch.testing.assert_close(subspace.forward(x), expected, rtol=1e-9, atol=1e-9)
    without = replace(problem, activation=None)
    assert (subspace_of(without) is None) == (not kept)


def test_memory_is_bounded(monkeypatch):
    problem = image_objective("residual")
    size = n_bytes(subspace_of(problem))
    monkeypatch.setattr(coarse_space, "_MAX_BYTES", size // 2)
    fewer = subspace_of(problem)
    assert 0 < n_bytes(fewer) <= size // 2
    monkeypatch.setattr(coarse_space, "free_bytes", lambda device: 1000)
    assert [coarse_space._room(torch.device(kind)) for kind in ("cpu", "cuda")] == [size // 2, 250]


def n_bytes(subspace):
    return sum(part.nbytes for rows in subspace.rows for part in rows)


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("plain", "squared"),
        ("transformer", "multinomial"),
        pytest.param("plain", "multinomial", marks=pytest.mark.slow),
        pytest.param("transformer", "squared", marks=pytest.mark.slow),
    ],
)
def test_same_optimum_in_fewer_iterations(kind, loss):
    n = 20
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    chosen = Squared(normal(n, CLASSES, seed=5), weights) if loss == "squared" else None
    problem = image_objective(kind, chosen, alpha=1e-2, n=n)
    x = torch.zeros(sum(problem.sizes), dtype=torch.float64)
    solutions = []
    for two_levels in (True, False):
        inverses = Inverses()
        inverse = inverses.at(problem)
        coarse = inverses.coarse(problem) if two_levels else None
        solution = minimize(
            problem, x, inverse, tolerance=lambda _: 5e-19, max_iter=500, coarse=coarse
        )
        assert solution.status == "converged"
        assert all(np.diff(solution.objective_path) <= 1e-15)
        value = value_of(problem, solution.x)
        assert solution.objective_path[-1] == pytest.approx(value, rel=1e-12)
        solutions.append(solution)
    torch.testing.assert_close(solutions[0].x, solutions[1].x, rtol=0, atol=1e-6)
    assert solutions[0].n_iter < solutions[1].n_iter


def test_a_good_start_makes_no_subspace():
    problem = image_objective("plain")
    inverses = Inverses()
    x = torch.zeros(sum(problem.sizes), dtype=torch.float64)

    def unwanted(inverse):
        raise AssertionError

    x = minimize(problem, x, inverses.at(problem), tolerance=lambda _: 5e-19, max_iter=500).x
    minimize(
        problem, x, inverses.at(problem), tolerance=lambda _: 5e-17, max_iter=5, coarse=unwanted
    )


@pytest.mark.parametrize("name", ["masked", "plain", "residual"])
@pytest.mark.parametrize("room", [2**30, None], ids=["all samples", "some samples"])
def test_rows_of_layers_give_those_of_the_space(monkeypatch, name, room):
    """The rows of the layers, or those of some samples and the network for the others."""
    monkeypatch.setattr(_factored_term, "READING", 0)
    monkeypatch.setattr(_factored_term, "_PASSES", 10**6)
    tangent = masked_term() if name == "masked" else image_term(name, 20)[0]
    if room is None:
        first = _factored_term.factored(tangent, 20, 2**30).kept[0][1]
        room = sum(z.nbytes for layer in first for z in layer.tensors)
    term = _factored_term.factored(tangent, 20, room)
    problems = [objective(classes(20), None, one) for one in (tangent, term)]
    subspace = subspace_of(problems[1])
    assert subspace.blocks
    kinds = {type(block.rows) for block in subspace.blocks}
    assert kinds <= {SummedRows, ProjectedRows}
    through = coarse_space.Subspace(problems[0], subspace.blocks, subspace.total)
    assert subspace.exact(problems[0])
    x = normal(sum(subspace.sizes))
    torch.testing.assert_close(subspace.forward(x), through.forward(x))
    assert (term.rest is None) == (room == 2**30)
