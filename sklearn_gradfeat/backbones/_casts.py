"""The warning of a network that computes in lower precision than float64, which was asked for."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sklearn_gradfeat.backbones._graph import run_once
from sklearn_gradfeat.backbones._independence import call_name, layer_paths


def first_cast(module: nn.Module, example: Tensor) -> str | None:
    """Return the first call that turns float64 numbers of the samples into narrower ones.

    Parameters
    ----------
    module : nn.Module
        The network, in float64.
    example : tensor of shape (n_samples, ...)
        A batch that the network accepts.

    Returns
    -------
    str or None
        The name of the torch function and of the layer that calls it.
    """
    casts = _Casts(example)
    with layer_paths(module, casts.path), casts:
        run_once(module, example)
    return casts.found


def warn_of_cast(call: str) -> None:
    """Warn of a network that computes partly in lower precision."""
    warnings.warn(
        "The backbone runs in float64, but it casts to lower precision inside. Its results have "
        f"the accuracy of that precision. The first cast is {call}. Take it out of the backbone, "
        "or set precision='float32'.",
        UserWarning,
        stacklevel=2,
    )


class _Casts(TorchFunctionMode):
    """Follows the tensors that are computed from a batch, to the first narrower float."""

    def __init__(self, batch: Tensor) -> None:
        super().__init__()
        self.found: str | None = None
        self.path: list[str] = [""]
        self._held = {id(batch): batch}  # kept, so that no other tensor gets the same id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function and keep its results."""
        result = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if id(t) in self._held]
        if not inputs:
            return result
        wide = any(tensor.dtype == torch.float64 for tensor in inputs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._held[id(tensor)] = tensor
                narrow = tensor.is_floating_point() and tensor.dtype != torch.float64
                if wide and narrow and self.found is None:
                    self.found = call_name(func, self.path[-1])
        return result
