"""Curvature of the linear model: preconditioners, the coarse space, leave-one-out."""

from sklearn_gradfeat.curvature._coarse_path import CoarsePath
from sklearn_gradfeat.curvature._explicit_rows import with_rows_if_cheap
from sklearn_gradfeat.curvature._factored_term import FactoredTerm
from sklearn_gradfeat.curvature._inverses import (
    Inverses,
    largest_curvature,
)
from sklearn_gradfeat.curvature._sample_space import (
    MAX_ROWS,
    activation_gram,
    leave_one_out,
    tangent_gram,
)

__all__ = [
    "MAX_ROWS",
    "CoarsePath",
    "FactoredTerm",
    "Inverses",
    "activation_gram",
    "largest_curvature",
    "leave_one_out",
    "tangent_gram",
    "with_rows_if_cheap",
]
