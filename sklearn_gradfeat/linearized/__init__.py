"""The linear model over a frozen head: Jacobian products, losses, objective."""

from sklearn_gradfeat.linearized._derivative_graph import (
    UntraceableError,
    linearized_graph,
)
from sklearn_gradfeat.linearized._explicit_term import ExplicitTerm
from sklearn_gradfeat.linearized._jacobian import (
    LinearizedHead,
    Tensors,
)
from sklearn_gradfeat.linearized._logits import (
    LinearModel,
    linear_logits,
    predict_activations,
    predict_logits,
    to_numpy,
)
from sklearn_gradfeat.linearized._losses import (
    Bernoulli,
    Huber,
    Loss,
    Multinomial,
    Shifted,
    Squared,
)
from sklearn_gradfeat.linearized._objective import (
    Batches,
    TangentObjective,
    TangentTerm,
    agrees,
)

__all__ = [
    "Batches",
    "Bernoulli",
    "ExplicitTerm",
    "Huber",
    "LinearModel",
    "LinearizedHead",
    "Loss",
    "Multinomial",
    "Shifted",
    "Squared",
    "TangentObjective",
    "TangentTerm",
    "Tensors",
    "UntraceableError",
    "agrees",
    "linear_logits",
    "linearized_graph",
    "predict_activations",
    "predict_logits",
    "to_numpy",
]
