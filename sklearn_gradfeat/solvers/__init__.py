"""Solvers that minimise a smooth convex loss of a linear map; they know nothing of networks."""

from sklearn_gradfeat.solvers._curvature_pairs import CurvaturePairs
from sklearn_gradfeat.solvers._lbfgs import (
    Solution,
    State,
    Status,
    minimize,
    preconditioned_norm,
    same_curvature,
)
from sklearn_gradfeat.solvers._newton import newton
from sklearn_gradfeat.solvers._steps import penalised

__all__ = [
    "CurvaturePairs",
    "Solution",
    "State",
    "Status",
    "minimize",
    "newton",
    "penalised",
    "preconditioned_norm",
    "same_curvature",
]
