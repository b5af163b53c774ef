"""Minimise a smooth convex loss of a linear map; no network is known here."""

from sklearn_gradfeat.solvers._lbfgs import (
    CurvaturePairs,
    Solution,
    minimize,
    preconditioned_norm,
    same_curvature,
)

__all__ = [
    "CurvaturePairs",
    "Solution",
    "minimize",
    "preconditioned_norm",
    "same_curvature",
]
