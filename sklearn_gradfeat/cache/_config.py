"""Settings of the process: the bound of the feature stores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

_UNKNOWN_MEMORY = 2**33
_settings: dict[str, Any] = {"store_bytes": "auto"}
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
    {'store_bytes': 'auto'}
    """
    return dict(_settings)


def set_config(*, store_bytes: int | Literal["auto"] | None = None) -> None:
    """Change the settings of the process, for all its threads.

    Parameters
    ----------
    store_bytes : int, "auto" or None, default=None
        Largest size of a feature store, in bytes. It bounds the store in memory, and a new store
        on disk. 0 stores nothing, neither in memory nor on disk. ``"auto"`` is a quarter of the
        memory of the machine, or of the container. In a worker process, such as those of joblib,
        ``"auto"`` divides the bound of the store in memory by the number of CPUs. None does not
        change the setting.

    Raises
    ------
    ValueError
        If ``store_bytes`` is not an integer of at least 0, ``"auto"`` or None.

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
    if store_bytes is None:
        return
    is_size = isinstance(store_bytes, int) and not isinstance(store_bytes, bool)
    if store_bytes != "auto" and not (is_size and int(store_bytes) >= 0):
        raise ValueError(
            f"store_bytes must be an integer of at least 0, 'auto' or None, got {store_bytes!r}. "
            "Pass the largest size of the feature store in bytes."
        )
    _settings["store_bytes"] = store_bytes
    for listener in _listeners:
        listener()


@contextmanager
def config_context(*, store_bytes: int | Literal["auto"] | None = None) -> Iterator[None]:
    """Change the settings in a ``with`` block, and restore them after it.

    The settings belong to the process: during the block, all its threads see the change.

    Parameters
    ----------
    store_bytes : int, "auto" or None, default=None
        Largest size of a feature store, in bytes, as in :func:`set_config`.

    Raises
    ------
    ValueError
        If ``store_bytes`` is not an integer of at least 0, ``"auto"`` or None.

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
    set_config(store_bytes=store_bytes)
    try:
        yield
    finally:
        set_config(**before)


def on_change(listener: Callable[[], None]) -> None:
    """Register a function to call after every change of the settings."""
    _listeners.append(listener)


def store_bytes() -> int:
    """Return the bound of a store on disk."""
    size = get_config()["store_bytes"]
    return _total_memory() // 4 if size == "auto" else int(size)


def memory_store_bytes() -> int:
    """Return the bound of the store in memory."""
    is_worker = multiprocessing.parent_process() is not None
    shared = is_worker and get_config()["store_bytes"] == "auto"
    return store_bytes() // (os.cpu_count() or 1) if shared else store_bytes()


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
