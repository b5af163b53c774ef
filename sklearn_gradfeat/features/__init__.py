"""The trunk's output for any number of samples, each computed once."""

from sklearn_gradfeat.features._disk import disk_store
from sklearn_gradfeat.features._store import FeatureKey, MemoryStore, Store, memory_store
from sklearn_gradfeat.features._trunk import Batch, Features, Trunk, compute_features

__all__ = [
    "Batch",
    "FeatureKey",
    "Features",
    "MemoryStore",
    "Store",
    "Trunk",
    "compute_features",
    "disk_store",
    "memory_store",
]
