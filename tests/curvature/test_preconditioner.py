"""The preconditioner against dense inverses, and its laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sklearn_gradfeat.curvature._kfac import Factor
from sklearn_gradfeat.curvature._preconditioner import Preconditioner
from sklearn_gradfeat.linearized import Bernoulli, Squared
from tests.curvature.problems import (
    MLP_LAYERS,
    classes,
    dense_map,
    dense_operator,
    image_objective,
    mlp,
    module_term,
    normal,
    objective,
    unequal_weights,
)
from tests.networks import NETWORKS


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize(("kind", "n_outputs"), [(Squared, 2), (Bernoulli, 1)])
@pytest.mark.parametrize("n_features", [4, 30], ids=["few", "more than samples"])
def test_exact_for_the_activation(kind, n_outputs, n_features, fit_intercept):
    loss = kind((normal(20, n_outputs) > 0).double(), unequal_weights(20))
    problem = objective(
        loss, normal(20, n_features) + 3, None, alpha=0.01, fit_intercept=fit_intercept
    )
    logits = normal(20, n_outputs, seed=1)
    A = dense_map(problem).flatten(0, 1)
    H = A.T @ (loss.curvatures(logits).reshape(-1, 1) * A) + torch.diag(problem.penalty)
    found = dense_operator(Preconditioner(problem, logits), sum(problem.sizes))
    torch.testing.assert_close(found @ H, torch.eye(len(H), dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.1, 0.0])
def test_blocks_of_layers_against_dense_solves(alpha, monkeypatch):
    matrices, spectra = [], Factor.spectra

    def noted(factor):
        factor.sum_rows()
        matrices.append((factor.output[0].clone(), factor.inputs[0].clone()))
        return spectra(factor)

    monkeypatch.setattr(Factor, "spectra", noted)
    tangent = module_term(mlp(), MLP_LAYERS, normal(40, 3), n_outputs=3, alpha=alpha)
    problem = objective(classes(40), None, tangent, fit_intercept=False)
    inverse = Preconditioner(problem, torch.zeros(40, 3, dtype=torch.float64))
    found = dense_operator(inverse, tangent.head.size)
    sizes = [value.numel() for value in tangent.head.values]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    expected = torch.zeros_like(found)
    for layer, (output, inputs) in zip(inverse.curvature.layers, matrices, strict=True):
        n_out, n_in = tangent.head.values[layer.weight].shape
        weight = starts[layer.weight] + torch.arange(n_out * n_in).view(n_out, n_in)
        bias = starts[layer.factor.bias] + torch.arange(n_out)[:, None]
        places = torch.cat([weight, bias], 1).reshape(-1)
        block = torch.kron(output, inputs) / inputs.trace()
        block.diagonal().add_(alpha or torch.finfo(block.dtype).eps * torch.linalg.norm(block, 2))
        expected[places[:, None], places] = torch.linalg.inv(block)
    if alpha:
        torch.testing.assert_close(found, expected)
    else:  # the smallest eigenvalues are rounding errors
        assert torch.linalg.eigvalsh(found).min() > 0
        assert float(found.norm()) == pytest.approx(float(expected.norm()), rel=1e-3)


@pytest.fixture(scope="module", params=NETWORKS)
def of_network(request):
    problem = image_objective(request.param, n=12)
    return Preconditioner(problem, normal(12, 3, seed=3)), sum(problem.sizes)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_linear_symmetric_and_positive(of_network, seed, factor):
    inverse, size = of_network
    x, y = normal(2, size, seed=seed)
    px, py = inverse(x.clone()), inverse(y.clone())
    torch.testing.assert_close(inverse(x + factor * y), px + factor * py)
    torch.testing.assert_close(x @ py, y @ px)
    assert x @ px > 0
