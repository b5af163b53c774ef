"""Grids of penalties, and the models along a path of them."""

import math

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
from sklearn_gradfeat.curvature import _coarse_space as coarse_space
from sklearn_gradfeat.training import TwoStageFit, _two_stage_fit
from tests.tiny import NET, X, Y

pytestmark = pytest.mark.filterwarnings("ignore:The best of .* at an end of the list:UserWarning")
TARGETS = Y + np.random.default_rng(0).normal(size=len(Y))


def classifier(**options):
    grid = {"alphas": [0.5, 0.02], "gradient_alphas": [0.1]}
    return GradientFeatureClassifierCV(NET, **{**grid, "cv": 2, **options}, activation_layer=None)


def regressor(**options):
    return GradientFeatureRegressorCV(NET, alphas=2, cv=2, **options, activation_layer=None)


# --- default grids ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1000.0, pytest.param(1e-3, marks=pytest.mark.slow)])
def test_default_grids_follow_the_scale_of_the_activations(scale):
    rows, y = load_iris(return_X_y=True)
    rows = StandardScaler().fit_transform(rows)[::3] * scale
    torch.manual_seed(0)
    # Without biases below the ReLUs the activations are proportional to the rows.
    net = nn.Sequential(nn.Linear(4, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    options = {"gradient_layers": ["2"], "alphas": 3, "gradient_alphas": 2, "cv": 2}
    model = GradientFeatureClassifierCV(net, **options, activation_layer=None).fit(rows, y[::3])
    assert model.best_score_ > -0.3
    reference = clone(model).fit(rows / scale, y[::3])
    np.testing.assert_allclose(model.alphas_, scale**2 * reference.alphas_, 1e-6)
    np.testing.assert_allclose(model.best_score_, reference.best_score_, atol=0.02)


def test_default_alphas_start_at_the_largest_curvature():
    rows = np.random.default_rng(0).normal(size=(60, 3)) * [5, 1, 0.1] + 40
    identity = nn.Sequential(nn.Flatten())
    model = GradientFeatureRegressorCV(
        identity, features="activation", alphas=4, refit=False, activation_layer=None
    )
    model.fit(rows, rows[:, 1])
    largest = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[-1]
    tried = set(np.round(np.log10(model.alphas_ / largest), 3))
    assert {0.0, -1.0, -2.0, -3.0} <= tried
    assert model.alpha_ < model.alphas_.max()


def test_search_is_coarse_to_fine():
    noisy = X + 3 * np.random.default_rng(0).normal(size=X.shape).astype(np.float32)
    model = classifier(alphas=4, gradient_alphas=3, refit=False).fit(noisy, Y)
    tried = ~np.isnan(model.scores_[0])
    assert tried.sum() < 0.7 * tried.size
    assert (tried == tried[None]).all()
    i, j = (
        list(model.alphas_).index(model.alpha_),
        list(model.gradient_alphas_).index(model.gradient_alpha_),
    )
    assert model.scores_.mean(0)[i, j] == np.nanmax(model.scores_.mean(0)) == model.best_score_
    assert math.inf in model.gradient_alphas_
    assert 0 < i < len(model.alphas_) - 1


@pytest.mark.parametrize(
    ("options", "are_fits"),
    [
        ({"gradient_alphas": 1, "alphas": [1e-3]}, False),
        ({"gradient_alphas": 1, "alphas": [1e-3], "features": "gradient"}, False),
        ({"weighted": True}, False),
        ({"cv": [(np.r_[:12, :12, 6], np.r_[12:24])], "scoring": "neg_log_loss"}, False),
        ({"cv": [(np.flatnonzero(Y), np.arange(24))], "scoring": "accuracy"}, True),
    ],
    ids=["one list", "gradient", "weights", "repeated rows", "fold without a class"],
)
def test_minima_over_the_coarse_space(monkeypatch, options, are_fits):
    """Their scores are close to those of fits, which a fold without a class has."""
    monkeypatch.setattr(coarse_space, "_MIN_COST", 1)
    fits, fit_gradient = [], TwoStageFit.fit_gradient
    monkeypatch.setattr(
        TwoStageFit, "fit_gradient", lambda *args: fits.append(args) or fit_gradient(*args)
    )
    options = {"alphas": 1, "gradient_alphas": [60.0, 6.0], "refit": False, **options}
    weights = np.arange(24) % 3 + 1.0 if options.pop("weighted", False) else None
    model = classifier(**options).fit(X, Y, weights)
    assert bool(fits) == are_fits
    exact = clone(model).set_params(alphas=[model.alpha_], gradient_alphas=model.gradient_alphas_)
    exact.fit(X, Y, weights)
    assert fits
    scores = model.scores_[:, model.alphas_ == model.alpha_]
    tried = np.isfinite(scores) & (model.gradient_alphas_ > 5)  # weaker ones ask for more space
    assert tried.any()
    np.testing.assert_allclose(scores[tried], exact.scores_[tried], rtol=0.1)


def test_scores_over_the_coarse_space_do_not_depend_on_a_small_max_iter(monkeypatch):
    monkeypatch.setattr(coarse_space, "_MIN_COST", 1)
    few, many = (
        classifier(alphas=[0.01], gradient_alphas=2, refit=False, max_iter=n).fit(X, Y)
        for n in (5, 100)
    )
    np.testing.assert_allclose(few.scores_, many.scores_, rtol=1e-3)


@pytest.mark.parametrize("options", [{"features": "gradient"}, {"gradient_alphas": [1.0, 0.1]}])
def test_grids_without_an_infinite_penalty(options):
    model = classifier(**{"alphas": 2, "gradient_alphas": 2, "refit": False, **options}).fit(X, Y)
    assert np.isfinite(model.gradient_alphas_).all()


def test_infinite_penalty_in_a_list_is_the_model_of_activations():
    model = classifier(gradient_alphas=[math.inf, 0.1], refit=False).fit(X, Y)
    activation = classifier(features="activation", refit=False).fit(X, Y)
    np.testing.assert_allclose(model.scores_[..., :1], activation.scores_, rtol=1e-6)
    assert activation.gradient_alphas_.tolist() == [math.inf]
    assert activation.gradient_alpha_ == math.inf


def test_folds_in_threads_give_the_same_scores():
    one, other = (classifier(n_jobs=n, refit=False).fit(X, Y) for n in (1, 2))
    np.testing.assert_array_equal(one.scores_, other.scores_)


def test_warning_of_a_choice_at_an_end():
    rows = np.random.default_rng(0).normal(size=(60, 3))
    model = GradientFeatureRegressorCV(
        nn.Sequential(nn.Flatten()), features="activation", cv=2, activation_layer=None
    )
    model.set_params(alphas=[1e-3, 10.0, 100.0])
    with pytest.warns(UserWarning, match=r"best of alphas is 0\.001, at an end of the list"):
        model.fit(rows, rows[:, 1])


def test_default_gradient_alphas_follow_the_targets():
    model = regressor(gradient_alphas=2).fit(X, TARGETS)
    larger = regressor(gradient_alphas=2).fit(X, 100 * TARGETS)
    finite = np.isfinite(model.gradient_alphas_)
    np.testing.assert_allclose(
        larger.gradient_alphas_[finite], 1e4 * model.gradient_alphas_[finite], 1e-3
    )
    np.testing.assert_allclose(larger.scores_, 1e4 * model.scores_, 1e-2)


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
    plain = GradientFeatureClassifier(
        random_state=0, alpha=1e-4, gradient_alpha=1e-4, activation_layer=None
    )
    GridSearchCV(plain, grid, cv=2, refit=False).fit(rows, y)
    of_grid_search = sum(passes)
    passes.clear()
    model = GradientFeatureClassifierCV(cv=2, refit=False, random_state=0, activation_layer=None)
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
