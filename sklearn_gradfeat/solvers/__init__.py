"""Minimise a smooth convex loss of a linear map; no network is known here."""

from sklearn_gradfeat.solvers._lbfgs import (
    Secants,
    Solution,
    minimize,
    preconditioned_norm,
    same_curvature,
)

__all__ = [
    "Secants",
    "Solution",
    "minimize",
    "preconditioned_norm",
    "same_curvature",
]
