"""Copies of modules: frozen ones with plain parameters, and copies with other tensors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

from sklearn_gradfeat.backbones._graph import run_once

Module = TypeVar("Module", bound=nn.Module)

_SHOWN = 3


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped, or the module itself."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def has_lazy_parameters(module: nn.Module) -> bool:
    """Whether some parameters have no shape until the module is first called."""
    return any(map(nn.parameter.is_lazy, chain(module.parameters(), module.buffers())))


def frozen_copy(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a copy in evaluation mode; the original stays as it is in every respect.

    Reparametrized weights become plain ones, so that a layer's weight is a parameter.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            "backbone is a TorchScript module, which cannot be linearised. Pass the "
            "torch.nn.Module that it was made from."
        )
    copied = _copy(module).eval()
    for name, layer in copied.named_modules():
        _remove_reparametrizations(layer)
        if isinstance(layer, _NormBase) and layer.running_mean is None:
            if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
                continue
            raise ValueError(
                f"Layer {name!r} of backbone normalises over the batch without running statistics, "
                "so the activation of a sample would depend on the rest of its batch. Build the "
                "layer with track_running_stats=True, or use another normalisation."
            )
    return copied.to(device, dtype)


def _copy(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module, also of one with lazy parameters."""
    held = chain.from_iterable(vars(layer).values() for layer in module.modules())
    # Autograd refuses to copy tensors that are not leaves, such as weights that a hook computes.
    computed = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    try:
        if has_lazy_parameters(module):
            lazy: nn.Module = pickle.loads(pickle.dumps(module))
            return lazy
        return copy.deepcopy(module, computed)
    except (RuntimeError, ValueError, TypeError, AttributeError, pickle.PicklingError) as error:
        raise ValueError(
            f"backbone cannot be copied ({error}). Store tensors in it as parameters or buffers, "
            "and no object that copy.deepcopy refuses."
        ) from error


def _remove_reparametrizations(layer: nn.Module) -> None:
    """Make the result of weight or spectral normalisation a plain parameter."""
    for name in list(getattr(layer, "parametrizations", {})):
        parametrize.remove_parametrizations(layer, name)
    hooks: list[Any] = list(layer._forward_pre_hooks.values())
    for hook in hooks:
        kind = type(hook).__name__
        if kind == "WeightNorm":
            remove_weight_norm(layer, hook.name)
        elif kind == "SpectralNorm":
            remove_spectral_norm(layer, hook.name)


def on_host(module: Module) -> Module:
    """Return a module with its tensors in host memory: itself if they are there already."""
    tensors = [*module.parameters(), *module.buffers()]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return module
    copies = {id(t): t.detach().cpu() for t in tensors}
    for tensor in tensors:
        if isinstance(tensor, nn.Parameter):
            copies[id(tensor)] = nn.Parameter(copies[id(tensor)], tensor.requires_grad)
    return copy.deepcopy(module, copies)


def equal_tensors(module: nn.Module, other: nn.Module) -> dict[int, Any]:
    """Return the tensors of ``other`` that equal those of a module, as a memo of deepcopy."""
    others = _named_tensors(other)
    return {
        id(tensor): others[name]
        for name, tensor in _named_tensors(module).items()
        if name in others and _equal(tensor, others[name])
    }


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in class, dtype, device and value."""
    alike = type(a) is type(b) and (a.dtype, a.device) == (b.dtype, b.device)
    return alike and torch.equal(a, b)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by name."""
    return dict(chain(module.named_parameters(), module.named_buffers()))


def stored_weights(module: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Return the parameters and buffers of a module by name, as arrays."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in _named_tensors(module).items()}


def with_weights(
    module: nn.Module, weights: dict[str, npt.NDArray[Any]], example: Tensor, dtype: torch.dtype
) -> nn.Module:
    """Return a copy of a module with other weights, for inference in host memory.

    Parameters
    ----------
    module : nn.Module
        The architecture.
    weights : dict of str to ndarray
        Parameters and buffers by name, from :func:`stored_weights`.
    example : tensor of shape (2 or more, ...)
        A batch as the network receives it, which gives lazy parameters their shape.
    dtype : torch.dtype
        Floating dtype of the copy.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If names or shapes differ.
    """
    copied = frozen_copy(module, example.device, dtype)
    if has_lazy_parameters(copied):
        run_once(copied, example)
    tensors = _named_tensors(copied)
    _compare(tensors, weights)
    with torch.no_grad():
        for name, array in weights.items():
            tensors[name].copy_(torch.from_numpy(array))
    return copied


def _compare(tensors: dict[str, Tensor], weights: dict[str, npt.NDArray[Any]]) -> None:
    """Raise an error unless tensors and weights agree in names and shapes."""
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
    """Yield a phrase about the first items, if there are any."""
    if items:
        more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
        yield f"{verb} {', '.join(items[:_SHOWN])}{more}"
