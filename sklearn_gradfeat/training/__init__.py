"""From frozen layers to a fitted linear model, for one pair of penalties or many."""

from sklearn_gradfeat.training._adjointness import check_adjointness
from sklearn_gradfeat.training._held_out import cached_logits
from sklearn_gradfeat.training._journal import Entry, Journal
from sklearn_gradfeat.training._penalties import (
    Candidate,
    CoarseFits,
    Pair,
    Tried,
    leave_one_out_path,
    penalty_path,
    search_grid,
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
from sklearn_gradfeat.training._relinearization import fit_in_turn
from sklearn_gradfeat.training._search import choose_penalties
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
    "CoarseFits",
    "Entry",
    "FirstStage",
    "FitResult",
    "FitSettings",
    "Journal",
    "Pair",
    "Prepared",
    "Problem",
    "Progress",
    "Tried",
    "TwoStageFit",
    "cached_logits",
    "check_adjointness",
    "choose_penalties",
    "classification_problem",
    "fit_in_turn",
    "leave_one_out_path",
    "penalty_path",
    "regression_problem",
    "search_grid",
    "warn_unless_converged",
    "with_callbacks",
]
