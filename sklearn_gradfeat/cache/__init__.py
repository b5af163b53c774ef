"""Run every sample through the frozen layers once, and keep their output."""

from sklearn_gradfeat.cache._config import config_context, get_config, set_config
from sklearn_gradfeat.cache._disk import disk_store
from sklearn_gradfeat.cache._extractor import (
    Extractor,
    build_extractor,
)
from sklearn_gradfeat.cache._runner import (
    NOT_FINITE,
    CachedSamples,
)
from sklearn_gradfeat.cache._sample_files import release_pages
from sklearn_gradfeat.cache._store import Store, memory_store

__all__ = [
    "NOT_FINITE",
    "CachedSamples",
    "Extractor",
    "Store",
    "build_extractor",
    "config_context",
    "disk_store",
    "get_config",
    "memory_store",
    "release_pages",
    "set_config",
]
