"""Targets at the ends of the range of float64."""

import numpy as np
import pytest

from sklearn_gradfeat import GradientFeatureRegressor


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 4)), rng.normal(size=30)


@pytest.mark.filterwarnings("ignore:The gradient term is zero")
@pytest.mark.parametrize("scale", [1e-139, 1e-12, 1e12, 1e139])
def test_scale_of_the_targets_scales_the_predictions(scale):
    X, y = data()
    options = {"features": "activation", "alpha": 0.1, "tol": 1e-8, "random_state": 0}
    expected = GradientFeatureRegressor(**options).fit(X, y).predict(X)
    found = GradientFeatureRegressor(**options).fit(X, scale * y).predict(X)
    np.testing.assert_allclose(found / scale, expected, rtol=1e-5, atol=1e-6)
    # The gradient features grow with the output weights, so the penalty counts less or more.
    full = (
        GradientFeatureRegressor(alpha=0.1, random_state=0, gradient_alpha=0.1)
        .fit(X, scale * y)
        .predict(X)
    )
    assert np.corrcoef(full / scale, y)[0, 1] > 0.5


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e154, 1e200, 1e307])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_targets_out_of_range_are_named(scale, fit_intercept):
    X, y = data()
    y = np.stack([y, scale * y], 1)
    with pytest.raises(ValueError, match=r"y deviates .* by up to .*Scale y, as sklearn\.compose"):
        GradientFeatureRegressor(fit_intercept=fit_intercept, alpha=1e-4, gradient_alpha=1e-4).fit(
            X, y
        )


def test_constant_targets_of_any_size():
    X, _ = data()
    for value in (0.0, 1e-300, 1e300):
        predictions = (
            GradientFeatureRegressor(alpha=0.1, gradient_alpha=0.1)
            .fit(X, np.full(30, value))
            .predict(X)
        )
        np.testing.assert_allclose(predictions, value)
