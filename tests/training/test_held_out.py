"""The folds of held-out samples, and their losses."""

import math
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone

from sklearn_gradfeat import GradientFeatureRegressor
from sklearn_gradfeat.curvature import _coarse_space as coarse_space
from sklearn_gradfeat.training import TwoStageFit
from sklearn_gradfeat.training import _held_out as held_out_module
from sklearn_gradfeat.training._held_out import (
    N_FOLDS,
    Folds,
    LeftOut,
    Relinearized,
    Runs,
    assign_folds,
)
from tests.tiny import NET, X, Y, data, estimator


def names(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**63, n).astype(np.uint64)


def held_out(model, samples, y, weights=None):
    problem = model._problem(y, weights)
    prepared = model._prepare(samples, problem.weights)
    return prepared, TwoStageFit(prepared, problem)


# --- folds ------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(2, 60), st.integers(1, 4))
def test_folds_depend_on_the_content_alone(seed, n, n_classes):
    rng = np.random.default_rng(seed)
    distinct, classes = names(n, seed), rng.integers(0, n_classes, n)
    folds = assign_folds(distinct, classes, np.ones(n))
    order = rng.permutation(n)
    np.testing.assert_array_equal(
        assign_folds(distinct[order], classes[order], np.ones(n)), folds[order]
    )
    copies = rng.integers(1, 4, n)
    repeated = assign_folds(distinct.repeat(copies), classes.repeat(copies), np.ones(copies.sum()))
    np.testing.assert_array_equal(repeated, folds.repeat(copies))
    np.testing.assert_array_equal(assign_folds(distinct, classes, copies / 2), folds)


@given(st.integers(0, 1000), st.integers(2, 60), st.integers(1, 4))
def test_every_training_part_has_every_class(seed, n, n_classes):
    classes = np.random.default_rng(seed).integers(0, n_classes, n)
    folds = assign_folds(names(n, seed), classes, np.ones(n))
    for fold in range(N_FOLDS):
        assert set(classes[folds != fold]) == set(classes)
    for each in np.unique(classes):
        sizes = np.bincount(folds[(classes == each) & (folds >= 0)], minlength=N_FOLDS)
        assert sizes.max() - sizes.min() <= 1
        assert (folds[classes == each] >= 0).all() == ((classes == each).sum() > 1)


def test_samples_of_weight_zero_are_never_held_out():
    weights = np.arange(20) % 2.0
    folds = assign_folds(names(20), np.zeros(20, int), weights)
    assert (folds[weights == 0] == -1).all() and (folds[weights > 0] >= 0).all()


def test_losses_are_those_of_fits_without_the_samples():
    model = estimator(precision="float64", tol=1e-10, activation_layer=None)
    prepared, stages = held_out(model, X, Y)
    folds = Folds.of(prepared, stages)
    numbers = assign_folds(prepared.samples.names, stages.problem.strata, np.ones(len(X)))
    for pair in ((0.1, math.inf), (0.1, 0.05), (0.02, 0.05)):
        losses = folds.losses(*pair)
        expected = []
        for fold in range(N_FOLDS):
            fitted = clone(model).set_params(alpha=pair[0], gradient_alpha=pair[1])
            fitted.fit(X[numbers != fold], Y[numbers != fold])
            test = np.flatnonzero(numbers == fold)
            test = test[np.argsort(prepared.samples.names[test])]
            expected.append(-fitted.predict_log_proba(X[test])[np.arange(len(test)), Y[test]])
        np.testing.assert_allclose(losses, np.concatenate(expected), rtol=0.05, atol=0.02)


def shared(model, samples, y, weights=None, alpha=0.03):
    """Return the folds of a problem, with the coarse space where there is one."""
    prepared, stages = held_out(model, samples, y, weights)
    folds, first = Folds.of(prepared, stages), stages.fit_activation(alpha)
    folds.share(*stages.shared(first))
    return folds


def test_the_coarse_space_takes_the_place_of_fits(monkeypatch):
    """The losses are close to those of fits, and those of copies of a sample are the same."""
    monkeypatch.setattr(coarse_space, "_MIN_COST", 1)
    monkeypatch.setattr(held_out_module, "_MAX_DENSE", 0)
    model = estimator(precision="float64", tol=1e-6, activation_layer=None)
    monkeypatch.setattr(held_out_module, "_TOL", 1e-6)
    folds, fits = shared(model, X, Y), Folds.of(*held_out(model, X, Y))
    for gradient_alpha in (1.0, 0.1):
        found, expected = (f.losses(0.03, gradient_alpha) for f in (folds, fits))
        assert list(folds._folds[0]._paths) == [0.03]
        np.testing.assert_allclose(found, expected, atol=0.02)

    weights = np.arange(len(X)) % 2 + 1
    repeated = shared(model, X.repeat(weights, 0), Y.repeat(weights, 0))
    weighted = shared(model, X, Y, weights.astype(float) / weights.sum())
    found, expected = (f.losses(0.03, 0.1) for f in (repeated, weighted))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_folds_until_they_hold_enough_samples():
    prepared, stages = held_out(estimator(), X, Y)
    folds = Folds.of(prepared, stages)
    assert len(folds.weights) == 24
    assert [len(folds.enough(n).weights) for n in (1, 5, 6, 24, 99)] == [5, 5, 10, 24, 24]
    assert Folds([]).enough(5) is None


@pytest.mark.parametrize(("n_rare", "n_folds"), [(6, 5), (20, 2), (60, 1)])
def test_more_folds_where_a_class_is_rare(n_rare, n_folds):
    images, _ = data(120)
    prepared, stages = held_out(estimator(), images, (np.arange(120) < n_rare).astype(int))
    assert len(Folds.of(prepared, stages).enough(10)._folds) == n_folds


def test_folds_with_a_typical_loss_come_first():
    prepared, stages = held_out(estimator(), X, Y)
    folds = Folds.of(prepared, stages)
    means = [fold.losses(0.1, math.inf).mean() for fold in folds._folds]
    ordered = [fold.losses(0.1, math.inf).mean() for fold in folds.typical_first(0.1)._folds]
    distances = np.abs(np.array(ordered) - np.mean(means))
    assert (np.diff(distances) >= 0).all()
    assert sorted(ordered) == sorted(means)


# --- leave-one-out ----------------------------------------------------------------------------


def regression(features="full", n=14):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, 4))
    y = rows @ rng.normal(size=4) + rng.normal(size=n)
    return (
        GradientFeatureRegressor(
            features=features, random_state=0, alpha=1.0, activation_layer=None
        ),
        rows,
        y,
    )


@pytest.mark.parametrize("gradient_alpha", [math.inf, 0.5])
def test_left_out_losses_are_those_of_fits(gradient_alpha):
    model, rows, y = regression()
    model.set_params(gradient_alpha=gradient_alpha, tol=1e-12)
    prepared, stages = held_out(model, rows, y)
    left_out = LeftOut.where_cheap(prepared, stages)
    losses = left_out.losses(1.0, gradient_alpha)
    order = np.argsort(prepared.samples.names)
    if math.isinf(gradient_alpha):
        others = [np.arange(len(y)) != row for row in order]
        weights = 13 / 14  # the loss is a mean over 14 samples, also without one of them
        found = [
            clone(model).set_params(alpha=1.0 / weights).fit(rows[o], y[o]).predict(rows[[r]])[0]
            for o, r in zip(others, order, strict=True)
        ]
        np.testing.assert_allclose(losses, (np.array(found) - y[order]) ** 2 / 2, rtol=1e-6)
    else:
        assert np.isfinite(losses).all()
        assert (losses != left_out.losses(1.0, math.inf)).any()


def test_copies_of_a_sample_are_left_out_together():
    model, rows, y = regression()
    times = np.random.default_rng(1).integers(1, 4, len(y))
    weighted = LeftOut.where_cheap(*held_out(model, rows, y, times))
    repeated = LeftOut.where_cheap(*held_out(model, rows.repeat(times, 0), y.repeat(times)))
    for pair in ((1.0, math.inf), (1.0, 0.1)):
        np.testing.assert_allclose(weighted.losses(*pair), repeated.losses(*pair), rtol=1e-6)
    np.testing.assert_allclose(weighted.weights, repeated.weights)


def test_where_leaving_out_has_no_closed_form():
    assert LeftOut.where_cheap(*held_out(estimator(), X, Y)) is None
    model = GradientFeatureRegressor(NET, alpha=1.0, gradient_alpha=1.0, activation_layer=None)
    assert not LeftOut.where_cheap(*held_out(model, X, Y * 1.0)).has_gram(1.0)
    model, rows, y = regression(n=1100)
    assert LeftOut.where_cheap(*held_out(model, rows, y)) is None


# --- several linearisations ---------------------------------------------------------------------


class Losses:
    """One fold of one sample; the losses of linear models and moved networks are given."""

    weights = np.ones(1)

    def __init__(self, *losses, unmoved=0.5):
        self.given, self.n_computed, self.unmoved = losses, 0, unmoved

    def losses(self, alpha, gradient_alpha):
        return np.array([self.unmoved])

    def start(self, alpha):
        return Runs([(self, Position())])

    def go_on(self, run, gradient_alpha):
        found = [np.array([loss]) for loss in self.given[run.number :][:2]]
        run.number += len(found)
        self.n_computed += len(found)
        return (*found, None, None)[:2] if found else (np.array([np.inf]), None)

    def refitted(self, alpha):
        return np.array([0.6])


@dataclass
class Position:
    """The number of losses that a run has used."""

    number: int = 0

    def copy(self):
        return replace(self)


@pytest.mark.parametrize(
    ("losses", "best", "n_computed"),
    [
        ((1.0, 0.8, 0.7, 0.9, 0.9, 0.9, 0.1), 3, 6),
        ((1.0, 2.0, 2.0, 2.0, 0.1), 1, 4),
        ((1.0, 2.0, 2.0, 0.1), 4, 4),  # the linear model overshoots, its shortened move does not
        ((1.0, 2.0, 0.5, 0.4), 4, 4),
        ((1.0, 0.999, 0.998, 0.997, 0.1), 2, 4),  # gains that are too small
        ((1.0, 1.001, 0.999, 2.0), 2, 4),  # a moved network that is nearly as good
        ((1.0,), 1, 1),
        ((np.inf, 1.0), 2, 2),
    ],
)
def test_linearizations_go_on_while_the_loss_falls(losses, best, n_computed):
    folds = Losses(*losses)
    held = Relinearized(folds, None, 0.0, 1.0)
    assert (held.n_models(1.0, 1.0), folds.n_computed) == (best, n_computed)


def test_linearizations_end_where_the_next_gain_would_be_too_small():
    """The gains of the moved networks shrink by a factor of 24, and by a factor of two."""
    for losses, n_computed in (((9, 1.05, 9, 1.01, 0.5), 4), ((9, 1.5, 9, 1.25, 9, 1.125, 9), 7)):
        folds = Losses(*losses, unmoved=2.0)
        Relinearized(folds, None, 0.0, 1.0).n_models(1.0, 1.0)
        assert folds.n_computed == n_computed


def test_a_fold_that_does_not_move_is_fitted_once_for_each_penalty():
    moving, stuck = Losses(1.0, 0.9, 0.8, 0.7, 0.6, 0.5), Losses(0.8)
    stuck.go_on = mock.Mock(side_effect=lambda run, g: (np.array([g]), None))
    runs = Runs([(moving, Position()), (stuck, Position())])
    found = [tuple(np.concatenate(runs.go_on(g))) for g in (0.3, 0.3, 0.1)]
    assert found == [(1.0, 0.3, 0.9, 0.3), (0.8, 0.3, 0.7, 0.3), (0.6, 0.1, 0.5, 0.3)]
    assert stuck.go_on.call_count == 2


@pytest.mark.parametrize(("n", "best"), [(1, 2), (2, 3), (3, 6), (9, 6)])
def test_a_number_is_the_largest_one(n, best):
    folds = Losses(1.0, 0.8, 0.7, 0.9, 0.5, 0.4)
    assert Relinearized(folds, n, 0.0, 1.0).n_models(1.0, 1.0) == best
    assert folds.n_computed == min(2 * n, 6)


@pytest.mark.parametrize(("losses", "judged"), [((1.0, 0.8, 0.1), 0.8), ((1.0,), 1.0)])
def test_the_first_moved_network_judges_penalties(losses, judged):
    folds = Losses(*losses)
    held = Relinearized(folds, None, 0.0, 1.0)
    assert held.losses(10.0, 1.0) == [judged]
    assert held.refitted == 0.6
    assert Relinearized(Losses(0.7, 0.8), None, 0.0, 1.0).losses(1.0, 1.0) == [0.7]
    assert folds.n_computed == min(2, len(losses))
    assert held.losses(1.0, math.inf) == [0.5]
    assert held.n_models(1.0, math.inf) == 1


class Sequences(Losses):
    """One fold of one sample, with the losses for sequences of penalties.

    They are those of moved networks, or pairs with those of the linear models before them.
    """

    def __init__(self, given, refitted=np.inf):
        super().__init__(unmoved=1.0)
        self.given, self.of_refitted, self.tried = given, refitted, []

    def start(self, alpha):
        return Runs([(self, Sequence())])

    def go_on(self, run, gradient_alpha):
        run.penalties += (gradient_alpha,)
        self.tried.append(run.penalties)
        losses = self.given[run.penalties]
        linear, moved = losses if isinstance(losses, tuple) else (losses + 0.5, losses)
        return np.array([linear]), np.array([moved])

    def refitted(self, alpha):
        return np.array([self.of_refitted])


@dataclass
class Sequence:
    """The penalties of a run."""

    penalties: tuple = ()

    def copy(self):
        return replace(self)


PATH = {
    (1.0,): 0.9,
    (0.1,): 0.8,
    (0.01,): 0.85,
    (0.1, 0.01): 0.7,
    (0.1, 1e-3): 0.7,
    (0.1, 0.01, 1e-3): 0.71,
    (0.1, 0.01, 1e-4): 0.72,
}


def test_penalties_share_a_point_while_the_loss_falls():
    further = {(0.1, *[0.01] * n): loss for n, loss in ((2, 0.6), (3, 0.7), (4, 0.7))}
    folds = Sequences({**PATH, **further, (10.0,): 0.95})
    held = Relinearized(folds, None, 0.0, 1.0)
    penalties = 1.0, 0.1, 0.01, 1e-3, 1e-4
    assert [held.losses(10.0, g).item() for g in penalties] == [0.9, 0.8, 0.7, 0.71, 0.72]
    # The network that moved with the fourth is no better, so nothing goes on from there.
    assert folds.tried == list(PATH)
    assert held.stronger(10.0, 0.01) == (0.1,)
    assert held.n_models(10.0, 0.01) == 6
    # Neither another alpha nor a stronger penalty goes on from there.
    assert held.losses(5.0, 0.01) == 0.85
    assert held.losses(10.0, 10.0) == 0.95
    assert held.stronger(5.0, 0.01) == held.stronger(10.0, 10.0) == ()


def test_penalties_share_a_point_once_the_number_is_reached():
    folds = Sequences({**PATH, (0.1, 1e-4): 0.65})
    held = Relinearized(folds, 2, 0.0, 1.0)
    found = [held.losses(10.0, g).item() for g in (1.0, 0.1, 0.01, 1e-3, 1e-4)]
    assert found == [0.9, 0.8, 0.7, 0.7, 0.65]
    assert max(map(len, folds.tried)) == 2
    assert held.stronger(10.0, 1e-4) == (0.1,)
    assert held.n_models(10.0, 1e-4) == 4


@pytest.mark.parametrize("losses", [(1.41, 0.8), (1.3, 0.898)])
def test_penalties_share_no_point_beyond_a_rise_of_the_linear_model(losses):
    """Nor beyond a fall of the moved network that does not count."""
    folds = Sequences({(1.0,): 0.9, (0.1,): losses, (1.0, 0.1): 0.7})
    held = Relinearized(folds, None, 0.0, 1.0)
    assert [held.losses(10.0, g).item() for g in (1.0, 0.1)] == [0.9, 0.7]
    assert held.stronger(10.0, 0.1) == (1.0,)


@pytest.mark.parametrize(("refitted", "last", "gave_up"), [(0.79, 0.85, True), (0.81, 0.7, False)])
def test_nothing_goes_on_where_another_alpha_is_better(refitted, last, gave_up):
    held = Relinearized(Sequences(PATH, refitted), None, 0.0, 1.0)
    assert [held.losses(10.0, g).item() for g in (1.0, 0.1, 0.01)] == [0.9, 0.8, last]
    assert (held.refitted, held.gave_up) == (refitted, gave_up)
    held.losses(1.0, 1.0)
    assert not held.gave_up


def test_penalties_of_a_given_number_of_linearizations():
    of_two = Relinearized(Losses(1.0, 0.9, 0.8, 0.7), 2, 0.0, 1.0)
    assert [of_two.losses(10.0, g).item() for g in (1.0, 0.1)] == [0.9, 0.9]
    assert of_two.stronger(10.0, 0.1) == ()
