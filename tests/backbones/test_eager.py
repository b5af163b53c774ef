"""Modules that cannot be captured as a graph."""

import warnings

import numpy as np
import pytest
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
    plain = estimator(tiny_net(), precision="float64", tol=1e-10, max_iter=200).fit(X, Y)
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


def test_activation_alone_needs_no_graph():
    model = estimator(Branching(), features="activation").fit(X, Y)
    plain = estimator(tiny_net(), features="activation").fit(X, Y)
    np.testing.assert_allclose(model.predict_proba(X), plain.predict_proba(X), atol=1e-5)


def test_refused_capture_prints_nothing(capfd):
    with pytest.warns(UserWarning, match="cannot be captured"):
        estimator(Branching()).fit(X, Y)
    assert capfd.readouterr() == ("", "")
