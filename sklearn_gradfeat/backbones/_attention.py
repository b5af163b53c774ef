"""Kernels of attention and of recurrent layers that have derivatives, selected for all threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_LOCK = threading.Lock()


def shared_setting(
    open_setting: Callable[[], AbstractContextManager[None]],
) -> Callable[[], AbstractContextManager[None]]:
    """Return a context manager for a setting of the process that threads share.

    The first thread to enter makes the setting, the last one to leave restores it.
    """
    inside: list[AbstractContextManager[None]] = []

    @contextmanager
    def setting() -> Iterator[None]:
        with _LOCK:
            if not inside:
                opened = open_setting()
                opened.__enter__()
                inside.append(opened)
            else:
                inside.append(inside[0])
        try:
            yield
        finally:
            with _LOCK:
                last = inside.pop()
                if not inside:
                    last.__exit__(None, None, None)

    return setting


@contextmanager
def _without_fast_path() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


plain_attention = shared_setting(_without_fast_path)
"""Avoid the fused transformer layers for inference, which cannot be captured as operators."""

_math_attention = shared_setting(lambda: sdpa_kernel(SDPBackend.MATH))


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Use the attention kernel that has a forward derivative."""
    with plain_attention(), _math_attention():
        yield


@contextmanager
def _disabled_cudnn() -> Iterator[None]:
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


without_cudnn = shared_setting(_disabled_cudnn)
"""Avoid the kernels of cuDNN: those of recurrent layers have no derivative in evaluation mode."""
