"""Pictures of fitted estimators, in the manner of scikit-learn's displays."""

from sklearn_gradfeat.displays._comparison import FeatureComparisonDisplay
from sklearn_gradfeat.displays._contributions import LayerContributionDisplay
from sklearn_gradfeat.displays._objective import ObjectiveDisplay
from sklearn_gradfeat.displays._saliency import SaliencyDisplay

__all__ = [
    "FeatureComparisonDisplay",
    "LayerContributionDisplay",
    "ObjectiveDisplay",
    "SaliencyDisplay",
]
