"""The linear model over a frozen head: products, objective, curvature."""

from sklearn_gradfeat.tangent._graph import UntraceableError, linearized_graph
from sklearn_gradfeat.tangent._head import LinearizedHead
from sklearn_gradfeat.tangent._inverses import Inverses
from sklearn_gradfeat.tangent._leave_one_out import leave_one_out
from sklearn_gradfeat.tangent._objective import TangentObjective, TangentTerm
from sklearn_gradfeat.tangent._preconditioner import Preconditioner
from sklearn_gradfeat.tangent._products import Head, Tensors
from sklearn_gradfeat.tangent._samples import MAX_ROWS, SampleInverse, tangent_gram
from sklearn_gradfeat.tangent._scale import largest_curvature

__all__ = [
    "MAX_ROWS",
    "Head",
    "Inverses",
    "LinearizedHead",
    "Preconditioner",
    "SampleInverse",
    "TangentObjective",
    "TangentTerm",
    "Tensors",
    "UntraceableError",
    "largest_curvature",
    "leave_one_out",
    "linearized_graph",
    "tangent_gram",
]
