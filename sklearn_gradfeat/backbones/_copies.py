"""A private copy of a module, with plain parameters, that is never trained."""

from __future__ import annotations

import copy
import pickle
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm


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
            "The backbone is a TorchScript module, which cannot be linearised. Pass the "
            "torch.nn.Module that it was made from."
        )
    copied = _copy(module).eval()
    for name, layer in copied.named_modules():
        _remove_reparametrizations(layer)
        if isinstance(layer, _NormBase) and layer.running_mean is None:
            if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
                continue
            raise ValueError(
                f"Layer {name!r} of the backbone normalises over the batch without running "
                "statistics, so the features of a sample would depend on its neighbours. "
                "Use track_running_stats=True, or another normalisation."
            )
    return copied.to(device, dtype)


def _copy(module: nn.Module) -> nn.Module:
    """Copy a module, also one whose parameters are yet to be drawn."""
    held = chain.from_iterable(vars(layer).values() for layer in module.modules())
    # Weights that a hook computes are no leaves of autograd, which refuses to copy them.
    computed = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    try:
        if has_lazy_parameters(module):
            lazy: nn.Module = pickle.loads(pickle.dumps(module))
            return lazy
        return copy.deepcopy(module, computed)
    except (RuntimeError, ValueError, TypeError, AttributeError, pickle.PicklingError) as error:
        raise ValueError(
            f"The backbone cannot be copied ({error}). Store tensors in it as parameters or "
            "buffers, and nothing that cannot be copied."
        ) from error


def _remove_reparametrizations(layer: nn.Module) -> None:
    """Turn the outcome of weight or spectral normalisation into a plain parameter."""
    for name in list(getattr(layer, "parametrizations", {})):
        parametrize.remove_parametrizations(layer, name)
    hooks: list[Any] = list(layer._forward_pre_hooks.values())
    for hook in hooks:
        kind = type(hook).__name__
        if kind == "WeightNorm":
            remove_weight_norm(layer, hook.name)
        elif kind == "SpectralNorm":
            remove_spectral_norm(layer, hook.name)
