"""Pickles of modules whose numbers are one array, which worker processes of joblib share.

joblib writes a large array to a file once for all tasks of a search, and its workers map the file.
Tensors would be pickled with each task. Some modules are pickled as they are: those whose layers
define how they are copied or pickled, which may need the numbers; those without a deep copy; and
those whose deep copy has functions that refer to layers of the original.
"""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sklearn_gradfeat.backbones._copies import on_host, refers
from sklearn_gradfeat.backbones._fingerprint import named_tensors, tensor_bytes

_Kind = tuple[str, torch.dtype, torch.Size]

_METHODS = {"__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"}

# joblib recognises an array by its identity, so that equal numbers must be the same object.
_NUMBERS: WeakKeyDictionary[nn.Module, npt.NDArray[np.uint8]] = WeakKeyDictionary()


class Pickled:
    """A module that is pickled as its structure and one array, and unpickled as a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to build the module from its structure, kinds of tensors, and numbers."""
        module = on_host(self.module)
        plain = {id(t): (name, t) for name, t in named_tensors(module) if _is_plain(t)}
        structure = _structure(module, {k: _without_numbers(t) for k, (_, t) in plain.items()})
        if structure is None:
            return _unpickled, (module, [], np.empty(0, np.uint8))
        kinds = [(name, tensor.dtype, tensor.shape) for name, tensor in plain.values()]
        numbers = np.frombuffer(b"".join(tensor_bytes(t) for _, t in plain.values()), np.uint8)
        known = _NUMBERS.get(self.module)
        if known is None or not np.array_equal(known, numbers):
            _NUMBERS[self.module] = known = numbers
        return _unpickled, (structure, kinds, known)


def _structure(module: nn.Module, memo: dict[int, Any]) -> nn.Module | None:
    """Return a deep copy of a module with the tensors in ``memo``, or None if it may differ."""
    if any(_has_own_methods(type(layer)) for layer in module.modules()):
        return None
    try:
        copied = copy.deepcopy(module, memo)
    except (RuntimeError, TypeError, ValueError):  # lazy parameters, tensors that are not leaves
        return None
    return None if any(refers(vars(layer), memo) for layer in copied.modules()) else copied


def _has_own_methods(kind: type) -> bool:
    """Whether a class that is not of torch defines how objects are copied or pickled."""
    own = (cls for cls in kind.__mro__ if cls.__module__.split(".")[0] not in ("torch", "builtins"))
    return any(not _METHODS.isdisjoint(vars(cls)) for cls in own)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but its numbers."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.numel() > 0
        and not vars(tensor)
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_quantized or tensor.is_meta or tensor.is_conj() or tensor.is_neg())
    )


def _without_numbers(tensor: Tensor) -> Tensor:
    """Return an empty tensor of the class and dtype of another."""
    empty = torch.empty(0, dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty.requires_grad_(tensor.requires_grad)


def _unpickled(module: nn.Module, kinds: list[_Kind], numbers: npt.NDArray[np.uint8]) -> nn.Module:
    """Return a module with the numbers in its tensors."""
    tensors, start = dict(named_tensors(module)), 0
    for name, dtype, shape in kinds:
        stop = start + shape.numel() * dtype.itemsize
        own = torch.from_numpy(numbers[start:stop].copy())  # workers may not write to a mapped file
        tensors[name].data = own.view(dtype).view(shape)
        start = stop
    return module
