"""``backbone=`` turned into one frozen network in two parts, trunk and head."""

from sklearn_gradfeat.backbones._advice import warn_of_class_scores, warn_of_unscaled_images
from sklearn_gradfeat.backbones._ambient import neutral_state
from sklearn_gradfeat.backbones._attention import differentiable_attention, without_cudnn
from sklearn_gradfeat.backbones._copies import on_host, stored_weights, unwrapped, with_weights
from sklearn_gradfeat.backbones._fingerprint import UndigestibleError, digest, tensor_bytes
from sklearn_gradfeat.backbones._frozen import FrozenBackbone, Network, freeze
from sklearn_gradfeat.backbones._graph import is_recurrent
from sklearn_gradfeat.backbones._independence import check_batch, check_transform, influenced
from sklearn_gradfeat.backbones._layers import ActivationLayer
from sklearn_gradfeat.backbones._pickling import Pickled
from sklearn_gradfeat.backbones._sources import (
    BackboneLike,
    Resolved,
    default_name,
    resolve_backbone,
    resolve_tokenizer,
    seeded,
)
from sklearn_gradfeat.backbones._threads import threads_for, threads_for_head

__all__ = [
    "ActivationLayer",
    "BackboneLike",
    "FrozenBackbone",
    "Network",
    "Pickled",
    "Resolved",
    "UndigestibleError",
    "check_batch",
    "check_transform",
    "default_name",
    "differentiable_attention",
    "digest",
    "freeze",
    "influenced",
    "is_recurrent",
    "neutral_state",
    "on_host",
    "resolve_backbone",
    "resolve_tokenizer",
    "seeded",
    "stored_weights",
    "tensor_bytes",
    "threads_for",
    "threads_for_head",
    "unwrapped",
    "warn_of_class_scores",
    "warn_of_unscaled_images",
    "with_weights",
    "without_cudnn",
]
