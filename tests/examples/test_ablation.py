"""Random parts of the linear model in examples/benchmarks, against a dense Jacobian."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureRegressor
from tests.networks import build
from tests.oracles import dense_jacobian, dense_optimum, dense_regression, ntk_scales

SCRIPTS = Path(__file__).parents[2] / "examples" / "benchmarks"
N = 30
PENALTIES = {"alpha": 0.01, "gradient_alpha": 0.003}
TIGHT = {**PENALTIES, "tol": 1e-22, "max_iter": 3000, "precision": "float64", "random_state": 0}


@pytest.fixture
def X():
    return np.random.default_rng(0).normal(size=(N, 2, 5, 5))


@pytest.fixture
def y():
    return np.arange(N) % 3


def networks(scripts, kind):
    """Return the activations' network, the gradients' network, both in one, and θ₂."""
    (module, names), (other, _) = build(kind), build(kind, seed=1)
    return module, other, together(scripts("_ablation").GradientsElsewhere, kind), names


@functools.cache
def together(gradients_elsewhere, kind):
    """Return both networks in one, which all tests share, and so its captured graph."""
    return gradients_elsewhere(build(kind)[0], build(kind, seed=1)[0])


def explicit(module, other, names, omega, X):
    """Return the activations of one network, and rows Ω J of another in NTK units, float64."""
    with torch.no_grad():
        f = module(torch.tensor(X))
    f = (f.flatten(2).mean(2) if f.ndim > 2 else f).numpy()
    J = dense_jacobian(other, names, X) * ntk_scales(other, names)
    return f, np.einsum("cd,ndp->ncp", omega, J)


@pytest.mark.parametrize("omega", ["fitted", "random"])
@pytest.mark.parametrize("kind", ["plain", "normed"])
def test_classifier_reaches_the_dense_optimum(kind, omega, scripts, X, y):
    module, other, elsewhere, names = networks(scripts, kind)
    random = scripts("_ablation").RandomOmegaClassifier
    estimator = random if omega == "random" else GradientFeatureClassifier
    layers = [f"gradient.{name}" for name in names]
    model = estimator(elsewhere, gradient_layers=layers, activation_layer=None, **TIGHT)
    model.fit(X, y)
    assert model.gradient_layers_ == layers
    f, g = explicit(module, other, names, model.omega_, X)
    value, logits = dense_optimum(f, g, y, np.ones(N), *PENALTIES.values(), 3, "multinomial")
    assert model.objective_path_[-1] == pytest.approx(value, rel=1e-7)
    found = model.decision_function(X)
    centred = found - found.mean(1, keepdims=True)
    np.testing.assert_allclose(centred, logits - logits.mean(1, keepdims=True), atol=5e-4)


def test_regressor_reaches_the_dense_optimum(scripts, X):
    targets = np.random.default_rng(1).normal(size=(N, 2))
    module, other, elsewhere, names = networks(scripts, "plain")
    layers = [f"gradient.{name}" for name in names]
    model = GradientFeatureRegressor(
        elsewhere, gradient_layers=layers, **TIGHT, activation_layer=None
    ).fit(X, targets)
    f, g = explicit(module, other, names, model.omega_, X)
    expected = dense_regression(f, g, targets, np.ones(N), *PENALTIES.values())
    np.testing.assert_allclose(model.predict(X), expected, atol=1e-6)


def test_gradients_of_the_same_network_change_nothing(scripts, X, y):
    module, names = build("plain")
    same = scripts("_ablation").GradientsElsewhere(module, module)
    plain = GradientFeatureClassifier(
        module, gradient_layers=names, **TIGHT, activation_layer=None
    ).fit(X, y)
    layers = [f"gradient.{name}" for name in names]
    model = GradientFeatureClassifier(
        same, gradient_layers=layers, **TIGHT, activation_layer=None
    ).fit(X, y)
    for name in names:
        moved = model.gradient_coef_[f"gradient.{name}"]
        np.testing.assert_allclose(moved, plain.gradient_coef_[name], atol=1e-8)


def test_activations_do_not_depend_on_the_network_of_the_gradients(scripts, X, y):
    module, _, elsewhere, _ = networks(scripts, "plain")
    options = {**TIGHT, "features": "activation"}
    expected = GradientFeatureClassifier(module, **options, activation_layer=None).fit(X, y).coef_
    found = GradientFeatureClassifier(elsewhere, **options, activation_layer=None).fit(X, y).coef_
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_random_omega_depends_on_the_seed_and_keeps_the_size(scripts, X, y):
    module, names = build("plain")
    options = {**TIGHT, "gradient_layers": names, "activation_layer": None, "tol": 1e-6}
    random = scripts("_ablation").RandomOmegaClassifier
    fitted = GradientFeatureClassifier(module, **options).fit(X, y)
    first, again, other = (
        random(module, **{**options, "random_state": seed}).fit(X, y) for seed in (0, 0, 1)
    )
    assert np.array_equal(first.omega_, again.omega_)
    assert np.array_equal(first.coef_, again.coef_)
    for one in (fitted, other):
        assert abs(np.corrcoef(first.omega_.ravel(), one.omega_.ravel())[0, 1]) < 0.9
    size = np.square(first.omega_).mean()
    assert size == pytest.approx(np.square(fitted.omega_).mean(), rel=1e-6)


def test_random_parameters(scripts):
    """Each of the four combinations leaves the other layers as they are."""
    network, _ = scripts("_setup").encoder("convnet-vae")
    pretrained = network.state_dict()
    for theta_1 in (False, True):
        for theta_2 in (False, True):
            layers = ["conv4", "conv5"]
            other = scripts("_ablation").partly_random(network, layers, theta_1, theta_2, 0)
            for name, value in other.state_dict().items():
                kept = theta_2 if name.startswith(("conv4", "conv5")) else theta_1
                assert torch.equal(value, pretrained[name]) == kept
