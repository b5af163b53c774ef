"""Modules that cannot be captured as a graph."""

import pickle
import re
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import load
from sklearn_gradfeat.backbones._eager import EagerHead
from sklearn_gradfeat.backbones._graph import ActivationModule
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


class OtherInGraphs(nn.Module):
    """A network with other code for torch.export."""

    def __init__(self):
        super().__init__()
        self.net = tiny_net()

    def forward(self, x):
        return self.net(2 * x if torch.compiler.is_compiling() else x)


@pytest.mark.parametrize("options", [{}, {"features": "activation"}])
def test_graph_that_is_another_function_is_not_used(options, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = estimator(OtherInGraphs(), **options).fit(X, Y)
        model.save(tmp_path / "model")
        loaded = load(tmp_path / "model", OtherInGraphs())
        restored = pickle.loads(pickle.dumps(model))
    told = ["the graph of torch.export has another output" in str(w.message) for w in caught]
    assert told == ([] if options else [True])
    plain = estimator(Branching(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = plain.fit(X, Y).predict_proba(X + 1)
    for each in (model, loaded, restored):
        np.testing.assert_allclose(each.predict_proba(X + 1), expected, atol=1e-5)


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
    plain = estimator(Branching(), activation_layer=None, max_iter=200, **options).fit(X, Y)
    assert model.gradient_layers_ == [f"net.{name}" for name in plain.gradient_layers_]
    np.testing.assert_allclose(model.predict_proba(X), plain.predict_proba(X), atol=1e-8)
    with pytest.raises(ValueError, match=r"'head\.weight' .* no derivative in it"):
        estimator(Upper(), activation_layer="net", gradient_layers="head").fit(X, Y)


class Within(Branching):
    """The network of :class:`Branching`, called in a context or changed by a function."""

    def __init__(self, context, change=torch.clone):
        super().__init__()
        self.context, self.change = context, change

    def forward(self, x):
        with self.context():
            return self.change(super().forward(x))


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
def test_no_grad_is_ignored_with_a_warning():
    expected = estimator(Branching(), precision="float64").fit(X, Y)
    with pytest.warns(UserWarning, match=r"backbone in 'net\.2\.weight' .* under torch\.no_grad"):
        model = estimator(Within(torch.no_grad), precision="float64").fit(X, Y)
    assert model.gradient_layers_ == expected.gradient_layers_
    np.testing.assert_array_equal(model.decision_function(X), expected.decision_function(X))


class Gated(Branching):
    """A network with all parameters on two paths, one of them in a context."""

    def __init__(self, context):
        super().__init__()
        self.context = context

    def forward(self, x):
        hidden = super().forward(x)
        with self.context():
            gate = super().forward(x).sigmoid()
        return hidden * gate


@pytest.mark.filterwarnings("ignore:The (backbone cannot|derivative of):UserWarning")
def test_no_grad_on_one_of_two_paths():
    settings = {"precision": "float64", "gradient_layers": "all", "tol": 1e-14}
    model = estimator(Gated(torch.no_grad), **settings).fit(X, Y)
    plain = estimator(Gated(nullcontext), **settings).fit(X, Y)
    np.testing.assert_array_equal(model.decision_function(X), plain.decision_function(X))


@pytest.mark.parametrize("outside", [True, False])
def test_the_gradient_mode_outside_of_a_network_stays(outside):
    module = ActivationModule(Within(torch.enable_grad), None)
    with torch.set_grad_enabled(outside):
        EagerHead(module, [])(torch.from_numpy(X))
        assert torch.is_grad_enabled() == outside


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
@pytest.mark.parametrize(
    ("backbone", "match"),
    [
        (Within(nullcontext, torch.detach), r"no derivative in any parameter.* after detach"),
        (Within(torch.inference_mode), r"in any parameter.* under torch.inference_mode\. Take"),
        (Gated(torch.inference_mode), r"cannot be differentiated: Inference.*inference_mode, out"),
    ],
)
def test_activation_without_a_derivative(backbone, match):
    with pytest.raises(ValueError, match=re.compile(match, re.S)):
        estimator(backbone).fit(X, Y)
