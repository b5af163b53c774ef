"""Losses against finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sklearn_gradfeat.linearized import Bernoulli, Huber, Multinomial, Squared

N, OUTPUTS = 7, 3


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


LOSSES = {
    "multinomial": lambda y, w: Multinomial(y.argmax(1), w, OUTPUTS),
    "bernoulli": lambda y, w: Bernoulli((y > 0).double(), w),
    "squared": Squared,
    "huber": lambda y, w: Huber(y, w, 0.4),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    weights = normal(N, seed=0).abs()
    return LOSSES[request.param](normal(N, OUTPUTS, seed=1), weights / weights.sum())


def test_gradient_is_the_derivative_of_the_value(loss):
    logits, gradient = normal(N, OUTPUTS, seed=2), torch.empty(N, OUTPUTS, dtype=torch.float64)
    for i in range(N):
        for j in range(OUTPUTS):
            step = torch.zeros_like(logits)
            step[i, j] = 1e-6
            gradient[i, j] = (loss.value(logits + step) - loss.value(logits - step)) / 2e-6
    torch.testing.assert_close(loss.gradient(logits), gradient, rtol=1e-6, atol=1e-9)
    rows = slice(2, 5)
    torch.testing.assert_close(loss.gradient(logits[rows], rows), loss.gradient(logits)[rows])


@pytest.mark.parametrize("kind", ["multinomial", "bernoulli", "squared"])
def test_curvature_is_the_derivative_of_the_gradient(kind):
    weights = normal(N, seed=0).abs()
    loss = LOSSES[kind](normal(N, OUTPUTS, seed=1), weights / weights.sum())
    logits = normal(N, OUTPUTS, seed=2)
    steps = 1e-6 * torch.eye(OUTPUTS, dtype=torch.float64)
    columns = [(loss.gradient(logits + s) - loss.gradient(logits - s)) / 2e-6 for s in steps]
    blocks = torch.stack(columns, 2)
    torch.testing.assert_close(loss.mean_curvature(logits), blocks.sum(0), rtol=1e-6, atol=1e-9)
    diagonals = blocks.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(loss.curvatures(logits), diagonals, rtol=1e-6, atol=1e-9)


def test_only_the_squared_loss_is_quadratic(loss):
    if not isinstance(loss, Squared):
        assert loss.quadratic_minimizer is None
        return
    torch.testing.assert_close(
        loss.gradient(loss.quadratic_minimizer), torch.zeros(N, OUTPUTS).double()
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 3), st.floats(-3, 3))
def test_parabola_of_huber_is_an_upper_bound(seed, epsilon, step):
    weights = torch.full((N,), 1 / N, dtype=torch.float64)
    loss = Huber(normal(N, 1, seed=seed), weights, epsilon)
    logits = 2 * normal(N, 1, seed=seed + 1)
    moved = logits + step * normal(N, 1, seed=seed + 2)
    d = moved - logits
    change = loss.gradient(logits) * d + loss.curvatures(logits) * d**2 / 2
    assert loss.value(moved) <= loss.value(logits) + float(change.sum()) + 1e-12
    assert (loss.curvatures(logits) > 0).all()
