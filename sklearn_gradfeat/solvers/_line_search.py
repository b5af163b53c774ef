"""Exact line search on known logits, without a pass over the data.

Along ``x + t d`` the logits are ``Z + t D`` with ``D = A d``, and the penalty is quadratic::

    F(t)  = loss(Z + t D) + linear t + quadratic t² / 2 + constant
    F'(t) = <loss'(Z + t D), D> + linear + quadratic t

``F`` is convex, so its minimiser is the root of ``F'``. An evaluation takes a few operations
on two arrays of shape (n_samples, n_outputs), independent of the cost of ``A``.
"""

from __future__ import annotations

from dataclasses import dataclass

from scipy.optimize import brentq
from torch import Tensor

from sklearn_gradfeat.data import sum_over_ranks
from sklearn_gradfeat.linearized import Loss

_LARGEST_STEP = 2.0**20
# Wolfe conditions on the unit step: F(1) - F(0) <= 1e-4 F'(0) and |F'(1)| <= 0.5 |F'(0)|.
_SUFFICIENT_DECREASE = 1e-4
_SLOPE_SHARE = 0.5
# Relative changes of the objective below this are dominated by rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Line:
    """The objective restricted to a line.

    Parameters
    ----------
    loss : Loss
        The loss of the logits.
    logits, change : tensor of shape (n_samples, n_outputs), float64
        Logits at the start of the line, and their change over a unit step.
    linear, quadratic : float
        The penalty along the line is ``linear * t + quadratic * t² / 2``.
    """

    loss: Loss
    logits: Tensor
    change: Tensor
    linear: float
    quadratic: float

    def slope(self, step: float) -> float:
        """Return the derivative of the objective at ``step``."""
        gradient = self.loss.gradient(self.logits + step * self.change)
        slope = sum_over_ranks((gradient * self.change).sum())
        return float(slope) + self.linear + step * self.quadratic

    def gain(self, step: float, value: float, slopes: tuple[float, float]) -> float:
        """Return the change of the objective over ``step``, accurate even when tiny.

        The difference of two nearly equal values consists of rounding errors. The trapezium
        rule on the two slopes, exact for a quadratic, then replaces it.
        """
        if abs(slopes[0]) * step < _ROUNDING * abs(value):
            return step * (slopes[0] + slopes[1]) / 2
        moved = self.loss.value(self.logits + step * self.change)
        penalty = step * (self.linear + step * self.quadratic / 2)
        return moved - self.loss.value(self.logits) + penalty


def search(line: Line, value: float) -> tuple[float, float]:
    """Return a step and the change of the objective over it.

    The unit step is kept when it meets the Wolfe conditions, because the caller already has
    its gradient. Otherwise the step is the exact minimiser. For a quadratic loss it always
    is: the gradient is known at every step.
    """
    start = line.slope(0.0)
    if start >= 0:
        return 0.0, 0.0
    end = line.slope(1.0)
    gain = line.gain(1.0, value, (start, end))
    enough = abs(end) <= _SLOPE_SHARE * -start and gain <= _SUFFICIENT_DECREASE * start
    if enough and line.loss.quadratic_minimizer is None:
        return 1.0, gain
    step = _minimiser(line, end)
    return step, line.gain(step, value, (start, line.slope(step)))


def _minimiser(line: Line, unit_slope: float) -> float:
    """Return the step at which the slope vanishes."""
    low, high = 0.0, 1.0
    while unit_slope < 0 and high < _LARGEST_STEP:
        low, high = high, 2 * high
        unit_slope = line.slope(high)
    if unit_slope < 0:
        return high
    return float(brentq(line.slope, low, high, rtol=1e-14, xtol=1e-15))
