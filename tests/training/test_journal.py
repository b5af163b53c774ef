"""The journal of a fit: what it keeps, for how long, and what it returns to a later process."""

import gc

import numpy as np
import pytest
import torch

from sklearn_gradfeat import config_context
from sklearn_gradfeat.curvature import Inverses
from sklearn_gradfeat.solvers import CurvaturePairs, Solution, State
from sklearn_gradfeat.training import Journal


class Objective:
    """The part of an objective that a journal reads."""

    penalty = torch.ones(3, dtype=torch.float64)


def vector(value):
    return torch.full((3,), float(value), dtype=torch.float64)


def solution(value):
    pairs = CurvaturePairs([(vector(value), vector(value + 1))], Objective.penalty)
    return Solution(vector(value), [3.0, 2.0], 1, 4, "max_iter", 0.5, pairs)


@pytest.fixture
def written():
    """Return the list of all writes of journals in this test."""
    with config_context(checkpoint_seconds=0):
        yield []


def test_a_finished_run_is_returned(written):
    inverses, first = Inverses(), solution(1)
    inverses.learn(first)
    inverses.curvature_at = vector(7)
    journal = Journal(write=written.append)
    journal.finish("full", first, inverses)
    assert not written  # what follows a run at once is in the same write
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
    journal, inverses = Journal(write=written.append), Inverses()
    journal.number("number", lambda: 2.0)
    pairs = [(vector(3), vector(4))]
    for coarse in (None, [], [(torch.zeros(2), torch.ones(2))]):
        journal.keep("full", inverses, State(vector(1), vector(2), [5.0, 4.0], 6, pairs, coarse))
        later = Journal(written[-1])
        assert later.number("number", lambda: 0.0) == 2.0
        assert later.finished("full", Objective, Inverses()) is None
        state = later.state(Objective, Inverses())
        assert (state.objective_path, state.n_passes) == ([5.0, 4.0], 6)
        assert [x.tolist() for x in (state.x, state.built_at)] == [[1, 1, 1], [2, 2, 2]]
        assert torch.equal(state.pairs[0][1], vector(4))
        assert (state.coarse_pairs is None) == (coarse is None)
        assert len(state.coarse_pairs or ()) == len(coarse or ())
        assert later.state(Objective, Inverses()) is None
    journal.finish("full", solution(1), inverses)
    journal.number("another", lambda: 2.0)
    assert [entry.name for entry in written[-1]] == ["number", "full finished", "another"]


def test_vectors_are_kept_for_as_long_as_the_fit_needs_them(written):
    journal, inverses, runs = Journal(write=written.append), Inverses(), [solution(1), solution(2)]

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
    journal = Journal(write=written.append)
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
