"""Data, targets, weights and penalties at the ends of what users pass.

Every fit must end with a finite model whose objective never increased, or with an error that says
what to change.
"""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
)


def network(scale=None):
    """Return a small network, with an output that is ``scale`` times as large."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh()).double()
    if scale is None:
        return layers
    layers[2].weight.data *= scale
    return layers[:3]


NETWORK = network()
C, R = GradientFeatureClassifier, GradientFeatureRegressor
SEARCHES = GradientFeatureClassifierCV, GradientFeatureRegressorCV


def rows(n=24, d=6):
    return np.random.default_rng(0).normal(size=(n, d))


def with_constants(X):
    X[:, ::2] = 7.5
    return X


def separable(X):
    X[:, 0] = 20.0 * (np.arange(len(X)) % 3)
    return X


SAMPLES = {
    "plain": rows,
    "tiny": lambda: rows() * 1e-12,
    "huge": lambda: rows() * 1e12,
    "of all sizes": lambda: rows() * 10.0 ** np.linspace(-12, 12, 6),
    "far from zero": lambda: rows() + 1e12,
    "constant columns": lambda: with_constants(rows()),
    "all equal": lambda: np.ones((24, 6)),
    "zeros": lambda: np.zeros((24, 6)),
    "copies": lambda: np.repeat(rows(4), 6, axis=0),
    "separable": lambda: separable(rows()),
    "float32": lambda: rows().astype(np.float32),
}
CLASSES = np.arange(24) % 3
NUMBERS = np.random.default_rng(1).normal(size=24)
TARGETS = {
    "tiny": NUMBERS * 1e-12,
    "huge": NUMBERS * 1e12,
    "offset": NUMBERS + 1e12,
    "constant": np.full(24, 3.5),
    "of other sizes": np.stack([NUMBERS * 1e-12, NUMBERS[::-1] * 1e12], 1),
    "outlier": np.where(np.arange(24) == 3, 1e12, NUMBERS),
}
WEIGHTS = {
    "huge": np.full(24, 1e300),
    "tiny": np.full(24, 1e-300),
    "of all sizes": 10.0 ** np.linspace(-300, 300, 24),
    "few": np.where(np.arange(24) < 3, 1.0, 0.0),
}
PENALTIES = [(1e-12, 1e-12), (1e-4, 1e12), (1e12, 1e-12), (1e12, 1e12), (1.0, np.inf)]
UNSCALED = "The columns of X have very different scales"
UNMOVED = "The gradient term is zero"
STOPPED = "The fit of features='.*' stopped after"


def fitted(model, X, y, weights=None, allowed=""):
    """Fit, check that the model is finite and that all warnings are allowed, and return it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("error", category=RuntimeWarning)
        model.fit(X, y, sample_weight=weights)
        assert (np.diff(model.objective_path_) <= 0).all()
        assert np.isfinite(model.objective_path_).all()
        for value in (model.coef_, model.intercept_, *model.gradient_coef_.values()):
            assert np.isfinite(value).all()
        assert model.predict(X).shape == np.shape(y)
        if hasattr(model, "predict_proba"):
            assert np.isfinite(model.predict_proba(X)).all()
            assert not np.isnan(model.predict_log_proba(X)).any()
    told = [str(w.message) for w in caught]
    assert all(allowed and re.match(allowed, message) for message in told), told
    return model


def targets(kind):
    return CLASSES if issubclass(kind, C) else NUMBERS


FAST = ["tiny", "all equal", "copies"]


@pytest.mark.parametrize("samples", FAST)
@pytest.mark.parametrize("kind", [C, R])
def test_samples_with_the_defaults(kind, samples):
    fitted(kind(NETWORK), SAMPLES[samples](), targets(kind))


@pytest.mark.parametrize(("kind", "samples"), [(C, "far from zero"), (R, "all equal")])
def test_samples_with_the_random_network(kind, samples):
    fitted(kind(random_state=0), SAMPLES[samples](), targets(kind))


@pytest.mark.slow
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("backbone", ["network", "random"])
@pytest.mark.parametrize("options", [{}, {"features": "activation"}, {"n_linearizations": 2}])
@pytest.mark.parametrize("kind", [C, R, *SEARCHES])
def test_samples_with_chosen_penalties(kind, options, backbone, samples):
    model = kind(NETWORK if backbone == "network" else None, random_state=0, **options)
    allowed = UNSCALED if backbone == "random" and samples == "of all sizes" else ""
    fitted(model, SAMPLES[samples](), targets(kind), allowed=allowed)


@pytest.mark.slow
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("loss", ["log_loss", "squared", "squared_error", "huber"])
def test_samples_with_extreme_penalties(loss, penalties, samples):
    kind = C if loss in ("log_loss", "squared") else R
    for features in ("full", "activation", "gradient"):
        if features == "gradient" and penalties[1] == np.inf:
            continue
        names = {"alpha": penalties[0], "gradient_alpha": penalties[1], "loss": loss}
        model = kind(NETWORK, features=features, gradient_layers="all", **names)
        fitted(model, SAMPLES[samples](), targets(kind), allowed=f"{UNMOVED}|{STOPPED}")


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("loss", ["squared_error", "huber"])
def test_targets(loss, name):
    for kind in (R, SEARCHES[1]):
        fitted(kind(NETWORK, loss=loss), rows(), TARGETS[name])
    for alpha in (1e-12, 1.0, 1e12):
        model = R(NETWORK, loss=loss, alpha=alpha, gradient_alpha=alpha)
        fitted(model, rows(), TARGETS[name], allowed=UNMOVED)


@pytest.mark.parametrize("name", ["tiny", "offset", pytest.param("huge", marks=pytest.mark.slow)])
def test_predictions_follow_targets(name):
    """Another unit or another zero of the targets is one of the predictions."""
    expected = R(NETWORK, tol=1e-8).fit(rows(), NUMBERS).predict(rows())
    scale, shift = {"tiny": (1e-12, 0.0), "huge": (1e12, 0.0), "offset": (1.0, 1e12)}[name]
    found = fitted(R(NETWORK, tol=1e-8), rows(), scale * NUMBERS + shift).predict(rows())
    np.testing.assert_allclose((found - shift) / scale, expected, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [C, R])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, kind):
    y, weights = targets(kind), WEIGHTS[name]
    fitted(kind(NETWORK), rows(), y, weights)
    allowed = UNMOVED if name == "of all sizes" else ""
    fitted(kind(NETWORK, alpha=1e-4, gradient_alpha=1e-4), rows(), y, weights, allowed)
    search = SEARCHES[kind is R](NETWORK)
    if name in ("huge", "tiny"):
        fitted(search, rows(), y, weights)
        return
    with pytest.raises(ValueError, match=r"samples of fold \d: .*[Ss]ample.weight"):
        fitted(search, rows(), y, weights)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e-12, 1e12, 1e100])
@pytest.mark.parametrize("kind", [C, R, *SEARCHES])
def test_networks_with_extreme_weights(kind, scale):
    backbone = network(scale)
    fitted(kind(backbone), rows(), targets(kind))
    if kind not in SEARCHES:
        for n in (1, 2):
            options = {"alpha": 1e-4, "gradient_alpha": 1e-4, "n_linearizations": n}
            fitted(kind(backbone, **options), rows(), targets(kind), allowed=UNMOVED)


@pytest.mark.parametrize("kind", [C, R, pytest.param(SEARCHES[0], marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"features": "activation"}])
def test_networks_whose_squares_overflow(kind, options):
    with pytest.raises((ValueError, FloatingPointError), match=r"[Ss]cale X"):
        fitted(kind(network(1e300), **options), rows(), targets(kind))


@pytest.mark.slow
def test_a_thousand_classes_of_one_sample():
    X = np.random.default_rng(0).normal(size=(1000, 20))
    with pytest.warns(UserWarning, match="number of unique classes"):
        model = C(alpha=1e-3, gradient_alpha=1e-3, random_state=0).fit(X, np.arange(1000))
    assert model.score(X, np.arange(1000)) > 0.99
    assert (np.diff(model.objective_path_) <= 0).all()


@pytest.mark.parametrize("alpha", [1e-12, "auto", pytest.param(1e12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [C, R])
def test_many_more_features_than_samples(kind, alpha):
    X = np.random.default_rng(0).normal(size=(24, 5000))
    fitted(kind(nn.Identity(), features="activation", alpha=alpha), X, targets(kind))
