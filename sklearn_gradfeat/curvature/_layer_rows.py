"""Linear and convolutional layers as matrix products: their input rows and output rows.

A convolution is the matrix product of the patches under its kernel with its weight. So two
matrices describe the curvature of every layer: the input rows ``a`` that the weight multiplies,
and the gradients ``g`` of the output rows. Rows have shape
``(groups, n_samples, positions, columns)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sklearn_gradfeat.backbones import differentiable_attention
from sklearn_gradfeat.linearized import LinearizedHead, Tensors

_LAYERS = {"linear", "conv1d", "conv2d", "conv3d"}
_VIEWS = {"flatten", "slice", "index_select"}
_NORM = ("input", "normalized_shape", "weight", "bias", "eps")
_ALL = slice(None)
# So many units of rounding of the largest singular value count as zero.
_ROUNDINGS = 100
# Multiplications that take as long as reading a number.
READING = 16


@dataclass(frozen=True)
class LayerCall:
    """One application of a linear or convolutional layer.

    Parameters
    ----------
    weight : int
        Position of the weight in the tuple of parameters.
    bias : int or None
        Position of the bias; None where it is not among the parameters.
    kind : str
        Name of the torch function.
    inputs, output : tensor
        Its first argument and its result.
    options : tuple
        Its arguments after the bias: stride, padding, dilation and groups of a convolution.
    part : (tensor, int) or None
        The numbers of the output channels of the weight that it computes, and the number of all
        of them; None where it computes all.
    """

    weight: int
    bias: int | None
    kind: str
    inputs: Tensor
    output: Tensor
    options: tuple[Any, ...]
    part: tuple[Tensor, int] | None = None

    @property
    def groups(self) -> int:
        """Number of groups of a convolution; one for a linear layer."""
        return int(self.options[3]) if len(self.options) > 3 else 1

    def is_by_sample(self, n_samples: int) -> bool:
        """Return whether every row of the output belongs to one sample."""
        if self.kind == "linear":
            return _by_sample(self.output, n_samples).shape[1] == n_samples
        return len(self.output) == n_samples and self.output.ndim == self.inputs.ndim

    def has_axis_of_samples(self, n_samples: int) -> bool:
        """Return whether samples have an axis of their own, instead of a share of a longer one."""
        return len(self.output) == n_samples or _is_second_axis(self.output, n_samples)

    def without_tensors(self) -> LayerCall:
        """Return the call without its input and output, which take memory."""
        none = self.inputs.new_empty(0)
        return replace(self, inputs=none, output=none)

    def input_rows(
        self, kernel: Sequence[int], n_samples: int, positions: Tensor | slice = _ALL
    ) -> Tensor:
        """Return the input rows at some positions."""
        if self.kind == "linear":
            return _by_sample(self.inputs, n_samples)[:, :, positions]
        stride, padding, dilation, _ = complete(self.options, len(kernel))
        x = _pad(self.inputs, kernel, padding, dilation)
        pieces = []
        for offset in product(*map(range, kernel)):
            window: list[slice] = [slice(None), slice(None)]
            for axis, (o, s, d) in enumerate(zip(offset, stride, dilation, strict=True)):
                length = self.output.shape[2 + axis]
                window.append(slice(o * d, o * d + (length - 1) * s + 1, s))
            piece = x[tuple(window)]
            pieces.append(piece if positions is _ALL else piece.flatten(2)[:, :, positions])
        patches = torch.stack(pieces, 2).flatten(3).unflatten(1, (self.groups, -1))
        flat: Tensor = patches.flatten(2, 3).permute(1, 0, 3, 2)
        return flat

    def scaled_rows(
        self,
        values: Sequence[Tensor],
        scales: Sequence[float],
        n_samples: int,
        positions: Tensor | slice = _ALL,
    ) -> Tensor:
        """Return the input rows of ``[weight, bias]`` in units of the scaled displacements."""
        rows = self.input_rows(values[self.weight].shape[2:], n_samples, positions)
        rows = rows * scales[self.weight]
        if self.bias is None:
            return rows
        return torch.cat([rows, torch.full_like(rows[..., :1], scales[self.bias])], -1)

    def output_rows(self, like_output: Tensor, n_samples: int) -> Tensor:
        """Return a tensor of the shape of the output, such as its gradient, as rows.

        The columns of output channels that the call does not compute are zero.
        """
        if self.kind == "linear":
            rows = _by_sample(like_output, n_samples)
            if self.part is None:
                return rows
            channels, width = self.part
            return rows.new_zeros(*rows.shape[:-1], width).index_copy(-1, channels, rows)
        flat: Tensor = like_output.flatten(2).unflatten(1, (self.groups, -1))
        return flat.permute(1, 0, 3, 2)


@dataclass(frozen=True)
class NormCall:
    """One application of a layer norm over the last axis.

    Parameters
    ----------
    weight : int
        Position of the weight in the tuple of parameters.
    bias : int or None
        Position of the bias; None where it is not among the parameters.
    normalised, output : tensor
        The result without weight and bias, and with them.
    """

    weight: int
    bias: int | None
    normalised: Tensor
    output: Tensor

    def is_by_sample(self, n_samples: int) -> bool:
        """Return whether every row of the output belongs to one sample."""
        return _by_sample(self.output, n_samples).shape[1] == n_samples

    def has_axis_of_samples(self, n_samples: int) -> bool:
        """Return whether samples have an axis of their own, instead of a share of a longer one."""
        return len(self.output) == n_samples or _is_second_axis(self.output, n_samples)

    def sample_gradients(self, gradient: Tensor, n_samples: int) -> dict[int, Tensor]:
        """Return the gradients in weight and bias of every sample, from that in the output."""
        rows = _by_sample(gradient, n_samples)[0]
        found = {self.weight: (rows * _by_sample(self.normalised, n_samples)[0]).sum(1)}
        if self.bias is not None:
            found[self.bias] = rows.sum(1)
        return found


class LayerRecorder(TorchFunctionMode):
    """Records the layers that a head applies, if their weight is among given parameters."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.positions = {id(p): i for i, p in enumerate(parameters)}
        self.parts: dict[int, tuple[Tensor, int]] = {}
        self.calls: list[LayerCall] = []
        self.norms: list[NormCall] = []
        self.derived: list[Tensor] = []  # from parameters, kept alive for their ids

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = getattr(func, "__name__", "").split(".")[0]
        if kind in _LAYERS and not kwargs:
            found = self._layer(kind, args)
            if found is not None:
                weight, bias, part = found
                output = _apart(func, args, {}, args[1 : 2 + (bias is not None)])
                inputs, options = args[0].detach(), args[3:]
                self.calls.append(LayerCall(weight, bias, kind, inputs, output, options, part))
                # An operator that works in place must not change the recorded output.
                return output.clone()
        if kind == "layer_norm":
            return self._norm(func, args, kwargs)
        output = func(*args, **kwargs)
        if kind in _VIEWS and args and id(args[0]) in self.positions:
            self._note_derived(kind, args, output)
        return output

    def _layer(
        self, kind: str, args: tuple[Any, ...]
    ) -> tuple[int, int | None, tuple[Tensor, int] | None] | None:
        """Return the positions of the weight and of the bias of a layer, and its part."""
        weight, part = self.positions.get(id(args[1])), self.parts.get(id(args[1]))
        # A convolution without an axis of samples has no rows either.
        whole = kind == "linear" or (part is None and args[0].ndim == args[1].ndim)
        if weight is None or not whole:
            return None
        bias = self.positions.get(id(args[2])) if len(args) > 2 else None
        if bias is not None and not _same(part, self.parts.get(id(args[2]))):
            bias = None
        return weight, bias, part

    def _norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Apply a layer norm; record it if it is over the last axis and its weight a parameter."""
        given = dict(zip(_NORM, args, strict=False)) | kwargs
        shape, pair = given["normalized_shape"], (given.get("weight"), given.get("bias"))
        weight, bias = (self.positions.get(id(one)) for one in pair)
        if len(shape) != 1 or weight is None:
            plain: Tensor = func(*args, **kwargs)
            return plain
        output = _apart(func, args, kwargs, pair if bias is not None else pair[:1])
        eps = given.get("eps", 1e-5)
        normalised = torch.layer_norm(given["input"].detach(), shape, eps=eps)
        self.norms.append(NormCall(weight, bias, normalised, output))
        return output.clone()

    def _note_derived(self, kind: str, args: tuple[Any, ...], output: Tensor) -> None:
        """Note a weight flattened to (n_outputs, n_inputs), or some rows of a weight or bias."""
        given, *rest = args
        if kind == "flatten":
            if output.ndim != 2 or len(output) != len(given):
                return
            if id(given) in self.parts:
                self.parts[id(output)] = self.parts[id(given)]
        elif len(args) > 2 and rest[0] == 0 and id(given) not in self.parts:
            numbers = torch.arange(len(given), device=given.device)
            rows = numbers[slice(*rest[1:])] if kind == "slice" else rest[1]
            self.parts[id(output)] = rows, len(given)
        else:
            return
        self.positions[id(output)] = self.positions[id(given)]
        self.derived.append(output)


def _apart(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Sequence[Any]
) -> Tensor:
    """Return the output of a layer, as if it did not depend on its parameters.

    So autograd finds the other uses of a parameter. The first argument is the input.
    """
    own = {id(parameter) for parameter in parameters}
    rest = (arg.detach() if id(arg) in own else arg for arg in args[1:])
    named = {
        name: arg.detach() if id(arg) in own and name != "input" else arg
        for name, arg in kwargs.items()
    }
    output: Tensor = func(*args[:1], *rest, **named)
    return output.requires_grad_(torch.is_grad_enabled()) if output.is_leaf else output


def _same(one: tuple[Tensor, int] | None, other: tuple[Tensor, int] | None) -> bool:
    """Whether two parts are the same rows."""
    if one is None or other is None:
        return one is other
    return torch.equal(one[0], other[0])


class Record(NamedTuple):
    """The activation of a batch, and the layers and layer norms with parameters.

    ``values`` are the parameters as autograd knows them.
    """

    activation: Tensor
    calls: list[LayerCall]
    norms: list[NormCall]
    values: Tensors

    def has_other_uses(self) -> bool:
        """Return whether the activation depends on a parameter other than through these layers.

        Another use counts for samples on which it has an effect. Without another use in the graph
        of autograd, nothing is computed.
        """
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.activation.shape, generator=generator, dtype=torch.float64)
        found = torch.autograd.grad(
            self.activation, self.values, v.to(self.activation),
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        return any(gradient is not None and bool(gradient.any()) for gradient in found)


def record(
    head: LinearizedHead, boundary: Tensors, *, differentiable: bool = False
) -> tuple[Tensor, list[LayerCall]]:
    """Return the activation and every application of a layer whose weight is a parameter."""
    return record_with_norms(head, boundary, differentiable=differentiable)[:2]


def record_with_norms(
    head: LinearizedHead, boundary: Tensors, *, differentiable: bool = False
) -> Record:
    """Return the activation, and every application of a layer or layer norm with parameters."""
    values = tuple(value.detach().requires_grad_(differentiable) for value in head.values)
    with (
        torch.set_grad_enabled(differentiable),
        differentiable_attention(),
        LayerRecorder(values) as recorder,
    ):
        activation = head.head(values, boundary)
    return Record(activation, _with_one_width(recorder.calls), recorder.norms, values)


def _with_one_width(calls: list[LayerCall]) -> list[LayerCall]:
    """Leave the bias out of the calls of a tied weight if some of these calls have none."""
    without = {call.weight for call in calls if call.bias is None}
    return [replace(call, bias=None) if call.weight in without else call for call in calls]


def spanning(omega: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two factors of ``Ω = outer @ columns`` with the fewest columns.

    Their number is the rank of ``Ω``, but at least one: with a softmax, one less than that of the
    outputs. The sizes of the rows of ``Ω``, such as units of targets, do not matter.
    """
    sizes = omega.norm(dim=1, keepdim=True)
    sizes = torch.where(sizes > 0, sizes, 1.0)
    left, singular, right = torch.linalg.svd(omega / sizes, full_matrices=False)
    least = _ROUNDINGS * torch.finfo(singular.dtype).eps * singular.max()
    rank = max(1, int((singular > least).sum()))
    return sizes * left[:, :rank], singular[:rank, None] * right[:rank]


def output_gradients(
    activation: Tensor, calls: Sequence[LayerCall | NormCall], columns: Tensor
) -> Iterator[Tensors]:
    """Yield, for every column, the gradients of ``column · activation`` in the recorded outputs."""
    outputs = [call.output for call in calls]
    for column in columns if calls else ():
        yield torch.autograd.grad(
            activation, outputs, column.expand_as(activation),
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip


class LayerGradients(NamedTuple):
    """The layers of some samples, and the gradients of columns of activations in their outputs.

    Attributes
    ----------
    calls : list of LayerCall
        The layers, with their inputs.
    by_column : iterable of (list of tensors, dict of int to tensor)
        For every column, the output rows of each layer, and the gradients of every sample in the
        vectors of layer norms.
    """

    calls: list[LayerCall]
    by_column: Iterable[tuple[list[Tensor], dict[int, Tensor]]]

    @classmethod
    def from_network(cls, record: Record, columns: Tensor, n_samples: int) -> LayerGradients:
        """Take a backward pass for every column; leave out norms without an axis of samples."""
        calls, norms = record.calls, [n for n in record.norms if n.is_by_sample(n_samples)]
        if not len(columns):  # the output weights are zero
            calls = []
        pulled = output_gradients(record.activation, [*calls, *norms], columns)
        return cls(calls, (_by_kind(calls, norms, grads, n_samples) for grads in pulled))


def _by_kind(
    calls: Sequence[LayerCall], norms: Sequence[NormCall], gradients: Tensors, n_samples: int
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Return the output rows of layers, and the gradients in the vectors of norms."""
    pairs = zip(calls, gradients[: len(calls)], strict=True)
    rows = [call.output_rows(gradient, n_samples) for call, gradient in pairs]
    found: dict[int, Tensor] = {}
    for norm, gradient in zip(norms, gradients[len(calls) :], strict=True):
        for i, part in norm.sample_gradients(gradient, n_samples).items():
            found[i] = found[i] + part if i in found else part
    return rows, found


def multiplications(head: LinearizedHead, boundary: Tensors) -> float:
    """Return the number of multiplications of a forward pass."""
    with torch.no_grad(), differentiable_attention(), _Counter() as counter:
        head.head(head.values, boundary)
    total: float = counter.total
    return total


def backward_share(head: LinearizedHead, forward: float, calls: Sequence[LayerCall]) -> float:
    """Return the cost of a backward pass to the outputs of all layers, as a share of the head.

    ``forward`` is the number of multiplications of the pass that recorded the calls. Without calls,
    as where all parameters are those of layer norms, the share is one.
    """
    if not calls:
        return 1.0
    first = calls[0]
    below = first.output.numel() * head.values[first.weight][0].numel()
    above = forward - below + READING * sum(call.output.numel() for call in calls)
    return min(above / forward, 1.0) if forward > 0 else 1.0


class _Counter(TorchDispatchMode):
    """Counts the multiplications of matrix products and convolutions."""

    total: float = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        flops = flop_registry.get(func.overloadpacket)
        if flops is not None:
            self.total += flops(*args, **kwargs, out_val=output) / 2
        return output


def _by_sample(rows: Tensor, n_samples: int) -> Tensor:
    """Group the rows of a linear layer by sample, or return one position of every row.

    The latter happens if no axis has the size of the batch.
    """
    if _is_second_axis(rows, n_samples):
        rows = rows.transpose(0, 1)
    flat = rows.reshape(-1, rows.shape[-1])
    if flat.shape[0] % n_samples:
        return flat[None, :, None]
    return flat.view(1, n_samples, -1, flat.shape[-1])


def _is_second_axis(rows: Tensor, n_samples: int) -> bool:
    """Return whether the samples are along the second axis, as in a sequence of batches."""
    return rows.ndim > 2 and rows.shape[0] % n_samples > 0 and rows.shape[1] == n_samples


def complete(options: tuple[Any, ...], n_axes: int) -> list[Any]:
    """Return stride, padding, dilation and groups of a convolution, with their defaults."""
    given = [*options, *(1, 0, 1, 1)[len(options) :]]
    return [
        [value] * n_axes if isinstance(value, int) else _spread(value, n_axes)
        for value in given[:3]
    ] + [given[3]]


def _spread(value: Any, n_axes: int) -> Any:
    """Repeat a sequence of length one over all axes; padding may also be a string."""
    return value if isinstance(value, str) or len(value) == n_axes else list(value) * n_axes


def _pad(x: Tensor, kernel: Sequence[int], padding: Any, dilation: Sequence[int]) -> Tensor:
    """Pad the spatial axes as the convolution does."""
    if padding == "valid":
        return x
    sides: list[int] = []
    for axis in reversed(range(len(kernel))):
        total = dilation[axis] * (kernel[axis] - 1)
        left = total // 2 if padding == "same" else int(padding[axis])
        sides += [left, total - left if padding == "same" else left]
    return torch.nn.functional.pad(x, sides)
