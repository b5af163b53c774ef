"""The weights of a frozen network, apart from its code."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from sklearn_gradfeat.backbones._copies import frozen_copy, has_lazy_parameters, unwrapped
from sklearn_gradfeat.backbones._frozen import FrozenBackbone, on_host
from sklearn_gradfeat.backbones._graph import ActivationModule, run_once

_SHOWN = 3


def stored_weights(backbone: FrozenBackbone) -> dict[str, npt.NDArray[Any]]:
    """Return the parameters and buffers of a frozen network by name."""
    tensors = _tensors(backbone.module.module)
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def with_weights(
    module: nn.Module, weights: dict[str, npt.NDArray[Any]], example: Tensor, dtype: torch.dtype
) -> nn.Module:
    """Return a copy of a module with other weights, for inference in host memory.

    Parameters
    ----------
    module : nn.Module
        The architecture.
    weights : dict of str to ndarray
        What :func:`stored_weights` returned.
    example : tensor of shape (2 or more, ...)
        A batch as the network receives it; it gives lazy parameters their shape.
    dtype : torch.dtype
        Floating dtype of the copy.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If names or shapes differ; the message says which.
    """
    copied = frozen_copy(module, example.device, dtype)
    if has_lazy_parameters(copied):
        run_once(copied, example)
    tensors = _tensors(copied)
    _compare(tensors, weights)
    with torch.no_grad():
        for name, array in weights.items():
            tensors[name].copy_(torch.from_numpy(array))
    return copied


def sharing(backbone: FrozenBackbone, module: nn.Module) -> FrozenBackbone:
    """Return the backbone in host memory, with tensors of ``module`` where they equal its own.

    A pickle of the two holds such tensors once. See :func:`apart`.
    """
    module = unwrapped(module)
    own = on_host(backbone.module)
    if not has_lazy_parameters(module):
        others = _tensors(module)
        same = {
            id(tensor): others[name]
            for name, tensor in _tensors(own.module).items()
            if name in others and _equal(tensor, others[name])
        }
        own = copy.deepcopy(own, same)
    return _with_module(backbone, own)


def apart(backbone: FrozenBackbone) -> FrozenBackbone:
    """Return the backbone with tensors of its own."""
    return _with_module(backbone, copy.deepcopy(backbone.module).requires_grad_(False))


def _with_module(backbone: FrozenBackbone, module: ActivationModule) -> FrozenBackbone:
    """Return a backbone in host memory that has another module."""
    other = FrozenBackbone.__new__(FrozenBackbone)
    state = {"module": module, "example": backbone.example.cpu(), "dtype": backbone.dtype}
    other.__setstate__(state)
    return other


def _equal(a: Tensor, b: Tensor) -> bool:
    alike = type(a) is type(b) and (a.dtype, a.device) == (b.dtype, b.device)
    return alike and torch.equal(a, b)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _compare(tensors: dict[str, Tensor], weights: dict[str, npt.NDArray[Any]]) -> None:
    """Raise an error that says how tensors differ from weights in names and shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    other = [
        f"{name!r} has shape {shapes[name]} instead of {array.shape}"
        for name, array in weights.items()
        if shapes.get(name, array.shape) != array.shape
    ]
    differences = [
        *_listed("lacks", [repr(name) for name in weights if name not in shapes]),
        *_listed("has, beyond those weights,", [repr(n) for n in shapes if n not in weights]),
        *_listed("", other),
    ]
    if differences:
        raise ValueError(f"the module {'; it '.join(differences)}")


def _listed(verb: str, items: list[str]) -> Iterable[str]:
    """Yield one phrase about the first few items, if there are any."""
    if items:
        more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
        yield f"{verb} {', '.join(items[:_SHOWN])}{more}"
