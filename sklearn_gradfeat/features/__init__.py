"""The trunk's output for any number of samples, each computed once."""

from sklearn_gradfeat.features._disk import disk_store
from sklearn_gradfeat.features._store import FeatureKey, MemoryStore, Store, memory_store
from sklearn_gradfeat.features._trunk import NOT_FINITE, Batch, Features, Trunk, compute_features

__all__ = [
    "NOT_FINITE",
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
