"""Grids of penalties, and the models along a path of them."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressorCV,
)
from sklearn_gradfeat.training import TwoStageFit, _two_stage_fit
from tests.tiny import NET, X, Y

TARGETS = Y + np.random.default_rng(0).normal(size=len(Y))


def classifier(**options):
    grid = {"alphas": [0.5, 0.02], "gradient_alphas": [0.1]}
    return GradientFeatureClassifierCV(NET, **{**grid, "cv": 2, **options})


def regressor(**options):
    return GradientFeatureRegressorCV(NET, alphas=2, cv=2, **options)


# --- default grids ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1000.0])
def test_default_grids_follow_the_scale_of_the_activations(scale):
    rows, y = load_iris(return_X_y=True)
    rows = StandardScaler().fit_transform(rows)[::2] * scale
    torch.manual_seed(0)
    # Without biases below the ReLUs the activations are proportional to the rows.
    net = nn.Sequential(nn.Linear(4, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    model = GradientFeatureClassifierCV(net, gradient_layers=["2"], alphas=4, gradient_alphas=2)
    model.fit(rows, y[::2])
    assert model.best_score_ > 0.93
    reference = clone(model).fit(rows / scale, y[::2])
    np.testing.assert_allclose(model.alphas_, scale**2 * reference.alphas_, 1e-6)
    np.testing.assert_allclose(model.gradient_alphas_, reference.gradient_alphas_, 0.5)
    np.testing.assert_allclose(model.scores_, reference.scores_, atol=0.07)


def test_default_alphas_start_at_the_largest_curvature():
    rows = np.random.default_rng(0).normal(size=(60, 3)) * [5, 1, 0.1] + 40
    identity = nn.Sequential(nn.Flatten())
    model = GradientFeatureRegressorCV(identity, features="activation", alphas=5, refit=False)
    model.fit(rows, rows[:, 1])
    largest = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[-1]
    np.testing.assert_allclose(model.alphas_, largest * np.logspace(0, -4, 5), 1e-3)


def test_default_gradient_alphas_follow_the_targets():
    model = regressor(gradient_alphas=3).fit(X, TARGETS)
    larger = regressor(gradient_alphas=3).fit(X, 100 * TARGETS)
    np.testing.assert_allclose(larger.gradient_alphas_, 1e4 * model.gradient_alphas_, 1e-3)
    np.testing.assert_allclose(larger.scores_, model.scores_, 1e-2)


def test_default_grids_of_samples_that_are_all_the_same():
    model = regressor(gradient_alphas=2).fit(0 * X, TARGETS)
    assert np.isfinite(model.alphas_).all() and (model.alphas_ > 0).all()


# --- paths ------------------------------------------------------------------------------------


def test_first_stage_is_fitted_once_for_every_alpha(monkeypatch):
    fits = []
    fit_activation = TwoStageFit.fit_activation

    def counted(self, alpha, *rest):
        fits.append(alpha)
        return fit_activation(self, alpha, *rest)

    monkeypatch.setattr(TwoStageFit, "fit_activation", counted)
    classifier(gradient_alphas=[1.0, 0.1, 0.01], refit=False).fit(X, Y)
    assert fits == [0.5, 0.02] * 2


def test_path_takes_fewer_passes_than_a_grid_search(monkeypatch):
    passes, minimize = [], _two_stage_fit.minimize

    def counted(*args, **options):
        found = minimize(*args, **options)
        passes.append(found.n_passes)
        return found

    monkeypatch.setattr(_two_stage_fit, "minimize", counted)
    rows, y = load_iris(return_X_y=True)
    rows, y = StandardScaler().fit_transform(rows)[::3], y[::3]
    grid = {"alpha": [0.1, 0.01], "gradient_alpha": [0.1, 0.01, 0.001]}
    plain = GradientFeatureClassifier(random_state=0, alpha=1e-4, gradient_alpha=1e-4)
    GridSearchCV(plain, grid, cv=2, refit=False).fit(rows, y)
    of_grid_search = sum(passes)
    passes.clear()
    model = GradientFeatureClassifierCV(cv=2, refit=False, random_state=0)
    model.set_params(alphas=grid["alpha"], gradient_alphas=grid["gradient_alpha"]).fit(rows, y)
    assert len(passes) == 2 * (2 + 6)
    assert sum(passes) < 0.6 * of_grid_search


def test_path_takes_fewer_passes_with_curvature_pairs(monkeypatch):
    noisy = X + np.random.default_rng(0).normal(size=X.shape)
    grid = {"alphas": [0.01], "gradient_alphas": [0.1, 0.05, 0.025, 0.0125]}
    model = classifier(**grid, tol=1e-8, precision="float64", refit=False)
    minimize = _two_stage_fit.minimize

    def passes(**changed):
        found = []

        def counted(*args, **options):
            found.append(minimize(*args, **{**options, **changed}))
            return found[-1]

        monkeypatch.setattr(_two_stage_fit, "minimize", counted)
        model.fit(noisy, Y)
        return sum(each.n_passes for each in found)

    assert passes() < 0.8 * passes(curvature_pairs=None)
