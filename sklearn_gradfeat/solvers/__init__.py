"""Minimisers of smooth convex objectives."""

from sklearn_gradfeat.solvers._lbfgs import (
    LinearObjective,
    Secants,
    Solution,
    minimize,
    preconditioned_norm,
    same_curvature,
)

__all__ = [
    "LinearObjective",
    "Secants",
    "Solution",
    "minimize",
    "preconditioned_norm",
    "same_curvature",
]
