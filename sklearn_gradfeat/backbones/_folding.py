"""Batch norms folded into the layers before them.

In evaluation mode a batch norm with the weight γ, bias β, running mean μ and running variance σ²
is affine in each channel, as is the convolution or linear layer z = W x + b before it:

    γ (W x + b - μ) / √(σ² + ε) + β  =  s W x + (s (b - μ) + β),    s = γ / √(σ² + ε).

So one layer with the weight s W (each output channel of W times its s) and the bias s (b - μ) + β
computes both. This saves a pass over the activations, and the gradient features are those of the
weights that the network uses. The method prescribes it. The new values are computed in float64.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from sklearn_gradfeat.backbones._graph import Captured

_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
_CONVOLUTIONS = {
    getattr(getattr(torch.ops.aten, f"conv{n}d"), overload)
    for n in (1, 2, 3)
    for overload in ("default", "padding")
}
_LINEAR = torch.ops.aten.linear.default


def fold_batch_norms(captured: Captured) -> None:
    """Fold every batch norm into the convolution or linear layer that it follows.

    The function of the network does not change, up to rounding. The folded weight keeps the
    name of the layer's weight. The folded bias has the name of the layer's bias; for a layer
    without one, that of the bias of the batch norm, from which it differs by a constant. Batch
    norms that follow no such layer stay, and their parameters are frozen.
    """
    names = {node: name for name, node in captured.parameters.items()}
    for node in list(captured.graph.nodes):
        if node.target is not _NORM:
            continue
        arguments: tuple[Any, ...] = node.args
        _, scale, shift, *_ = arguments
        layer = _foldable(captured, node)
        if layer is None:
            captured.frozen.update(
                names[p] for p in _constants(captured, scale, shift) if p in names
            )
        else:
            _fold(captured, names, node, layer)


def _foldable(captured: Captured, norm: fx.Node) -> fx.Node | None:
    """Return the layer that a batch norm can be folded into, None if there is none.

    Nothing else may read the output of the layer or its parameters, and the scale, the shift and
    the statistics must be tensors of the network, not computed ones.
    """
    layer = norm.args[0]
    users = list(norm.users)
    if not all(u.target is operator.getitem and u.args[1] == 0 for u in users if u.users):
        return None
    if not isinstance(layer, fx.Node) or len(layer.users) != 1:
        return None
    matrix = layer.target is _LINEAR and layer.meta["val"].ndim == 2
    if not matrix and layer.target not in _CONVOLUTIONS:
        return None
    own: tuple[Any, ...] = layer.args[1:3]
    alone = all(p is None or (p in captured.tensors and len(p.users) == 1) for p in own)
    tensors = all(node is None or node in captured.tensors for node in norm.args[1:5])
    return layer if alone and tensors else None


def _constants(captured: Captured, *nodes: fx.Node | None) -> set[fx.Node]:
    """Return the nodes that compute some others, as far as these do not depend on samples."""
    found: set[fx.Node] = set()
    for node in nodes:
        above, todo = set[fx.Node](), [] if node is None else [node]
        while todo:
            above.add(todo[-1])
            todo += [source for source in todo.pop().all_input_nodes if source not in above]
        if captured.input not in above:
            found |= above
    return found


def _fold(captured: Captured, names: dict[fx.Node, str], norm: fx.Node, layer: fx.Node) -> None:
    """Replace a layer and its batch norm by the folded layer."""
    arguments: tuple[Any, ...] = norm.args
    _, scale, shift, mean, variance, _, eps = arguments
    weight, bias = _weight_and_bias(layer)

    def value(node: fx.Node | None, default: float) -> Tensor:
        reference = captured.tensors[mean]
        found = captured.tensors[node] if node is not None else torch.full_like(reference, default)
        return found.double() if found.device.type != "mps" else found

    s = value(scale, 1.0) * (value(variance, 1.0) + eps).rsqrt()
    kernel = value(weight, 1.0)
    folded_weight = kernel * s.view(-1, *[1] * (kernel.ndim - 1))
    folded_bias = s * (value(bias, 0.0) - value(mean, 0.0)) + value(shift, 0.0)
    dtype = captured.tensors[weight].dtype
    captured.tensors[weight] = folded_weight.to(dtype)
    if scale in names and weight in names:
        captured.absorbed[names[scale]] = names[weight]
    if bias is None:
        bias = _bias_node(captured, names, layer, shift)
    elif shift in names and bias in names:
        captured.absorbed[names[shift]] = names[bias]
    captured.tensors[bias] = folded_bias.to(dtype)
    layer.args = (layer.args[0], weight, bias, *layer.args[3:])
    for user in list(norm.users):
        user.replace_all_uses_with(layer)
    for dead in (scale, shift):
        if dead is not bias:
            captured.parameters.pop(names.get(dead, ""), None)


def _bias_node(
    captured: Captured, names: dict[fx.Node, str], layer: fx.Node, shift: fx.Node | None
) -> fx.Node:
    """Return the placeholder for the bias of a layer that had none."""
    if shift is not None and len(shift.users) == 1:
        return shift
    weight, _ = _weight_and_bias(layer)
    with captured.graph.inserting_before(captured.input):
        node = captured.graph.placeholder(f"{weight.name}_folded_bias")
    if weight in names:
        name = names[weight].removesuffix("weight") + "bias"
        captured.parameters[name] = node
        names[node] = name
    return node


def _weight_and_bias(layer: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Return the placeholders of the parameters of a layer."""
    weight, *bias = layer.args[1:3]
    assert isinstance(weight, fx.Node)
    return weight, bias[0] if bias and isinstance(bias[0], fx.Node) else None
