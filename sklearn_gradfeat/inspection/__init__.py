"""Attributions and displays of fitted estimators."""

from sklearn_gradfeat.inspection._contributions_display import (
    LayerContributionDisplay,
)
from sklearn_gradfeat.inspection._objective_display import (
    ObjectiveDisplay,
)
from sklearn_gradfeat.inspection._penalty_display import (
    PenaltyDisplay,
)
from sklearn_gradfeat.inspection._saliency_display import (
    SaliencyDisplay,
)

__all__ = [
    "LayerContributionDisplay",
    "ObjectiveDisplay",
    "PenaltyDisplay",
    "SaliencyDisplay",
]
