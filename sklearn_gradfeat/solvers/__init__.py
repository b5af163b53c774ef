"""Minimisers of smooth convex objectives."""

from sklearn_gradfeat.solvers._lbfgs import (
    LinearObjective,
    Solution,
    minimize,
    preconditioned_norm,
    same_curvature,
)

__all__ = ["LinearObjective", "Solution", "minimize", "preconditioned_norm", "same_curvature"]
