"""A module captured as a graph by ``torch.export``, once for every architecture."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from sklearn_gradfeat.backbones._attention import plain_attention
from sklearn_gradfeat.backbones._fingerprint import architecture_digest, named_tensors
from sklearn_gradfeat.backbones._functional import functional
from sklearn_gradfeat.backbones._graph import ActivationModule, Captured, CaptureError, tied_names
from sklearn_gradfeat.backbones._split import extract
from sklearn_gradfeat.data import is_out_of_memory


class Exported(NamedTuple):
    """The graph of an architecture, without the weights of a network.

    Attributes
    ----------
    graph : torch.fx.Graph
        ATen operators, without mutation.
    names : dict of str to str
        The names of parameters, buffers and constants by placeholder.
    parameters : set of str
        The placeholders of parameters.
    constants : dict of str to tensor
        The tensors that the code of the network creates, by name.
    """

    graph: fx.Graph
    names: dict[str, str]
    parameters: set[str]
    constants: dict[str, Tensor]


# The outputs of one function in two forms differ by no more than this many units of rounding.
_ROUNDINGS = 100
# Kernels of CUDA are chosen by whether a batch has more than 65,535 samples or so. A graph holds
# for one choice, and batches are smaller.
_LARGEST_BATCH = 2**15
_KEPT = 16
_exported: OrderedDict[str, Exported] = OrderedDict()
_LOCK = threading.Lock()


def capture(
    module: ActivationModule, example: Tensor, exported: Exported | None = None
) -> Captured:
    """Return a module as a graph with a free batch size.

    The graph of another network of the same architecture is used again if all of its code belongs
    to installed packages, and if the graph gives the output of this network.

    Parameters
    ----------
    module : ActivationModule
        The network, in evaluation mode.
    example : tensor of shape (2 or more, ...)
        A batch that the network accepts.
    exported : Exported or None
        A graph of the same module with other ones of the layers ``among``.

    Returns
    -------
    Captured

    Raises
    ------
    CaptureError
        If ``torch.export`` refuses the module.
    """
    if exported is not None:
        return _with_tensors(exported, module)
    wide = module if module.among is None else ActivationModule(module.module, module.among)
    key = architecture_digest(wide, example)
    with _LOCK:
        known = _exported.get(key)
    if known is not None:
        captured = _with_tensors(known, module)
        if _agrees(captured, module, example):
            return captured
    exported = _export(wide, example)
    captured = _with_tensors(exported, module)
    with _LOCK:
        _exported[key] = exported
        _exported.move_to_end(key)
        while len(_exported) > _KEPT:
            _exported.popitem(last=False)
    return captured


def _export(module: ActivationModule, example: Tensor) -> Exported:
    """Return the graph of a module."""
    batch = torch.export.Dim("batch", min=2, max=_LARGEST_BATCH)
    try:
        with torch.no_grad(), plain_attention(), _quiet():
            program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
            program = functional(program)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CaptureError(str(error).strip().split("\n")[0] or type(error).__name__) from error
    graph = program.graph_module.graph
    for node in graph.nodes:
        if node.op == "get_attr":
            raise CaptureError(f"the graph holds a subgraph, {node.target}")
        if node.target is torch.ops.aten.embedding.default:
            node.args = node.args[:3]  # without sparse gradients, or gradients by frequency
    signature = program.graph_signature
    constants = signature.inputs_to_lifted_tensor_constants
    return Exported(
        graph,
        {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **constants},
        set(signature.inputs_to_parameters),
        {name: program.constants[name].detach() for name in constants.values()},
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from printing the graph that it refuses."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def _with_tensors(exported: Exported, module: ActivationModule) -> Captured:
    """Return a copy of a graph with the tensors of a module."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    outputs = graph.graph_copy(exported.graph, copies)
    assert isinstance(outputs, tuple)
    values = {**exported.constants, **dict(named_tensors(module))}
    tensors: dict[fx.Node, Tensor] = {}
    parameters: dict[str, fx.Node] = {}
    names: dict[fx.Node, str] = {}
    entry: list[fx.Node] = []
    aliases = tied_names(module.module)
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name not in exported.names:
            entry.append(node)
            continue
        tensors[node] = values[exported.names[node.name]].detach()
        names[node] = exported.names[node.name].removeprefix("module.")
        if node.name in exported.parameters and tensors[node].is_floating_point():
            parameters[aliases.get(names[node], names[node])] = node
    every = module.module.named_modules(remove_duplicate=False)
    classes = {name: type(layer) for name, layer in every}
    captured = Captured(
        graph,
        tensors,
        parameters,
        entry[0],
        outputs[-1],
        classes,
        aliases=aliases,
        names=names,
        exported=exported,
    )
    if module.among is not None:
        _narrow(captured, [i for i, part in enumerate(module.among) if module.joins(part)])
    used = set(captured.used())
    captured.parameters = {n: node for n, node in parameters.items() if node in used}
    if captured.input not in used:
        raise ValueError(
            "The output of backbone does not depend on its input. Pass a module whose activation "
            "is computed from the samples, or another activation_layer."
        )
    return captured


def _narrow(captured: Captured, kept: Sequence[int]) -> None:
    """Leave some of the averages that the output joins, and what computes them."""
    casts = []
    node = captured.output
    while node.target is not torch.ops.aten.cat.default:
        casts.append(node)
        node = node.all_input_nodes[0]
    parts: Any = node.args[0]
    parts = [parts[i] for i in kept]
    node.args = (parts, *node.args[1:])
    width = sum(part.meta["val"].shape[1] for part in parts)
    for changed in [node, *casts]:
        value = changed.meta["val"]
        changed.meta["val"] = value.new_empty((value.shape[0], width))
    used = set(captured.used())
    for other in reversed(list(captured.graph.nodes)):
        if other not in used and other.op != "placeholder":
            captured.graph.erase_node(other)


def _agrees(captured: Captured, module: ActivationModule, example: Tensor) -> bool:
    """Whether a graph gives the output of a module.

    It does not if a function of a package was replaced, or a setting that it reads.
    """
    if example.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(example.shape, generator=generator).to(example)
    graph = extract(captured, [captured.input], [captured.output])
    try:
        with torch.no_grad(), plain_attention():
            expected, found = module(example), graph(example)[0]
    except Exception as error:  # whatever the module may raise for these values
        if is_out_of_memory(error):
            raise
        return False
    bound = _ROUNDINGS * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    same_shape = expected.shape == found.shape
    return same_shape and float((found - expected).abs().max()) <= bound
