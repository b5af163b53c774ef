"""Steps from one point to the next: their gradients, values and passes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sklearn_gradfeat.solvers._steps import (
    coarse_step,
    line_and_coarse_step,
    line_step,
    penalised,
    start,
)
from tests.solvers.dense import LOSSES, normal, problem


def check(objective, point):
    torch.testing.assert_close(point.logits, objective.matrix @ point.x)
    torch.testing.assert_close(point.gradient, objective.gradient(point.x))
    assert point.value == pytest.approx(objective.value(point.x), rel=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("scale", [1e-3, 0.5, 20.0])
def test_points_are_consistent_and_passes_are_counted(kind, scale):
    objective = problem(kind)
    point = start(objective, normal(8))
    check(objective, point)
    before = objective.passes
    moved, cost = line_step(objective, point, -scale * point.gradient)
    assert objective.passes - before == cost
    assert kind != "squared" or cost == 1
    check(objective, moved)
    assert moved.value < point.value
    assert line_step(objective, point, point.gradient) == (None, 1)


def to_zero(x, logits, norm):
    """Remove two of the coordinates."""
    moved = x.clone()
    moved[:2] = 0
    objective = problem("multinomial")
    gain = objective.value(moved) - objective.value(x)
    return moved, objective.matrix @ moved, gain


def test_coarse_steps_are_consistent_and_passes_are_counted():
    objective = problem("multinomial")
    point = start(objective, normal(8))
    for moved, cost, passes in (
        (*coarse_step(objective, point, to_zero, 1.0), 1),
        (*line_and_coarse_step(objective, point, -point.gradient, to_zero, 1.0), 2),
    ):
        assert cost == passes
        check(objective, moved)
        assert not moved.x[:2].any()
    uphill = line_and_coarse_step(objective, point, point.gradient, to_zero, 1.0)
    assert uphill == (None, 1)


def test_penalty_is_summed_in_float64():
    numbers = np.random.default_rng(0)
    penalty, x, y = numbers.random((3, 10**6), dtype=np.float32)
    loss = SimpleNamespace(weights=torch.zeros(1, dtype=torch.float64))
    blocks = torch.from_numpy(penalty).split([1, 10**6 - 1])
    objective = SimpleNamespace(penalties=blocks, loss=loss)
    found = penalised(objective, torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx((penalty.astype(float) * x) @ y.astype(float), rel=1e-12)
