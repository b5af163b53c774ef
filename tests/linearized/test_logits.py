"""Logits of the linear model, against dense Jacobians in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.backbones import freeze
from sklearn_gradfeat.linearized import LinearizedHead, LinearModel, linear_logits
from tests.networks import NETWORKS, build
from tests.oracles import dense_jacobian

N_OUTPUTS = 3


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def random_model(head, n_features):
    moves = {n: normal(*v.shape, seed=5) for n, v in zip(head.names, head.values, strict=True)}
    weights, omega = normal(2, N_OUTPUTS, n_features, seed=6)
    return LinearModel(weights, normal(N_OUTPUTS, seed=7), omega, moves)


@pytest.fixture(params=NETWORKS)
def linearized(request):
    """Return a head, the inputs of it, and activations and Jacobians of all samples."""
    module, names = build(request.param)
    x = normal(5, 2, 5, 5, seed=4)
    network = freeze(module, x[:2], torch.float64, None).network(names)
    head = LinearizedHead(network.head, network.parameters, "standard")
    boundary = (x,) if network.trunk is None else network.trunk(x)
    if request.param == "residual":  # dense Jacobians are those of networks without batch norm
        module = Activation(network, boundary)
    return head, boundary, module, x


class Activation(nn.Module):
    """The head as a module on its own inputs."""

    def __init__(self, network, boundary):
        super().__init__()
        self.network, self.boundary = network, boundary
        self.names = {name: name.replace(".", "_") for name in network.parameters}
        for name, value in network.parameters.items():
            self.register_parameter(self.names[name], nn.Parameter(value.detach().clone()))

    def forward(self, _):
        values = tuple(getattr(self, self.names[name]) for name in self.network.parameters)
        return self.network.head(values, self.boundary)


# --- the sum ---------------------------------------------------------------------------------


def test_every_combination_of_terms():
    f, tangent = normal(2, 4, 6)
    weights, omega = normal(2, N_OUTPUTS, 6, seed=1)
    intercept = normal(N_OUTPUTS, seed=2)
    terms = {"activation": f @ weights.T, "tangent": tangent @ omega.T, "intercept": intercept}
    for number in range(1, 8):
        chosen = [name for i, name in enumerate(terms) if number >> i & 1]
        found = linear_logits(
            f if "activation" in chosen else None,
            tangent if "tangent" in chosen else None,
            weights=weights,
            intercept=intercept if "intercept" in chosen else None,
            omega=omega,
        )
        torch.testing.assert_close(found, sum(terms[name] for name in chosen))


def test_terms_without_their_weights_are_left_out():
    f, tangent = normal(2, 4, 6)
    intercept = normal(N_OUTPUTS, seed=2)
    assert torch.equal(linear_logits(f, tangent, intercept=intercept), intercept)


def test_arguments_stay_as_they_are():
    f, tangent = normal(2, 4, 6)
    weights, omega = normal(2, N_OUTPUTS, 6, seed=1)
    intercept = normal(N_OUTPUTS, seed=2)
    before = intercept.clone()
    linear_logits(f, tangent, weights=weights, intercept=intercept, omega=omega)
    assert torch.equal(intercept, before)


# --- the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("term", ["full", "activation", "gradient"])
def test_logits_against_dense_jacobians(linearized, term, known):
    head, boundary, module, x = linearized
    f = head.activation(boundary)
    model = random_model(head, f.shape[1]).term(term)
    names = [n.replace(".", "_") if isinstance(module, Activation) else n for n in head.names]
    J = torch.from_numpy(dense_jacobian(module, names, x))
    expected = model.intercept.expand(len(x), -1)
    if term != "gradient":
        expected = expected + f @ model.weights.T
    if term != "activation":
        moves = torch.cat([move.flatten() for move in model.displacements.values()])
        expected = expected + J @ moves @ model.omega.T
    found = model.logits(head, boundary, f if known else None)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_known_activations_are_not_computed_again(linearized, monkeypatch):
    head, boundary, _, _ = linearized
    f = head.activation(boundary)
    model = random_model(head, f.shape[1])
    expected = model.logits(head, boundary)
    monkeypatch.setattr(LinearizedHead, "activation_and_jvp", None)
    monkeypatch.setattr(LinearizedHead, "activation", None)
    torch.testing.assert_close(model.logits(head, boundary, f), expected)


def test_displacements_of_some_parameters_add_up(linearized):
    head, boundary, _, _ = linearized
    f = head.activation(boundary)
    model = random_model(head, f.shape[1]).term("gradient").shifted(np.zeros(N_OUTPUTS))
    parts = [model.displaced_in([name]).logits(head, boundary) for name in head.names]
    total = sum(part - model.intercept for part in parts) + model.intercept
    torch.testing.assert_close(model.logits(head, boundary), total, rtol=1e-9, atol=1e-9)


def test_shift_of_the_intercept():
    model = LinearModel(normal(2, 3), normal(2), normal(2, 3), {})
    shifted = model.shifted(np.array([1.0, -2.0]))
    torch.testing.assert_close(shifted.intercept, model.intercept + torch.tensor([1.0, -2.0]))
    assert shifted.weights is model.weights


def test_attributes_and_back():
    model = LinearModel(normal(2, 3), normal(2), normal(2, 3), {"a.weight": normal(4, 1)})
    estimator = GradientFeatureClassifier(alpha=1e-4, gradient_alpha=1e-4)
    vars(estimator).update(model.attributes())
    assert estimator.gradient_layers_ == ["a.weight"]
    assert estimator.coef_.dtype == np.float64
    back = LinearModel.from_estimator(estimator, torch.device("cpu"), torch.float64)
    assert torch.equal(back.weights, model.weights)
    assert torch.equal(back.intercept, model.intercept)
    assert torch.equal(back.omega, model.omega)
    assert torch.equal(back.displacements["a.weight"], model.displacements["a.weight"])
    back.weights.zero_()
    assert estimator.coef_.any()
