"""Linear and convolutional layers as matrix products: their input rows and output rows.

A convolution is the matrix product of the patches under its kernel with its weight. So two
matrices describe the curvature of every layer: the input rows ``a`` that the weight multiplies,
and the gradients ``g`` of the output rows. Rows have shape
``(groups, n_samples, positions, columns)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sklearn_gradfeat.backbones import differentiable_attention
from sklearn_gradfeat.linearized import LinearizedHead, Tensors

_LAYERS = {"linear", "conv1d", "conv2d", "conv3d"}
_ALL = slice(None)


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
    """

    weight: int
    bias: int | None
    kind: str
    inputs: Tensor
    output: Tensor
    options: tuple[Any, ...]

    @property
    def groups(self) -> int:
        """Number of groups of a convolution; one for a linear layer."""
        return int(self.options[3]) if len(self.options) > 3 else 1

    def input_rows(
        self, kernel: Sequence[int], n_samples: int, positions: Tensor | slice = _ALL
    ) -> Tensor:
        """Return the input rows at some positions."""
        if self.kind == "linear":
            return _by_sample(self.inputs, n_samples)[:, :, positions]
        stride, padding, dilation, _ = _complete(self.options, len(kernel))
        x = _pad(self.inputs, kernel, padding, dilation)
        pieces = []
        for offset in product(*map(range, kernel)):
            window: list[slice] = [slice(None), slice(None)]
            for axis, (o, s, d) in enumerate(zip(offset, stride, dilation, strict=True)):
                length = self.output.shape[2 + axis]
                window.append(slice(o * d, o * d + (length - 1) * s + 1, s))
            pieces.append(x[tuple(window)].flatten(2)[:, :, positions])
        patches = torch.stack(pieces, 2).unflatten(1, (self.groups, -1))
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
        """Return a tensor of the shape of the output, such as its gradient, as rows."""
        if self.kind == "linear":
            return _by_sample(like_output, n_samples)
        rows: Tensor = like_output.flatten(2).unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2)
        return rows


class LayerRecorder(TorchFunctionMode):
    """Records the layers that a head applies, if their weight is among given parameters."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.positions = {id(p): i for i, p in enumerate(parameters)}
        self.calls: list[LayerCall] = []
        self.matrices: list[Tensor] = []  # flattened weights, kept alive for their ids

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        kind = getattr(func, "__name__", "").split(".")[0]
        if kind == "flatten" and args and id(args[0]) in self.positions and output.ndim == 2:
            self._note_matrix(args[0], output)
        if kind in _LAYERS and not kwargs and id(args[1]) in self.positions:
            bias = self.positions.get(id(args[2])) if len(args) > 2 else None
            weight = self.positions[id(args[1])]
            self.calls.append(LayerCall(weight, bias, kind, args[0].detach(), output, args[3:]))
            # An operator that works in place must not change the recorded output.
            return output.clone()
        return output

    def _note_matrix(self, weight: Tensor, flat: Tensor) -> None:
        """Treat a weight flattened to (n_outputs, n_inputs) as the weight."""
        if len(flat) == len(weight):
            self.positions[id(flat)] = self.positions[id(weight)]
            self.matrices.append(flat)


def record(
    head: LinearizedHead, boundary: Tensors, *, differentiable: bool = False
) -> tuple[Tensor, list[LayerCall]]:
    """Return the activation and every application of a layer whose weight is a parameter."""
    values = tuple(value.detach().requires_grad_(differentiable) for value in head.values)
    with (
        torch.set_grad_enabled(differentiable),
        differentiable_attention(),
        LayerRecorder(values) as recorder,
    ):
        activation = head.head(values, boundary)
    return activation, _with_one_width(recorder.calls)


def _with_one_width(calls: list[LayerCall]) -> list[LayerCall]:
    """Leave the bias out of the calls of a tied weight if some of these calls have none."""
    without = {call.weight for call in calls if call.bias is None}
    return [replace(call, bias=None) if call.weight in without else call for call in calls]


def output_gradients(
    activation: Tensor, calls: Sequence[LayerCall], columns: Tensor
) -> Iterator[Tensors]:
    """Yield, for every column, the gradients of ``column · activation`` in the recorded outputs."""
    outputs = [call.output for call in calls]
    for column in columns if calls else ():
        yield torch.autograd.grad(
            activation, outputs, column.expand_as(activation),
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip


def _by_sample(rows: Tensor, n_samples: int) -> Tensor:
    """Group the rows of a linear layer by sample, or return one position of every row.

    The latter happens if no axis has the size of the batch.
    """
    if rows.ndim > 2 and rows.shape[0] % n_samples and rows.shape[1] == n_samples:
        rows = rows.transpose(0, 1)
    flat = rows.reshape(-1, rows.shape[-1])
    if flat.shape[0] % n_samples:
        return flat[None, :, None]
    return flat.view(1, n_samples, -1, flat.shape[-1])


def _complete(options: tuple[Any, ...], n_axes: int) -> list[Any]:
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
