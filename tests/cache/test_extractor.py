"""The scales of several activation layers."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn
from torch.func import jacrev

from sklearn_gradfeat import GradientFeatureClassifierCV, GradientFeatureRegressor
from sklearn_gradfeat.linearized import LinearizedHead
from tests.cache.stores import model, passes
from tests.tiny import X, Y, estimator, tiny_net

LAYERS = ["1", "3"]
ROWS = X.astype(np.float64)
DOUBLE = tiny_net().double().requires_grad_(False)
WEIGHTS = np.random.default_rng(1).integers(0, 4, len(X)).astype(float)


def parts(x, weight=None):
    """The averaged outputs of both layers of the tiny network, written out."""
    lower = torch.relu(nn.functional.conv2d(x, DOUBLE[0].weight, DOUBLE[0].bias))
    kernel = DOUBLE[2].weight if weight is None else weight
    upper = torch.relu(nn.functional.conv2d(lower, kernel, DOUBLE[2].bias))
    return [lower.mean((2, 3)), upper.mean((2, 3))]


def scaled(x, weights):
    """The activation, by numpy."""
    with torch.no_grad():
        found = [part.numpy() for part in parts(torch.from_numpy(x))]
    rms = [np.sqrt(np.average((part**2).mean(1), weights=weights)) for part in found]
    return np.hstack([part / size for part, size in zip(found, rms, strict=True)]), rms


def fit(weights=None, **parameters):
    options = {"activation_layer": LAYERS, "precision": "float64", "max_iter": 200, "tol": 1e-8}
    return estimator(**{**options, **parameters}).fit(ROWS, Y, sample_weight=weights)


@pytest.mark.parametrize("features", ["full", "activation"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_every_layer_has_unit_mean_square(features, weights):
    fitted = fit(weights, features=features)
    expected, rms = scaled(ROWS, weights)
    np.testing.assert_allclose(fitted.transform(ROWS), expected, rtol=1e-12)
    assert list(fitted.activation_layers_) == LAYERS
    np.testing.assert_allclose(list(fitted.activation_layers_.values()), 1 / np.array(rms))
    if features == "activation":
        logits = expected @ fitted.coef_.T + fitted.intercept_
        np.testing.assert_allclose(fitted.decision_function(ROWS), logits, rtol=1e-10)


def test_integer_weights_are_repetitions():
    repeated = np.repeat(np.arange(len(X)), WEIGHTS.astype(int))
    expected = estimator(activation_layer=LAYERS, precision="float64", max_iter=200, tol=1e-8).fit(
        ROWS[repeated], Y[repeated]
    )
    np.testing.assert_allclose(
        fit(WEIGHTS).predict_proba(ROWS), expected.predict_proba(ROWS), atol=1e-5
    )


def test_products_are_those_of_the_dense_jacobian():
    extractor = fit(device="cpu")._extractor
    network = extractor.network(["2.weight"])
    x = torch.from_numpy(ROWS[:5])
    boundary = network.boundary(x)
    _, rms = scaled(ROWS, None)

    def activation(weight):
        return torch.cat([p / size for p, size in zip(parts(x, weight), rms, strict=True)], 1)

    (weight,) = network.parameters.values()
    J = jacrev(activation)(weight.clone()).flatten(2)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(weight.numel(), generator=generator, dtype=torch.float64)
    v = torch.randn(5, 10, generator=generator, dtype=torch.float64)
    for head in (network.head, lambda p, z: network.graph(*p, *z)[0]):
        linearized = LinearizedHead(head, network.parameters, "standard")
        torch.testing.assert_close(linearized.jvp(boundary, u), J @ u)
        torch.testing.assert_close(linearized.vjp(boundary, v), torch.einsum("nd,ndp->p", v, J))


def test_layer_of_zeros_keeps_its_scale():
    network = tiny_net()
    nn.init.zeros_(network[2].weight)
    nn.init.constant_(network[2].bias, -1.0)
    fitted = fit(backbone=network, features="activation")
    assert list(fitted.activation_layers_.values())[1] == 1
    assert not fitted.transform(ROWS)[:, 4:].any()


@pytest.mark.parametrize("activation_layer", [None, "3"])
def test_one_layer_has_no_scale(activation_layer):
    fitted = fit(activation_layer=activation_layer)
    assert fitted.activation_layers_ == {activation_layer or "": 1}
    with torch.no_grad():
        expected = parts(torch.from_numpy(ROWS))[1]
    np.testing.assert_allclose(fitted.transform(ROWS), expected, rtol=1e-12)


def test_clones_with_other_weights_share_the_frozen_network_and_have_their_own_scales():
    one, other = fit(), fit(WEIGHTS)
    assert one._extractor.backbone is other._extractor.backbone
    before = one.predict_proba(ROWS)
    assert one._extractor.scales != other._extractor.scales
    clone(other).fit(ROWS, Y)
    assert np.array_equal(one.predict_proba(ROWS), before)


@pytest.mark.parametrize("features", ["full", "activation"])
def test_scales_are_no_part_of_the_key_of_the_store(counted, features):
    for weights in (None, WEIGHTS):
        fitted = model(counted, activation_layer=LAYERS, features=features)
        fitted.fit(X, Y, sample_weight=weights).predict(X)
    assert passes(counted) == len(X)


def test_pickle_and_module_for_export():
    fitted = fit()
    expected = fitted.predict_proba(ROWS)
    assert np.array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(ROWS), expected)
    exported = torch.export.export(
        fitted.to_torch(), (torch.from_numpy(ROWS),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    found = exported.module()(torch.from_numpy(ROWS[:7]))
    np.testing.assert_allclose(found, expected[:7], atol=1e-12)


def test_regression_and_folds():
    options = {"activation_layer": 2, "precision": "float64"}
    regressor = GradientFeatureRegressor(tiny_net(), alpha=0.1, gradient_alpha=0.1, **options)
    regressor.fit(ROWS, Y.astype(float), sample_weight=WEIGHTS)
    assert regressor.coef_.shape == (1, 4 + 6 + 6)
    searched = GradientFeatureClassifierCV(
        tiny_net(), alphas=[0.1], gradient_alphas=[0.1], cv=2, tol=1e-8, **options
    ).fit(ROWS, Y)
    plain = fit(activation_layer=2)
    np.testing.assert_allclose(searched.predict_proba(ROWS), plain.predict_proba(ROWS), atol=1e-6)
