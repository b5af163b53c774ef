"""Tokens that nobody reads, left out of the graph.

A vision transformer returns its class token. The tokens of images pass through the last block too,
where only the keys and values of the attention need them. If ``h`` treats the rows of an axis
independently, the rows ``S`` of its value need no others of its operand::

    h(x)[S] = h(x[S])

So the choice of rows moves from the output towards the input, through elementwise operators, norms
over other axes, matrix products and the queries of attention, until an operator mixes the rows.

One pass from the output to the input finds which rows of every value are read: a *box*, some rows
of each axis. Readers may ask for different boxes. One value serves them all, the smallest box
around theirs, unless apart they are much smaller: of a linear layer that returns queries, keys and
values side by side, one row of the queries and all rows of the others. A value that is read almost
whole is computed whole. A second pass from the input to the output writes the new graph. It
computes nothing that the old one does not, and the names of the parameters stay.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import SymInt, Tensor, fx

from sklearn_gradfeat.backbones._graph import Captured, operator_name

_aten = torch.ops.aten

# A box that holds a larger share of the numbers than this is not worth its indices.
_MOST = 0.75
# Stands for the number of samples in sizes. It is prime, so the products of sizes show their
# factors.
_BATCH = 2**61 - 1


class Rows(NamedTuple):
    """Some rows of an axis of size ``outer * n * inner``.

    They are those whose place along the middle factor is in ``kept``. An axis whose size does
    not depend on the number of samples has ``n`` rows and ``inner`` is one.
    """

    n: int
    inner: int
    kept: tuple[int, ...]


Box: TypeAlias = tuple[Rows | None, ...]
Sizes: TypeAlias = Mapping[fx.Node, tuple[int, ...]]


@dataclass(frozen=True)
class _Read:
    """A part of the value of a node, without the axis ``dropped``, of which it has one row."""

    node: fx.Node
    box: Box
    dropped: int | None = None


class _Call(NamedTuple):
    """An operator on parts of values; tensors among its arguments are constants."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


_Source: TypeAlias = _Read | _Call
_Rule: TypeAlias = Callable[[fx.Node, Box, Sizes], _Source | None]


def without_unread_tokens(captured: Captured) -> Captured:
    """Return a graph that computes only what is read; the same one if there is no such saving.

    Parameters
    ----------
    captured : Captured
        A graph. It does not change.

    Returns
    -------
    Captured
        Another graph of the same function, parameters and names.
    """
    used = captured.used()
    try:
        sizes = {node: _sizes(node, captured) for node in used}
    except TypeError:  # a size that depends on the values of the samples
        return captured
    sources: dict[fx.Node, dict[Box, _Source]] = {}
    requests: defaultdict[fx.Node, list[Box]] = defaultdict(list)
    requests[captured.output].append(_whole(captured.output, sizes))
    for node in reversed(used):
        sources[node] = _sources(node, requests[node], sizes, captured)
        for source in sources[node].values():
            for read in _reads(source):
                requests[read.node].append(read.box)
    computed = {node: boxes for node, boxes in sources.items() if node.op == "call_function"}
    if not any(
        any(box) and isinstance(source, _Call)
        for boxes in computed.values()
        for box, source in boxes.items()
    ):
        return captured
    return _Writer(captured, sizes).written({node: sources[node] for node in used})


def _sizes(node: fx.Node, captured: Captured) -> tuple[int, ...]:
    """Return the shape of a node's value, with ``_BATCH`` samples."""
    batch, value = captured.input.meta["val"].shape[0], node.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    return tuple(
        int(size.node.expr.subs(batch.node.expr, _BATCH)) if isinstance(size, SymInt) else size
        for size in value.shape
    )


def _is_free(size: int) -> bool:
    """Whether a size depends on the number of samples."""
    return size >= _BATCH


def _whole(node: fx.Node, sizes: Sizes) -> Box:
    return (None,) * len(sizes[node])


def _narrowed(sizes: Sequence[int], box: Box) -> tuple[int, ...]:
    """Return the shape of a part."""
    return tuple(
        size if rows is None else size // rows.n * len(rows.kept)
        for size, rows in zip(sizes, box, strict=True)
    )


# --- which parts of a value are computed -------------------------------------------------------


def _sources(
    node: fx.Node, requests: Sequence[Box], sizes: Sizes, captured: Captured
) -> dict[Box, _Source]:
    """Return the parts of a node's value that are computed, and from what."""
    whole = _whole(node, sizes)
    boxes = _joined(requests)
    found = {box: _source(node, box, sizes, captured) for box in boxes}
    if all(source is not None for source in found.values()):
        return {box: source for box, source in found.items() if source is not None}
    return {whole: _source(node, whole, sizes, captured) or _copied(node, sizes)}


def _source(node: fx.Node, box: Box, sizes: Sizes, captured: Captured) -> _Source | None:
    """Return the source of a part of a node's value; None if only the whole has one."""
    if node.op != "call_function":
        return None if any(box) else _copied(node, sizes)
    if captured.is_batch_size(node.meta.get("val")):
        return _Call(
            _aten.sym_size.int, (_Read(captured.input, _whole(captured.input, sizes)), 0), {}
        )
    name = operator_name(node)
    if node.target is operator.getitem:
        source = _item(node, box, sizes)
    elif name in _INDEXED:
        source = _indexed(node, box, sizes, captured)
    elif name in _CHOICES:
        source = _CHOICES[name](node, box, sizes)
    elif any(box):
        rule = _RULES.get(name)
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = _elementwise
        return rule(node, box, sizes) if rule is not None else None
    else:
        source = None
    return _copied(node, sizes) if source is None and not any(box) else source


def _copied(node: fx.Node, sizes: Sizes) -> _Call:
    """Return the call of a node as it is."""
    return _mapped(node, lambda operand: _Read(operand, _whole(operand, sizes)))


def _mapped(node: fx.Node, part: Callable[[fx.Node], Any]) -> _Call:
    """Return the call of a node on a part of every operand."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), part)
    return _Call(node.target, args, kwargs)


def _reads(source: _Source) -> list[_Read]:
    """Return the parts of other values that a part is computed from."""
    found: list[_Read] = []
    leaves: Any = source if isinstance(source, _Read) else (source.args, dict(source.kwargs))
    fx.node.map_aggregate(
        leaves, lambda leaf: found.append(leaf) if isinstance(leaf, _Read) else None
    )
    return found


def _joined(requests: Sequence[Box]) -> list[Box]:
    """Return boxes that contain the given ones: few, and not much larger."""
    found: list[Box] = []
    for request in requests:
        box = _rounded(request)
        while True:
            near = next((b for b in found if _share(b) + _share(box) > _MOST * _hull_share(b, box)),
                        None)  # fmt: skip
            if near is None:
                break
            found.remove(near)
            box = _rounded(_hull(near, box))
        found.append(box)
    return found


def _hull(a: Box, b: Box) -> Box:
    """Return the smallest box around two."""
    return tuple(
        None
        if one is None or other is None or one[:2] != other[:2]
        else one._replace(kept=tuple(sorted({*one.kept, *other.kept})))
        for one, other in zip(a, b, strict=True)
    )


def _hull_share(a: Box, b: Box) -> float:
    return _share(_rounded(_hull(a, b)))


def _share(box: Box) -> float:
    """Return the share of the numbers of a value that a box holds."""
    return math.prod(len(rows.kept) / rows.n for rows in box if rows is not None)


def _rounded(box: Box) -> Box:
    """Return the whole in place of a large part."""
    return (None,) * len(box) if _share(box) > _MOST else box


# --- operators that choose rows ----------------------------------------------------------------


def _chosen(
    x: fx.Node, axis: int, index: Sequence[int], box: Box, sizes: Sizes, *, dropped: bool = False
) -> _Source | None:
    """Return a part of the rows ``index`` of an axis, of which ``dropped`` leaves out the axis."""
    n = sizes[x][axis]
    if dropped:
        box = (*box[:axis], None, *box[axis:])
    elif (rows := box[axis]) is not None:
        index = [index[i] for i in rows.kept]
    ordered = tuple(sorted(set(index)))
    if not ordered:
        return None
    wanted = None if len(ordered) == n else Rows(n, 1, ordered)
    read = _Read(x, (*box[:axis], wanted, *box[axis + 1 :]), axis if dropped else None)
    if tuple(index) == ordered:
        return read
    places = torch.tensor(_places(index, ordered))
    return _Call(_aten.index_select.default, (read, axis, places), {})


def _places(rows: Sequence[int], held: Sequence[int]) -> tuple[int, ...]:
    """Return the places of some rows among those that are held."""
    place = {row: i for i, row in enumerate(held)}
    return tuple(place[row] for row in rows)


def _select(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    x, axis, i = (_arguments(node)[name] for name in ("self", "dim", "index"))
    axis = axis % len(sizes[x])
    n = sizes[x][axis]
    if _is_free(n) or not isinstance(i, int):
        return None
    return _chosen(x, axis, [i % n], box, sizes, dropped=True)


def _slice(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    given = _arguments(node)
    x, axis = given["self"], given["dim"] % len(sizes[given["self"]])
    n = sizes[x][axis]
    if n == sizes[node][axis]:
        return _Read(x, box)
    ends = [given[name] for name in ("start", "end", "step")]
    if _is_free(n) or any(isinstance(end, fx.Node) for end in ends):
        return None
    return _chosen(x, axis, range(n)[slice(*ends)], box, sizes)


def _item(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    """Return a part of one item of a tensor that was split."""
    parts: Any = node.args[0]
    i: Any = node.args[1]
    if operator_name(parts) not in ("unbind", "split", "split_with_sizes", "chunk", "tensor_split"):
        return None
    given = _arguments(parts)
    x, axis = given["self"], given["dim"] % len(sizes[given["self"]])
    if _is_free(sizes[x][axis]):
        return None
    if operator_name(parts) == "unbind":
        return _chosen(x, axis, [i], box, sizes, dropped=True)
    widths = [int(part.shape[axis]) for part in parts.meta["val"]]
    start = sum(widths[:i])
    return _chosen(x, axis, range(start, start + widths[i]), box, sizes)


def _indexed(node: fx.Node, box: Box, sizes: Sizes, captured: Captured) -> _Source | None:
    """Return a part of rows that a constant tensor chooses."""
    given = _arguments(node)
    x = given["self"]
    if "dim" in given:
        axis, chooser = given["dim"] % len(sizes[x]), given["index"]
    else:
        choosers = [(i, index) for i, index in enumerate(given["indices"]) if index is not None]
        if len(choosers) != 1:
            return None
        ((axis, chooser),) = choosers
    while chooser not in captured.tensors and operator_name(chooser) in _COPIES:
        chooser = chooser.args[0]
    index = captured.tensors.get(chooser)
    n = sizes[x][axis]
    if index is None or index.dtype is torch.bool or index.ndim != 1 or _is_free(n):
        return None
    return _chosen(x, axis, [i % n for i in index.long().tolist()], box, sizes)


_COPIES = {"clone", "detach", "alias", "lift_fresh_copy", "_to_copy", "to", "contiguous", "dropout"}
_INDEXED = {"index_select", "index"}
_CHOICES: dict[str, _Rule] = {"select": _select, "slice": _slice}


# --- operators that treat rows independently ---------------------------------------------------


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an ATen operator by name, with their defaults."""
    target: Any = node.target
    signature = target._schema.arguments
    defaults = {a.name: a.default_value for a in signature if a.has_default_value()}
    given = zip((argument.name for argument in signature), node.args, strict=False)
    return {**defaults, **dict(given), **node.kwargs}


def _on(node: fx.Node, boxes: Mapping[int, Box], sizes: Sizes) -> _Call:
    """Return the call of a node on parts of some operands, by their place in its signature."""
    target: Any = node.target
    copied = _copied(node, sizes)
    args, kwargs = list(copied.args), dict(copied.kwargs)
    for i, box in boxes.items():
        name = target._schema.arguments[i].name
        if i < len(args) and isinstance(args[i], _Read):
            args[i] = replace(args[i], box=box)
        elif isinstance(kwargs.get(name), _Read):
            kwargs[name] = replace(kwargs[name], box=box)
    return _Call(target, tuple(args), kwargs)


def _broadcast(box: Box, operand: Sequence[int]) -> Box:
    """Return the part of an operand that a part of the result of broadcasting reads."""
    return tuple(
        None if size == 1 else rows
        for size, rows in zip(operand, box[len(box) - len(operand) :], strict=True)
    )


def _elementwise(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    return _mapped(node, lambda operand: _Read(operand, _broadcast(box, sizes[operand])))


def _cast(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    """Leave a second operand unread: only its dtype counts."""
    x: Any = node.args[0]
    if len(node.all_input_nodes) == 1:
        return _elementwise(node, box, sizes)
    return _Call(_aten.to.dtype, (_Read(x, box), node.meta["val"].dtype), {})


def _along(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    """Follow the axes that a reduction, a softmax or a cumulative sum leaves alone."""
    given, x = _arguments(node), node.args[0]
    assert isinstance(x, fx.Node)
    dims, n_axes = given.get("dim", given.get("dims")), len(sizes[x])
    mixed = {d % n_axes for d in ([dims] if isinstance(dims, int) else dims or range(n_axes))}
    if len(box) == n_axes:
        return None if any(box[d] for d in mixed) else _on(node, {0: box}, sizes)
    kept = iter(box)
    return _on(node, {0: tuple(None if d in mixed else next(kept) for d in range(n_axes))}, sizes)


def _norm(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    shape = _arguments(node)["normalized_shape"]
    return None if any(box[-len(shape) :]) else _on(node, {0: box}, sizes)


def _linear(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    *rows, outputs = box
    return _on(node, {0: (*rows, None), 1: (outputs, None), 2: (outputs,)}, sizes)


def _product(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    """Read rows of the first matrix, columns of the second, and the same part of an addend."""
    *addend, first, second = (operand for operand in node.args if isinstance(operand, fx.Node))
    if min(len(sizes[first]), len(sizes[second])) < 2:
        return None
    *batch, rows, columns = box
    boxes = [
        *(_broadcast(box, sizes[operand]) for operand in addend),
        _broadcast((*batch, rows, None), sizes[first]),
        _broadcast((*batch, None, columns), sizes[second]),
    ]
    return _on(node, dict(enumerate(boxes)), sizes)


def _einsum(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    equation: Any = node.args[0]
    operands: Any = node.args[1]
    labels, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        return None
    rows = dict(zip(result, box, strict=True))
    reads = [
        _Read(x, _broadcast(tuple(map(rows.get, own)), sizes[x]))
        for x, own in zip(operands, labels.split(","), strict=True)
    ]
    return _Call(node.target, (equation, reads), {})


def _attention(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    """Follow the queries."""
    given = _arguments(node)
    *batch, queries, columns = box
    if given["enable_gqa"] and any(batch):
        return None
    places = {"query": queries, "key": None, "value": None, "attn_mask": queries}
    boxes = {
        i: _broadcast((*batch, rows, columns if name == "value" else None), sizes[given[name]])
        for i, (name, rows) in enumerate(places.items())
        if given[name] is not None
    }
    call = _on(node, boxes, sizes)
    if not given["is_causal"] or queries is None:
        return call
    n_keys = sizes[given["key"]][-2]
    if _is_free(queries.n) or _is_free(n_keys):
        return None
    allowed = torch.ones(queries.n, n_keys, dtype=torch.bool).tril()[list(queries.kept)]
    options = {name: given[name] for name in ("scale", "enable_gqa")}
    return _Call(node.target, (*call.args[:3], None if allowed.all() else allowed), options)


def _permute(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    given, order = _arguments(node), list(range(len(box)))
    if "dims" in given:
        order = [d % len(box) for d in given["dims"]]
    else:
        first, second = given.get("dim0", 0), given.get("dim1", -1)
        order[first], order[second] = order[second], order[first]
    return _on(node, {0: tuple(box[order.index(axis)] for axis in range(len(box)))}, sizes)


def _reshape(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    """Find the axes of the operand that hold the chosen rows, by their strides."""
    if node.target is _aten.view.dtype:
        return None
    x: Any = node.args[0]
    before, after = sizes[x], sizes[node]
    found: list[Rows | None] = [None] * len(before)
    for rows, stride in zip(box, _strides(after), strict=True):
        if rows is None:
            continue
        width = stride * rows.inner
        axis = next(
            (
                axis
                for axis, (n, own) in enumerate(zip(before, _strides(before), strict=True))
                if n > 1 and width % own == 0 and n * own % (rows.n * width) == 0
            ),
            None,
        )
        if axis is None or found[axis] is not None:
            return None
        inner = width // _strides(before)[axis]
        found[axis] = _numbered(Rows(rows.n, inner, rows.kept), before[axis])
    shape = [-1 if _is_free(n) else n for n in _narrowed(after, box)]
    if shape.count(-1) > 1:
        return None
    return _Call(_aten.reshape.default, (_Read(x, tuple(found)), shape), {})


def _strides(sizes: Sequence[int]) -> list[int]:
    return [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]


def _numbered(rows: Rows, size: int) -> Rows:
    """Return rows of an axis of that size with an outer and an inner factor of one, if known."""
    if _is_free(size):
        return rows
    block = [i * rows.inner + j for i in rows.kept for j in range(rows.inner)]
    starts = range(0, size, rows.n * rows.inner)
    return Rows(size, 1, tuple(start + i for start in starts for i in block))


def _expand(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    if any(rows is not None and _is_free(n) for rows, n in zip(box, sizes[node], strict=True)):
        return None
    x: Any = node.args[0]
    (_, shape), _ = _copied(node, sizes)[1:]
    shape = [n if rows is None else len(rows.kept) for rows, n in zip(box, shape, strict=True)]
    return _Call(node.target, (_Read(x, _broadcast(box, sizes[x])), shape), {})


def _cat(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    """Leave out the tensors of which no row is read."""
    given = _arguments(node)
    tensors, axis = given["tensors"], given["dim"] % len(box)
    rows, reads, start = box[axis], [], 0
    if any(len(sizes[x]) != len(box) or _is_free(sizes[x][axis]) for x in tensors):
        return None
    if _promotes(node, tensors):
        return None
    for x in tensors:
        n = sizes[x][axis]
        own = tuple(i - start for i in rows.kept if start <= i < start + n) if rows else ()
        some = None if len(own) in (0, n) else Rows(n, 1, own)
        if own or rows is None:
            reads.append(_Read(x, (*box[:axis], some, *box[axis + 1 :])))
        start += n
    return reads[0] if len(reads) == 1 else _Call(node.target, (reads, axis), {})


def _promotes(node: fx.Node, tensors: Sequence[fx.Node]) -> bool:
    """Whether a node joins tensors of several dtypes."""
    return any(x.meta["val"].dtype != node.meta["val"].dtype for x in tensors)


def _stack(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    given = _arguments(node)
    if _promotes(node, given["tensors"]):
        return None
    tensors, axis = given["tensors"], given["dim"] % len(box)
    rows, own = box[axis], (*box[:axis], *box[axis + 1 :])
    chosen = tensors if rows is None else [tensors[i] for i in rows.kept]
    return _Call(node.target, ([_Read(x, own) for x in chosen], axis), {})


def _embedding(node: fx.Node, box: Box, sizes: Sizes) -> _Source | None:
    *rows, columns = box
    return _on(node, {0: (None, columns), 1: tuple(rows)}, sizes)


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        [*_COPIES, "feature_dropout", "hardswish", "hardsigmoid", "log_sigmoid",
         "zeros_like", "ones_like", "full_like"], _elementwise),
    **dict.fromkeys(
        ["softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "logsumexp", "glu",
         "cumsum", "flip", "mean", "sum", "prod", "var", "std", "norm", "linalg_vector_norm",
         "amax", "amin", "argmax", "argmin", "any", "all"], _along),
    **dict.fromkeys(["layer_norm", "rms_norm"], _norm),
    **dict.fromkeys(["matmul", "mm", "bmm", "addmm", "baddbmm"], _product),
    **dict.fromkeys(["permute", "transpose", "t"], _permute),
    **dict.fromkeys(["view", "reshape", "_unsafe_view", "view_as", "flatten", "unflatten",
         "squeeze", "unsqueeze"], _reshape),
    "type_as": _cast, "to": _cast, "linear": _linear, "einsum": _einsum, "embedding": _embedding,
    "scaled_dot_product_attention": _attention, "expand": _expand, "cat": _cat, "stack": _stack,
}  # fmt: skip


# --- the new graph -----------------------------------------------------------------------------


class _Writer:
    """Writes the graph that computes the chosen parts of values."""

    def __init__(self, captured: Captured, sizes: Sizes) -> None:
        self.captured, self.sizes = captured, sizes
        self.graph = fx.Graph()
        self.copies = {
            node: self.graph.node_copy(node)
            for node in captured.graph.nodes
            if node.op == "placeholder"
        }
        self.tensors = {self.copies[node]: value for node, value in captured.tensors.items()}
        self.made: dict[fx.Node, dict[Box, fx.Node]] = {}
        self.parts: dict[_Read, fx.Node] = {}

    def written(self, sources: Mapping[fx.Node, Mapping[Box, _Source]]) -> Captured:
        """Return the graph of the parts that have a source."""
        old, copies = self.captured, self.copies
        for node, boxes in sources.items():
            self.made[node] = {
                box: copies[node] if node in copies else self._value(node, box, source)
                for box, source in boxes.items()
            }
        return replace(
            old,
            graph=self.graph,
            tensors=self.tensors,
            parameters={name: copies[node] for name, node in old.parameters.items()},
            input=copies[old.input],
            output=self.made[old.output][_whole(old.output, self.sizes)],
            names={copies[node]: name for node, name in old.names.items()},
        )

    def _value(self, node: fx.Node, box: Box, source: _Source) -> fx.Node:
        """Write a part of the value of a node."""
        if isinstance(source, _Read):
            return self._part(source)

        def operand(leaf: Any) -> Any:
            if isinstance(leaf, _Read):
                return self._part(leaf)
            return self._constant(leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = fx.node.map_aggregate((source.args, dict(source.kwargs)), operand)
        made = self.graph.call_function(source.target, args, kwargs)
        return self._described(made, node, _narrowed(self.sizes[node], box))

    def _described(self, made: fx.Node, like: fx.Node, sizes: tuple[int, ...]) -> fx.Node:
        """Note that a value is like that of a node of the old graph, but for its shape."""
        made.meta = dict(like.meta)
        if sizes != self.sizes[like]:
            batch = self.captured.input.meta["val"].shape[0]
            shape = [n // _BATCH * batch if _is_free(n) else n for n in sizes]
            made.meta["val"] = like.meta["val"].new_empty(shape)
        return made

    def _constant(self, value: Tensor) -> fx.Node:
        """Return a placeholder for a constant."""
        first = self.copies[self.captured.input]
        with self.graph.inserting_before(first):
            node = self.graph.placeholder("chosen_rows")
        self.tensors[node] = value.to(first.meta["val"].device)
        return node

    def _part(self, read: _Read) -> fx.Node:
        """Return a part of the value of a node, cut out of one that contains it."""
        if read in self.parts:
            return self.parts[read]
        held, value = next(
            (box, value) for box, value in self.made[read.node].items() if _contains(box, read.box)
        )
        sizes, dropped = list(_narrowed(self.sizes[read.node], held)), 0
        for axis, (rows, have) in enumerate(zip(read.box, held, strict=True)):
            if rows is None or rows == have:
                continue
            n, places = (
                (rows.n, rows.kept)
                if have is None
                else (len(have.kept), _places(rows.kept, have.kept))
            )
            if axis == read.dropped:
                (dropped,) = places
                continue
            value = self._rows(value, axis, Rows(n, rows.inner, places), sizes, read.node)
            sizes[axis] = sizes[axis] // n * len(places)
        if read.dropped is not None:
            value = self.graph.call_function(_aten.select.int, (value, read.dropped, dropped))
            del sizes[read.dropped]
            self._described(value, read.node, tuple(sizes))
        self.parts[read] = value
        return value

    def _rows(
        self, value: fx.Node, axis: int, rows: Rows, sizes: Sequence[int], like: fx.Node
    ) -> fx.Node:
        """Write the choice of rows of one axis of a value of shape ``sizes``."""
        before, after = sizes[:axis], sizes[axis + 1 :]
        outer, chosen = sizes[axis] // (rows.n * rows.inner), len(rows.kept)
        factored = outer > 1 or rows.inner > 1
        if factored:
            value = self._reshaped(value, (*before, outer, rows.n, rows.inner, *after), like)
        place, start = axis + factored, rows.kept[0]
        step = rows.kept[1] - start if chosen > 1 else 1
        span = range(start, rows.kept[-1] + 1, step)
        if rows.kept == tuple(span):
            value = self.graph.call_function(
                _aten.slice.Tensor, (value, place, start, span.stop, step)
            )
        else:
            index = self._constant(torch.tensor(rows.kept))
            value = self.graph.call_function(_aten.index_select.default, (value, place, index))
        narrowed = (outer, chosen, rows.inner) if factored else (chosen,)
        self._described(value, like, (*before, *narrowed, *after))
        if factored:
            value = self._reshaped(value, (*before, math.prod(narrowed), *after), like)
        return value

    def _reshaped(self, value: fx.Node, sizes: tuple[int, ...], like: fx.Node) -> fx.Node:
        made = self.graph.call_function(
            _aten.reshape.default, (value, [-1 if _is_free(n) else n for n in sizes])
        )
        return self._described(made, like, sizes)


def _contains(box: Box, other: Box) -> bool:
    """Whether one part contains another."""
    return all(
        one is None or (some is not None and one[:2] == some[:2] and {*some.kept} <= {*one.kept})
        for one, some in zip(box, other, strict=True)
    )
