"""The choice of the gradient layers θ₂: the blocks of a network, and parameters by name.

A block is a submodule of the network. The graph shows the blocks as follows:

1. The layers are the nodes that multiply samples with a weight. Linear layers on pooled or
   flattened activations, one row per sample, do not count if there are other layers.
2. A skip connection forks and joins again, in a sum or a concatenation. For two paths into the
   join, its region is the symmetric difference of their ancestors: the nodes on either path
   below the fork are on both, so they cancel. A sum belongs to its region; a concatenation
   belongs to the next block. The submodule of the region is the smallest one around it.
3. The block of a layer is the submodule of the smallest region around the layer. For a layer in
   no region it is the outermost submodule around the layer that has the class of such a block,
   as a block without its skip connection has. Otherwise the layer itself is a block.
4. A block inside of another one is part of it if several blocks have the class of the outer one,
   as an attention with a skip connection of its own is part of a layer of a transformer.
5. Blocks are in the order of their last layers.

The parameters of a block are those below its path, and the biases that batch norms outside of
the block left in its layers.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import SymInt, fx

from sklearn_gradfeat.backbones._graph import (
    MATRIX,
    WEIGHTED,
    Captured,
    in_network,
    module_path,
    operator_name,
)
from sklearn_gradfeat.backbones._split import downstream

_aten = torch.ops.aten
_ADD, _CAT = _aten.add.Tensor, _aten.cat.default
_PRODUCTS = {"scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum"}


def blocks(captured: Captured) -> dict[str, list[str]]:
    """Return the parameter names of every block by its path, from the input to the output."""
    layers = _layers(captured)
    regions = _residual_regions(captured)
    paths = [_innermost(node, regions) for node, _ in layers]
    known = {captured.classes[path] for path in paths if path is not None}
    found: dict[str, None] = {}
    for (_, name), path in zip(layers, paths, strict=True):
        where = path or _of_known_class(name, captured, known) or name.rpartition(".")[0]
        found.pop(where, None)
        found[where] = None
    number = Counter(captured.classes.get(path) for path in found)
    repeated = tuple(f"{path}." for path in found if number[captured.classes.get(path)] > 1)
    return {path: _members(captured, path) for path in found if not path.startswith(repeated)}


def _layers(captured: Captured) -> list[tuple[fx.Node, str]]:
    """Return the nodes that multiply samples with a weight, with the name of the weight."""
    names = {node: name for name, node in captured.parameters.items()}
    found = [
        (node, names[source])
        for node in captured.used()
        if node.op == "call_function"
        for source in node.all_input_nodes
        if source in names and captured.tensors[source].ndim > 1
    ]
    weighted = [pair for pair in found if operator_name(pair[0]) in WEIGHTED] or found
    return [pair for pair in weighted if not _is_dense(pair[0], captured)] or weighted


def _is_dense(node: fx.Node, captured: Captured) -> bool:
    """Whether a node is a matrix product with one row per sample."""
    if operator_name(node) not in MATRIX:
        return False
    value = node.meta["val"]
    return bool(value.ndim == 2 and captured.is_batch_size(value.shape[0]))


def _residual_regions(captured: Captured) -> list[tuple[set[fx.Node], str]]:
    """Return the region of every skip connection, with the smallest submodule around it."""
    ancestors: dict[fx.Node, set[fx.Node]] = {}
    regions = []
    for node in captured.used():
        above: set[fx.Node] = {node}
        for source in node.all_input_nodes:
            above |= ancestors[source]
        ancestors[node] = above
        if node.target not in (_ADD, _CAT) or not in_network(node):
            continue
        sources = [s for s in node.all_input_nodes if captured.input in ancestors[s]]
        for first, second in pairwise(sources):
            apart = ancestors[first] ^ ancestors[second]
            region = {n for n in apart if n.op == "call_function" and not _is_size(n)}
            if not region:
                continue
            if node.target is _ADD:
                region.add(node)
            path = _common_path([module_path(n) for n in region])
            if path:
                regions.append((region, path))
    return regions


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a size of a tensor. It may be read outside of the block that needs it."""
    return isinstance(node.meta.get("val"), (int, SymInt))


def _common_path(paths: Sequence[str]) -> str:
    """Return the longest path of a submodule that contains all of ``paths``."""
    common: list[str] = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _innermost(node: fx.Node, regions: list[tuple[set[fx.Node], str]]) -> str | None:
    """Return the submodule of the smallest region around a node."""
    around = [(len(region), path) for region, path in regions if node in region]
    return min(around)[1] if around else None


def _of_known_class(name: str, captured: Captured, known: set[type]) -> str | None:
    """Return the outermost submodule around a parameter with a class of ``known`` blocks."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        if captured.classes.get(path) in known - {torch.nn.Sequential, torch.nn.ModuleList}:
            return path
    return None


def _members(captured: Captured, path: str) -> list[str]:
    """Return the differentiable parameters of a block, with the biases folded into it."""
    tied = {own for alias, own in captured.aliases.items() if alias.startswith(f"{path}.")}
    inside = [
        n for n in differentiable(captured) if n in tied or n.startswith(f"{path}.") or not path
    ]
    nodes = {captured.parameters[n] for n in inside}
    for name in differentiable(captured):
        layers = captured.parameters[name].users
        if name not in inside and any(
            layer.args[1:2]
            and layer.args[1] in nodes
            and layer.args[2:3] == (captured.parameters[name],)
            for layer in layers
        ):
            inside.append(name)
    return inside


def after_attention(captured: Captured) -> set[str]:
    """Return the parameters of the layers that follow the attention of the last block.

    Attention is the last product of two matrices that both depend on the samples.
    """
    path, members = next(reversed(blocks(captured).items()), ("", []))
    used = captured.used()
    samples = downstream(used, [captured.input])
    attention = [
        node
        for node in used
        if f"{module_path(node)}.".startswith(f"{path}." if path else "")
        and operator_name(node) in _PRODUCTS
        and len(samples.intersection(node.all_input_nodes)) > 1
    ]
    above = downstream(used, attention[-1:])
    layers = [node for node, name in _layers(captured) if node in above and name in members]
    if not layers:
        raise ValueError(
            "gradient_layers='after_attention' needs a transformer: a last block with attention "
            f"and layers after it. The last block of the backbone, {path!r}, has none. Pass "
            "'last', or names of layers."
        )
    inputs = {source for node in layers for source in node.all_input_nodes}
    return {name for name in members if captured.parameters[name] in inputs}


def differentiable(captured: Captured) -> list[str]:
    """Return the names of the parameters that may be chosen, in graph order.

    Those that reach the activation only through ``detach`` have no derivative.
    """
    order = {node: i for i, node in enumerate(captured.graph.nodes)}
    reaching = {captured.output}
    for node in reversed(captured.graph.nodes):
        if node in reaching and operator_name(node) != "detach":
            reaching.update(node.all_input_nodes)
    names = [
        name
        for name, node in captured.parameters.items()
        if name not in captured.frozen and node in reaching
    ]
    return sorted(names, key=lambda n: order[captured.parameters[n]])


def choose_parameters(
    gradient_layers: str | int | Sequence[str],
    names: Sequence[str],
    blocks: Callable[[], list[list[str]]],
    after_attention: Callable[[], Collection[str]],
    gone: dict[str, str],
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Return the names of the parameters that are differentiated.

    Parameters
    ----------
    gradient_layers : str, int or list of str
        ``"last"``, ``"after_attention"``, ``"all"``, a number of blocks, or names and glob
        patterns of submodules or parameters.
    names : sequence of str
        The parameters to choose from.
    blocks : callable
        Returns the parameter names of every block, from bottom to top.
    after_attention : callable
        Returns the parameters of the last block after its attention.
    gone : dict of str to str
        Parameters that cannot be chosen, and why.
    aliases : mapping of str to str, default={}
        Further names of tied parameters, and the one among ``names``.

    Returns
    -------
    list of str
        In the order of ``names``.

    Raises
    ------
    ValueError
        If a pattern matches nothing, or there are fewer blocks than asked for.
    """
    if not names:
        raise ValueError(
            "backbone has no parameters to differentiate, or detaches its output from all of them. "
            "Pass a network with layers, or set features='activation'."
        )
    if isinstance(gradient_layers, str) and gradient_layers == "all":
        return list(names)
    if isinstance(gradient_layers, str) and gradient_layers == "last":
        gradient_layers = 1
    chosen: Collection[str]
    if isinstance(gradient_layers, str) and gradient_layers == "after_attention":
        chosen = after_attention()
    elif isinstance(gradient_layers, (str, Sequence)):
        patterns = [gradient_layers] if isinstance(gradient_layers, str) else gradient_layers
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(
                f"gradient_layers={gradient_layers!r} must list one or more strings: names or glob "
                "patterns of submodules or parameters."
            )
        chosen = {name for pattern in patterns for name in _match(pattern, names, gone, aliases)}
    else:
        available = set(names)
        found = [block for block in blocks() if not available.isdisjoint(block)]
        if gradient_layers > len(found):
            raise ValueError(
                f"gradient_layers={gradient_layers} asks for more blocks than the backbone "
                f"has: {len(found)}. Pass a smaller number, or 'all'."
            )
        chosen = {name for block in found[-int(gradient_layers) :] for name in block}
    return [name for name in names if name in chosen]


def _match(
    pattern: str, names: Sequence[str], gone: dict[str, str], aliases: Mapping[str, str]
) -> list[str]:
    """Return the parameters that a pattern matches, themselves or through a submodule."""
    others = {name for alias, name in aliases.items() if _covers(pattern, alias)}
    matched = [name for name in names if name in others or _covers(pattern, name)]
    if matched:
        return matched
    lost = [name for name in gone if _covers(pattern, name)]
    if lost:
        raise ValueError(
            f"gradient_layers={pattern!r} matches only parameters that cannot be chosen: "
            f"{lost[0]!r} {gone[lost[0]]}."
        )
    candidates = dict.fromkeys(part for name in names for part in _ancestors(name))
    candidates |= dict.fromkeys(("last", "after_attention", "all"))
    nearest = difflib.get_close_matches(pattern, candidates, n=5, cutoff=0.0)
    raise ValueError(
        f"gradient_layers={pattern!r} matches no parameter of the backbone and no submodule "
        f"that has any. The nearest names are {', '.join(map(repr, nearest))}."
    )


def _covers(pattern: str, name: str) -> bool:
    """Whether a pattern matches a parameter or one of the submodules around it."""
    return any(fnmatchcase(part, pattern) for part in _ancestors(name))


def _ancestors(name: str) -> list[str]:
    """Return a parameter's name and the paths of the submodules around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
