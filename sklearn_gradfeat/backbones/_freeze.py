"""One frozen copy of a module for all of its users."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import uuid
import weakref
from itertools import chain
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from sklearn_gradfeat.backbones._copy import has_lazy_parameters
from sklearn_gradfeat.backbones._network import FrozenBackbone

_CACHE: weakref.WeakKeyDictionary[Any, dict[Any, FrozenBackbone]]
_CACHE = weakref.WeakKeyDictionary()
# Every task of a worker process brings a copy of the module that ends with the task.
_WORKER = type("Worker", (), {})()
_LOCK = threading.RLock()
_HASHED_APART = {"training", "_parameters", "_buffers", "_modules"}


def freeze(
    module: nn.Module,
    example: Tensor,
    dtype: torch.dtype,
    activation_layer: str | None,
    owner: object = None,
) -> FrozenBackbone:
    """Return the frozen copy of a module; clones and folds share one.

    So do equal modules of one ``owner``, such as the factory that made them, and those of one
    worker process. A module that was changed since, in place or not, gets a new copy; so does
    one whose parameters are yet to be drawn.
    """
    if has_lazy_parameters(module):
        return FrozenBackbone(module, example, dtype, activation_layer)
    kind = (tuple(example.shape[1:]), example.dtype, dtype, example.device, activation_layer)
    with _LOCK:
        stamp = module_digest(module)
        known = _CACHE.setdefault(_owner(module, owner), {})
        for key in [key for key in known if key[-1] != stamp]:
            del known[key]
        if (*kind, stamp) not in known:
            known[*kind, stamp] = FrozenBackbone(module, example, dtype, activation_layer)
        return known[*kind, stamp]


def _owner(module: nn.Module, owner: object) -> object:
    """Return what the frozen copy lives with."""
    if multiprocessing.parent_process() is not None:
        return _WORKER
    try:
        return module if owner is None else next(iter(weakref.WeakSet([owner])))
    except TypeError:  # the owner has no hash or no weak references
        return module


def module_digest(module: nn.Module) -> str:
    """Return a hash of everything that the function of a module depends on.

    Parameters, buffers, and the attributes of every submodule, hooks among them; not the
    mode. A module with an attribute that cannot be pickled never has the same hash twice.
    """
    state = xxhash.xxh3_128()
    for name, layer in module.named_modules():
        held = sorted((k, v) for k, v in vars(layer).items() if k not in _HASHED_APART)
        try:
            state.update(pickle.dumps((name, id(type(layer)), held)))
        except Exception:  # whatever an attribute's own pickling may raise
            return uuid.uuid4().hex
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()
