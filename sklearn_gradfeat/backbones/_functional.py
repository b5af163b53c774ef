"""An exported graph in which no operator writes into its input.

torch removes such writes by running every operator again (``run_decompositions``), which takes
longer than the export itself. Most networks need less: ``relu_`` may become ``relu`` if nothing
else that shares the memory of its input is read afterwards. The pass of torch also replaces
operators that are made of views, such as ``movedim`` by ``permute``. A graph keeps the few of them
that the rest of the package knows, and any other calls for the pass of torch.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram

_aten = torch.ops.aten
_IDENTITIES = {_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default}
# The operators made of views that may stay as they are.
_VIEWS = {
    _aten.reshape.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.view_as.default,
    _aten.contiguous.default,
    _aten.chunk.default,
    _aten.to.dtype,
}


def _embedding_bags(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    _scale_grad_by_freq: bool = False,
    mode: int = 0,
    _sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute ``torch.ops.aten.embedding_bag`` by operators with all derivatives.

    Only the first of its four results, one row per bag, is filled.
    """
    n_bags = offsets.shape[0] - int(include_last_offset)
    positions = torch.arange(indices.shape[0], device=indices.device, dtype=offsets.dtype)
    bag = torch.searchsorted(offsets, positions, right=True) - 1
    rows = torch.ops.aten.embedding.default(weight, indices)
    kept = (indices != (-1 if padding_idx is None else padding_idx))[:, None]
    zeros = rows.new_zeros(n_bags, rows.shape[1])
    counts = rows.new_zeros(n_bags, 1).index_add(0, bag, kept.to(rows.dtype))
    if mode == _MAX:
        lowest = torch.where(kept, rows, -math.inf)
        places = bag[:, None].expand(-1, rows.shape[1])
        largest = zeros.scatter_reduce(0, places, lowest, "amax", include_self=False)
        found = torch.where(counts > 0, largest, 0.0)
    else:
        factors = kept.to(rows.dtype)
        if per_sample_weights is not None:
            factors = factors * per_sample_weights[:, None]
        found = zeros.index_add(0, bag, rows * factors)
        if mode == _MEAN:
            found = found / counts.clamp(min=1)
    return found, bag, offsets, offsets


def _copied(target: Tensor, source: Tensor, _non_blocking: bool = False) -> Tensor:
    """Compute ``torch.ops.aten.copy`` by operators with all derivatives.

    The result is laid out as the target, since views of the target are taken of it.
    """
    order = sorted(range(target.ndim), key=target.stride, reverse=True)
    values = source.to(target.dtype).expand(target.shape).permute(order)
    back = [order.index(axis) for axis in range(target.ndim)]
    return values.clone(memory_format=torch.contiguous_format).permute(back)


_MEAN, _MAX = 1, 2  # the modes of embedding bags; the sum is 0
# Operators without derivatives of both modes, and what replaces them.
_DECOMPOSED = {
    torch.ops.aten.copy.default: _copied,
    torch.ops.aten.embedding_bag.default: _embedding_bags,
    torch.ops.aten.embedding_bag.padding_idx: _embedding_bags,
}


def functional(program: ExportedProgram) -> ExportedProgram:
    """Return a program without writes and dropout, in which batch norms use their statistics.

    Parameters
    ----------
    program : ExportedProgram
        What ``torch.export.export`` returned. It may be changed.

    Returns
    -------
    ExportedProgram
        The same one, or a new one where torch's own pass is needed.
    """
    nodes: list[fx.Node] = list(program.graph_module.graph.nodes)
    plain = [node for node in nodes if _is_plain(node)]
    for node in plain:
        if node.target in _IDENTITIES:
            node.replace_all_uses_with(node.all_input_nodes[0])
    if plain != nodes or not _are_replaceable(nodes):
        rewritten: ExportedProgram = program.run_decompositions(_DECOMPOSED)
        return rewritten
    place = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        if node.target is _aten.batch_norm.default:
            _replace_batch_norm(node, place)
        elif _writes(node):
            _replace_write(node, place)
    return program


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is a value, or one operator in the form of evaluation mode."""
    if node.target in _IDENTITIES:
        return node.args[2:] == (False,)
    if node.target is _aten.batch_norm.default:
        return node.args[5:6] == (False,)
    if isinstance(node.target, OpOverload):
        kinds = torch._C._dispatch_has_kernel_for_dispatch_key
        composite = kinds(node.target.name(), "CompositeImplicitAutograd")
        is_view = any(result.alias_info for result in node.target._schema.returns)
        made_of_views = composite and is_view and not node.target._schema.is_mutable
        return node.target not in _DECOMPOSED and (not made_of_views or node.target in _VIEWS)
    return node.op != "get_attr" and not isinstance(node.target, HigherOrderOperator)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _are_replaceable(nodes: list[fx.Node]) -> bool:
    """Whether every write can be replaced by an operator that returns the new value.

    Whatever shares the memory of the input, as the views of one tensor do, must not be read after
    the write, other than the input itself.
    """
    place = {node: i for i, node in enumerate(nodes)}
    memories = _memories(nodes)
    sharing = defaultdict(list)
    for node in nodes:
        for memory in memories[node]:
            sharing[memory].append(node)
    for node in filter(_writes, nodes):
        target: Any = node.args[0] if node.args else None
        if _counterpart(node) is None or not isinstance(target, fx.Node):
            return False
        for other in (other for memory in memories[node] for other in sharing[memory]):
            earlier = place[other] < place[node] and other is not target
            if other.op == "placeholder" or (
                earlier and any(place[user] > place[node] for user in other.users)
            ):
                return False
    return True


def _memories(nodes: list[fx.Node]) -> dict[fx.Node, set[int]]:
    """Return the storages that the tensors of each node's value have at run time, as numbers."""
    found: dict[fx.Node, set[int]] = {}
    same: dict[int, int] = {}
    for node in nodes:
        found[node] = {same.get(memory, memory) for memory in _storages(node)}
        if node.target in _IDENTITIES:  # torch 2.9 takes their result for a copy
            same |= zip(_storages(node), found[node.all_input_nodes[0]], strict=True)
    return found


def _storages(node: fx.Node) -> Iterator[int]:
    value = node.meta.get("val")
    for tensor in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(tensor, Tensor):
            yield tensor.untyped_storage()._cdata


def _counterpart(node: fx.Node) -> OpOverload | None:
    """Return the operator that returns what a node writes, None if there is none for certain."""
    target: Any = node.target
    namespace, name = target._schema.name.split("::")
    found = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = getattr(found, target._overloadname, None)
    written = [a for a in target._schema.arguments if a.alias_info and a.alias_info.is_write]
    writes_first = name.endswith("_") and written == target._schema.arguments[:1]
    if overload is None or overload in _DECOMPOSED or not writes_first:
        return None
    # A write keeps shape and dtype of its input, where its counterpart may promote them.
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    try:
        found = overload(*args, **kwargs)
    except Exception:  # the overload of this name takes other arguments
        return None
    wanted = node.meta["val"]
    same = isinstance(found, Tensor) and (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    return overload if same else None


def _replace_write(node: fx.Node, place: dict[fx.Node, int]) -> None:
    """Replace a write and all later reads of its input by the new value."""
    counterpart = _counterpart(node)
    assert counterpart is not None
    with node.graph.inserting_before(node):
        value = node.graph.call_function(counterpart, node.args, node.kwargs)
    value.meta = dict(node.meta)
    place[value] = place[node]
    target = node.all_input_nodes[0]
    node.replace_all_uses_with(value)
    target.replace_all_uses_with(value, lambda user: place[user] > place[value])
    node.graph.erase_node(node)


def _replace_batch_norm(node: fx.Node, place: dict[fx.Node, int]) -> None:
    """Replace a batch norm by the operator that has no training mode."""
    norm = _aten._native_batch_norm_legit_no_training.default
    with node.graph.inserting_before(node):
        results = node.graph.call_function(norm, (*node.args[:5], *node.args[6:8]))
        value = node.graph.call_function(operator.getitem, (results, 0))
    results.meta, value.meta = {**node.meta, "val": None}, dict(node.meta)
    place |= dict.fromkeys((results, value), place[node])
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
