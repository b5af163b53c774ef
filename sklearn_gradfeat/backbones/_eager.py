"""The head of a network that cannot be captured as a graph: the whole module."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from sklearn_gradfeat.backbones._attention import plain_attention, without_cudnn
from sklearn_gradfeat.backbones._graph import MODULE_LOCK, ActivationModule
from sklearn_gradfeat.data import is_out_of_memory

_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, nn.RNNBase, nn.MultiheadAttention,
)  # fmt: skip


class _GradientsStayOn(TorchFunctionMode):
    """Ignores ``torch.no_grad`` if gradients are on outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.on = torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, unless it turns gradients off."""
        if self.on and func is torch._C._set_grad_enabled and not args[0]:
            return None
        return func(*args, **(kwargs or {}))


class EagerHead:
    """A module as a function of some of its parameters and a batch.

    Parameters
    ----------
    module : ActivationModule
        The network.
    names : list of str
        The parameters.
    as_written : bool, default=False
        Whether ``torch.no_grad`` in the module stops derivatives. By default it does not, as in a
        graph. Forward mode does not know it either.
    """

    def __init__(
        self, module: ActivationModule, names: list[str], *, as_written: bool = False
    ) -> None:
        self.module = module
        self.names = [f"module.{name}" for name in names]
        self.mode = nullcontext if as_written else _GradientsStayOn

    def __call__(self, *values: Tensor) -> tuple[Tensor]:
        """Take the parameters, then the batch."""
        *parameters, x = values
        replaced = dict(zip(self.names, parameters, strict=True))
        with plain_attention(), MODULE_LOCK, self.mode():
            return (functional_call(self.module, replaced, (x,)),)


def parameter_names(module: ActivationModule, example: Tensor) -> list[str]:
    """Return the parameters that may be chosen.

    These are the parameters that the activation has a derivative in, except those of batch norms.
    """
    inner = module.module
    norms = {name for name, layer in inner.named_modules() if isinstance(layer, _BatchNorm)}
    candidates = {
        name: value.detach().requires_grad_()
        for name, value in inner.named_parameters()
        if value.is_floating_point() and name.rpartition(".")[0] not in norms
    }
    with torch.enable_grad(), without_cudnn():
        try:
            (output,) = EagerHead(module, list(candidates))(*candidates.values(), example)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"backbone cannot be differentiated: {error}\nTake the cause, such as "
                "torch.inference_mode, out of its forward pass, or set features='activation'."
            ) from error
        if not output.requires_grad:
            raise ValueError(
                "The activation has no derivative in any parameter of backbone, as after detach or "
                "under torch.inference_mode. Take these out of its forward pass, or set "
                "features='activation'."
            )
        found = torch.autograd.grad(output.sum(), list(candidates.values()), allow_unused=True)
    pairs = zip(candidates, found, strict=True)
    return [name for name, gradient in pairs if gradient is not None]


def module_out_channels(module: nn.Module) -> dict[str, int]:
    """Return the number of output channels of the weights whose first axis is another one."""
    found = {}
    for path, layer in module.named_modules():
        name = f"{path}.weight" if path else "weight"
        if isinstance(layer, _ConvTransposeNd):
            found[name] = layer.out_channels
        elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            found[name] = layer.embedding_dim
    return found


def module_blocks(
    module: ActivationModule, example: Tensor, names: list[str]
) -> dict[str, list[str]]:
    """Return the parameter names of every block by its path, found in the tree of submodules.

    The block of a layer is the smallest element of a ``Sequential`` or ``ModuleList`` that
    contains the layer, or the layer itself if there is none. Layers without one of the parameters
    ``names`` do not count, such as those above the activation. Linear layers on one row per sample
    do not count if there are other layers.
    """
    called: list[tuple[str, bool]] = []
    inner = module.module
    hooks = [
        layer.register_forward_hook(_recorder(name, called))
        for name, layer in inner.named_modules()
        if isinstance(layer, _LAYERS) and any(n.startswith(f"{name}.") or not name for n in names)
    ]
    try:
        with torch.no_grad(), plain_attention():
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    spatial = [name for name, dense in called if not dense] or [name for name, _ in called]
    found: dict[str, None] = {}
    for name in spatial or [""]:
        path = _element(inner, name)
        found.pop(path, None)
        found[path] = None
    return {path: [n for n in names if not path or n.startswith(f"{path}.")] for path in found}


def _recorder(name: str, called: list[tuple[str, bool]]) -> Any:
    """Return a hook that appends a layer, and whether its input has one row per sample."""

    def hook(layer: nn.Module, inputs: tuple[Any, ...], _output: object) -> None:
        called.append((name, isinstance(layer, nn.Linear) and inputs[0].ndim == 2))

    return hook


def _element(module: nn.Module, name: str) -> str:
    """Return the path of the smallest element of a list around a layer, or the layer itself."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        parent = module.get_submodule(".".join(parts[: end - 1]))
        if type(parent) in (nn.Sequential, nn.ModuleList):
            return ".".join(parts[:end])
    return name
