"""The graph cut in two: the trunk, run once per sample, and the head, run in every pass.

A node belongs to the head for certain if its value depends on a differentiated parameter, and to
the trunk for certain if it multiplies samples with a frozen weight, which is expensive. Every
other node, such as a ReLU, a sum or a reshape, may run on either side or on both. The values that
the head reads from the trunk are stored for every sample, so the cut should store few bytes:

    minimise    sum of size(v) over the nodes v that are stored
    such that   every path from the source to the sink passes a stored node,

where size(v) is the number of bytes of the value of v for one sample. This is a minimum cut of a
flow network [1]_. Each node v becomes an edge from an entry to an exit with capacity size(v), the
only edges that may be cut. Edges of infinite capacity run from the source to the entries of the
input and of the expensive nodes, from the exit of every node to the entries of its users, and
from the exits of the nodes that the head reads to the sink. By max-flow min-cut, the edges from
the vertices that do not reach the sink in the residual network of a maximum flow to those that
reach it form a minimum cut. Of all minimum cuts this is the one closest to the sink: it leaves
the head the least to compute.

References
----------
.. [1] L. Ford and D. Fulkerson, Maximal flow through a network, Canadian Journal of
   Mathematics 8, 1956.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from torch import SymInt, Tensor, fx

from sklearn_gradfeat.backbones._graph import WEIGHTED, Captured, operator_name

_aten = torch.ops.aten
_HARDTANH = _aten.hardtanh.default
_RELUS = {_aten.relu.default, _aten.relu6.default, _aten.leaky_relu.default}
_CONVOLUTIONS = {getattr(_aten, f"conv{n}d").default for n in (1, 2, 3)}
_DEFAULTS = (None, 1, (0,), 1, 1)  # bias, stride, padding, dilation, groups
_INFINITE = 2**26  # far below the limit of the 32-bit capacities of maximum_flow


def is_relu(node: fx.Node) -> bool:
    """Whether a node is a ReLU, ReLU6, leaky ReLU or a hardtanh from zero."""
    return node.target in _RELUS or (node.target is _HARDTANH and node.args[1:2] == (0.0,))


def _with_negative_slope(node: fx.Node, value: fx.Node, negative_slope: float) -> fx.Node:
    """Return a leaky ReLU of ``value``, with the upper bound of the ReLU ``node``."""
    result = value.graph.call_function(_aten.leaky_relu.default, (value, negative_slope))
    if node.target is _HARDTANH:
        highest: Any = node.args[2] if len(node.args) > 2 else 1.0
    elif node.target is _aten.relu6.default:
        highest = 6.0
    else:
        return result
    return value.graph.call_function(_aten.clamp_max.default, (result, highest))


def batch_axis(node: fx.Node, captured: Captured) -> int | None:
    """Return the axis of a node's value that runs over samples, if it can be stored."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    axes = [i for i, size in enumerate(value.shape) if isinstance(size, SymInt)]
    if len(axes) != 1 or not captured.is_batch_size(value.shape[axes[0]]):
        return None
    return axes[0]


def boundary(captured: Captured, chosen: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the nodes whose values are stored between trunk and head.

    Parameters
    ----------
    captured : Captured
        The network.
    chosen : iterable of nodes
        The placeholders of the differentiated parameters.

    Returns
    -------
    list of nodes
        In graph order. The input alone where no cut is possible.
    """
    used = captured.used()
    head = downstream(used, chosen)
    if captured.output not in head:
        raise ValueError(
            "gradient_layers chooses only parameters that the activation does not depend on. "
            "Choose layers between the input and the activation, or another activation_layer."
        )
    samples = downstream(used, [captured.input])
    between = [node for node in used if node in samples and node not in head]
    edges = _edges(captured, between, head, samples)
    source, sink = 2 * len(between), 2 * len(between) + 1
    reaching = _sink_side(edges, source, sink)
    cut = [n for i, n in enumerate(between) if 2 * i not in reaching and 2 * i + 1 in reaching]
    storable = all(batch_axis(node, captured) is not None for node in cut)
    return cut if cut and storable else [captured.input]


def downstream(used: list[fx.Node], sources: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose value depends on ``sources`` through tensors, not through sizes."""
    reached = set(sources)
    for node in used:
        is_size = isinstance(node.meta.get("val"), (SymInt, int, float, bool))
        if not is_size and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def _edges(
    captured: Captured, between: list[fx.Node], head: set[fx.Node], samples: set[fx.Node]
) -> dict[tuple[int, int], int]:
    """Return the capacities of the flow network; node i has the entry 2 i and the exit 2 i + 1."""
    index = {node: i for i, node in enumerate(between)}
    source, sink = 2 * len(between), 2 * len(between) + 1
    edges: dict[tuple[int, int], int] = {}
    for node, i in index.items():
        edges[2 * i, 2 * i + 1] = _size(node, captured)
        expensive = operator_name(node) in WEIGHTED and not samples.issuperset(node.all_input_nodes)
        if node is captured.input or expensive:
            edges[source, 2 * i] = _INFINITE
        for above in node.all_input_nodes:
            if above in index:
                edges[2 * index[above] + 1, 2 * i] = _INFINITE
        if not head.isdisjoint(node.users):
            edges[2 * i + 1, sink] = _INFINITE
    return edges


def _size(node: fx.Node, captured: Captured) -> int:
    """Return the bytes per sample of a node's value, the same for every floating dtype."""
    axis = batch_axis(node, captured)
    if axis is None:
        return _INFINITE
    value = node.meta["val"]
    static = [int(size) for i, size in enumerate(value.shape) if i != axis]
    width = 4 if value.is_floating_point() else value.element_size()
    return min(math.prod(static) * width, _INFINITE)


def _sink_side(edges: dict[tuple[int, int], int], source: int, sink: int) -> set[int]:
    """Return the vertices that reach the sink in the residual network of a maximum flow."""
    # maximum_flow takes 32-bit integers only, in older versions for the indices too.
    rows, columns = np.array(list(edges), np.int32).T
    capacities = np.array(list(edges.values()), np.int32)
    graph = csr_array((capacities, (rows, columns)), (sink + 1, sink + 1))
    residual = (graph - maximum_flow(graph, source, sink).flow).tocoo()
    into = defaultdict(list)
    for row, column, capacity in zip(residual.row, residual.col, residual.data, strict=True):
        if capacity > 0:
            into[column].append(row)
    reaching, queue = {sink}, deque([sink])
    while queue:
        for vertex in into[queue.popleft()]:
            if vertex not in reaching:
                reaching.add(vertex)
                queue.append(vertex)
    return reaching


def extract(
    captured: Captured,
    inputs: list[fx.Node],
    outputs: list[fx.Node],
    chosen: Iterable[fx.Node] = (),
    negative_slopes: Mapping[fx.Node, float] = MappingProxyType({}),
) -> fx.GraphModule:
    """Return the part of the graph between ``inputs`` and ``outputs`` as a module.

    Its arguments are the ``chosen`` parameters, then the inputs; it returns a tuple of the
    outputs. The first axis of inputs and outputs runs over samples. All other tensors become
    buffers. The ReLUs in ``negative_slopes`` become leaky ReLUs of these slopes.
    """
    graph, root = fx.Graph(), torch.nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    for node in [*chosen, *inputs]:
        copies[node] = graph.placeholder(node.name)
    sized = copies[inputs[0]]
    for node in inputs:
        if axis := batch_axis(node, captured):
            copies[node] = graph.call_function(torch.transpose, (copies[node], 0, axis))
    for node in _between(captured, set(copies), outputs):
        if node in captured.tensors:
            root.register_buffer(node.name, captured.tensors[node])
            copies[node] = graph.get_attr(node.name)
        elif captured.is_batch_size(node.meta.get("val")):
            copies[node] = graph.call_function(_aten.sym_size.int, (sized, 0))
        elif node in negative_slopes:
            value = copies[node.all_input_nodes[0]]
            copies[node] = _with_negative_slope(node, value, negative_slopes[node])
        elif _at_one_position(node):
            copies[node] = _as_product(node, graph, copies)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.target is _aten.view.default:
                # The strides seen at capture time depend on the kernels chosen then.
                copies[node].target = _aten.reshape.default
    results = []
    for node in outputs:
        axis = batch_axis(node, captured)
        swapped = (copies[node], 0, axis)
        results.append(graph.call_function(torch.transpose, swapped) if axis else copies[node])
    graph.output(tuple(results))
    return fx.GraphModule(root, graph)


def _at_one_position(node: fx.Node) -> bool:
    """Whether a node is a convolution with a kernel as large as its input."""
    if node.target not in _CONVOLUTIONS:
        return False
    arguments: tuple[Any, ...] = (*node.args, *_DEFAULTS[len(node.args) - 2 :])
    image, weight, _, _, padding, _, groups = arguments
    shapes = [argument.meta["val"].shape for argument in (image, weight)]
    return shapes[0][2:] == shapes[1][2:] and not any(padding) and groups == 1


def _as_product(node: fx.Node, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """Copy a convolution at one position as a matrix product, which is faster on CPUs."""
    arguments: tuple[Any, ...] = node.args[:3]
    image, weight, *bias = map(copies.get, arguments)
    flatten = _aten.flatten.using_ints
    rows, matrix = (graph.call_function(flatten, (tensor, 1)) for tensor in (image, weight))
    product = graph.call_function(_aten.linear.default, (rows, matrix, *bias))
    shape = [-1, *node.meta["val"].shape[1:]]
    return graph.call_function(_aten.reshape.default, (product, shape))


def _between(captured: Captured, given: set[fx.Node], outputs: list[fx.Node]) -> list[fx.Node]:
    """Return the nodes that ``outputs`` depend on beyond the given ones, in graph order."""
    needed = set(outputs) - given
    for node in reversed(captured.graph.nodes):
        if node in needed and not captured.is_batch_size(node.meta.get("val")):
            needed.update(set(node.all_input_nodes) - given)
    return [node for node in captured.graph.nodes if node in needed]
