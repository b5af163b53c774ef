"""Smaller batches where memory runs out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

# The messages of torch's allocators and of the libraries of CUDA, such as the status
# CUBLAS_STATUS_ALLOC_FAILED. Not all of them have an exception class of their own. Without memory
# for its workspace, cuDNN finds no engine for a convolution.
_MESSAGES = (
    "can't allocate memory",
    "out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "unable to find an engine to execute this computation",
)


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that tensors may still take, 0 for the host.

    It includes what torch has reserved and does not use, and ends at the fraction of the device
    that ``torch.cuda.set_per_process_memory_fraction`` grants.
    """
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    granted = int(torch.cuda.get_per_process_memory_fraction(device) * total) - allocated
    return max(min(free + unused, granted), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the host or of a device is too small."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def unless_out_of_memory(compute: Callable[[], Result]) -> Result | None:
    """Return ``compute()``, or None where memory runs out, for results that are not needed."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Not in the handler: its traceback keeps the tensors of the attempt alive.
    _free_unused()
    return None


class BatchSize:
    """The number of samples in a batch. It is halved each time memory runs out.

    Parameters
    ----------
    size : int
        The number of samples to begin with.

    Attributes
    ----------
    size : int
        The present number.
    reduced : bool
        Whether memory has run out before.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.reduced = False

    def retry(self, compute: Callable[[], Result]) -> Result:
        """Return ``compute()``, which is called again where memory runs out.

        Parameters
        ----------
        compute : callable
            A computation in batches of at most ``size`` samples. It reads ``size`` anew.

        Raises
        ------
        RuntimeError
            If memory runs out for single samples, or if ``compute`` fails for another reason.
        """
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if self.size == 1 or not is_out_of_memory(error):
                    raise
            # Not in the handler: its traceback keeps the tensors of the failed attempt alive.
            self._reduce(self.size)

    def run(self, compute: Callable[[slice], Result], n_samples: int) -> list[Result]:
        """Return ``compute(rows)`` for consecutive slices of at most ``size`` samples."""
        results: list[Result] = []
        start = 0
        while start < n_samples:
            stop = min(start + self.size, n_samples)
            try:
                results.append(compute(slice(start, stop)))
            except (RuntimeError, MemoryError) as error:
                if stop - start == 1 or not is_out_of_memory(error):
                    raise
            else:
                start = stop
                continue
            self._reduce(stop - start)
        return results

    def _reduce(self, failed: int) -> None:
        """Halve the size that failed, and give back the memory that nothing uses."""
        self.size = (failed + 1) // 2
        self.reduced = True
        _free_unused()
        warnings.warn(
            f"Memory ran out. Trying again with {self.size} samples in a batch. Set "
            f"batch_size={self.size} to save the attempt.",
            RuntimeWarning,
            stacklevel=2,
        )


def _free_unused() -> None:
    """Give back the memory that nothing uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
