"""Both stages: tolerances, warm starts, warnings."""

import math
import re

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from sklearn_gradfeat.training import FitSettings, TwoStageFit, _two_stage_fit
from tests.tiny import NET, X, Y, estimator


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
def test_first_stage_is_solved_to_a_smaller_tolerance(solves, features):
    estimator(features=features, tol=1e-4).fit(X, Y)
    (first, first_tolerance), (second, second_tolerance) = solves
    assert first_tolerance == pytest.approx(second_tolerance / 10)  # the root of a share of 1/100
    assert first.status == second.status == "converged"


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


@pytest.mark.parametrize("features", ["full", "activation"])
def test_zero_model_that_is_the_optimum(solves, features):
    """All targets are in both classes with equal weights, so the gradient is rounding noise."""
    samples, y = np.concatenate([X, X]), np.arange(48) // 24
    model = estimator(features=features).fit(samples, y)
    assert all(math.isinf(tolerance) for _, tolerance in solves)
    assert not model.coef_.any()
    model.set_params(warm_start=True).fit(samples, y)
    assert not model.coef_.any()


def test_stages_for_several_penalties_share_the_samples():
    model = estimator(precision="float64")
    prepared = model._prepare(X)
    stages = TwoStageFit(prepared, model._problem(Y, None))
    for alpha in (0.1, 1.0):
        result = stages.fit(alpha, 0.5)
        expected = estimator(precision="float64", alpha=alpha, gradient_alpha=0.5).fit(X, Y)
        np.testing.assert_allclose(result.model.weights, expected.coef_, rtol=0.02, atol=1e-4)
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
