"""What ``backbone=`` may be, turned into one frozen network."""

from sklearn_gradfeat.backbones._freeze import freeze
from sklearn_gradfeat.backbones._network import FrozenBackbone, Network, on_host
from sklearn_gradfeat.backbones._resolve import BackboneLike, Resolved, resolve_backbone, seeded

__all__ = [
    "BackboneLike",
    "FrozenBackbone",
    "Network",
    "Resolved",
    "freeze",
    "on_host",
    "resolve_backbone",
    "seeded",
]
