"""The linear model over a frozen head: products, objective, curvature."""

from sklearn_gradfeat.tangent._graph import UntraceableError, linearized_graph
from sklearn_gradfeat.tangent._head import LinearizedHead
from sklearn_gradfeat.tangent._objective import TangentObjective, TangentTerm
from sklearn_gradfeat.tangent._preconditioner import Preconditioner
from sklearn_gradfeat.tangent._products import Head, Tensors

__all__ = [
    "Head",
    "LinearizedHead",
    "Preconditioner",
    "TangentObjective",
    "TangentTerm",
    "Tensors",
    "UntraceableError",
    "linearized_graph",
]
