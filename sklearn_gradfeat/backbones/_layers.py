"""The choice of several layers whose outputs make up the activation.

An output is averaged over all axes but those of samples and channels. The channels are on the
second axis after a convolution, and on the last one after a linear layer. A run on an example
shows which: the layer computes its output from that of the last convolution, product with a matrix
or normalisation before it, whose axes it may permute.

Padding is left out of an average, so that the activation of a text does not depend on the lengths
of other texts. The positions of padding come from the argument ``attention_mask`` of a submodule,
or from the mask of padding that torch's transformers take.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sklearn_gradfeat.backbones._graph import (
    RECURRENT,
    Layer,
    averaged,
    main_output,
    not_called,
    run_once,
    token_masks,
    watched,
)
from sklearn_gradfeat.backbones._independence import agree

ActivationLayer: TypeAlias = str | int | Sequence[str] | None

# The default of activation_layer, and the number of blocks that it stands for, if there are any.
AUTO = "auto"
_AUTO_BLOCKS = 4

_CHANNELS_SECOND = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "batch_norm", "group_norm", "instance_norm",
}  # fmt: skip
_CHANNELS_LAST = RECURRENT | {
    "linear", "addmm", "layer_norm", "rms_norm", "multi_head_attention_forward", "embedding",
}  # fmt: skip
_PERMUTATIONS = {
    "permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint", "mT", "mH",
}  # fmt: skip
# Averages agree if they differ by no more than this share.
_ROUNDING = 1e-4
# Samples of noise, for layers that see some samples only, such as experts.
_N_NOISE = 8


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
        raise _unknown(layer, [*names, AUTO])


def choose_layers(module: nn.Module, patterns: Sequence[str], example: Tensor) -> tuple[Layer, ...]:
    """Return the layers with some names, in the order of their last calls.

    Parameters
    ----------
    module : nn.Module
        The network, in evaluation mode.
    patterns : sequence of str
        Names and glob patterns of submodules. The empty name is the network.
    example : tensor of shape (2 or more, ...)
        A batch that the network accepts.

    Returns
    -------
    tuple of Layer

    Raises
    ------
    ValueError
        If a pattern matches nothing, or if a layer is not called or returns no activation.
    """
    names = _names(module)
    matched = {pattern: _match(pattern, names) for pattern in patterns}
    seen = _run(module, set(chain(*matched.values())), example)
    for pattern, found in matched.items():
        _check_outputs(pattern, [seen[path] for path in found if path in seen])
    return tuple(found.layer for found in seen.values())


class Outputs:
    """The outputs of all submodules of a network, for a choice of blocks.

    Parameters
    ----------
    module : nn.Module
        The network, in evaluation mode.
    example : tensor of shape (2 or more, ...)
        A batch that the network accepts.
    without : str or None
        A linear layer at the end of the network to leave out, if a submodule returns its input.

    Attributes
    ----------
    network : Layer
        The network.
    last : Layer
        The network, or the submodule that returns the input of that layer.
    """

    def __init__(self, module: nn.Module, example: Tensor, without: str | None = None) -> None:
        # A compiled submodule does not call hooks of those inside of it.
        names = [name for name in _names(module) if "_orig_mod" not in name.split(".")]
        self._seen = _run(module, ["", *names], example)
        _leave_out(self._seen, module, example)
        self._module, self._example = module, example
        self.network = self.last = self._seen[""].layer
        if without is not None:
            x = _input_of(module, without, example)
            same = [s for s in self._seen.values() if not s.fault and _equal(s.rows, x)]
            self.last = same[-1].layer if same else self.last

    @property
    def candidates(self) -> tuple[Layer, ...]:
        """The last layer and submodules that are often blocks, in the order of their calls.

        These are the elements of the network and of lists, and those with submodules of their own
        whose output is not that of another one around them.
        """
        seen = {path: found for path, found in self._seen.items() if not found.fault}
        chosen = {
            path for path in seen if path == self.last.path or _is_element(self._module, path)
        }
        for path in sorted(seen.keys() - chosen, key=len):
            around = [seen[outer].rows for outer in chosen if path.startswith(f"{outer}.")]
            same = any(torch.equal(rows, seen[path].rows) for rows in around)
            if list(self._module.get_submodule(path).children()) and not same:
                chosen.add(path)
        return tuple(found.layer for path, found in seen.items() if path in chosen)

    def topmost(self, k: int, blocks: Sequence[str]) -> tuple[Layer, ...]:
        """Return the topmost k blocks, and the network unless one of them has its output.

        Raises
        ------
        ValueError
            If there are fewer blocks.
        """
        if k > len(blocks):
            raise ValueError(
                f"activation_layer={k} asks for more blocks than the backbone has: {len(blocks)}. "
                "Pass a smaller number."
            )
        seen = self._seen
        paths = [_around(path, seen) for path in blocks[len(blocks) - k :]]
        if not any(_same(seen[path], seen[""], self._example) for path in paths):
            paths.append("")
        return self._layers(paths)

    def _layers(self, paths: Collection[str]) -> tuple[Layer, ...]:
        return tuple(found.layer for path, found in self._seen.items() if path in paths)

    def below(
        self, blocks: Mapping[str, Collection[str]], names: Collection[str], last: Layer
    ) -> tuple[Layer, ...]:
        """Return up to four blocks below all parameters ``names``, and ``last``."""
        # A submodule around later blocks has layers of its own at its place, and no output there.
        order = list(blocks)
        later = {
            of: [path for path in order[i:] if _inside(path, of)] for i, of in enumerate(order)
        }
        own = [set(blocks[of]).difference(*(blocks[p] for p in later[of])) for of in order]
        lowest = next((i for i, found in enumerate(own) if found & set(names)), 0)
        paths = [path for path in order[:lowest] if not later[path]][-_AUTO_BLOCKS:]
        around = [_around(path, self._seen) for path in paths]
        below = [path for path in around if not any(n.startswith(f"{path}.") for n in names)]
        return self._layers([last.path, *below])


def _input_of(module: nn.Module, path: str, example: Tensor) -> Tensor:
    """Return the first tensor that a submodule receives."""
    received: list[Tensor] = []

    def note(_layer: nn.Module, args: Any, kwargs: Any) -> None:
        received.extend(x for x in tree_leaves((args, kwargs))[:1] if isinstance(x, Tensor))

    layer = module.get_submodule(path)
    hook = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run_once(module, example)
    finally:
        hook.remove()
    return received[-1] if received else example.new_empty(0)


def _equal(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


def _leave_out(seen: dict[str, _Seen], module: nn.Module, example: Tensor) -> None:
    """Note the submodules whose outputs are no rows of samples in another batch.

    Such a submodule runs on other numbers of rows, or not in every call, or has rows that depend
    on other samples or are not finite.
    """
    again = _other_run(module, [path for path in seen if path], example)
    for path, found in seen.items():
        other = again.get(path)
        if not path or found.fault:
            continue
        if other is None or other.fault:
            fault = "is not called for every batch" if other is None else other.fault
        elif not found.rows.isfinite().all():
            fault = "returns NaN or infinity"
        elif not agree(other.rows[: len(example)], found.rows.flip(0)):
            fault = "depends on other samples of a batch"
        else:
            continue
        seen[path] = found._replace(fault=fault)


def _other_run(module: nn.Module, paths: Collection[str], example: Tensor) -> dict[str, _Seen]:
    """Run a network on the example in reverse and further samples: noise, if it takes any."""
    reverse = example.flip(0)
    if example.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(_N_NOISE, *example.shape[1:], generator=generator).to(example)
        noise = example.mean() + noise * example.std()
        with contextlib.suppress(Exception):  # whatever the network may raise for noise
            return _run(module, paths, torch.cat([reverse, noise]))
    return _run(module, paths, torch.cat([reverse, reverse[:1]]))


def _is_element(module: nn.Module, name: str) -> bool:
    """Whether a submodule with parameters is an element of a list, or of the network itself."""
    if not any(True for _ in module.get_submodule(name).parameters()):
        return False
    parent = name.rpartition(".")[0]
    return not parent or type(module.get_submodule(parent)) in (nn.Sequential, nn.ModuleList)


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
    """Return the axis of the channels; the operation before had ``n_channels`` on ``axis``.

    Other numbers of channels, as of a gated linear unit, are on the same axis.
    """
    if output.ndim == 2:
        return 1
    likely = [i for i in (axis, 1, -1) if i in (1, -1)]
    return next((i for i in likely if output.shape[i] == n_channels), likely[0])


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
        if name == "__get__":  # of a property
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in _PERMUTATIONS and args:
            self._permuted(args[0], result)
        # A matrix is the same for all samples. Products of samples are those of attention.
        by_matrix = name == "matmul" and len(args) == 2 and args[1].ndim == 2
        if name in _CHANNELS_SECOND or name in _CHANNELS_LAST or by_matrix:
            output = tree_leaves(result)[0]
            axis = 1 if name in _CHANNELS_SECOND else -1
            if output.ndim > 2 or (output.ndim == 2 and len(output) != self.n_samples):
                self.latest = axis, output.shape[axis]
        return result

    def _permuted(self, x: Tensor, result: Tensor) -> None:
        """Follow the channels of a tensor whose axes are permuted, if it has as many."""
        axis, n_channels = self.latest
        dense = x.layout is torch.strided and not x.is_nested
        if dense and x.ndim > max(axis, 2) and x.shape[axis] == n_channels:
            places = list(zip(result.shape, result.stride(), strict=True))
            place = places.index((n_channels, x.stride(axis)))
            self.latest = -1 if place == x.ndim - 1 else place, n_channels


def _around(path: str, seen: Mapping[str, _Seen]) -> str:
    """Return the innermost submodule around a path whose output can be an activation."""
    while path and (path not in seen or seen[path].fault):
        path = path.rpartition(".")[0]
    return path


def _inside(path: str, other: str) -> bool:
    """Whether a submodule is part of another one."""
    return path != other and (not other or path.startswith(f"{other}."))


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
