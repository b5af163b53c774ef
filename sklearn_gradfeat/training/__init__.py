"""From frozen features to a fitted linear model, for one or many penalties."""

from sklearn_gradfeat.training._calibration import (
    calibrated,
)
from sklearn_gradfeat.training._penalties import (
    Candidate,
    Grid,
    known_logits,
    left_out_path,
    penalty_path,
    place,
)
from sklearn_gradfeat.training._prediction import (
    predict_logits,
)
from sklearn_gradfeat.training._problem import (
    Classification,
    Problem,
    centre,
    encode,
    numeric,
    regression_loss,
    sample_weights,
)
from sklearn_gradfeat.training._progress import (
    CallbackSupportMixin,
    FitCallbacks,
    with_callbacks,
)
from sklearn_gradfeat.training._stages import (
    Prepared,
    Settings,
    TwoStageFit,
    train,
    warn_of_search,
    warn_unless_converged,
)

__all__ = [
    "CallbackSupportMixin",
    "Candidate",
    "Classification",
    "FitCallbacks",
    "Grid",
    "Prepared",
    "Problem",
    "Settings",
    "TwoStageFit",
    "calibrated",
    "centre",
    "encode",
    "known_logits",
    "left_out_path",
    "numeric",
    "penalty_path",
    "place",
    "predict_logits",
    "regression_loss",
    "sample_weights",
    "train",
    "warn_of_search",
    "warn_unless_converged",
    "with_callbacks",
]
