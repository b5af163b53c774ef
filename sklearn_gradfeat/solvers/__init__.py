"""Minimisers of smooth convex objectives."""

from sklearn_gradfeat.solvers._lbfgs import (
    Secants,
    Solution,
    minimize,
    preconditioned_norm,
    same_curvature,
)
from sklearn_gradfeat.solvers._steps import LinearObjective

__all__ = [
    "LinearObjective",
    "Secants",
    "Solution",
    "minimize",
    "preconditioned_norm",
    "same_curvature",
]
