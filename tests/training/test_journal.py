"""The journal of a fit: what it keeps, for how long, and what it returns to a later process."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

from sklearn_gradfeat import GradientFeatureRegressor
from sklearn_gradfeat.curvature import Inverses
from sklearn_gradfeat.solvers import CurvaturePairs, Solution, State
from sklearn_gradfeat.training import Journal, TwoStageFit
from tests.tiny import NET, X


class Objective:
    """The part of an objective that a journal reads."""

    penalties = (torch.ones(3, dtype=torch.float64),)
    like, sizes = torch.empty(0, dtype=torch.float64), (3,)


def vector(value):
    return torch.full((3,), float(value), dtype=torch.float64)


def solution(value):
    pairs = CurvaturePairs([(vector(value), vector(value + 1))], Objective.penalties)
    return Solution(vector(value), [3.0, 2.0], 1, 4, "max_iter", 0.5, pairs)


@pytest.fixture
def written():
    """Return the list of all that the journals of this test write."""
    return []


def writer(written):
    """Return the function with which a journal writes."""
    return lambda contents: written.append(contents())


def test_a_finished_run_is_returned(written):
    inverses, first = Inverses(), solution(1)
    inverses.learn(first)
    inverses.curvature_at = vector(7)
    journal = Journal(write=writer(written))
    journal.finish("full", first, inverses)
    journal.number("number", lambda: 2.0)
    later, following = Inverses(), Journal(written[-1])
    found = following.finished("full", Objective, later)
    assert (found.n_iter, found.n_passes, found.status, found.norm) == (1, 4, "max_iter", 0.5)
    assert found.objective_path == first.objective_path
    assert torch.equal(found.x, first.x)
    for (s, y), (s_there, y_there) in zip(
        later.curvature_pairs.pairs, first.curvature_pairs.pairs, strict=True
    ):
        assert torch.equal(s, s_there)
        assert torch.equal(y, y_there)
    assert torch.equal(later.curvature_at, vector(7))
    assert later.subspace_at is None
    assert following.number("number", lambda: 0.0) == 2.0
    assert following.finished("full", Objective, later) is None


def test_the_state_of_a_run_is_returned_once(written):
    journal, inverses = Journal(write=writer(written)), Inverses()
    journal.number("number", lambda: 2.0)
    pairs = [(vector(3), vector(4))]
    logits, products = torch.eye(2, dtype=torch.float64), torch.full((1, 1), 7.0)
    for coarse in (None, [], [(torch.zeros(2), torch.ones(2))]):
        state = State(
            vector(1), vector(5), logits, vector(2), 0.5, [5.0, 4.0], 6, pairs, products, coarse
        )  # fmt: skip
        journal.keep("full", inverses, state)
        later = Journal(written[-1])
        assert later.number("number", lambda: 0.0) == 2.0
        assert later.finished("full", Objective, Inverses()) is None
        state = later.state(Objective, Inverses())
        assert (state.objective_path, state.n_passes, state.scale) == ([5.0, 4.0], 6, 0.5)
        vectors = state.x, state.gradient, state.built_at
        assert [x.tolist() for x in vectors] == [[1] * 3, [5] * 3, [2] * 3]
        assert torch.equal(state.logits, logits)
        assert torch.equal(state.products, products)
        assert torch.equal(state.pairs[0][1], vector(4))
        assert (state.coarse_pairs is None) == (coarse is None)
        assert len(state.coarse_pairs or ()) == len(coarse or ())
        assert later.state(Objective, Inverses()) is None
    journal.finish("full", solution(1), inverses)
    journal.number("another", lambda: 2.0)
    assert [entry.name for entry in written[-1]] == ["number", "full finished", "another"]


def test_vectors_are_kept_for_as_long_as_the_fit_needs_them(written):
    journal, inverses, runs = Journal(write=writer(written)), Inverses(), [solution(1), solution(2)]

    def finish(run):
        inverses.learn(run)
        journal.finish("full", run, inverses)

    def kept():
        journal.number("number", lambda: 0.0)
        return [set(entry.vectors) for entry in written[-1] if entry.name != "number"]

    finish(runs[0])
    assert kept() == [{"x", "pairs"}]
    finish(runs[1])
    assert kept() == [{"x"}, {"x", "pairs"}]
    model = Inverses()  # stands for a model that was made from the unknowns
    journal.used_by(model)
    runs.clear()
    gc.collect()
    assert kept()[0] == set()
    del model, inverses.curvature_pairs
    gc.collect()
    assert kept() == [set(), set()]
    found = Journal(written[-1][:1]).finished("full", Objective, Inverses())
    assert torch.isnan(found.x).all()
    assert found.objective_path == [3.0, 2.0]


def test_numbers_keep_their_values(written):
    journal = Journal(write=writer(written))
    values = np.array([0.1, np.nan, -np.inf])
    assert journal.numbers("losses", lambda: values).tolist()[0] == 0.1
    assert journal.number("yes", lambda: True) == 1
    later = Journal(written[-1])
    np.testing.assert_array_equal(later.numbers("losses", lambda: 0), values)
    with pytest.raises(ValueError, match="goes on with 'yes' where this fit has 'no'"):
        later.number("no", lambda: 0)


def test_without_a_file_nothing_is_kept():
    journal, inverses, run = Journal(), Inverses(), solution(1)
    inverses.learn(run)
    journal.finish("full", run, inverses)
    assert journal.number("number", lambda: 1.0) == 1
    assert journal.finished("full", Objective, inverses) is None
    assert inverses.curvature_pairs is run.curvature_pairs


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_choices_do_not_depend_on_forgotten_unknowns(precision, written):
    """Where rows give the inverses, they still do when the weights of a move are forgotten."""
    y = np.arange(len(X)) / len(X)
    model = GradientFeatureRegressor(NET, loss="huber", precision=precision)
    problem = model._problem(y, None)
    prepared = model._prepare(X, problem.weights)
    point = {name: 0.1 * value for name, value in prepared.network.parameters.items()}

    def choices(journal):
        stages = TwoStageFit(prepared._replace(journal=journal), problem).moved(point)
        first = stages.fit_activation(0.1)
        found = [stages.has_coarse_space(first), stages.shared(first) is None]
        gone = torch.isnan(first.model.omega).any()
        del first
        stages.fit_activation(0.2)
        return found, bool(gone)

    journal = Journal(write=writer(written))
    assert choices(journal) == ([False, True], False)
    gc.collect()
    journal.number("the end", lambda: 0)
    assert choices(Journal(written[-1])) == ([False, True], True)


def test_nothing_is_kept_after_an_interruption(written):
    """Another thread may end a run, whose result is not that of the fit."""
    journal, inverses = Journal(write=writer(written)), Inverses()
    journal.keep("full", inverses, State(*[vector(1)] * 4, 0.5, [5.0], 6, [], None, None))
    journal.finish("full", replace(solution(1), status="interrupted"), inverses)
    assert journal.number("number", lambda: 2.0) == 2.0
    assert [[entry.name for entry in entries] for entries in written] == [["full state"]]
