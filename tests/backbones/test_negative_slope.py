"""``negative_slope``: ReLUs of the head with a slope, against networks written with it."""

import functools
import pickle

import numpy as np
import pytest
import torch
from sklearn.model_selection import GridSearchCV
from torch import nn
from torch.nn.functional import leaky_relu

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    load,
)

N, SLOPE = 40, 0.2
X = np.random.default_rng(0).normal(size=(N, 2, 8, 8)).astype(np.float32)
Y = np.arange(N) % 3
OPTIONS = {"gradient_layers": "middle", "alpha": 0.02, "gradient_alpha": 0.01}
OPTIONS |= {"precision": "float64", "tol": 1e-14}


BOUNDED = nn.Hardtanh(0, 1)


class Net(nn.Module):
    """ReLUs below the gradient layer ``middle``, beside it and above it."""

    def __init__(self, kind="relu", slope=None):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.slope = kind, slope
        self.bottom, self.middle, self.top = (
            nn.Conv2d(i, o, 3, padding=1) for i, o in ((2, 6), (6, 6), (6, 8))
        )
        with torch.no_grad():
            self.middle.weight.mul_(8)  # beyond the bounds

    def relu(self, x):
        slope = 0.0 if self.slope is None else self.slope
        if self.kind in ("relu6", "hardtanh"):
            bounded, most = (nn.functional.relu6, 6) if self.kind == "relu6" else (BOUNDED, 1)
            written = torch.clamp(leaky_relu(x, slope), max=most)
            return bounded(x) if self.slope is None else written
        if self.kind == "leaky":
            return leaky_relu(x, 0.01 if self.slope is None else self.slope)
        return torch.relu(x) if self.slope is None else leaky_relu(x, self.slope)

    def forward(self, x):
        x = torch.relu(self.bottom(x))
        beside = torch.relu(self.bottom(x[:, :2]))
        x = self.relu(self.middle(x)) + beside
        return self.relu(self.top(x))


@functools.cache
def net(kind="relu", slope=None):
    """Return a network that all tests share, and so its captured graph."""
    return Net(kind, slope)


@pytest.mark.parametrize("kind", ["relu", "relu6", "hardtanh", "leaky"])
def test_classifier_is_that_of_the_leaky_network(kind):
    """ReLUs below and beside the gradient layer stay as they are."""
    model = GradientFeatureClassifier(net(kind), negative_slope=SLOPE, **OPTIONS).fit(X, Y)
    expected = GradientFeatureClassifier(net(kind, SLOPE), **OPTIONS).fit(X, Y)
    plain = GradientFeatureClassifier(net(kind), **OPTIONS).fit(X, Y)
    found = model.decision_function(X)
    np.testing.assert_allclose(found, expected.decision_function(X), atol=1e-6)
    assert abs(found - plain.decision_function(X)).max() > 1e-2
    np.testing.assert_allclose(
        model.gradient_coef_["middle.weight"], expected.gradient_coef_["middle.weight"], atol=1e-6
    )


def test_regressor():
    y = np.random.default_rng(1).normal(size=(N, 2))
    model = GradientFeatureRegressor(net("relu"), negative_slope=SLOPE, **OPTIONS).fit(X, y)
    expected = GradientFeatureRegressor(net("relu", SLOPE), **OPTIONS).fit(X, y)
    np.testing.assert_allclose(model.predict(X), expected.predict(X), atol=1e-6)


def test_slope_of_zero_is_a_plain_relu():
    model = GradientFeatureClassifier(net("leaky"), negative_slope=0, **OPTIONS).fit(X, Y)
    expected = GradientFeatureClassifier(net("relu"), **OPTIONS).fit(X, Y)
    np.testing.assert_allclose(model.decision_function(X), expected.decision_function(X), atol=1e-6)


def test_without_gradients_there_is_no_head():
    options = {**OPTIONS, "features": "activation"}
    model = GradientFeatureClassifier(net("relu"), negative_slope=SLOPE, **options).fit(X, Y)
    plain = GradientFeatureClassifier(net("relu"), **options).fit(X, Y)
    assert np.array_equal(model.coef_, plain.coef_)


def test_round_trips(tmp_path):
    model = GradientFeatureClassifier(net("relu"), negative_slope=SLOPE, **OPTIONS).fit(X, Y)
    expected = model.predict_proba(X)
    model.save(tmp_path / "model.gf")
    stored = load(tmp_path / "model.gf", backbone=Net())
    assert np.array_equal(stored.predict_proba(X), expected)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), expected)
    with torch.no_grad():
        exported = model.to_torch()(torch.tensor(X).double())
    np.testing.assert_allclose(exported.numpy(), expected, atol=1e-6)


def test_searched():
    """The slopes of a grid share what the frozen layers compute."""
    grid = {"negative_slope": [None, 0.1, 0.5]}
    model = GradientFeatureClassifier(net("relu"), **{**OPTIONS, "tol": 1e-4})
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(X, Y)
    scores = search.cv_results_["mean_test_score"]
    for slope, score in zip(grid["negative_slope"][1:], scores[1:], strict=True):
        alone = GridSearchCV(model.set_params(backbone=net("relu", slope)), {"tol": [1e-4]}, cv=2)
        assert alone.fit(X, Y).best_score_ == score
    options = {"alphas": [0.02], "gradient_alphas": [0.01], "cv": 2, "gradient_layers": "middle"}
    options |= {"scoring": "accuracy", "precision": "float64"}
    own = GradientFeatureClassifierCV(net("relu"), negative_slope=0.5, **options)
    assert own.fit(X, Y).best_score_ == scores[2]


# --- errors ----------------------------------------------------------------------------------


class Refused(Net):
    """A network that cannot be captured: its path depends on the numbers."""

    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


def test_no_relu_above_the_gradient_layers():
    smooth = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GELU())
    model = GradientFeatureClassifier(
        smooth, gradient_layers="2", negative_slope=SLOPE, alpha=1e-4, gradient_alpha=1e-4
    )
    with pytest.raises(
        ValueError,
        match=r"negative_slope=0\.2 changes nothing: there is no ReLU.* Set negative_slope=None",
    ):
        model.fit(X, Y)


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured")
def test_network_without_a_graph():
    with pytest.raises(
        ValueError, match=r"negative_slope=0\.2 needs a backbone that .* Set negative_slope=None"
    ):
        GradientFeatureClassifier(Refused(), negative_slope=SLOPE, **OPTIONS).fit(X, Y)


@pytest.mark.parametrize("slope", [-0.1, 1, "relu"])
def test_slopes_out_of_range(slope):
    with pytest.raises(ValueError, match="negative_slope"):
        GradientFeatureClassifier(net("relu"), negative_slope=slope, **OPTIONS).fit(X, Y)
