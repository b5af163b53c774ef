"""The optimum of stage two, against scikit-learn and dense solvers on explicit features."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureRegressor
from sklearn_gradfeat.curvature import _coarse_space, _explicit_rows, _factored_term
from tests.networks import NETWORKS, build
from tests.oracles import dense_jacobian, dense_optimum, ntk_scales
from tests.tiny import estimator

N = 40


def targets(rng):
    return {
        "binary": rng.integers(0, 2, N),
        "multinomial": rng.integers(0, 3, N),
        "multilabel": rng.integers(0, 2, (N, 3)),
    }


X = np.random.default_rng(0).normal(size=(N, 2, 5, 5))
TARGETS = targets(np.random.default_rng(1))
WEIGHTS = np.random.default_rng(2).integers(1, 4, N).astype(float)
TIGHT = {"tol": 1e-22, "max_iter": 3000, "precision": "float64"}


def fit(kind, target, fresh=False, **options):
    module, names = build(kind)
    module = copy.deepcopy(module) if fresh else module
    model = GradientFeatureClassifier(
        module, gradient_layers=names, **{**TIGHT, **options}, activation_layer=None
    )
    return model.fit(X, TARGETS[target], sample_weight=WEIGHTS), module


def explicit(model, module):
    """Activations, and rows Ωᵀ J of every output in NTK units, float64."""
    names = model.gradient_layers_
    J = dense_jacobian(module, names, X) * ntk_scales(module, names)
    with torch.no_grad():
        f = module(torch.tensor(X))
    f = (f.flatten(2).mean(2) if f.ndim > 2 else f).numpy()
    return f, np.einsum("cd,ndp->ncp", model.omega_, J)


@pytest.mark.parametrize("kind", ["plain", "whole", "grouped", "normed", "transformer"])
def test_binary_optimum_is_logistic_regression_on_explicit_features(kind):
    alpha = 0.02
    model, module = fit(kind, "binary", alpha=alpha, gradient_alpha=alpha)
    f, g = explicit(model, module)
    features = np.hstack([f, g[:, 0]])
    C = 1 / (alpha * WEIGHTS.sum())
    oracle = LogisticRegression(C=C, tol=1e-10, max_iter=10000, solver="newton-cholesky")
    oracle.fit(features, TARGETS["binary"], sample_weight=WEIGHTS)
    expected = oracle.decision_function(features)
    np.testing.assert_allclose(model.decision_function(X), expected, rtol=1e-6, atol=1e-7)
    d = f.shape[1]
    np.testing.assert_allclose(model.coef_, oracle.coef_[:, :d], rtol=1e-5, atol=1e-7)
    moved = np.concatenate([v.ravel() for v in model.gradient_coef_.values()])
    u = moved / ntk_scales(module, model.gradient_layers_)
    np.testing.assert_allclose(u, oracle.coef_[0, d:], rtol=1e-4, atol=1e-7)


@pytest.fixture
def with_rows(monkeypatch):
    """Explicit rows cost nothing, so fits use them."""
    monkeypatch.setattr(_explicit_rows, "_NUMBER", 0)
    monkeypatch.setattr(_explicit_rows, "_LOGIT", 0)
    monkeypatch.setattr(_explicit_rows, "_FEWEST", 16)


@pytest.fixture
def with_factors(monkeypatch):
    """Rows of layers cost nothing, and explicit ones too much, so fits use the first."""
    monkeypatch.setattr(_explicit_rows, "_NUMBER", 1e12)
    monkeypatch.setattr(_factored_term, "READING", 0)
    monkeypatch.setattr(_factored_term, "_PASSES", 10**6)
    made = []
    monkeypatch.setattr(
        _explicit_rows,
        "factored",
        lambda *args: made.append(_factored_term.factored(*args)) or made[-1],
    )
    yield
    assert made and None not in made


@pytest.mark.parametrize("rows", [None, "with_rows", "with_factors"])
@pytest.mark.parametrize("target", ["multinomial", "multilabel"])
@pytest.mark.parametrize("kind", ["plain", "normed"])
def test_optimum_matches_a_dense_solve(kind, target, rows, request):
    if rows:
        request.getfixturevalue(rows)
    alpha, gradient_alpha = 0.01, 0.003
    model, module = fit(kind, target, alpha=alpha, gradient_alpha=gradient_alpha)
    f, g = explicit(model, module)
    value, logits = dense_optimum(f, g, TARGETS[target], WEIGHTS, alpha, gradient_alpha, 3, target)
    assert model.objective_path_[-1] == pytest.approx(value, rel=1e-8)
    got = model.decision_function(X)
    if target == "multinomial":
        assert model.intercept_.sum() == pytest.approx(0, abs=1e-12)
        got, logits = got - got.mean(1, keepdims=True), logits - logits.mean(1, keepdims=True)
    np.testing.assert_allclose(got, logits, atol=2e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"features": "gradient"},
        {"fit_intercept": False},
        {"loss": "squared", "precision": "float64"},
        {"n_linearizations": 2},
        {"alpha": "auto", "gradient_alpha": "auto"},
    ],
)
@pytest.mark.parametrize("rows", ["with_rows", "with_factors"])
def test_rows_reach_the_optimum_of_jacobian_products(options, rows, request):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(N, 1, 8, 8)).astype(np.float32)
    model = estimator(tol=1e-9, max_iter=500, activation_layer=None, **options)
    expected = model.fit(images, TARGETS["multinomial"], WEIGHTS).objective_path_[-1]
    request.getfixturevalue(rows)
    found = model.fit(images, TARGETS["multinomial"], WEIGHTS).objective_path_[-1]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("target", ["binary", "multinomial"])
def test_stage_one_is_logistic_regression(target):
    model, module = fit("plain", target, features="activation", alpha=0.01)
    with torch.no_grad():
        f = module(torch.tensor(X)).flatten(2).mean(2).numpy()
    oracle = LogisticRegression(C=1 / (0.01 * WEIGHTS.sum()), tol=1e-10, max_iter=10000)
    oracle.fit(f, TARGETS[target], sample_weight=WEIGHTS)
    np.testing.assert_allclose(model.predict_proba(X), oracle.predict_proba(f), atol=1e-5)
    np.testing.assert_array_equal(model.coef_, model.omega_)


@pytest.mark.parametrize("n_features", [300, 9000])
def test_more_features_than_samples(n_features):
    """The preconditioner is then exact for the samples, however many features there are."""
    wide = np.random.default_rng(3).normal(size=(N, n_features))
    model = GradientFeatureClassifier(
        nn.Identity(), features="activation", alpha=0.02, tol=1e-14, activation_layer=None
    )
    model.fit(wide, TARGETS["multinomial"], sample_weight=WEIGHTS)
    oracle = LogisticRegression(C=1 / (0.02 * WEIGHTS.sum()), tol=1e-10, max_iter=10000)
    oracle.fit(wide, TARGETS["multinomial"], sample_weight=WEIGHTS)
    expected = oracle.decision_function(wide)
    np.testing.assert_allclose(model.decision_function(wide), expected, atol=1e-4)
    assert model.n_passes_ < 60


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("loss", ["log_loss", "squared"])
def test_more_features_than_samples_without_a_penalty(loss):
    """Directions that no sample has are next to free, so rounding errors along them are large."""
    X, y = np.random.default_rng(0).normal(size=(200, 400)).astype(np.float32), np.arange(200) % 3
    model = GradientFeatureClassifier(
        nn.Identity(), features="activation", alpha=0, loss=loss, activation_layer=None
    )
    separable = pytest.warns(ConvergenceWarning, match="The classes are separable")
    with separable if loss == "log_loss" else nullcontext():
        model.fit(X, y)
    assert model.score(X, y) == 1


def test_gradient_features_alone():
    model, module = fit("plain", "binary", features="gradient", gradient_alpha=0.01)
    _, g = explicit(model, module)
    oracle = LogisticRegression(C=1 / (0.01 * WEIGHTS.sum()), tol=1e-10, max_iter=10000)
    oracle.fit(g[:, 0], TARGETS["binary"], sample_weight=WEIGHTS)
    np.testing.assert_allclose(
        model.decision_function(X), oracle.decision_function(g[:, 0]), atol=1e-5
    )
    assert not model.coef_.any()


@pytest.mark.parametrize("kind", NETWORKS)
def test_objective_never_increases_and_standard_parametrization_works(kind):
    model, _ = fit(kind, "multinomial", parametrization="standard", tol=1e-10, alpha=0.05)
    assert (np.diff(model.objective_path_) <= 0).all()
    assert len(model.objective_path_) == model.n_iter_ + 1
    assert {k: v.shape for k, v in model.gradient_coef_.items()} == {
        n: tuple(p.shape)
        for n, p in model._extractor.backbone.network(model.gradient_layers_).parameters.items()
    }


@pytest.mark.parametrize(("seed", "batch_size"), [(0, 1), (1, 7)])
def test_order_repetition_and_batch_size_do_not_matter(seed, batch_size):
    options = {"precision": "float64", "tol": 1e-18, "max_iter": 500}
    options |= {"alpha": 0.05, "gradient_alpha": 0.05}
    module, names = build("normed")
    x, y = X[:12], TARGETS["multinomial"][:12]
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 3, len(x))
    order = rng.permutation(weights.sum())
    weighted = GradientFeatureClassifier(
        module, gradient_layers=names, **options, activation_layer=None
    )
    weighted.fit(x, y, sample_weight=weights)
    repeated = GradientFeatureClassifier(
        module, gradient_layers=names, batch_size=batch_size, **options, activation_layer=None
    )
    repeated.fit(x.repeat(weights, 0)[order], y.repeat(weights)[order])
    np.testing.assert_allclose(weighted.predict_proba(x), repeated.predict_proba(x), atol=1e-6)


def test_same_predictions_without_a_split(monkeypatch):
    from sklearn_gradfeat.backbones import _frozen

    split, _ = fit("transformer", "multinomial", alpha=0.05, gradient_alpha=0.05)

    def refuse(*args):
        raise _frozen.CaptureError("refused for the test")

    monkeypatch.setattr(_frozen, "capture", refuse)
    with pytest.warns(UserWarning, match="refused for the test") as record:
        whole, _ = fit("transformer", "multinomial", True, alpha=0.05, gradient_alpha=0.05)
    assert len([w for w in record if w.category is UserWarning]) == 1
    assert whole.gradient_layers_ == split.gradient_layers_
    np.testing.assert_allclose(whole.predict_proba(X), split.predict_proba(X), atol=1e-7)


def test_convergence_warning_says_what_to_do():
    with pytest.warns(ConvergenceWarning, match="Increase max_iter=2, alpha.* or tol"):
        fit("plain", "multinomial", max_iter=2, alpha=1e-4, gradient_alpha=1e-4)


@pytest.mark.filterwarnings("error")
def test_rounding_errors_end_a_fit():
    """No digit of the objective is left to gain, whatever tol asks for."""
    penalties = {"alpha": 0.01, "gradient_alpha": 0.01}
    model, _ = fit("plain", "binary", precision="float32", tol=1e-28, **penalties)
    exact, _ = fit("plain", "binary", **penalties)
    assert model.objective_path_[-1] == pytest.approx(exact.objective_path_[-1], rel=1e-6)


@pytest.mark.parametrize("features", ["activation", "full"])
def test_the_unit_of_the_activations_does_not_matter(features):
    """The intercept is not penalised, so penalties far above one must not hold it back."""
    generator = np.random.default_rng(0)
    X = generator.standard_normal((80, 5)) + 3
    y = generator.choice(3, size=80, p=[0.7, 0.2, 0.1])
    torch.manual_seed(0)
    fits = {}
    linear = nn.Linear(5, 4, dtype=torch.float64)
    for scale in (1.0, 1e3):
        scaled = copy.deepcopy(linear)
        with torch.no_grad():
            scaled.weight *= scale
            scaled.bias *= scale
        model = GradientFeatureClassifier(
            scaled,
            features=features,
            alpha=0.01 * scale**2,
            gradient_alpha=0.1 / scale**2,
            activation_layer=None,
        )
        fits[scale] = model.fit(X, y)
    probabilities = [model.predict_proba(X) for model in fits.values()]
    np.testing.assert_allclose(*probabilities, rtol=1e-7)
    assert fits[1.0].n_iter_ == fits[1e3].n_iter_


class Tied(nn.Module):
    """A weight with a use besides the layer, which has no Gram matrix of samples."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 3).double()

    def forward(self, x):
        return torch.tanh(self.layer(x)) @ self.layer.weight


def test_fit_of_tied_weights_reaches_the_optimum():
    rows = np.random.default_rng(0).normal(size=(9, 3))
    y = np.sin(rows[:, 0] * 3)
    model = GradientFeatureRegressor(
        Tied(),
        gradient_layers="all",
        alpha=0.01,
        gradient_alpha=1e-4,
        tol=1e-10,
        max_iter=1000,
        activation_layer=None,
    ).fit(rows, y)
    names = model.gradient_layers_
    module = model.backbone
    J = dense_jacobian(module, names, rows) * ntk_scales(module, names)
    f = module(torch.tensor(rows)).detach().numpy()
    unit = np.sqrt(0.01 / 1e-4)
    columns = np.hstack([f, unit * np.einsum("d,ndp->np", model.omega_[0], J)])
    oracle = Ridge(0.01 * len(rows)).fit(columns, y)
    np.testing.assert_allclose(model.predict(rows), oracle.predict(columns), rtol=1e-4)


@pytest.mark.parametrize("estimator", [GradientFeatureClassifier, GradientFeatureRegressor])
def test_estimators_use_the_coarse_space(estimator, monkeypatch):
    for name, value in (("_MIN_COST", 0), ("READING", 0), ("_BETWEEN_STEPS", 0.5), ("_ALONE", 0.5)):
        monkeypatch.setattr(_coarse_space, name, value)
    made = []
    monkeypatch.setattr(
        "sklearn_gradfeat.curvature._inverses.leading_subspace",
        lambda *args: made.append(_coarse_space.leading_subspace(*args)) or made[-1],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 2), nn.Tanh())
    model = estimator(network, preprocess=None, alpha=1e-3, gradient_alpha=1e-4)
    model.fit(X.astype(np.float32), np.arange(N) % 3)
    assert [subspace is not None for subspace in made] == [True]
