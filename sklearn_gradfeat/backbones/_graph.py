"""A module captured as one flat graph of ATen operators."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sklearn_gradfeat.backbones._advice import layout_advice
from sklearn_gradfeat.backbones._attention import plain_attention
from sklearn_gradfeat.data import is_out_of_memory

MATRIX = {"linear", "addmm", "matmul", "mm", "bmm"}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
WEIGHTED = MATRIX | RECURRENT | {
    "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d",
}  # fmt: skip


# Arguments of modules for samples with different numbers of tokens, and whether numbers other than
# zero stand for padding.
_MASKS = {"attention_mask": False, "src_key_padding_mask": True, "key_padding_mask": True}


# A call of a module changes its hooks, and may change its parameters. Folds in threads share it.
MODULE_LOCK = threading.RLock()


class CaptureError(Exception):
    """The module cannot be turned into a graph."""


class Fold(NamedTuple):
    """A batch norm that was folded into a layer, by names of parameters and buffers.

    Attributes
    ----------
    weight : str or None
        The folded weight, which has the name of the weight of the layer.
    bias : str or None
        The folded bias.
    own : str or None
        The bias of the layer.
    scale, shift, mean, variance : str or None
        Those of the batch norm.
    eps : float
        The number that the batch norm adds to the variance.
    is_alone : bool
        Whether nothing else uses the tensors of the batch norm.
    """

    weight: str | None
    bias: str | None
    own: str | None
    scale: str | None
    shift: str | None
    mean: str | None
    variance: str | None
    eps: float
    is_alone: bool


@dataclass
class Captured:
    """A graph from one input to the activation, with its tensors.

    Attributes
    ----------
    graph : torch.fx.Graph
        ATen operators; functional, without mutation.
    tensors : dict of node to tensor
        The value of every placeholder but the input: parameters, buffers, constants.
    parameters : dict of str to node
        The placeholders of floating parameters by name, in graph order.
    input, output : node
        The placeholder of the samples, and the activation.
    classes : dict of str to type
        The class of every submodule by its path.
    frozen : set of str
        Names of parameters that must not be differentiated.
    absorbed : dict of str to str
        Parameters that were folded into another one, and the name of that one.
    names : dict of node to str
        The names of parameters and buffers in the module.
    folds : list of Fold
        The batch norms that were folded.
    aliases : dict of str to str
        Further names of tied parameters, and the name in ``named_parameters()``.
    exported : object
        What the graph was copied from, for another choice of layers.
    """

    graph: fx.Graph
    tensors: dict[fx.Node, Tensor]
    parameters: dict[str, fx.Node]
    input: fx.Node
    output: fx.Node
    classes: dict[str, type]
    frozen: set[str] = field(default_factory=set)
    absorbed: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)
    exported: Any = None

    def is_batch_size(self, size: object) -> bool:
        """Whether a size, or a node's value, is the symbolic number of samples."""
        batch = self.input.meta["val"].shape[0]
        return isinstance(size, SymInt) and bool(size.node.expr == batch.node.expr)

    def used(self) -> list[fx.Node]:
        """Return the nodes that the output depends on, in graph order."""
        needed = {self.output}
        for node in reversed(self.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        return [node for node in self.graph.nodes if node in needed]


class Layer(NamedTuple):
    """A submodule whose output is a part of the activation.

    Attributes
    ----------
    path : str
        The path of the submodule; empty for the network itself.
    axis : int
        The axis of its output that holds the channels: the second, 1, or the last, -1.
    width : int
        The number of channels.
    """

    path: str
    axis: int
    width: int


class ActivationModule(nn.Module):
    """A network whose output is the activation, of shape (n_samples, n_activations).

    It has the dtype of the network, also where that casts its output to another one.

    Parameters
    ----------
    module : nn.Module
        The network.
    layer : str, tuple of Layer or None
        Path of the submodule whose output is the activation, averaged over all axes after the
        second; or the layers whose outputs are averaged and joined. None takes the output of the
        network.
    among : tuple of Layer or None
        Layers, with those of the activation, whose outputs are in the graph when it is captured,
        so that one capture serves all choices among them.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: str | tuple[Layer, ...] | None,
        among: tuple[Layer, ...] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.layer = layer
        self.among = among

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation."""
        with MODULE_LOCK:
            if isinstance(self.layer, tuple):
                rows = joined(self.module, self.layer, x)
            else:
                rows = activation(self.module, self.layer, x)
        dtype = self._dtype()
        return rows if dtype in (None, rows.dtype) else rows.to(dtype)

    def joins(self, layer: Layer) -> bool:
        """Whether the output of a layer is a part of the activation, None being the network."""
        return layer in self.layer if isinstance(self.layer, tuple) else not layer.path

    def _dtype(self) -> torch.dtype | None:
        """Return the floating dtype of the network, None if it has no tensors."""
        tensors = chain(self.module.parameters(), self.module.buffers())
        return next((t.dtype for t in tensors if t.is_floating_point()), None)


@contextmanager
def watched(
    module: nn.Module, paths: Iterable[str], see: Callable[[str, Any], None]
) -> Iterator[None]:
    """Call ``see`` with the path and the output of every submodule that runs."""

    def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: see(path, output)

    hooks = [module.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def token_masks(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the masks of tokens that submodules are given, in their order.

    A mask has the shape (n_samples, n_positions), or one row for all samples. It is False at
    padding.
    """
    masks: list[Tensor] = []

    def hook(signature: inspect.Signature) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            given = signature.bind_partial(*args, **kwargs).arguments
            for name, padding in _MASKS.items():
                mask = given.get(name)
                if not isinstance(mask, Tensor) or mask.ndim != 2:
                    continue
                if name == "key_padding_mask" and given.get("query") is not given.get("key"):
                    continue  # the keys have other positions than the output
                if not mask.is_floating_point():
                    masks.append((mask == 0) == padding)
                elif padding:  # added to the logarithms of attention weights
                    masks.append(mask.exp() > 0)
                # In a float attention_mask, zeros stand for tokens or for padding.

        return note

    hooks = []
    for submodule in module.modules():
        try:
            signature = inspect.signature(submodule.forward)
        except (TypeError, ValueError):  # as of some compiled functions
            continue
        if not _MASKS.keys().isdisjoint(signature.parameters):
            hooks.append(submodule.register_forward_pre_hook(hook(signature), with_kwargs=True))
    try:
        yield masks
    finally:
        for handle in hooks:
            handle.remove()


def joined(module: nn.Module, layers: Sequence[Layer], x: Tensor) -> Tensor:
    """Return the averaged outputs of layers side by side, one row per sample.

    The mask of a layer is the latest one when it returns, or else the first one after it.
    """
    axes = {layer.path: layer.axis for layer in layers}
    rows: dict[str, Tensor] = {}
    unmasked: dict[str, Tensor] = {}

    def see(path: str, output: Any) -> None:
        found = main_output(output)
        unmasked.pop(path, None)
        if found.ndim == 3 and _mask(found, axes[path], masks) is None:
            unmasked[path] = found.clone()
        else:
            rows[path] = averaged(found, axes[path], masks[::-1])

    with token_masks(module) as masks, watched(module, axes, see):
        module(x)
    rows |= {path: averaged(found, axes[path], masks) for path, found in unmasked.items()}
    return torch.cat([rows[path] for path in axes], 1)


def main_output(output: Any) -> Any:
    """Return the first item of a tuple, which attention, LSTMs and some blocks return."""
    return output[0] if isinstance(output, tuple) and output else output


def averaged(output: Tensor, axis: int, masks: Iterable[Tensor]) -> Tensor:
    """Return the mean over all axes but those of samples and channels, in new memory.

    Padding is left out by the first mask of that number of positions.
    """
    axis %= output.ndim
    mask = _mask(output, axis, masks)
    if mask is not None:
        total = torch.where(mask.unsqueeze(axis), output, 0.0).sum(3 - axis)
        return total / mask.sum(1, keepdim=True).clamp(min=1).to(total)
    axes = [i for i in range(1, output.ndim) if i != axis]
    return output.mean(axes) if axes else output.clone()


def _mask(output: Tensor, axis: int, masks: Iterable[Tensor]) -> Tensor | None:
    """Return the first mask of the samples and positions of an output with channels on an axis."""
    if output.ndim != 3:
        return None
    known = statically_known_true
    for mask in masks:
        n_samples, n_positions = mask.shape
        of_samples = known(n_samples == output.shape[0]) or known(n_samples == 1)
        if of_samples and known(n_positions == output.shape[3 - axis % 3]):
            return mask
    return None


def activation(module: nn.Module, layer: str | None, x: Tensor) -> Tensor:
    """Return the output of a module or of its submodule ``layer``, one row per sample."""
    if layer is None:
        output = module(x)
    else:
        seen: list[Any] = []
        with watched(module, [layer], lambda _path, output: seen.append(output)):
            module(x)
        if not seen:
            raise not_called(layer)
        output = seen[-1]
    check_activation(output, x.shape[0])
    rows: Tensor = output.flatten(2).mean(2) if output.ndim > 2 else output
    return rows


def not_called(layer: str) -> ValueError:
    """Return the error of a submodule that has no output."""
    return ValueError(
        f"activation_layer={layer!r} is not called in the forward pass of the backbone. "
        "Name a submodule that is."
    )


def check_activation(output: Any, n_samples: int) -> None:
    """Raise an error unless ``output`` can be the activation of a batch."""
    advice = "Wrap the module, or set activation_layer to a submodule with such an output."
    if not isinstance(output, Tensor):
        raise TypeError(
            f"backbone must return one tensor, it returned {type(output).__name__}. {advice}"
        )
    if output.ndim < 2:
        raise ValueError(
            "backbone must return a tensor of shape (n_samples, n_activations) or "
            f"(n_samples, n_activations, ...), it returned shape {tuple(output.shape)}. {advice}"
        )
    if output.shape[0] != n_samples:
        raise ValueError(
            f"backbone must return one row per sample: it was given {n_samples} samples and "
            f"returned shape {tuple(output.shape)}. {advice}"
        )
    if not output.numel():
        raise ValueError(
            "backbone must return at least one activation per sample, it returned shape "
            f"{tuple(output.shape)}. {advice}"
        )
    if not output.is_floating_point() or output.layout is not torch.strided:
        layout = "" if output.layout is torch.strided else f" with the layout {output.layout}"
        raise TypeError(
            "backbone must return a dense tensor of floating point numbers, it returned "
            f"{output.dtype}{layout}. {advice}"
        )


def run_once(module: Callable[[Tensor], Tensor], example: Tensor) -> Tensor:
    """Return the output of a module for an example; an error names its shape and dtype."""
    try:
        with torch.no_grad(), plain_attention():
            return module(example)
    except (RuntimeError, IndexError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        elsewhere = ""
        if example.device.type != "cpu":
            elsewhere = (
                f" On {example.device}, the tensors of the network must be parameters, buffers, or "
                "made on the device of its input; for other networks, set device='cpu'."
            )
        raise ValueError(
            f"backbone failed on a batch of shape {tuple(example.shape)} and dtype "
            f"{example.dtype}: {error}\n{layout_advice(module, example)}Pass X, or set "
            "preprocess, so that the batch has the shape, dtype and range of values that the "
            "network expects. If the network itself casts to float32, set precision='float32'."
            f"{elsewhere}"
        ) from error


def tied_names(module: nn.Module) -> dict[str, str]:
    """Return the further names of tied parameters, with the name in ``named_parameters()``."""
    first = {id(value): name for name, value in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(value)] for name, value in every if first[id(value)] != name}


def out_channels(captured: Captured, names: Iterable[str]) -> dict[str, int]:
    """Return the number of output channels of the weights whose first axis is another one.

    These are the weights of transposed convolutions, the tables of embeddings, and matrices that
    samples are multiplied with from the left.
    """
    found = {}
    for name in names:
        weight = captured.parameters[captured.aliases.get(name, name)]
        shape = captured.tensors[weight].shape
        for user in weight.users:
            operator, arguments = operator_name(user), user.args
            if operator.startswith("conv_transpose") and arguments[1] is weight:
                found[name] = int(user.meta["val"].shape[1 - len(shape)])
            elif operator == "embedding" and arguments[0] is weight:
                found[name] = shape[1]
            elif operator in ("matmul", "mm", "bmm", "addmm") and arguments[-1] is weight:
                found[name] = shape[-1]
    return found


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost submodule that a node was called in."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return str(path).removeprefix("module").removeprefix(".")


def in_network(node: fx.Node) -> bool:
    """Whether a node was called in the network, and not by :class:`ActivationModule`."""
    return len(node.meta.get("nn_module_stack") or {}) > 1


def operator_name(node: fx.Node) -> str:
    """Return the name of an ATen operator without its overload."""
    return str(node.target).removeprefix("aten.").split(".")[0]


def is_recurrent(module: object) -> bool:
    """Whether a network, or a graph of one, has recurrent layers."""
    if isinstance(module, fx.GraphModule):
        return any(operator_name(node) in RECURRENT for node in module.graph.nodes)
    layers = module.modules() if isinstance(module, nn.Module) else ()
    return any(isinstance(layer, nn.RNNBase) for layer in layers)
