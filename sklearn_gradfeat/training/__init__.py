"""From frozen layers to a fitted linear model, for one pair of penalties or many."""

from sklearn_gradfeat.training._adjointness import check_adjointness
from sklearn_gradfeat.training._penalties import (
    Candidate,
    Grid,
    leave_one_out_path,
    penalty_path,
    place_grid,
)
from sklearn_gradfeat.training._problem import (
    Problem,
    classification_problem,
    regression_problem,
)
from sklearn_gradfeat.training._progress import (
    CallbackSupportMixin,
    Progress,
    with_callbacks,
)
from sklearn_gradfeat.training._two_stage_fit import (
    FirstStage,
    FitResult,
    FitSettings,
    Prepared,
    TwoStageFit,
    warn_unless_converged,
)

__all__ = [
    "CallbackSupportMixin",
    "Candidate",
    "FirstStage",
    "FitResult",
    "FitSettings",
    "Grid",
    "Prepared",
    "Problem",
    "Progress",
    "TwoStageFit",
    "check_adjointness",
    "classification_problem",
    "leave_one_out_path",
    "penalty_path",
    "place_grid",
    "regression_problem",
    "warn_unless_converged",
    "with_callbacks",
]
