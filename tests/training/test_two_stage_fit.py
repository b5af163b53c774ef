"""Both stages: tolerances, warm starts, warnings."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from sklearn_gradfeat import GradientFeatureRegressor
from sklearn_gradfeat.training import (
    FitSettings,
    TwoStageFit,
    _two_stage_fit,
    warn_unless_converged,
)
from tests.tiny import NET, X, Y, estimator, tiny_net


@pytest.fixture
def solves(monkeypatch):
    """Return the solutions of all solves, with the tolerances that were asked for."""
    found, minimize = [], _two_stage_fit.minimize

    def recorded(*args, **options):
        solution = minimize(*args, **options)
        found.append((solution, options["tolerance"]))
        return solution

    monkeypatch.setattr(_two_stage_fit, "minimize", recorded)
    return found


@pytest.mark.parametrize("features", ["full", "gradient"])
def test_a_stage_stops_relative_to_its_own_fall(solves, features):
    estimator(features=features, tol=1e-4).fit(X, Y)
    for (solution, tolerance), share in zip(solves, (1e-6, 1e-4), strict=True):
        assert solution.status == "converged"
        end = solution.objective_path[-1]
        # The first stage starts at the zero model, and so does the second one without activations;
        # with them, it starts at the result of the first.
        start = solution.objective_path[0]
        assert tolerance(end) == pytest.approx(share * (start - end), rel=1e-3)
        assert solution.norm**2 / 2 <= tolerance(end)
        assert tolerance(start) == pytest.approx(100 * np.finfo(np.float32).eps ** 2 * start)


def test_a_model_of_gradients_starts_at_the_zero_model():
    """The intercept of the first stage may be far from zero, where it has large weights."""
    rows = np.random.default_rng(0).normal(size=(30, 4)) + 100
    y = rows @ [1.0, -2.0, 3.0, 0.5]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    options = {"features": "gradient", "alpha": 1e-9, "gradient_alpha": 1e-3}
    model = GradientFeatureRegressor(network, **options).fit(rows, y)
    assert model.objective_path_[0] == pytest.approx(y.var() / 2)


@pytest.mark.parametrize("alpha", [1e-2, 1e-5])
def test_second_stage_moves_however_good_the_first_is(alpha):
    """Also where the first stage fits all samples."""
    model = estimator(alpha=alpha, gradient_alpha=1e-4, max_iter=300).fit(X, Y)
    assert model.n_iter_ > 0
    assert any(move.any() for move in model.gradient_coef_.values())
    exact = clone(model).set_params(tol=1e-8).fit(X, Y)
    start = exact.objective_path_[0]
    gain, all_of_it = (start - m.objective_path_[-1] for m in (model, exact))
    assert gain > 0.99 * all_of_it


def test_model_of_activations_is_the_first_stage_of_the_full_model():
    activation = estimator(features="activation", feature_store=None).fit(X, Y)
    full = estimator(feature_store=None).fit(X, Y)
    np.testing.assert_array_equal(activation.omega_, full.omega_)


def test_infinite_penalty_is_the_model_of_activations():
    without = estimator(gradient_alpha=math.inf, feature_store=None).fit(X, Y)
    activation = estimator(features="activation", feature_store=None).fit(X, Y)
    np.testing.assert_array_equal(without.predict_proba(X), activation.predict_proba(X))
    assert without.gradient_coef_.keys() and not any(
        move.any() for move in without.gradient_coef_.values()
    )
    assert without.gradient_alpha_ == activation.gradient_alpha_ == math.inf


def test_infinite_penalty_and_no_other_term():
    with pytest.raises(ValueError, match=r"gradient_alpha=inf .* features='gradient'"):
        estimator(features="gradient", gradient_alpha=math.inf).fit(X, Y)


class HalfDead(nn.Module):
    """A ReLU without positive inputs has no derivative."""

    def __init__(self):
        super().__init__()
        self.live, self.dead = tiny_net(), nn.Linear(64, 6)

    def forward(self, x):
        return self.live(x) + torch.relu(self.dead(x.flatten(1)) - 1e4)


def test_gradient_term_that_stays_zero_is_reported():
    with pytest.warns(ConvergenceWarning, match=r"The gradient term is zero, although gradient_al"):
        estimator(HalfDead(), gradient_layers=["dead"]).fit(X, Y)


def test_warning_of_rounding_errors():
    problem = estimator()._problem(Y, None)
    prepared = estimator()._prepare(X, problem.weights)
    result = TwoStageFit(prepared, problem).fit(0.1, 0.1)
    stalled = {k: replace(s, status="stalled") for k, s in result.solutions.items()}
    with pytest.warns(ConvergenceWarning, match=r"Rounding errors .*precision='float64'"):
        warn_unless_converged(result._replace(solutions=stalled), prepared.settings)


def test_warm_start_does_not_start_above_the_end(solves):
    model = estimator(max_iter=2, tol=1e-10, warm_start=True)
    with pytest.warns(ConvergenceWarning):
        model.fit(X, Y)
        end = model.objective_path_[-1]
        model.fit(X, Y)
    assert model.objective_path_[0] <= end * (1 + 1e-6)


def test_model_of_activations_is_the_first_stage(solves):
    model = estimator(features="activation", tol=1e-4).fit(X, Y)
    ((solution, _),) = solves
    assert np.array_equal(model.coef_, model.omega_)
    assert model.n_iter_ == solution.n_iter
    assert model.n_passes_ == solution.n_passes
    assert np.array_equal(model.objective_path_, solution.objective_path)
    assert not model.gradient_coef_


def test_model_of_gradients_has_no_weights(solves):
    model = estimator(features="gradient").fit(X, Y)
    assert not model.coef_.any()
    assert model.omega_.any()
    assert model.n_iter_ == solves[1][0].n_iter


def test_second_stage_starts_at_the_first(solves):
    model = estimator(tol=1e-6).fit(X, Y)
    activation = estimator(features="activation", tol=1e-8).fit(X, Y)
    np.testing.assert_allclose(model.objective_path_[0], activation.objective_path_[-1], rtol=1e-4)
    assert model.objective_path_[-1] < model.objective_path_[0]


def test_a_better_model_shows_that_the_zero_model_is_not_the_optimum(monkeypatch):
    model = estimator()
    problem = model._problem(Y, None)
    fits = TwoStageFit(model._prepare(X, problem.weights), problem)
    found = fits.fit_activation(1.0)
    worse = replace(found.model, omega=-100 * found.model.omega)
    assert not fits.fit_activation(0.1, worse).is_zero
    monkeypatch.setattr(_two_stage_fit, "_is_optimum", None)
    assert not fits.fit_activation(0.01, found.model).is_zero
    with pytest.raises(TypeError):
        fits.fit_activation(0.01, worse)


@pytest.mark.parametrize("features", ["full", "activation"])
def test_zero_model_that_is_the_optimum(solves, features):
    """All targets are in both classes with equal weights, so the gradient is rounding noise."""
    samples, y = np.concatenate([X, X]), np.arange(48) // 24
    model = estimator(features=features).fit(samples, y)
    assert all(solution.n_iter == 0 for solution, _ in solves)
    assert not model.coef_.any()
    model.set_params(warm_start=True).fit(samples, y)
    assert not model.coef_.any()


def test_stages_for_several_penalties_share_the_samples():
    model = estimator(precision="float64")
    problem = model._problem(Y, None)
    prepared = model._prepare(X, problem.weights)
    stages = TwoStageFit(prepared, problem)
    for alpha in (0.1, 1.0):
        result = stages.fit(alpha, 0.5)
        expected = estimator(precision="float64", alpha=alpha, gradient_alpha=0.5).fit(X, Y)
        np.testing.assert_allclose(result.model.weights.cpu(), expected.coef_, rtol=0.02, atol=1e-4)
    assert prepared.settings == FitSettings("full", "ntk", True, 1e-4, 40)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("activation", r"features='activation' stopped after 1 .*max_iter=1, alpha or tol\."),
        ("full", r"features='full' stopped after 1 .*max_iter=1, alpha, gradient_alpha or tol\."),
    ],
)
def test_warning_of_too_few_iterations(features, message):
    before = r"Newton decrement of .* before it met tol=1e-12"
    with pytest.warns(ConvergenceWarning, match=before) as caught:
        estimator(NET, features=features, max_iter=1, tol=1e-12).fit(X, Y)
    assert any(re.search(message, str(w.message)) for w in caught)
