"""Samples that are counted on their way through the trunk, small chunks, and forks."""

import os
from pathlib import Path

import pytest
import torch

from sklearn_gradfeat.cache._store import HeldChunk, TrunkKey
from tests.tiny import NET, estimator

FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


def passes(counted):
    """Return the number of samples that went through the trunk."""
    log = Path(counted.file)
    return sum(map(int, log.read_text().split())) if log.exists() else 0


def model(counted, backbone=NET, **parameters):
    return estimator(backbone, preprocess=counted, **{"alpha": 1.0, **parameters})


class Owner:
    """Stands for a network."""


def key(owner, digest=b"k" * 16):
    return TrunkKey(digest, True, owner)


def chunk(size, n=4):
    return HeldChunk((torch.zeros(n, size // n, dtype=torch.uint8),))


def names(start, n=4):
    return [bytes([start + i]) * 16 for i in range(n)]


def in_child(function):
    """Call a function in a forked process; return its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return child
