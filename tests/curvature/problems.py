"""Objectives of tiny networks, in float64, and their dense linear maps."""

from functools import partial

import torch
from torch import nn

from sklearn_gradfeat.backbones import freeze
from sklearn_gradfeat.curvature._kfac import factors, network_batches
from sklearn_gradfeat.linearized import (
    LinearizedHead,
    Multinomial,
    TangentObjective,
    TangentTerm,
)
from tests.networks import build

MLP_LAYERS = ("0.weight", "0.bias", "2.weight", "2.bias")


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def unequal_weights(n):
    """Weights that add up to one; the first is zero."""
    weights = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights[0] = 0
    return weights / weights.sum()


def batches(boundary, size, stride=1):
    n = len(boundary[0])
    for start in range(0, n, size * stride):
        rows = slice(start, min(start + size * stride, n), stride)
        yield rows, tuple(z[rows] for z in boundary)


def objective(loss, activation, tangent, alpha=1e-3, fit_intercept=True):
    n = len(loss.weights)
    like = torch.empty(0, dtype=torch.float64)
    return TangentObjective(loss, activation, tangent, alpha, fit_intercept, n, like, like.device)


def classes(n, n_classes=3, weights=None):
    weights = torch.full((n,), 1 / n, dtype=torch.float64) if weights is None else weights
    return Multinomial(torch.arange(n) % n_classes, weights, n_classes)


def image_term(kind, n=40, n_outputs=3, alpha=1e-4, batch_size=16):
    """Return the gradient term of one of the networks of tests.networks, and its boundary."""
    module, names = build(kind)
    images = normal(n, 2, 5, 5)
    network = freeze(module, images[:2], torch.float64, None).network(names)
    boundary = network.trunk(images)
    head = LinearizedHead(network.head, network.parameters, "ntk")
    width = head.activation(boundary).shape[1]
    omega = normal(n_outputs, width, seed=1)
    return TangentTerm(head, partial(batches, boundary, batch_size), omega, alpha), boundary


def image_objective(kind, loss=None, alpha=1e-4, n=40):
    tangent, boundary = image_term(kind, n, 3, alpha)
    return objective(loss or classes(n), tangent.head.activation(boundary), tangent)


def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh()).double()


def module_term(module, names, x, n_outputs=1, alpha=0.03, batch_size=5):
    """Return the gradient term of a module, all of which is its head."""
    parameters = {n: p.detach() for n, p in module.named_parameters() if n in names}
    rest = {n: p.detach() for n, p in module.named_parameters() if n not in names}

    def head(values, boundary):
        state = dict(zip(parameters, values, strict=True)) | rest
        return torch.func.functional_call(module, state, boundary)

    linearized = LinearizedHead(head, parameters, "ntk")
    omega = normal(n_outputs, linearized.activation((x,)).shape[1], seed=2)
    return TangentTerm(linearized, partial(batches, (x,), batch_size), omega, alpha)


def network_factors(head, batches, columns, weights, n_samples):
    """Return the factors from samples that pass the head."""
    through = network_batches(head, batches, columns)
    return factors(head, through, columns, weights, n_samples)


def dense_map(objective):
    """Return the map from the unknowns to the logits, (n_samples, n_outputs, n_unknowns)."""
    unit = torch.eye(sum(objective.sizes), dtype=torch.float64)
    return torch.stack([objective.forward(column) for column in unit], 2)


def dense_operator(operator, n):
    """Return the matrix of a linear operator on vectors of n numbers."""
    unit = torch.eye(n, dtype=torch.float64)
    return torch.stack([operator(column) for column in unit], 1)
