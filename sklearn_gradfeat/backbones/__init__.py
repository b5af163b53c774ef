"""``backbone=`` turned into one frozen network in two parts, trunk and head."""

from sklearn_gradfeat.backbones._attention import (
    differentiable_attention,
)
from sklearn_gradfeat.backbones._fingerprint import (
    UndigestibleError,
    digest,
)
from sklearn_gradfeat.backbones._frozen import (
    FrozenBackbone,
    Network,
    freeze,
    on_host,
)
from sklearn_gradfeat.backbones._sources import (
    BackboneLike,
    Resolved,
    default_name,
    resolve_backbone,
    seeded,
)
from sklearn_gradfeat.backbones._weights import (
    apart,
    sharing,
    stored_weights,
    with_weights,
)

__all__ = [
    "BackboneLike",
    "FrozenBackbone",
    "Network",
    "Resolved",
    "UndigestibleError",
    "apart",
    "default_name",
    "differentiable_attention",
    "digest",
    "freeze",
    "on_host",
    "resolve_backbone",
    "seeded",
    "sharing",
    "stored_weights",
    "with_weights",
]
