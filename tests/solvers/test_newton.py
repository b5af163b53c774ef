"""Newton's method in the space of samples."""

import pytest
import torch

from sklearn_gradfeat.linearized import Bernoulli, Multinomial, Squared
from sklearn_gradfeat.solvers import newton

N = 30


def loss_of(kind):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    weights[:3] = 0
    weights /= weights.sum()
    classes = torch.randint(3, (N, 2), generator=generator)
    if kind == "classes":
        return Multinomial(classes[:, 0], weights, 3)
    kinds = {"labels": Bernoulli, "targets": Squared}
    return kinds[kind](classes.clamp(max=1).double(), weights)


def gram_of(loss, n_features, penalty):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(N * loss.n_outputs, n_features, generator=generator, dtype=torch.float64)
    return rows @ rows.T / penalty


@pytest.mark.parametrize("kind", ["classes", "labels", "targets"])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("near", [None, 0.0, 1e3])
@pytest.mark.parametrize(("n_features", "penalty"), [(5, 1e-2), (200, 1e-4)])
def test_optimum(kind, fit_intercept, near, n_features, penalty):
    """The gradient in the unknowns ``Aᵀ β`` and in the intercept vanishes."""
    loss = loss_of(kind)
    gram = gram_of(loss, n_features, penalty)
    if near is not None:
        near = torch.full((N, loss.n_outputs), near, dtype=torch.float64)
        near[::2] *= -1
    dual, intercept, logits = newton(loss, gram, fit_intercept, near)
    torch.testing.assert_close(logits, (gram @ dual.reshape(-1)).view_as(dual) + intercept)
    error = dual + loss.gradient(logits)
    assert (error.reshape(-1) @ gram @ error.reshape(-1)) < 1e-8 * loss.value(0 * logits)
    assert intercept.any() == fit_intercept
    if fit_intercept:
        assert loss.gradient(logits).sum(0).abs().max() < 1e-5


@pytest.mark.parametrize("size", [float("inf"), float("nan")])
def test_hessian_that_is_not_finite(size):
    ones = torch.ones(3, dtype=torch.float64)
    gram = size * torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"curvature .* not finite\. Scale X"):
        newton(Squared(ones[:, None], ones / 3), gram, True)
