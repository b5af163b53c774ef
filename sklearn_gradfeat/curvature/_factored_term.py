"""The gradient term from the inputs and the output gradients of every layer.

With input rows ``a_t`` and gradients ``g_ct`` of logit ``c`` in the output rows of a layer, at the
positions ``t`` of a sample, a displacement ``D`` of the layer adds to that logit::

    Σ_t g_ctᵀ D a_t

Both are kept for all samples. Then a pass multiplies every layer with its inputs once. A pass
through the network takes about three times as long: it computes the value as well, and takes the
derivatives through all layers. The rows take a backward pass for every logit, or for every
dimension that the output weights ``Ω`` span, which is one less with a softmax.

Rows of linear layers at positions without a gradient, such as padded tokens, are left out. Where
memory is too small for all samples, the others pass the network.

*Check.* The sum is all of the derivative where the layers are the only uses of the parameters. In
every batch, autograd is asked for other uses, which costs nothing where its graph has none. Whether
rows belong to their samples does not show there: a few samples of every batch are compared with the
network. All of them are where a layer has no axis of samples, since one sample may then have more
rows than another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from sklearn_gradfeat.backbones import threads_for, threads_for_head
from sklearn_gradfeat.curvature._layer_rows import (
    READING,
    LayerCall,
    LayerGradients,
    NormCall,
    Record,
    backward_share,
    complete,
    multiplications,
    output_gradients,
    record_with_norms,
    spanning,
)
from sklearn_gradfeat.data import on_all_ranks, row_blocks, unless_out_of_memory
from sklearn_gradfeat.linearized import Batches, TangentTerm, Tensors, agrees

# Passes of a fit, and the cost of one through the network, in forward passes of the head.
_PASSES, _NETWORK = 10, 3
# Samples of a batch that are compared with the network.
_COMPARED = 4


@dataclass(frozen=True)
class _Linear:
    """A linear layer: inputs (n_rows, n_inputs), gradients (n_columns, n_rows, n_outputs)."""

    call: LayerCall
    inputs: Tensor
    gradients: Tensor
    samples: Tensor
    places: Tensor
    n_positions: int

    @property
    def tensors(self) -> Tensors:
        """What is kept."""
        return self.inputs, self.gradients

    @property
    def n_columns(self) -> int:
        """The number of columns."""
        return self.gradients.shape[0]

    @classmethod
    def from_call(cls, call: LayerCall, gradients: Sequence[Tensor], n_samples: int) -> _Linear:
        """Keep the rows of some samples that have a gradient."""
        own = replace(call, part=None)
        flat = [own.output_rows(g, n_samples)[0].flatten(0, 1) for g in gradients]
        inputs = call.input_rows((), n_samples)[0]
        n_positions = inputs.shape[1]
        sizes = [torch.linalg.vector_norm(g, ord=math.inf, dim=1) for g in flat]
        seen = torch.stack(sizes).any(0).nonzero()[:, 0]
        rows = inputs.new_empty(len(flat), len(seen), flat[0].shape[1])
        for place, g in zip(rows, flat, strict=True):
            torch.index_select(g, 0, seen, out=place)
        samples = seen // n_positions
        return cls(
            call.without_tensors(), inputs.flatten(0, 1)[seen], rows, samples, seen, n_positions
        )

    def of(self, chosen: Tensor) -> _Linear:
        """Return the rows of some samples, in this order."""
        samples, kept = (chosen[:, None] == self.samples).nonzero().T
        places = samples * self.n_positions + self.places[kept] % self.n_positions
        return replace(
            self, inputs=self.inputs[kept], gradients=self.gradients[:, kept], samples=samples,
            places=places,
        )  # fmt: skip

    def project(self, weight: Tensor, bias: Tensor | None, n_samples: int) -> Tensor:
        """Return the outputs of another layer with the same inputs, (n_samples, positions, n)."""
        moved = torch.nn.functional.linear(self.inputs, weight.flatten(1), bias)
        return self._spread(moved, n_samples)

    def output_rows(self, of: Tensor | int, n_samples: int) -> Tensor:
        """Return those of a column or a mixture, (groups, n_samples, positions, n_outputs)."""
        one = isinstance(of, int)
        rows = self.gradients[of] if one else torch.tensordot(of, self.gradients, 1)
        return self.call.output_rows(self._spread(rows, n_samples), n_samples)

    def whole_call(self, n_samples: int) -> LayerCall:
        """Return the call with its inputs, zeros where none are kept."""
        return replace(self.call, inputs=self._spread(self.inputs, n_samples))

    def _spread(self, rows: Tensor, n_samples: int) -> Tensor:
        """Return the rows at all positions, zeros where none are kept."""
        spread = rows.new_zeros(n_samples * self.n_positions, rows.shape[1])
        return spread.index_copy(0, self.places, rows).view(n_samples, self.n_positions, -1)

    def _blocks(self) -> Iterator[slice]:
        width = self.gradients.shape[2] + self.inputs.shape[1]
        return row_blocks(len(self.inputs), width, device=self.inputs.device)

    def add_forward(self, moves: Tensors, total: Tensor) -> None:
        """Add the change of every column to ``total``, of shape (n_samples, n_columns)."""
        weight = moves[self.call.weight].flatten(1)
        bias = None if self.call.bias is None else moves[self.call.bias]
        if self.call.part is not None:
            channels = self.call.part[0]
            weight, bias = weight[channels], None if bias is None else bias[channels]
        for rows in self._blocks():
            moved = torch.nn.functional.linear(self.inputs[rows], weight, bias)
            seen = torch.stack([torch.linalg.vecdot(g[rows], moved) for g in self.gradients], 1)
            total.index_add_(0, self.samples[rows], seen)

    def add_adjoint(self, cotangent: Tensor, totals: Sequence[Tensor]) -> None:
        """Add the transpose of :meth:`add_forward`, applied to ``cotangent``."""
        for rows in self._blocks():
            factors = cotangent[self.samples[rows]]
            pulled = factors[:, :1] * self.gradients[0, rows]
            for factor, gradient in zip(factors.T[1:], self.gradients[1:], strict=True):
                pulled.addcmul_(factor[:, None], gradient[rows])
            found = {self.call.weight: pulled.T @ self.inputs[rows]}
            if self.call.bias is not None:
                found[self.call.bias] = pulled.sum(0)
            for i, piece in found.items():
                total = totals[i].view(len(totals[i]), *piece.shape[1:])
                if self.call.part is None:
                    total += piece
                else:
                    total.index_add_(0, self.call.part[0], piece)


@dataclass(frozen=True)
class _Convolution:
    """A convolution: inputs (n_samples, ...), gradients (n_samples, n_columns, ...)."""

    call: LayerCall
    inputs: Tensor
    gradients: Tensor

    @property
    def tensors(self) -> Tensors:
        """What is kept."""
        return self.inputs, self.gradients

    @property
    def n_columns(self) -> int:
        """The number of columns."""
        return self.gradients.shape[1]

    @classmethod
    def from_call(cls, call: LayerCall, gradients: Sequence[Tensor]) -> _Convolution:
        """Keep all inputs and gradients."""
        return cls(call.without_tensors(), call.inputs.clone(), torch.stack(list(gradients), 1))

    def of(self, chosen: Tensor) -> _Convolution:
        """Return the inputs and gradients of some samples."""
        return replace(self, inputs=self.inputs[chosen], gradients=self.gradients[chosen])

    def project(self, weight: Tensor, bias: Tensor | None, n_samples: int) -> Tensor:
        """Return the outputs of another layer with the same inputs, (n_samples, positions, n)."""
        layer: Callable[..., Tensor] = getattr(torch, self.call.kind)
        return layer(self.inputs, weight, bias, *self.call.options).flatten(2).mT

    def output_rows(self, of: Tensor | int, n_samples: int) -> Tensor:
        """Return those of a column or a mixture, (groups, n_samples, positions, n_outputs)."""
        one = isinstance(of, int)
        rows = self.gradients[:, of] if one else torch.tensordot(self.gradients, of, ([1], [0]))
        return self.call.output_rows(rows, n_samples)

    def whole_call(self, n_samples: int) -> LayerCall:
        """Return the call with its inputs, and an output of the same shape."""
        return replace(self.call, inputs=self.inputs, output=self.gradients[:, 0])

    def _blocks(self) -> Iterator[slice]:
        width = self.gradients[0, 0].numel() + self.inputs[0].numel()
        return row_blocks(len(self.inputs), width, device=self.inputs.device)

    def add_forward(self, moves: Tensors, total: Tensor) -> None:
        """Add the change of every column to ``total``, of shape (n_samples, n_columns)."""
        bias = None if self.call.bias is None else moves[self.call.bias]
        layer: Callable[..., Tensor] = getattr(torch, self.call.kind)
        for rows in self._blocks():
            moved = layer(self.inputs[rows], moves[self.call.weight], bias, *self.call.options)
            gradients = self.gradients[rows].flatten(2)
            total[rows] += (gradients @ moved.reshape(len(moved), -1, 1))[:, :, 0]

    def add_adjoint(self, cotangent: Tensor, totals: Sequence[Tensor]) -> None:
        """Add the transpose of :meth:`add_forward`, applied to ``cotangent``."""
        weight, bias = totals[self.call.weight], self.call.bias
        stride, padding, dilation, groups = complete(self.call.options, weight.ndim - 2)
        none = [0] * (weight.ndim - 2)
        for rows in self._blocks():
            gradients = self.gradients[rows]
            pulled = (cotangent[rows, None] @ gradients.flatten(2)).view_as(gradients[:, 0])
            _, piece, _ = torch.ops.aten.convolution_backward(
                pulled, self.inputs[rows], weight, None, stride, padding, dilation, False, none,
                groups, (False, True, False),
            )  # fmt: skip
            weight += piece
            if bias is not None:
                totals[bias].add_(pulled.transpose(0, 1).flatten(1).sum(1))


@dataclass(frozen=True)
class _Norm:
    """The gradients in the vectors of a norm, each of shape (n_samples, n_columns, size)."""

    gradients: dict[int, Tensor]

    @property
    def tensors(self) -> Tensors:
        """What is kept."""
        return tuple(self.gradients.values())

    @classmethod
    def from_call(cls, call: NormCall, gradients: Sequence[Tensor], n_samples: int) -> _Norm:
        """Sum the gradients over the positions of every sample."""
        found = [call.sample_gradients(g, n_samples) for g in gradients]
        return cls({i: torch.stack([one[i] for one in found], 1) for i in found[0]})

    def of(self, chosen: Tensor) -> _Norm:
        """Return the gradients of some samples."""
        return _Norm({i: gradients[chosen] for i, gradients in self.gradients.items()})

    def add_forward(self, moves: Tensors, total: Tensor) -> None:
        """Add the change of every column to ``total``, of shape (n_samples, n_columns)."""
        for i, gradients in self.gradients.items():
            total += gradients @ moves[i].flatten()

    def add_adjoint(self, cotangent: Tensor, totals: Sequence[Tensor]) -> None:
        """Add the transpose of :meth:`add_forward`, applied to ``cotangent``."""
        for i, gradients in self.gradients.items():
            totals[i].view(-1).add_(cotangent.flatten() @ gradients.flatten(0, 1))


KeptLayer = _Linear | _Convolution
_Kept = KeptLayer | _Norm


@dataclass(frozen=True, kw_only=True)
class FactoredTerm(TangentTerm):
    """The gradient term ``Ω J u`` from the inputs and output gradients of the layers.

    Parameters
    ----------
    outer : tensor of shape (n_outputs, n_columns)
        Orthonormal columns that span those of ``Ω``.
    kept : list of (slice, list)
        The rows of a batch, and its layers with their inputs and output gradients.
    rest : TangentTerm or None
        The term of the samples that are not kept, if any.
    """

    outer: Tensor
    kept: list[tuple[slice, list[_Kept]]] = field(repr=False)
    rest: TangentTerm | None = None

    def add_forward(self, u: Tensor, logits: Tensor) -> Tensor:
        """Return ``logits + Ω J u``."""
        total, moves = logits.clone(), self.head.displacements(u)
        for rows, layers in self.kept:
            total[rows] += self._forward(layers, moves, rows).to(logits)
        return total if self.rest is None else self.rest.add_forward(u, total)

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """Return ``Σᵢ Jᵢᵀ Ωᵀ cotangentᵢ``."""
        pulled = self.omega.new_zeros(self.head.size)
        totals = self.head.pieces(pulled)
        for rows, layers in self.kept:
            self._adjoint(layers, cotangent[rows], totals)
        self._scale_(totals)
        return pulled if self.rest is None else pulled.add_(self.rest.adjoint(cotangent))

    def add_forward_adjoint(
        self, u: Tensor, logits: Tensor, cotangent_of: Callable[[slice, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return ``logits + Ω J u`` and its adjoint at ``cotangent_of(rows, logits)``.

        The cotangent of a batch may depend on the logits of that batch alone.
        """
        total, moves = logits.clone(), self.head.displacements(u)
        pulled = self.omega.new_zeros(self.head.size)
        totals = self.head.pieces(pulled)
        for rows, layers in self.kept:
            total[rows] += self._forward(layers, moves, rows).to(logits)
            self._adjoint(layers, cotangent_of(rows, total[rows]), totals)
        self._scale_(totals)
        if self.rest is None:
            return total, pulled
        total, others = self.rest.add_forward_adjoint(u, total, cotangent_of)
        return total, pulled.add_(others)

    def calls(self, layers: Sequence[_Kept], weight: int) -> list[KeptLayer]:
        """Return the linear layers and convolutions with a given weight."""
        found = [layer for layer in layers if not isinstance(layer, _Norm)]
        return [layer for layer in found if layer.call.weight == weight]

    def layer_gradients(
        self, stride: int, columns: Tensor
    ) -> Iterator[tuple[Tensor, LayerGradients]]:
        """Iterate over (rows, their layers with gradients) of every ``stride``-th sample kept.

        ``columns``, of shape (n_columns, n_features), are in the span of those of ``Ω``.
        """
        outer, omega, wide = (z.cpu().double() for z in (self.outer, self.omega, columns))
        mixtures = wide @ torch.linalg.pinv(torch.linalg.pinv(outer) @ omega)
        mixtures = mixtures.to(self.outer)
        for rows, layers in self.kept:
            first = -(-rows.start // stride) * stride
            chosen = torch.arange(first, rows.stop, stride, device=self.outer.device)
            if len(chosen):
                some = [layer.of(chosen - rows.start) for layer in layers]
                yield chosen, _gradients(some, mixtures, len(chosen))

    def _forward(self, layers: Sequence[_Kept], moves: Tensors, rows: slice) -> Tensor:
        n_samples = rows.stop - rows.start
        total = self.outer.new_zeros(n_samples, self.outer.shape[1])
        with threads_for(n_samples * self.head.size):
            for layer in layers:
                layer.add_forward(moves, total)
        return total @ self.outer.T

    def _adjoint(
        self, layers: Sequence[_Kept], cotangent: Tensor, totals: Sequence[Tensor]
    ) -> None:
        pulled = cotangent.to(self.outer) @ self.outer
        with threads_for(len(pulled) * self.head.size):
            for layer in layers:
                layer.add_adjoint(pulled, totals)

    def _scale_(self, totals: Sequence[Tensor]) -> None:
        """Turn gradients in the displacements into those in ``u``."""
        for piece, scale in zip(totals, self.head.scales, strict=True):
            piece.mul_(scale)


def _gradients(layers: Sequence[_Kept], mixtures: Tensor, n_samples: int) -> LayerGradients:
    """Return the layers of some samples with the gradients of mixtures of the columns."""
    rows = [layer for layer in layers if not isinstance(layer, _Norm)]
    norms = [layer for layer in layers if isinstance(layer, _Norm)]

    def of_mixture(mixture: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
        found: dict[int, Tensor] = {}
        for i, gradients in (pair for norm in norms for pair in norm.gradients.items()):
            part = torch.tensordot(gradients, mixture, ([1], [0]))
            found[i] = found[i] + part if i in found else part
        return [layer.output_rows(mixture, n_samples) for layer in rows], found

    calls = [layer.whole_call(n_samples) for layer in rows]
    return LayerGradients(calls, map(of_mixture, mixtures))


def factored(tangent: TangentTerm, n_samples: int, max_bytes: int) -> FactoredTerm | None:
    """Return the gradient term with the rows of as many samples as possible, if they save time.

    Parameters
    ----------
    tangent : TangentTerm
        The gradient term.
    n_samples : int
        Number of samples.
    max_bytes : int
        Largest size of the rows. Other samples pass the network.

    Returns
    -------
    FactoredTerm or None
        The same map. It is None where the rows take too much time, those of a batch take too much
        memory, memory runs out, or the rows do not determine the map, as where a parameter has
        another use besides the layers.
    """
    if not on_all_ranks(max_bytes > 0 and _is_cheap(tangent, tangent.few(n_samples))):
        return None
    outer, columns = spanning(tangent.omega)
    if not columns.any():
        return None
    kept = unless_out_of_memory(lambda: _rows(tangent, outer, columns, max_bytes))
    if not on_all_ranks(kept is not None):
        return None
    assert kept is not None
    rest, n_kept = None, kept[-1][0].stop
    if n_kept < n_samples:
        rest = replace(tangent, batches=partial(_after, tangent.batches, n_kept))
    return FactoredTerm(**vars(tangent), outer=outer, kept=kept, rest=rest)


def _after(batches: Batches, n: int) -> Iterator[tuple[slice, Tensors]]:
    """Iterate over (rows, boundary tensors) of the samples after the first ``n``."""
    for rows, boundary in batches():
        first = max(n, rows.start)
        if first < rows.stop:
            yield slice(first, rows.stop), tuple(z[first - rows.start :] for z in boundary)


def _is_cheap(tangent: TangentTerm, few: Tensors) -> bool:
    """Return whether the rows save time."""
    head, n_samples, n_columns = tangent.head, len(few[0]), min(tangent.omega.shape)
    record = record_with_norms(head, few)
    if not _covers(record, len(head.values), n_samples):
        return False
    calls, forward = record.calls, multiplications(head, few)
    layers = sum(call.output.numel() * head.values[call.weight][0].numel() for call in calls)
    numbers = sum(call.inputs.numel() + n_columns * call.output.numel() for call in calls)
    saved = _PASSES * (_NETWORK * forward - layers - READING * numbers)
    passes = 1 + n_columns * backward_share(head, forward, calls)
    passes += 0 if _have_axes(record, n_samples) else _NETWORK
    return saved >= passes * forward


def _every(record: Record) -> list[LayerCall | NormCall]:
    return [*record.calls, *record.norms]


def _have_axes(record: Record, n_samples: int) -> bool:
    """Return whether samples have an axis of their own in all layers."""
    return all(call.has_axis_of_samples(n_samples) for call in _every(record))


def _covers(record: Record, n_parameters: int, n_samples: int) -> bool:
    """Return whether all parameters are those of layers whose rows belong to samples."""
    every = _every(record)
    used = {i for call in every for i in (call.weight, call.bias)}
    by_sample = all(call.is_by_sample(n_samples) for call in every)
    # The backward operator of convolutions takes no padding by name.
    named = any(isinstance(option, str) for call in record.calls for option in call.options)
    return by_sample and not named and used >= set(range(n_parameters))


def _rows(
    tangent: TangentTerm, outer: Tensor, columns: Tensor, max_bytes: int
) -> list[tuple[slice, list[_Kept]]] | None:
    """Return the layers of the first samples, or None if they do not determine the map."""
    n_bytes = 0
    kept: list[tuple[slice, list[_Kept]]] = []
    for rows, boundary in tangent.batches():
        n_samples = rows.stop - rows.start
        with threads_for_head(tangent.head.values, boundary):
            record = record_with_norms(tangent.head, boundary, differentiable=True)
            layers = _kept(tangent, record, columns, n_samples)
        if layers is None:
            return None
        n_bytes += sum(part.nbytes for layer in layers for part in layer.tensors)
        if n_bytes > max_bytes:
            break
        n_compared = min(n_samples, _COMPARED) if _have_axes(record, n_samples) else n_samples
        del record
        if not _agree(tangent, outer, layers, boundary, n_compared):
            return None
        kept.append((rows, layers))
    return kept or None


def _kept(
    tangent: TangentTerm, record: Record, columns: Tensor, n_samples: int
) -> list[_Kept] | None:
    """Return the layers of a batch, or None if they are not all that the parameters change."""
    if not (record.activation.requires_grad and _covers(record, len(record.values), n_samples)):
        return None
    if record.has_other_uses():
        return None
    every = _every(record)
    pulled = zip(*output_gradients(record.activation, every, columns), strict=True)
    layers = [_keep(call, g, n_samples) for call, g in zip(every, pulled, strict=True)]
    return layers if all(_is_finite(part) for layer in layers for part in layer.tensors) else None


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, without a copy."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def _agree(
    tangent: TangentTerm,
    outer: Tensor,
    layers: Sequence[_Kept],
    boundary: Tensors,
    n_compared: int,
) -> bool:
    """Return whether layers and network agree on a random vector, for some samples of a batch.

    They are the first and the last sample, and others at equal distances in between.
    """
    head, n_samples = tangent.head, len(boundary[0])
    chosen = torch.linspace(0, n_samples - 1, n_compared, device=outer.device).round().long()
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(head.size, generator=generator, dtype=torch.float64).to(outer)
    moves = head.displacements(u)
    found = outer.new_zeros(n_compared, outer.shape[1])
    with threads_for_head(head.values, boundary):
        for layer in layers:
            layer.of(chosen).add_forward(moves, found)
    expected = head.jvp(tuple(z[chosen] for z in boundary), u) @ tangent.omega.T
    return agrees(found @ outer.T, expected, outer.dtype)


def _keep(call: LayerCall | NormCall, gradients: Tensors, n_samples: int) -> _Kept:
    """Return one layer with the gradients in its output, one for every column."""
    if isinstance(call, NormCall):
        return _Norm.from_call(call, gradients, n_samples)
    if call.kind == "linear":
        return _Linear.from_call(call, gradients, n_samples)
    return _Convolution.from_call(call, gradients)
