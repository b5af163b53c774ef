"""The terms of the logits as functions of the input."""

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat.inspection._attribution import InputTerm, relative_displacements
from tests.tiny import X, Y, estimator, tiny_net


def test_terms_have_the_scales_of_activation_layers():
    model = estimator(activation_layer=["1", "3"], precision="float64").fit(X, Y)
    term = InputTerm(*model._extractor_and_model(), "full")
    x = term.inputs(X[:3])
    expected = model.decision_function(X[:3]) - model.intercept_
    np.testing.assert_allclose(term.values(x).cpu(), expected, atol=1e-12)
    move = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    change = (term.values(x + 1e-6 * move) - term.values(x - 1e-6 * move))[:, 1] / 2e-6
    gradient = term.gradient(x, [1, 1, 1])
    torch.testing.assert_close((gradient * move).sum((1, 2, 3)), change, rtol=1e-5, atol=1e-8)


@pytest.fixture
def around_a_moved_network():
    """A linear model around another point than the pretrained parameters, and its oracle."""
    model = estimator(
        smooth_net(), gradient_layers="all", n_linearizations=2, gradient_alpha=1e-3,
        precision="float64", device="cpu",
    ).fit(X, Y)  # fmt: skip
    generator = np.random.default_rng(0)
    move = {
        name: 0.1 * generator.normal(size=value.shape)
        for name, value in model.gradient_coef_.items()
    }
    model.gradient_coef_ = {name: u + move[name] for name, u in model.gradient_coef_.items()}
    return model, move


def smooth_net():
    return nn.Sequential(*(nn.Tanh() if isinstance(m, nn.ReLU) else m for m in tiny_net()))


def logits(model, move, x, term):
    """The terms of the logits of a sample, by torch.func on the pretrained network."""
    module = smooth_net().double()
    at = {
        name: value.detach() + torch.from_numpy(model.linearization_point_[name])
        for name, value in module.named_parameters()
    }
    f, tangent = torch.func.jvp(
        lambda parameters: torch.func.functional_call(module, parameters, (x,)),
        (at,),
        ({name: torch.from_numpy(move[name]) for name in at},),
    )
    coef, omega = torch.from_numpy(model.coef_), torch.from_numpy(model.omega_)
    parts = {"activation": f @ coef.T, "gradient": tangent @ omega.T}
    return sum(parts.values()) if term == "full" else parts[term]


@pytest.mark.parametrize("term", ["gradient", "activation", "full"])
def test_terms_of_a_linear_model_around_a_moved_network(around_a_moved_network, term):
    model, move = around_a_moved_network
    found = InputTerm(*model._extractor_and_model(), term)
    x = found.inputs(X[:3])
    torch.testing.assert_close(found.values(x), logits(model, move, x, term))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(logits(model, move, x, term)[:, 2].sum(), x)
    torch.testing.assert_close(found.gradient(x, [2, 2, 2]), expected)


def test_displacements_are_those_from_the_pretrained_network(around_a_moved_network):
    """Not those of the last move alone."""
    model, _ = around_a_moved_network
    found = relative_displacements(*model._extractor_and_model(), {"upper": ["2.weight"]})
    size = smooth_net()[2].weight.detach().double().norm()
    expected = np.linalg.norm(model.gradient_coef_["2.weight"]) / float(size)
    assert found["upper"] == pytest.approx(expected)
