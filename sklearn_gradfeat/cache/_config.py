"""Settings of the process: bounds of feature stores and of the memory of a fit; checkpoints."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, Literal

_UNKNOWN_MEMORY = 2**33
_settings: dict[str, Any] = {
    "store_bytes": "auto",
    "memory_bytes": "auto",
    "checkpoint_seconds": 60,
}
# "auto" divides the memory of the machine by these numbers.
_SHARES = {"store_bytes": 4, "memory_bytes": 2}
_listeners: list[Callable[[], None]] = []


def get_config() -> dict[str, Any]:
    """Return the settings of the process.

    Returns
    -------
    dict of str to object
        A copy of the settings. The keys are the parameters of :func:`set_config`.

    See Also
    --------
    set_config : Change the settings.
    config_context : Change the settings in a block.

    Examples
    --------
    >>> from sklearn_gradfeat import get_config
    >>> get_config()
    {'store_bytes': 'auto', 'memory_bytes': 'auto', 'checkpoint_seconds': 60}
    """
    return dict(_settings)


def set_config(
    *,
    store_bytes: int | Literal["auto"] | None = None,
    memory_bytes: int | Literal["auto"] | None = None,
    checkpoint_seconds: float | None = None,
) -> None:
    """Change the settings of the process, for all its threads.

    Parameters
    ----------
    store_bytes : int, "auto" or None, default=None
        Largest size of a feature store, in bytes. It bounds the store in memory, and a new store
        on disk. 0 stores nothing, neither in memory nor on disk. ``"auto"`` is a quarter of the
        memory of the machine, or of the container. In a worker process, such as those of joblib,
        ``"auto"`` divides the bound of the store in memory by the number of CPUs. None does not
        change the setting.
    memory_bytes : int, "auto" or None, default=None
        Largest size of the trunk output and the activations that a fit keeps in memory, in bytes.
        If they are larger, the fit keeps them in temporary files and reads them batch by batch.
        Explicit gradients take at most a quarter of this size. ``"auto"`` is half of the memory of
        the machine, or of the container, and in a worker process this half divided by the number of
        CPUs. None does not change the setting.
    checkpoint_seconds : float, default=None
        Seconds between two writes of the file of a ``checkpoint``, 60 at first: a fit that is
        killed loses about this time. None does not change the setting.

    Raises
    ------
    ValueError
        If a size is not an integer of at least 0, ``"auto"`` or None; or if
        ``checkpoint_seconds`` is not a finite number of at least 0.

    See Also
    --------
    get_config : Return the settings.
    config_context : Change the settings in a block.

    Examples
    --------
    >>> from sklearn_gradfeat import set_config
    >>> set_config(store_bytes=2 * 2**30)  # 2 GiB
    >>> set_config(store_bytes="auto")
    """
    given = {"store_bytes": store_bytes, "memory_bytes": memory_bytes}
    sizes = {name: size for name, size in given.items() if size is not None}
    for name, size in sizes.items():
        is_size = isinstance(size, int) and not isinstance(size, bool)
        if size != "auto" and not (is_size and int(size) >= 0):
            raise ValueError(
                f"{name} must be an integer of at least 0, 'auto' or None, got {size!r}. Pass a "
                "size in bytes."
            )
    if checkpoint_seconds is not None:
        is_number = isinstance(checkpoint_seconds, Real) and not isinstance(
            checkpoint_seconds, bool
        )
        if not (is_number and 0 <= checkpoint_seconds < math.inf):
            raise ValueError(
                "checkpoint_seconds must be a finite number of at least 0 or None, got "
                f"{checkpoint_seconds!r}. Pass a time in seconds."
            )
        _settings["checkpoint_seconds"] = checkpoint_seconds
    _settings.update(sizes)
    for listener in _listeners:
        listener()


@contextmanager
def config_context(
    *,
    store_bytes: int | Literal["auto"] | None = None,
    memory_bytes: int | Literal["auto"] | None = None,
    checkpoint_seconds: float | None = None,
) -> Iterator[None]:
    """Change the settings in a ``with`` block, and restore them after it.

    The settings belong to the process: during the block, all its threads see the change.

    Parameters
    ----------
    store_bytes, memory_bytes : int, "auto" or None, default=None
        Sizes in bytes, as in :func:`set_config`.
    checkpoint_seconds : float, default=None
        Seconds between two writes of a checkpoint, as in :func:`set_config`.

    Raises
    ------
    ValueError
        If a value is invalid, as in :func:`set_config`.

    See Also
    --------
    set_config : Change the settings.
    get_config : Return the settings.

    Examples
    --------
    >>> from sklearn_gradfeat import config_context, get_config
    >>> with config_context(store_bytes=0):
    ...     get_config()["store_bytes"]
    0
    """
    before = get_config()
    set_config(
        store_bytes=store_bytes, memory_bytes=memory_bytes, checkpoint_seconds=checkpoint_seconds
    )
    try:
        yield
    finally:
        set_config(**before)


def on_change(listener: Callable[[], None]) -> None:
    """Register a function to call after every change of the settings."""
    _listeners.append(listener)


def store_bytes() -> int:
    """Return the bound of a store on disk."""
    return _size("store_bytes")


def memory_store_bytes() -> int:
    """Return the bound of the store in memory."""
    return _own_share("store_bytes")


def memory_bytes() -> int:
    """Return the bound of the trunk output and the activations that a fit keeps in memory."""
    return _own_share("memory_bytes")


def _size(name: str) -> int:
    """Return the value of a setting; ``"auto"`` is a share of the memory."""
    size = get_config()[name]
    return _total_memory() // _SHARES[name] if size == "auto" else int(size)


def _own_share(name: str) -> int:
    """Return the value of a setting for this process; worker processes divide ``"auto"``."""
    is_worker = multiprocessing.parent_process() is not None
    shared = is_worker and get_config()[name] == "auto"
    return _size(name) // (os.cpu_count() or 1) if shared else _size(name)


def _total_memory() -> int:
    """Return the memory of the machine, or of the container if that is smaller, in bytes."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        size = _UNKNOWN_MEMORY
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            size = min(size, int(Path(file).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return size
