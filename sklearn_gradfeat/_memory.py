"""How much memory there is, and smaller batches where it runs out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

# What torch's allocators say, in exceptions that are not always of a class of their own.
_COMPLAINTS = ("can't allocate memory", "out of memory")


def free_bytes(device: torch.device) -> int:
    """Return how much memory a device has left besides that of the host."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def in_smaller_batches(run: Callable[[int], Result], batch_size: int) -> Result:
    """Return ``run(batch_size)``, with batches half as large after every lack of memory.

    Parameters
    ----------
    run : callable
        Takes the number of samples in a batch; it may be called again after it failed.
    batch_size : int
        What to begin with.

    Returns
    -------
    object
        What ``run`` returned.

    Raises
    ------
    RuntimeError
        If memory runs out for single samples, or ``run`` raises it for another reason.
    """
    while True:
        try:
            return run(batch_size)
        except RuntimeError as error:
            if batch_size == 1 or not any(c in str(error) for c in _COMPLAINTS):
                raise
        # Not in the handler, where the traceback keeps the tensors of the failed attempt.
        batch_size = (batch_size + 1) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"Memory ran out. Trying again with {batch_size} samples in a batch; set batch_size to "
            "what works, to save the attempts.",
            RuntimeWarning,
            stacklevel=2,
        )
