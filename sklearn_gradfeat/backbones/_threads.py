"""One thread for small matrix products, the threads of the caller for large ones.

At the end of every product, its threads wait for each other. Where other programs use the same
cores, this wait is as long as a time slice of the operating system, and a fit has thousands of
small products. The number of OpenMP threads belongs to the calling thread, unlike that of
``torch.set_num_threads``, so that fits in several threads do not change each other's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from threadpoolctl import ThreadpoolController

# Multiplications from which threads pay even on busy cores: a few milliseconds of one core.
LARGE = 2**27

_caller = threading.local()


@functools.cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the body in one thread, except for the parts in :func:`threads_for`."""
    if hasattr(_caller, "number"):
        yield
        return
    # In a new thread, torch sets the number when it is first asked for it.
    _caller.number = torch.get_num_threads()
    try:
        with _openmp().limit(limits=1):
            yield
    finally:
        del _caller.number


@contextmanager
def threads_for(n_products: float) -> Iterator[None]:
    """Run the body in the threads that the caller of :func:`one_thread` had, if it is large.

    Parameters
    ----------
    n_products : float
        Estimated number of multiplications.
    """
    number = getattr(_caller, "number", 1)
    if number == 1 or n_products < LARGE:
        yield
        return
    with _openmp().limit(limits=number):
        yield


def threads_for_head(
    parameters: Iterable[torch.Tensor], boundary: tuple[torch.Tensor, ...]
) -> AbstractContextManager[None]:
    """Return :func:`threads_for` a pass of the gradient layers over a batch.

    At every position of every sample, a pass multiplies by all weights once. Channels or features
    are taken for the longest axis of the boundary tensors.
    """
    n_rows = max((z.numel() / max(z.shape[1:], default=1) for z in boundary), default=0)
    return threads_for(n_rows * sum(p.numel() for p in parameters))
