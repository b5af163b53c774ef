"""The regressor, against scikit-learn and dense solvers on explicit gradients."""

import functools
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_diabetes
from sklearn.linear_model import HuberRegressor, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_gradfeat import GradientFeatureRegressor
from sklearn_gradfeat.linearized._losses import Huber, Squared
from tests.networks import NETWORKS, build
from tests.oracles import dense_jacobian, dense_regression, ntk_scales
from tests.tiny import NET

N = 40


def problem():
    """Return images with three targets and integer weights."""
    rng = np.random.RandomState(0)
    samples, noise = rng.randn(N, 2, 5, 5), rng.randn(N, 3)
    targets = noise + samples.mean((2, 3)) @ rng.randn(2, 3) + 5
    return samples, targets, rng.randint(0, 4, N).astype(float)


def images_of_their_target():
    rng = np.random.RandomState(1)
    targets = rng.randn(24)
    noise = rng.randn(24, 1, 8, 8)
    return (noise + targets[:, None, None, None]).astype(np.float32), targets


X, Y, WEIGHTS = problem()
IMAGES, TARGETS = images_of_their_target()
TIGHT = {"tol": 1e-22, "max_iter": 3000, "precision": "float64"}


def fit(kind, y, **options):
    module, names = build(kind)
    model = GradientFeatureRegressor(
        module, gradient_layers=names, **{**TIGHT, **options}, activation_layer=None
    )
    return model.fit(X, y, sample_weight=WEIGHTS), module


def small(**options):
    defaults = {"alpha": 0.1, "gradient_alpha": 0.01}
    return GradientFeatureRegressor(NET, **{**defaults, **options}, activation_layer=None)


def activation(module):
    with torch.no_grad():
        f = module(torch.tensor(X))
    return (f.flatten(2).mean(2) if f.ndim > 2 else f).numpy()


def explicit(model, module):
    """Activations, and rows ω̄ J of every output in NTK units, float64."""
    names = model.gradient_layers_
    J = dense_jacobian(module, names, X) * ntk_scales(module, names)
    return activation(module), np.einsum("cd,ndp->ncp", model.omega_, J)


# --- the losses ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Squared, Huber])
def test_gradient_and_curvature_of_the_loss(kind):
    rng = np.random.RandomState(0)
    targets, logits, moved = torch.tensor(rng.randn(3, 5, 2))
    weights = torch.tensor(rng.rand(5))
    loss = kind(targets, weights, *([0.4] if kind is Huber else []))
    gradient, curvature = loss.gradient(logits), loss.curvatures(logits)
    for i, c in np.ndindex(5, 2):
        step = torch.zeros_like(logits)
        step[i, c] = 1e-6
        difference = (loss.value(logits + step) - loss.value(logits - step)) / 2e-6
        assert float(gradient[i, c]) == pytest.approx(difference, abs=1e-8)
    torch.testing.assert_close(loss.gradient(logits[2:], slice(2, None)), gradient[2:])
    torch.testing.assert_close(loss.mean_curvature(logits), torch.diag(curvature.sum(0)) / (
        weights.sum() if kind is Squared else 1
    ))  # fmt: skip
    step = moved - logits
    bound = loss.value(logits) + float((gradient * step + curvature * step**2 / 2).sum())
    assert loss.value(moved) == pytest.approx(bound) if kind is Squared else bound
    assert loss.value(moved) <= bound + 1e-12


# --- the optimum -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fit_intercept"),
    [("plain", True), ("plain", False), ("grouped", True), ("normed", True)],
)
def test_optimum_is_ridge_on_explicit_gradients(kind, fit_intercept):
    alpha, gradient_alpha = 0.1, 0.03
    model, module = fit(
        kind, Y[:, 0], alpha=alpha, gradient_alpha=gradient_alpha, fit_intercept=fit_intercept
    )
    f, g = explicit(model, module)
    stretch = np.sqrt(alpha / gradient_alpha)
    columns = np.hstack([f, stretch * g[:, 0]])
    oracle = Ridge(alpha * WEIGHTS.sum(), fit_intercept=fit_intercept, solver="cholesky")
    oracle.fit(columns, Y[:, 0], sample_weight=WEIGHTS)
    np.testing.assert_allclose(model.predict(X), oracle.predict(columns), rtol=1e-7)
    d = f.shape[1]
    np.testing.assert_allclose(model.coef_[0], oracle.coef_[:d], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(model.intercept_, oracle.intercept_, rtol=1e-7)
    moved = np.concatenate([v.ravel() for v in model.gradient_coef_.values()])
    u = moved / ntk_scales(module, model.gradient_layers_)
    np.testing.assert_allclose(u, stretch * oracle.coef_[d:], rtol=1e-5, atol=1e-7)


@functools.cache
def mlp():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(50, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    return module.double()


@pytest.mark.parametrize("gradient_alpha", [0.3, 1e-4])
@pytest.mark.parametrize("features", ["full", "gradient"])
def test_tabular_data_are_solved_to_rounding_whatever_tol(features, gradient_alpha):
    module, rows = mlp(), X.reshape(N, -1)
    model = GradientFeatureRegressor(
        module,
        gradient_layers="all",
        features=features,
        alpha=1e-3,
        gradient_alpha=gradient_alpha,
        activation_layer=None,
    ).fit(rows, Y)
    with torch.no_grad():
        f = module(torch.from_numpy(rows)).numpy()
    names = model.gradient_layers_
    J = dense_jacobian(module, names, rows) * ntk_scales(module, names)
    g = np.einsum("cd,ndp->ncp", model.omega_, J)
    f = f if features == "full" else f[:, :0]
    expected = dense_regression(f, g, Y, np.ones(N), 1e-3, gradient_alpha)
    np.testing.assert_allclose(model.predict(rows), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("features", "fit_intercept", "loss"),
    [
        ("full", True, "squared_error"),
        ("gradient", False, "squared_error"),
        ("full", False, "huber"),
        ("gradient", True, "huber"),
    ],
)
def test_outputs_share_the_displacements(features, fit_intercept, loss):
    options = {"alpha": 0.1, "gradient_alpha": 0.03, "epsilon": 0.7}
    model, module = fit(
        "plain", Y, features=features, fit_intercept=fit_intercept, loss=loss, **options
    )
    f, g = explicit(model, module)
    f = f[:, : f.shape[1] * (features == "full")]
    epsilon = 0.7 if loss == "huber" else None
    expected = dense_regression(f, g, Y, WEIGHTS, 0.1, 0.03, fit_intercept, epsilon)
    np.testing.assert_allclose(model.predict(X), expected, rtol=1e-7 if epsilon is None else 1e-4)
    assert (np.diff(model.objective_path_) <= 0).all()


def test_first_stage_is_ridge():
    model, module = fit("plain", Y, features="activation", alpha=0.01)
    f = activation(module)
    oracle = Ridge(0.01 * WEIGHTS.sum()).fit(f, Y, sample_weight=WEIGHTS)
    np.testing.assert_allclose(model.predict(X), oracle.predict(f), rtol=1e-8)
    np.testing.assert_array_equal(model.coef_, model.omega_)


def test_first_stage_is_scikit_learns_huber_regression_at_its_scale():
    module, _ = build("plain")
    f = activation(module)
    y = Y[:, 0].copy()
    y[::5] += 30
    weights = WEIGHTS + 1
    oracle = HuberRegressor(epsilon=1.2, alpha=0.5, tol=1e-10, max_iter=10000)
    oracle.fit(f, y, sample_weight=weights)
    model = GradientFeatureRegressor(
        module, features="activation", loss="huber", epsilon=1.2 * oracle.scale_,
        alpha=0.5 * oracle.scale_ / weights.sum(), **TIGHT, activation_layer=None,
    )  # fmt: skip
    model.fit(X, y, sample_weight=weights)
    np.testing.assert_allclose(model.predict(X), oracle.predict(f), rtol=1e-4)


@pytest.mark.parametrize("loss", ["squared_error", "huber"])
def test_few_samples_have_the_optimum_of_many(loss, monkeypatch):
    rows, y = X.reshape(N, -1), Y[:, :2]
    model = GradientFeatureRegressor(
        loss=loss,
        epsilon=0.5,
        alpha=0.01,
        random_state=0,
        tol=1e-18,
        max_iter=2000,
        gradient_alpha=0.01,
        activation_layer=None,
    )
    exact = clone(model).fit(rows, y)
    monkeypatch.setattr("sklearn_gradfeat.curvature._sample_space.MAX_ROWS", 0)
    other = clone(model).fit(rows, y)
    np.testing.assert_allclose(exact.predict(rows), other.predict(rows), rtol=1e-6)
    assert exact.n_iter_ < other.n_iter_
    assert loss == "huber" or exact.n_iter_ <= 2


@pytest.mark.parametrize("loss", ["squared_error", "huber"])
def test_integer_weights_are_repetitions(loss):
    module, names = build("normed")
    model = GradientFeatureRegressor(
        module, gradient_layers=names, loss=loss, epsilon=0.5, **TIGHT, activation_layer=None
    )
    model.set_params(alpha=0.05)
    some, y, times = X[:20], Y[:20], WEIGHTS[:20].astype(int)
    weighted = clone(model).fit(some, y, sample_weight=times)
    order = np.random.RandomState(1).permutation(times.sum())
    repeated = clone(model).set_params(batch_size=7)
    repeated.fit(some.repeat(times, 0)[order], y.repeat(times, 0)[order])
    np.testing.assert_allclose(weighted.predict(X), repeated.predict(X), rtol=1e-7)


@pytest.mark.parametrize("loss", ["squared_error", "huber"])
def test_units_of_the_targets(loss):
    options = {"precision": "float64", "tol": 1e-20, "max_iter": 2000, "loss": loss}
    base = small(**options, epsilon=0.5).fit(IMAGES, TARGETS)
    moved = small(**options, epsilon=500.0, gradient_alpha=0.01 * 1000**2)
    moved.fit(IMAGES, 1000 * TARGETS - 1e6)
    np.testing.assert_allclose(moved.predict(IMAGES), 1000 * base.predict(IMAGES) - 1e6, rtol=1e-9)


def test_targets_far_from_zero_in_float32():
    model = small(tol=1e-6).fit(IMAGES, TARGETS + 1e4)
    assert model.predict(IMAGES).dtype == model.intercept_.dtype == np.float32
    reference = small(precision="float64", tol=1e-18, max_iter=1000).fit(IMAGES, TARGETS)
    np.testing.assert_allclose(model.predict(IMAGES) - 1e4, reference.predict(IMAGES), atol=0.05)


@pytest.mark.parametrize("outlier", [1e3, 1e9])
def test_huber_ignores_outliers(outlier):
    y = TARGETS.copy()
    y[3] = outlier
    model = small(loss="huber", epsilon=0.5, precision="float64", max_iter=1000).fit(IMAGES, y)
    clean = np.delete(np.arange(len(y)), 3)
    assert np.corrcoef(model.predict(IMAGES[clean]), TARGETS[clean])[0, 1] > 0.9
    assert np.abs(model.predict(IMAGES[clean])).max() < 10


# --- targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["squared_error", "huber"])
@pytest.mark.parametrize("value", [0.1, 0.0, -1e8])
def test_constant_target(value, loss):
    for features in ("full", "gradient"):
        model = small(loss=loss, features=features, precision="float64")
        y = np.full(len(IMAGES), value)
        model.fit(IMAGES, y, sample_weight=np.linspace(0, 1, len(y)))
        np.testing.assert_array_equal(model.predict(IMAGES), y)
    columns = np.stack([y, TARGETS], 1)
    model = small(loss=loss, precision="float64").fit(IMAGES, columns)
    assert np.isfinite(model.predict(IMAGES)).all()


@pytest.mark.parametrize("n_outputs", [None, 1, 2])
def test_shape_of_the_predictions_is_that_of_the_targets(n_outputs):
    y = TARGETS if n_outputs is None else np.stack([TARGETS] * n_outputs, 1)
    model = small().fit(IMAGES, y)
    assert model.predict(IMAGES).shape == y.shape
    assert model.coef_.shape == model.omega_.shape == (n_outputs or 1, 6)
    assert model.intercept_.shape == (n_outputs or 1,)
    assert model.score(IMAGES, y) > 0.5


@pytest.mark.parametrize(
    "y", [TARGETS.tolist(), torch.tensor(TARGETS), TARGETS.astype(object)], ids=type
)
def test_kinds_of_targets(y):
    np.testing.assert_array_equal(
        small().fit(IMAGES, y).predict(IMAGES), small().fit(IMAGES, TARGETS).predict(IMAGES)
    )


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.where(np.arange(24) == 3, np.nan, TARGETS), "Input y contains NaN"),
        (np.where(np.arange(24) == 3, np.inf, TARGETS), "Input y contains infinity"),
        (np.array(["cold", "hot"] * 12), "y must hold finite real numbers.*cold"),
        (TARGETS + 1j, "Complex data not supported"),
        (TARGETS[:, None, None], "dim 3"),
        (TARGETS[:5], "inconsistent numbers of samples"),
        (None, "requires y to be passed"),
    ],
)
def test_targets_that_cannot_be_used(y, message):
    with pytest.raises(ValueError, match=message):
        small().fit(IMAGES, y)


def test_one_sample():
    with pytest.raises(ValueError, match=r"1 sample|minimum of 2"):
        small().fit(IMAGES[:1], TARGETS[:1])


@pytest.mark.parametrize(
    "options", [{"loss": "absolute"}, {"epsilon": 0.0}, {"epsilon": -1}], ids=str
)
def test_parameters_that_cannot_be_used(options):
    with pytest.raises(ValueError, match=f"The '{next(iter(options))}' parameter"):
        small(**options).fit(IMAGES, TARGETS)


# --- inside scikit-learn ---------------------------------------------------------------------


def test_pipeline_search_and_transformed_targets():
    rows, y = load_diabetes(return_X_y=True)
    model = GradientFeatureRegressor(
        alpha=1.0, random_state=0, gradient_alpha=1.0, activation_layer=None
    )
    scaled = TransformedTargetRegressor(model, transformer=StandardScaler())
    grid = {"transformedtargetregressor__regressor__gradient_alpha": [0.1, 1.0]}
    search = GridSearchCV(make_pipeline(StandardScaler(), scaled), grid, cv=2)
    search.fit(rows[::2], y[::2])
    assert search.score(rows[1::2], y[1::2]) > 0.4
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_clone_and_pickle():
    model = small(loss="huber", epsilon=0.3).fit(IMAGES, TARGETS)
    assert clone(model).get_params() == model.get_params()
    assert clone(model).backbone is NET
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(IMAGES), model.predict(IMAGES))


def test_warm_start():
    tight = {"precision": "float64", "tol": 1e-16, "max_iter": 500}
    y = TARGETS + 1e4
    warm = small(warm_start=True, **tight).fit(IMAGES, y)
    first, before = warm.n_iter_, warm.predict(IMAGES)
    warm.fit(IMAGES, y)
    assert warm.n_iter_ < first / 2
    np.testing.assert_allclose(warm.predict(IMAGES), before, rtol=1e-9)
    warm.set_params(fit_intercept=False).fit(IMAGES, TARGETS)
    cold = small(fit_intercept=False, **tight).fit(IMAGES, TARGETS)
    np.testing.assert_allclose(warm.predict(IMAGES), cold.predict(IMAGES), atol=1e-4)


def test_warm_start_where_nothing_is_left_to_learn():
    warm = small(warm_start=True).fit(IMAGES, TARGETS)
    warm.fit(IMAGES, np.full_like(TARGETS, 2.5))
    np.testing.assert_allclose(warm.predict(IMAGES), 2.5, rtol=1e-6)


@pytest.mark.parametrize("kind", sorted(NETWORKS))
def test_every_kind_of_network(kind):
    model, _ = fit(kind, Y, loss="huber", tol=1e-10, alpha=0.05, parametrization="standard")
    assert model.score(X, Y, sample_weight=WEIGHTS) > 0
