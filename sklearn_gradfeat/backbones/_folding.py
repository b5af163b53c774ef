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
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sklearn_gradfeat.backbones._graph import Captured, Fold

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

    original = bias
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

    def name(node: fx.Node | None) -> str | None:
        return None if node is None else captured.names.get(node)

    held = [node for node in (scale, shift, mean, variance) if node is not None]
    alone = all(len(node.users) == 1 for node in held) and len(set(held)) == len(held)
    of_norm = name(scale), name(shift), name(mean), name(variance)
    captured.folds.append(
        Fold(names.get(weight), names.get(bias), name(original), *of_norm, eps, alone)
    )
    layer.args = (layer.args[0], weight, bias, *layer.args[3:])
    for user in list(norm.users):
        user.replace_all_uses_with(layer)
        if user is captured.output:
            captured.output = layer
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


def unfold(
    folds: Sequence[Fold], state: dict[str, Tensor], displacements: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the state of a module whose folded weights and biases are displaced.

    A displaced folded weight ``s W + d`` is that of a layer with the weight ``W + d / s``. Where
    ``s`` is zero, the batch norm gets a scale with which it is one. A displaced folded bias moves
    the shift of the batch norm; without one, the bias of the layer; without that, the mean.

    Parameters
    ----------
    folds : sequence of Fold
        The batch norms that were folded.
    state : dict of str to tensor
        The state of the module.
    displacements : dict of str to tensor
        The displacements of folded and of other parameters.

    Returns
    -------
    dict of str to tensor
        New tensors for everything that changes.

    Raises
    ------
    ValueError
        If other layers use the tensors that would have to change.
    """
    state, left = dict(state), dict(displacements)
    for fold in folds:
        weight, bias = left.pop(fold.weight or "", None), left.pop(fold.bias or "", None)
        if weight is not None or bias is not None:
            changed = _unfolded(fold, state, weight, bias)
            state |= {name: value.to(state[name].dtype) for name, value in changed.items()}
    for name, move in left.items():
        state[name] = (state[name].double() + move.to(state[name].device)).to(state[name].dtype)
    return state


def _unfolded(
    fold: Fold, state: Mapping[str, Tensor], weight: Tensor | None, bias: Tensor | None
) -> dict[str, Tensor]:
    """Return the tensors that change with a displaced folded weight and bias."""
    assert fold.variance is not None and fold.mean is not None
    deviation = (state[fold.variance].double() + fold.eps).sqrt()

    def value(name: str | None, default: float) -> Tensor:
        return torch.full_like(deviation, default) if name is None else state[name].double()

    s = value(fold.scale, 1.0) / deviation
    own, mean, shift = value(fold.own, 0.0), value(fold.mean, 0.0), value(fold.shift, 0.0)
    total = s * (own - mean) + shift + (0.0 if bias is None else bias.to(s))
    new: dict[str, Tensor] = {}
    if weight is not None:
        assert fold.weight is not None
        dead, kernel = s == 0, state[fold.weight].double()
        size = [-1, *[1] * (kernel.ndim - 1)]
        if fold.scale and bool(dead.any()):
            new[fold.scale] = torch.where(dead, deviation, state[fold.scale].double())
            s, kernel = s.masked_fill(dead, 1.0), kernel.masked_fill(dead.view(size), 0.0)
        new[fold.weight] = kernel + weight.to(s) / s.view(size)
    if bias is None and fold.scale not in new:
        return new
    if fold.shift:
        new[fold.shift] = total - s * (own - mean)
    elif fold.own:
        new[fold.own] = total / s + mean
    else:
        new[fold.mean] = own - total / s
    if not fold.is_alone and {fold.scale, fold.shift, fold.mean} & set(new):
        raise ValueError(
            f"The displacements of {fold.weight!r} and {fold.bias!r} cannot be written back: "
            "other layers use the batch norm that was folded into them, too. Give each layer a "
            "batch norm of its own, or choose other gradient_layers."
        )
    return new
