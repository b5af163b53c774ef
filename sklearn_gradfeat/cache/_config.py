"""Settings of the process."""

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
        A copy, by the names of the parameters of :func:`set_config`.

    Examples
    --------
    >>> from sklearn_gradfeat import get_config
    >>> get_config()
    {'store_bytes': 'auto'}
    """
    return dict(_settings)


def set_config(*, store_bytes: int | Literal["auto"] | None = None) -> None:
    """Change the settings of the process, in all of its threads.

    Parameters
    ----------
    store_bytes : int, "auto" or None, default=None
        The most that the feature store in memory holds, and that a new store on disk may
        grow to; 0 stores nothing. ``"auto"`` is a quarter of the memory of the machine, or
        of the container; for the memory of a worker process, such as joblib's, an equal
        share of that for each CPU. None leaves the setting as it is.

    Raises
    ------
    ValueError
        If ``store_bytes`` is neither.

    Examples
    --------
    >>> from sklearn_gradfeat import set_config
    >>> set_config(store_bytes=2 * 2**30)
    >>> set_config(store_bytes="auto")
    """
    if store_bytes is None:
        return
    is_size = isinstance(store_bytes, int) and not isinstance(store_bytes, bool)
    if store_bytes != "auto" and not (is_size and int(store_bytes) >= 0):
        raise ValueError(
            f"store_bytes={store_bytes!r} is no number of bytes. "
            "Pass an integer of 0 or more, or 'auto'."
        )
    _settings["store_bytes"] = store_bytes
    for listener in _listeners:
        listener()


@contextmanager
def config_context(**settings: Any) -> Iterator[None]:
    """Change settings for a while; they are those of the process, not of the thread.

    Parameters
    ----------
    **settings : dict
        As in :func:`set_config`.

    Examples
    --------
    >>> from sklearn_gradfeat import config_context, get_config
    >>> with config_context(store_bytes=0):
    ...     get_config()["store_bytes"]
    0
    """
    before = get_config()
    set_config(**settings)
    try:
        yield
    finally:
        set_config(**before)


def on_change(listener: Callable[[], None]) -> None:
    """Have a function called whenever the settings were changed."""
    _listeners.append(listener)


def store_bytes() -> int:
    """Return the bound of a store on disk."""
    size = get_config()["store_bytes"]
    return _memory() // 4 if size == "auto" else int(size)


def memory_store_bytes() -> int:
    """Return the bound of the store in memory."""
    alone = multiprocessing.parent_process() is None
    if alone or get_config()["store_bytes"] != "auto":
        return store_bytes()
    return store_bytes() // (os.cpu_count() or 1)


def _memory() -> int:
    """Return the bytes of memory of the machine, or of the container if that has fewer."""
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
