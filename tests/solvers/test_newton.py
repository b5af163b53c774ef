"""Newton's method on explicit rows."""

import pytest
import torch

from sklearn_gradfeat.linearized import Squared
from sklearn_gradfeat.solvers import newton


@pytest.mark.parametrize("size", [1e160, float("nan")])
def test_hessian_that_is_not_finite(size):
    ones = torch.ones(3, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"curvature .* not finite\. Scale X"):
        newton(Squared(ones[:, None], ones / 3), size * ones[:, None, None], ones[:1], ones[:1])
