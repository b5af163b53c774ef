"""What ``backbone=`` may be, turned into one frozen network."""

from sklearn_gradfeat.backbones._elsewhere import gradients_elsewhere
from sklearn_gradfeat.backbones._freeze import freeze
from sklearn_gradfeat.backbones._network import FrozenBackbone, Network, on_host
from sklearn_gradfeat.backbones._resolve import (
    BackboneLike,
    Resolved,
    default_name,
    resolve_backbone,
    seeded,
)
from sklearn_gradfeat.backbones._stored import apart, sharing, stored_weights, with_weights

__all__ = [
    "BackboneLike",
    "FrozenBackbone",
    "Network",
    "Resolved",
    "apart",
    "default_name",
    "freeze",
    "gradients_elsewhere",
    "on_host",
    "resolve_backbone",
    "seeded",
    "sharing",
    "stored_weights",
    "with_weights",
]
