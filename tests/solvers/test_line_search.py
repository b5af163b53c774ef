"""The line search against scans of the line."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sklearn_gradfeat.solvers._line_search import Line, search
from tests.solvers.dense import LOSSES, normal, problem


def line_of(kind, seed, scale):
    """Return the line along the negative gradient, and the objective along it."""
    objective = problem(kind, seed=seed)
    x = normal(8, seed=seed + 3)
    d = -scale * objective.gradient(x)
    penalty = objective.penalty
    line = Line(
        objective.loss, objective.matrix @ x, objective.matrix @ d,
        float(penalty * x @ d), float(penalty * d @ d),
    )  # fmt: skip
    return line, lambda t: objective.value(x + t * d)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(LOSSES)), st.integers(0, 1000), st.floats(-3, 3))
def test_decreases_and_meets_the_wolfe_conditions(kind, seed, exponent):
    line, value = line_of(kind, seed, 10**exponent)
    step, gain = search(line, value(0.0))
    assert gain == pytest.approx(value(step) - value(0.0), rel=1e-6, abs=1e-14)
    assert gain <= 1e-4 * step * line.slope(0.0)
    assert abs(line.slope(step)) <= 0.5 * abs(line.slope(0.0))
    if step != 1.0 or kind == "squared":
        assert abs(line.slope(step)) <= 1e-10 * abs(line.slope(0.0))
        nearby = [value(t) for t in step * np.linspace(0.5, 1.5, 11)]
        assert value(step) <= min(nearby) + 1e-12


def test_slope_is_the_derivative():
    for kind in LOSSES:
        line, value = line_of(kind, 0, 1.0)
        difference = (value(0.7 + 1e-6) - value(0.7 - 1e-6)) / 2e-6
        assert line.slope(0.7) == pytest.approx(difference, rel=1e-6)


def test_no_step_uphill():
    line, value = line_of("multinomial", 0, -1.0)
    assert search(line, value(0.0)) == (0.0, 0.0)


def test_unbounded_line_ends_at_the_largest_step():
    """Without a penalty, the loss of separable samples decreases forever."""
    loss = LOSSES["bernoulli"](torch.ones(4, 1).double(), torch.full((4,), 0.25).double())
    line = Line(loss, torch.zeros(4, 1).double(), torch.full((4, 1), 1e-6).double(), 0.0, 0.0)
    step, gain = search(line, np.log(2))
    assert step == 2**20
    assert gain < 0


def test_tiny_gains_are_accurate():
    """A difference of values would have no digits."""
    line, value = line_of("squared", 0, 1e-14)
    slope = line.slope(0.0)
    assert line.gain(1.0, value(0.0), (slope, line.slope(1.0))) == pytest.approx(slope, rel=1e-6)
