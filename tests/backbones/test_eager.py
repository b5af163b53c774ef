"""Modules that cannot be captured as a graph."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tests.tiny import X, Y, estimator, tiny_net


class Branching(nn.Module):
    """The tiny network, with a branch on the data that is never taken."""

    def __init__(self):
        super().__init__()
        self.net = tiny_net()

    def forward(self, x):
        if x.abs().sum() > 1e9:
            return self.net(x) * 2
        return self.net(x)


def test_module_that_cannot_be_captured():
    with pytest.warns(UserWarning, match="cannot be captured as a graph") as caught:
        model = estimator(Branching(), precision="float64", tol=1e-10, max_iter=200).fit(X, Y)
    assert len(caught) == 1
    plain = estimator(precision="float64", tol=1e-10, max_iter=200).fit(X, Y)
    assert model.gradient_layers_ == [f"net.{name}" for name in plain.gradient_layers_]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(model.predict_proba(X), plain.predict_proba(X), atol=1e-5)


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
@pytest.mark.parametrize(
    ("gradient_layers", "expected"),
    [
        (1, ["net.2.weight", "net.2.bias"]),
        (2, ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]),
        ("all", ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]),
        ("net.0", ["net.0.weight", "net.0.bias"]),
        ("*.bias", ["net.0.bias", "net.2.bias"]),
    ],
)
def test_gradient_layers_without_a_graph(gradient_layers, expected):
    model = estimator(Branching(), gradient_layers=gradient_layers, batch_size=10).fit(X, Y)
    assert model.gradient_layers_ == expected
    assert list(model.gradient_coef_) == expected


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
def test_too_many_blocks_without_a_graph():
    with pytest.raises(ValueError, match="more blocks than the backbone has: 2"):
        estimator(Branching(), gradient_layers=3).fit(X, Y)


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
def test_attention_is_found_in_a_graph_alone():
    with pytest.raises(ValueError, match=r"needs a backbone that torch\.export can capture"):
        estimator(Branching(), gradient_layers="after_attention").fit(X, Y)


def test_activation_alone_needs_no_graph():
    model = estimator(Branching(), features="activation").fit(X, Y)
    plain = estimator(features="activation").fit(X, Y)
    np.testing.assert_allclose(model.predict_proba(X), plain.predict_proba(X), atol=1e-5)


def test_refused_capture_prints_nothing(capfd):
    with pytest.warns(UserWarning, match="cannot be captured"):
        estimator(Branching()).fit(X, Y)
    assert capfd.readouterr() == ("", "")


# --- the activation below the output -----------------------------------------------------------


class Upper(nn.Module):
    """A network without a graph, with layers above the activation and a tied parameter."""

    def __init__(self):
        super().__init__()
        self.net = Branching()
        self.head, self.tied = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.head.weight

    def forward(self, x):
        return self.tied(self.head(self.net(x)))


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
@pytest.mark.parametrize("gradient_layers", ["last", "all", 2])
def test_activation_layer_without_a_graph(gradient_layers):
    options = {"gradient_layers": gradient_layers, "precision": "float64", "tol": 1e-10}
    model = estimator(Upper(), activation_layer="net", max_iter=200, **options).fit(X, Y)
    plain = estimator(Branching(), max_iter=200, **options).fit(X, Y)
    assert model.gradient_layers_ == [f"net.{name}" for name in plain.gradient_layers_]
    np.testing.assert_allclose(model.predict_proba(X), plain.predict_proba(X), atol=1e-8)
    with pytest.raises(ValueError, match=r"'head\.weight' .* no derivative in it"):
        estimator(Upper(), activation_layer="net", gradient_layers="head").fit(X, Y)


class Gradientless(Branching):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
def test_activation_without_a_derivative():
    with pytest.raises(ValueError, match=r"no derivative in any parameter.* under torch.no_grad"):
        estimator(Gradientless()).fit(X, Y)
