"""Gradients at other parameters than the activations, and random output weights."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureRegressor
from sklearn_gradfeat.cache._store import memory_store
from sklearn_gradfeat.inspection._contributions import LayerContributionDisplay
from tests.networks import build
from tests.oracles import dense_jacobian, dense_optimum, dense_regression, ntk_scales
from tests.tiny import NET, estimator, tiny_net
from tests.tiny import X as IMAGES
from tests.tiny import Y as LABELS

rng = np.random.default_rng(0)
N = 30
X = rng.normal(size=(N, 2, 5, 5))
CLASSES = np.arange(N) % 3
TARGETS = rng.normal(size=(N, 2))
TIGHT = {"tol": 1e-22, "max_iter": 3000, "precision": "float64"}


def other_net():
    net = tiny_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def explicit(model, kind):
    """Activations of one network, rows Ω J of another in NTK units, float64."""
    (module, names), (other, _) = build(kind), build(kind, seed=1)
    assert [f"gradient.{name}" for name in names] == model.gradient_layers_
    with torch.no_grad():
        f = module(torch.tensor(X))
    f = (f.flatten(2).mean(2) if f.ndim > 2 else f).numpy()
    J = dense_jacobian(other, names, X) * ntk_scales(other, names)
    return f, np.einsum("cd,ndp->ncp", model.omega_, J)


# --- against a dense Jacobian ----------------------------------------------------------------


@pytest.mark.parametrize("omega", ["fitted", "random"])
@pytest.mark.parametrize("kind", ["plain", "normed"])
def test_classifier_at_other_parameters(kind, omega):
    """The activations of one network, the Jacobian of another."""
    (module, names), (other, _) = build(kind), build(kind, seed=1)
    model = GradientFeatureClassifier(
        module, gradient_backbone=other, gradient_layers=names, omega=omega,
        alpha=0.01, gradient_alpha=0.003, random_state=0, **TIGHT,
    ).fit(X, CLASSES)  # fmt: skip
    f, g = explicit(model, kind)
    value, logits = dense_optimum(f, g, CLASSES, np.ones(N), 0.01, 0.003, 3, "multinomial")
    assert model.objective_path_[-1] == pytest.approx(value, rel=1e-7)
    got = model.decision_function(X)
    centred = got - got.mean(1, keepdims=True)
    np.testing.assert_allclose(centred, logits - logits.mean(1, keepdims=True), atol=5e-4)


@pytest.mark.parametrize("omega", ["fitted", "random"])
def test_regressor_at_other_parameters(omega):
    (module, names), (other, _) = build("plain"), build("plain", seed=1)
    model = GradientFeatureRegressor(
        module, gradient_backbone=other, gradient_layers=names, omega=omega,
        alpha=0.01, gradient_alpha=0.003, random_state=0, **TIGHT,
    ).fit(X, TARGETS)  # fmt: skip
    f, g = explicit(model, "plain")
    expected = dense_regression(f, g, TARGETS, np.ones(N), 0.01, 0.003)
    np.testing.assert_allclose(model.predict(X), expected, atol=1e-6)


# --- the network of the gradients ------------------------------------------------------------


def test_the_same_network_changes_nothing():
    names = ["2.weight", "2.bias"]
    plain = estimator(precision="float64", tol=1e-12).fit(IMAGES, LABELS)
    same = clone(plain).set_params(gradient_backbone=NET).fit(IMAGES, LABELS)
    assert plain.gradient_layers_ == names
    assert same.gradient_layers_ == [f"gradient.{name}" for name in names]
    for name in names:
        np.testing.assert_allclose(
            same.gradient_coef_[f"gradient.{name}"], plain.gradient_coef_[name], atol=1e-8
        )


def test_choice_of_layers_is_in_the_network_of_the_gradients():
    model = estimator(gradient_backbone=other_net, gradient_layers=["0.*"], max_iter=5, tol=1.0)
    assert model.fit(IMAGES, LABELS).gradient_layers_ == ["gradient.0.weight", "gradient.0.bias"]
    with pytest.raises(ValueError, match=r"'gradient\.0' matches no submodule"):
        model.set_params(gradient_layers="gradient.0").fit(IMAGES, LABELS)


def test_activations_do_not_depend_on_it():
    model = estimator(gradient_backbone=other_net, features="activation").fit(IMAGES, LABELS)
    assert np.array_equal(model.coef_, estimator(features="activation").fit(IMAGES, LABELS).coef_)


def test_two_factories_draw_apart():
    def lazy_net():
        return nn.Sequential(nn.LazyConv2d(6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    options = {"random_state": 0, "max_iter": 3, "tol": 1.0}
    model = estimator(lazy_net, gradient_backbone=lazy_net, **options)
    pair = model.fit(IMAGES, LABELS)._extractor.backbone.module.module
    assert torch.equal(pair.gradient[0].weight, pair.fixed[0].weight)
    assert not torch.equal(pair.gradient[0].weight, pair.activation[0].weight)


def test_activation_layer_holds_for_both():
    options = {"activation_layer": "3", "max_iter": 5, "tol": 1.0}
    model = estimator(gradient_backbone=other_net(), **options).fit(IMAGES, LABELS)
    assert model.gradient_layers_ == ["gradient.2.weight", "gradient.2.bias"]


def test_activations_of_another_length():
    short = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"gradient_backbone has 4 .* and backbone has 6.*same"):
        estimator(gradient_backbone=short).fit(IMAGES, LABELS)


# --- the output weights ----------------------------------------------------------------------


def test_activations_in_bfloat16_are_those_of_the_backbone():
    """What the other network returns, however large, leaves no trace in them."""
    loud = copy.deepcopy(NET)
    with torch.no_grad():
        loud[-1 if hasattr(loud[-1], "weight") else 0].weight.mul_(1e3)
    options = {"precision": "bfloat16", "gradient_layers": "last", "tol": 1e-10, "max_iter": 500}
    other = estimator(gradient_backbone=loud, **options).fit(IMAGES, LABELS)
    plain = estimator(**{**options, "precision": "float32"}).fit(IMAGES, LABELS)
    np.testing.assert_allclose(other.omega_, plain.omega_, rtol=1e-2, atol=1e-3)


def test_random_output_weights():
    fitted, first, again, other = (
        estimator(omega=omega, random_state=seed).fit(IMAGES, LABELS)
        for omega, seed in (("fitted", 0), ("random", 0), ("random", 0), ("random", 1))
    )
    assert np.array_equal(first.omega_, again.omega_)
    assert np.array_equal(first.coef_, again.coef_)
    for one in (fitted, other):
        assert abs(np.corrcoef(first.omega_.ravel(), one.omega_.ravel())[0, 1]) < 0.9
    assert 0.3 < np.square(first.omega_).mean() / np.square(fitted.omega_).mean() < 3


# --- what becomes of a fitted model ----------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    return estimator(gradient_backbone=other_net(), omega="random").fit(IMAGES, LABELS)


def test_copies_share_the_network_and_its_features(fitted):
    twin = clone(fitted)
    assert twin.gradient_backbone is fitted.gradient_backbone
    before = memory_store().nbytes
    twin.fit(IMAGES, LABELS)
    assert memory_store().nbytes == before
    assert twin._extractor.backbone is fitted._extractor.backbone


def test_pickle_and_export(fitted):
    expected = fitted.predict_proba(IMAGES)
    assert np.array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(IMAGES), expected)
    with torch.no_grad():
        found = fitted.to_torch()(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_contributions(fitted):
    pytest.importorskip("matplotlib")
    assert list(LayerContributionDisplay.from_estimator(fitted, IMAGES).parts) == ["gradient.2"]


def test_file(fitted, tmp_path):
    with pytest.raises(ValueError, match="gradient_backbone can be stored by pickle only"):
        fitted.save(tmp_path / "model.safetensors")
