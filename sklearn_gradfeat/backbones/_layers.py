"""The choice of several layers whose outputs make up the activation.

An output is averaged over all axes but those of samples and channels. The channels are on the
second axis after a convolution, and on the last one after a linear layer. A run on an example
shows which: the layer computes its output from that of the last convolution, matrix product or
normalisation before it, which has as many channels.

Padding is left out of an average, so that the activation of a text does not depend on the lengths
of other texts. The positions of padding come from the argument ``attention_mask`` of a submodule,
or from the mask of padding that torch's transformers take.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sklearn_gradfeat.backbones._graph import (
    Layer,
    averaged,
    main_output,
    not_called,
    run_once,
    token_masks,
    watched,
)

ActivationLayer: TypeAlias = str | int | Sequence[str] | None

_CHANNELS_SECOND = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "batch_norm", "group_norm", "instance_norm",
}  # fmt: skip
_CHANNELS_LAST = {
    "linear", "addmm", "layer_norm", "rms_norm", "multi_head_attention_forward", "embedding",
    "lstm", "gru", "rnn_tanh", "rnn_relu",
}  # fmt: skip
# Averages agree if they differ by no more than this share.
_ROUNDING = 1e-4


class _Seen(NamedTuple):
    """A submodule in a run: its output as a layer, or the reason why it cannot be a layer."""

    layer: Layer
    rows: Tensor
    fault: str


def hashable(activation_layer: ActivationLayer) -> str | int | tuple[str, ...] | None:
    """Return ``activation_layer`` with a tuple for a list; raise an error unless it has names."""
    if activation_layer is None or isinstance(activation_layer, str):
        return activation_layer
    if not isinstance(activation_layer, Sequence):
        return int(activation_layer)
    if not activation_layer or not all(isinstance(name, str) for name in activation_layer):
        raise ValueError(
            f"activation_layer={activation_layer!r} must list one or more strings: names or glob "
            "patterns of submodules."
        )
    return tuple(activation_layer)


def is_pattern(name: str, module: nn.Module) -> bool:
    """Whether a name is a glob pattern and not a submodule."""
    return name not in _names(module) and any(sign in name for sign in "*?[")


def check_layer(module: nn.Module, layer: str) -> None:
    """Raise an error unless a module has a submodule of that name."""
    names = _names(module)
    if layer not in names:
        raise _unknown(layer, names)


def choose_layers(
    module: nn.Module,
    chosen: int | Sequence[str],
    example: Tensor,
    blocks: Callable[[], Sequence[str]],
) -> tuple[Layer, ...]:
    """Return the layers that ``activation_layer`` chooses, in the order of their last calls.

    Parameters
    ----------
    module : nn.Module
        The network, in evaluation mode.
    chosen : int or sequence of str
        The number of blocks, or names and glob patterns of submodules. The empty name is the
        network.
    example : tensor of shape (2 or more, ...)
        A batch that the network accepts.
    blocks : callable
        Returns the paths of the blocks, from bottom to top.

    Returns
    -------
    tuple of Layer

    Raises
    ------
    ValueError
        If a pattern matches nothing, if a layer is not called or returns no activation, or if
        there are fewer blocks than asked for.
    """
    names = _names(module)
    if isinstance(chosen, int):
        seen = _run(module, ["", *names], example)
        paths = _topmost(chosen, blocks(), seen)
        if not any(_same(seen[path], seen[""], example) for path in paths):
            paths.append("")
    else:
        matched = {pattern: _match(pattern, names) for pattern in chosen}
        seen = _run(module, set(chain(*matched.values())), example)
        for pattern, found in matched.items():
            _check_outputs(pattern, [seen[path] for path in found if path in seen])
        paths = list(seen)
    return tuple(found.layer for path, found in seen.items() if path in paths)


def _names(module: nn.Module) -> list[str]:
    """Return the paths of all submodules."""
    return [name for name, _ in module.named_modules() if name]


def _run(module: nn.Module, paths: Collection[str], example: Tensor) -> dict[str, _Seen]:
    """Run a network, and return its submodules with their outputs, ordered by their last calls."""
    seen: dict[str, _Seen] = {}
    recorder = _Recorder(len(example))

    def see(path: str, output: Any) -> None:
        seen.pop(path, None)
        given = len(example), recorder.latest, masks[::-1]
        seen[path] = _described(path, main_output(output), *given)

    with token_masks(module) as masks, watched(module, paths, see), recorder:
        run_once(module, example)
    return seen


def _described(
    path: str, output: Any, n_samples: int, latest: tuple[int, int], masks: Sequence[Tensor]
) -> _Seen:
    """Return an output as a layer with its averages, or the reason why it cannot be a layer."""
    fault = ""
    if not isinstance(output, Tensor):
        fault = f"returns {type(output).__name__}"
    elif output.is_nested or output.layout is not torch.strided:
        fault = "returns a nested or sparse tensor"
    elif not output.is_floating_point():
        fault = f"returns {output.dtype}"
    elif output.ndim < 2 or output.shape[0] != n_samples:
        fault = f"returns shape {tuple(output.shape)} for {n_samples} samples"
    if fault:
        return _Seen(Layer(path, 1, 0), torch.empty(0), fault)
    axis = _channel_axis(output, *latest)
    return _Seen(Layer(path, axis, output.shape[axis]), averaged(output, axis, masks).detach(), "")


def _channel_axis(output: Tensor, axis: int, n_channels: int) -> int:
    """Return the axis of the channels; the operation before had ``n_channels`` on ``axis``."""
    if output.ndim == 2:
        return 1
    return next((i for i in (axis, -axis) if output.shape[i] == n_channels), 1)


class _Recorder(TorchFunctionMode):
    """Keeps the axis and the number of the channels of the latest operation that has any.

    Linear layers on one row per sample do not count, such as those that weight the channels of
    an image.
    """

    def __init__(self, n_samples: int) -> None:
        super().__init__()
        self.n_samples = n_samples
        self.latest = (1, 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function and note the channels of its result."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _CHANNELS_SECOND or name in _CHANNELS_LAST:
            output = tree_leaves(result)[0]
            axis = 1 if name in _CHANNELS_SECOND else -1
            if output.ndim > 2 or (output.ndim == 2 and len(output) != self.n_samples):
                self.latest = axis, output.shape[axis]
        return result


def _topmost(k: int, blocks: Sequence[str], seen: Mapping[str, _Seen]) -> list[str]:
    """Return the topmost blocks."""
    if k > len(blocks):
        raise ValueError(
            f"activation_layer={k} asks for more blocks than the backbone has: {len(blocks)}. "
            "Pass a smaller number."
        )
    return [_around(path, seen) for path in blocks[-k:]]


def _around(path: str, seen: Mapping[str, _Seen]) -> str:
    """Return the innermost submodule around a path whose output can be an activation."""
    while path and (path not in seen or seen[path].fault):
        path = path.rpartition(".")[0]
    return path


def _same(block: _Seen, network: _Seen, example: Tensor) -> bool:
    """Whether a block has the output of the network, up to rounding.

    For token ids that is unknown: a network may leave out padding, which an example may lack.
    """
    if block.layer == network.layer:
        return True
    if not example.is_floating_point() or block.rows.shape != network.rows.shape:
        return False
    return bool((block.rows - network.rows).norm() <= _ROUNDING * network.rows.norm())


def _match(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the submodule of that name, or those that a pattern matches."""
    if not pattern or pattern in names:
        return [pattern]
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if not matched:
        raise _unknown(pattern, names)
    return matched


def _check_outputs(pattern: str, called: Sequence[_Seen]) -> None:
    """Raise an error unless there are layers, and all their outputs can be activations."""
    if not called:
        raise not_called(pattern)
    for layer, _, fault in called:
        if fault:
            raise ValueError(
                f"activation_layer={pattern!r} chooses the submodule {layer.path!r}, which "
                f"{fault}. Choose submodules that return one floating point tensor of shape "
                "(n_samples, n_features) or (n_samples, n_features, ...)."
            )


def _unknown(pattern: str, names: Sequence[str]) -> ValueError:
    """Return the error of a pattern that matches nothing."""
    nearest = difflib.get_close_matches(pattern, names, n=5, cutoff=0.0)
    return ValueError(
        f"activation_layer={pattern!r} is not a submodule of the backbone. Pass the name of one, "
        f"or a glob pattern; the nearest names are {', '.join(map(repr, nearest))}."
    )
