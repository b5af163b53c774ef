"""The derivative of a head as a graph of plain operators, for export.

The head is a graph of ATen operators. An interpreter runs it on pairs of a value and its
tangent: the parameters start as ``(θ, t)``, and an operator ``h`` maps::

    (x, ẋ) ↦ (h(x), J_h(x) ẋ)

Values that do not depend on the parameters have no tangent. The last pair is the activation and
``J t``. Tracing this run leaves a graph of plain operators, which needs no differentiation. The
batch size is free, and everything that depends on ``θ`` and ``t`` alone is constant.

The products ``J_h(x) ẋ`` come from double backward: ``v ↦ J_hᵀ v`` is linear, so its
vector-Jacobian product with ``ẋ`` is ``J_h ẋ`` for any ``v``. Forward mode would be shorter, but
tracing it writes the batch size of the example into the graph. The same happens with the second
derivatives of convolutions, which have the product rule instead::

    conv(x, W, b) ↦ conv(ẋ, W) + conv(x, Ẇ) + ḃ
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from sklearn_gradfeat.backbones import differentiable_attention
from sklearn_gradfeat.data import is_out_of_memory
from sklearn_gradfeat.linearized._jacobian import Tensors

_ATEN = torch.ops.aten


class UntraceableError(Exception):
    """The derivative has no graph with a free batch size."""


def linearized_graph(
    head: fx.GraphModule, parameters: Tensors, tangents: Tensors, boundary: Tensors
) -> fx.GraphModule:
    """Return a graph from the boundary to the activation and ``J t``.

    Parameters
    ----------
    head : GraphModule
        ``head(*parameters, *boundary)`` returns a tuple of the activation alone.
    parameters : tuple of tensors
        The parameters that vary, at their pretrained values.
    tangents : tuple of tensors
        The direction ``t``, one tensor per parameter.
    boundary : tuple of tensors
        An example of at least two samples.

    Returns
    -------
    GraphModule
        Maps the boundary to the activation and ``J t``, both of shape (n_samples,
        n_features). The parameters and the direction are its buffers.

    Raises
    ------
    UntraceableError
        If the derivative of an operator cannot be traced with a free batch size.
    """
    batch = torch.export.Dim("batch", min=2)
    shapes = (*(None for _ in parameters), *({0: batch} for _ in boundary))
    try:
        with torch.no_grad(), differentiable_attention():
            program = torch.export.export(head, (*parameters, *boundary), dynamic_shapes=shapes)
            program = program.run_decompositions(_simpler_operators())
            return _trace(program, (*parameters, *boundary), tangents)
    except Exception as error:  # whatever torch.export or a derivative may raise
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UntraceableError(reason) from error


def _simpler_operators() -> dict[Any, Callable[..., Any]]:
    """Return decompositions of operators without a double backward of free batch size."""
    table: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions().items())
    recurrent = [getattr(_ATEN, kind).input for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")]
    others = ("_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
              "native_group_norm", "native_layer_norm", "glu", "hardsigmoid")  # fmt: skip
    table |= get_decompositions([*recurrent, *(getattr(_ATEN, kind) for kind in others)])
    return {**table, _ATEN.adaptive_avg_pool2d.default: _adaptive_average}


def _adaptive_average(x: Tensor, size: Sequence[int]) -> Any:
    """Average over whole images without torch's ``as_strided``, which ONNX does not have."""
    if list(size) != [1, 1]:
        return NotImplemented
    return x.mean((-2, -1), keepdim=True)


def _trace(
    program: torch.export.ExportedProgram, inputs: Tensors, tangents: Tensors
) -> fx.GraphModule:
    """Trace the derivative of an exported head in its first inputs, the parameters."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    held = {**program.constants, **program.state_dict}
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    constants = [held[names[node.name]] for node in nodes if node.name in names]
    fakes = [node.meta["val"] for node in nodes]
    varying = range(len(constants), len(constants) + len(tangents))

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        operands: list[Any] = list(values[: len(fakes)])
        for i, tangent in zip(varying, values[len(fakes) :], strict=True):
            operands[i] = _Dual(operands[i], tangent)
        (activation,) = _Linearizer(program.graph_module).run(*operands)
        return activation.value, activation.tangent

    with fakes[-1].fake_mode:
        operands = (*fakes, *(torch.empty_like(fakes[i]) for i in varying))
        # The symbolic mode chooses kernels that leave the batch size free.
        traced = make_fx(run, tracing_mode="symbolic")(*operands)
        # Unused operators can be removed once none of them works in place.
        traced = make_fx(torch.func.functionalize(traced), tracing_mode="symbolic")(*operands)
    if fakes[-1].shape[0].node.expr.is_number:
        raise UntraceableError("the derivative of some operator fixes the batch size")
    known = [*constants, *inputs[: len(tangents)]]
    return _bind(traced, [*known, *[None] * (len(fakes) - len(known)), *tangents])


def _bind(traced: fx.GraphModule, values: Sequence[Tensor | None]) -> fx.GraphModule:
    """Turn the inputs that have a value into buffers."""
    graph = traced.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for i, (node, value) in enumerate(zip(placeholders, values, strict=True)):
        if value is not None:
            traced.register_buffer(f"constant_{i}", value)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(f"constant_{i}"))
            graph.erase_node(node)
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default:
            # A view is valid only for the strides of this trace.
            node.target = torch.ops.aten.reshape.default
    graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    return fx.GraphModule(traced, graph)


@dataclass(frozen=True, eq=False)
class _Dual:
    """The value of a node and its tangent; two tuples for a node with several outputs."""

    value: Any
    tangent: Any


class _Linearizer(fx.Interpreter):
    """Runs a graph of ATen operators on values and tangents."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator."""
        leaves, spec = tree_flatten((args, kwargs))
        varying = [i for i, leaf in enumerate(leaves) if isinstance(leaf, _Dual)]
        if not varying:
            return super().call_function(target, args, kwargs)
        if target is operator.getitem:
            dual, index = args
            value, tangent = dual.value[index], dual.tangent[index]
            return value if tangent is None else _Dual(value, tangent)
        tangents = [leaves[i].tangent for i in varying]
        values = [leaf.value if isinstance(leaf, _Dual) else leaf for leaf in leaves]

        def function(*moved: Tensor) -> Any:
            full = list(values)
            for i, tensor in zip(varying, moved, strict=True):
                full[i] = tensor
            positional, named = tree_unflatten(full, spec)
            return target(*positional, **named)

        value = function(*(values[i] for i in varying))
        if target is _ATEN.convolution.default:
            return _Dual(value, _convolution_tangent(target, args, value))
        tangent = _tangent(function, [values[i] for i in varying], tangents)
        return value if tangent is None else _Dual(value, tangent)


def _convolution_tangent(target: Any, args: tuple[Any, ...], value: Tensor) -> Tensor:
    """Return the tangent of a convolution by the product rule."""
    x, weight, bias, rest = *args[:2], args[2] if len(args) > 2 else None, args[3:]
    terms = []
    if isinstance(x, _Dual):
        terms.append(target(x.tangent, _value(weight), None, *rest))
    if isinstance(weight, _Dual):
        terms.append(target(_value(x), weight.tangent, None, *rest))
    if isinstance(bias, _Dual):
        terms.append(bias.tangent.reshape(-1, *[1] * (value.ndim - 2)).expand_as(value))
    total: Tensor = functools.reduce(torch.add, terms)
    return total


def _value(operand: Any) -> Any:
    return operand.value if isinstance(operand, _Dual) else operand


def _tangent(
    function: Callable[..., Any], values: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Any:
    """Return the tangents of the outputs of an operator; None if all are constant."""
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in values]
        outputs = function(*leaves)
        if isinstance(outputs, Tensor):
            return _double_backward(outputs, leaves, tangents)
        found = [_double_backward(output, leaves, tangents) for output in outputs or ()]
    return None if all(tangent is None for tangent in found) else found


def _double_backward(
    output: Any, leaves: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Tensor | None:
    """Return the tangent of one output, or None if it is constant.

    ``v`` is one: at zero, torch returns NaN for operators that use logarithms.
    """
    if not isinstance(output, Tensor) or not output.requires_grad:
        return None
    v = torch.ones_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, leaves, v, create_graph=True, materialize_grads=True)
    linked = [(p, t) for p, t in zip(pulled, tangents, strict=True) if p.requires_grad]
    if not linked:
        return None
    tangent: Tensor = torch.autograd.grad([p for p, _ in linked], v, [t for _, t in linked])[0]
    return tangent
