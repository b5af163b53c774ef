"""Attributions and displays of fitted estimators."""

from sklearn_gradfeat.inspection._contributions import (
    LayerContributionDisplay,
)
from sklearn_gradfeat.inspection._objective import (
    ObjectiveDisplay,
)
from sklearn_gradfeat.inspection._saliency import (
    SaliencyDisplay,
)

__all__ = [
    "LayerContributionDisplay",
    "ObjectiveDisplay",
    "SaliencyDisplay",
]
