"""The direction of L-BFGS, against the two-loop recursion."""

import math

import pytest
import torch

from sklearn_gradfeat.solvers import _curvature_pairs
from sklearn_gradfeat.solvers._curvature_pairs import CurvaturePairs, InverseHessian
from tests.reads import ReadValues

N = 40


@pytest.fixture
def hessian():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(N, N, generator=generator, dtype=torch.float64)
    return root @ root.T / N + 0.1 * torch.eye(N, dtype=torch.float64)


DIAGONAL = torch.linspace(0.5, 2, N, dtype=torch.float64)


def inverse(x):
    return x.div_(DIAGONAL)


def vectors(n):
    return torch.randn(n, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def two_loops(pairs, scale, gradient):
    """Nocedal and Wright, algorithm 7.4."""
    q, weights = -gradient, []
    for s, y in reversed(pairs):
        weights.append((s @ q) / (s @ y))
        q = q - weights[-1] * y
    r = scale * q / DIAGONAL
    for (s, y), weight in zip(pairs, reversed(weights), strict=True):
        r = r + s * (weight - (y @ r) / (s @ y))
    return r


@pytest.fixture(params=["matrix", "vectors"])
def kind(request, monkeypatch):
    if request.param == "vectors":
        monkeypatch.setattr(_curvature_pairs, "_MATRIX", 0)


@pytest.mark.parametrize("n_kept", [30, 2])
@pytest.mark.parametrize("n_pairs", [0, 1, 2, 3, 7, 35])
def test_direction(hessian, n_pairs, n_kept, kind, monkeypatch):
    if n_kept == 2:
        monkeypatch.setattr(_curvature_pairs, "_ELEMENTS", 0)
    memory, pairs = InverseHessian(inverse, hessian[0]), []
    for step in vectors(n_pairs):
        if len(pairs) == n_kept:  # a direction makes room for the next pair
            memory.direction(step, step / DIAGONAL)
            assert len(memory) == n_kept - 1
        pairs = [*pairs, (step, hessian @ step)][-n_kept:]
        memory.add(*pairs[-1], pairs[-1][1] / DIAGONAL)
    assert len(memory) == len(pairs)
    for found, expected in zip(memory.pairs, pairs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    scale = 1.0
    if pairs:
        s, y = pairs[-1]
        scale = float(s @ y / (y @ (y / DIAGONAL)))
    assert memory.scale == pytest.approx(scale, rel=1e-12)
    gradient = vectors(n_pairs + 1)[-1]
    expected = two_loops(pairs, scale, gradient)
    found = memory.direction(gradient, gradient / DIAGONAL)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_secant_equation(hessian):
    memory = InverseHessian(inverse, hessian[0])
    for step in vectors(5):
        memory.add(step, hessian @ step)
    y = hessian @ vectors(5)[-1]
    torch.testing.assert_close(memory.direction(y, y / DIAGONAL), -vectors(5)[-1])


def test_pairs_without_curvature_are_left_out(hessian):
    memory = InverseHessian(inverse, hessian[0])
    step = vectors(1)[0]
    memory.add(step, -hessian @ step, step)
    memory.add(step, torch.zeros(N, dtype=torch.float64), step)
    memory.add(torch.zeros(N, dtype=torch.float64), step, step)
    memory.add(step, hessian @ step, -step)
    memory.add(step, hessian @ step, math.nan * step)
    memory.add(step, math.nan * step)
    assert len(memory) == 0 and memory.scale == 1


def test_pairs_that_were_returned_do_not_change(hessian, kind):
    memory = InverseHessian(inverse, hessian[0])
    for step in vectors(30):
        memory.add(step, hessian @ step)
    kept = memory.pairs
    for step in vectors(40)[30:]:
        memory.add(step, hessian @ step)
    torch.testing.assert_close(torch.stack([s for s, _ in kept]), vectors(30), rtol=0, atol=0)


def test_pairs_of_other_penalties(hessian):
    penalties = torch.full((N,), 0.1, dtype=torch.float64), torch.rand(N, dtype=torch.float64)
    pairs = [(step, hessian @ step) for step in vectors(4)]
    memory = InverseHessian(inverse, hessian[0])
    memory.recall(CurvaturePairs(pairs, (penalties[0],)), (penalties[1],))
    for (step, change), (s, y) in zip(memory.pairs, pairs, strict=True):
        torch.testing.assert_close(step, s)
        torch.testing.assert_close(change, y + (penalties[1] - penalties[0]) * s)
    s, y = memory.pairs[-1]
    assert memory.scale == pytest.approx(float(s @ y / (y @ (y / DIAGONAL))))
    memory.recall(None, penalties)
    assert len(memory) == 4
    memory.clear()
    assert len(memory) == 0 and memory.pairs == []
    assert memory._steps._matrix is None  # freed


def test_few_scalars_are_read(hessian, kind):
    memory = InverseHessian(inverse, hessian[0])
    for step in vectors(30):
        memory.add(step, hessian @ step, step)
    gradient = vectors(1)[0]
    with ReadValues() as seen:
        memory.direction(gradient, gradient.clone())
        memory.add(gradient, hessian @ gradient, gradient)
    assert seen.read <= 4
