"""Layers as matrix products."""

import pytest
import torch
from torch.nn.functional import linear

from sklearn_gradfeat.curvature._layer_rows import LayerRecorder, spanning


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"padding": "same", "dilation": 2},
                                     {"stride": 2, "groups": 2}])  # fmt: skip
def test_patches_times_weight_is_the_convolution(options):
    generator = torch.Generator().manual_seed(0)
    for conv, x in (
        (torch.nn.Conv1d, torch.randn(3, 4, 9, generator=generator)),
        (torch.nn.Conv2d, torch.randn(3, 4, 7, 8, generator=generator)),
    ):
        layer = conv(4, 6, 3, bias=False, **options)
        with LayerRecorder([layer.weight]) as recorder:
            output = layer(x)
        (call,) = recorder.calls
        everywhere = torch.arange(output[0, 0].numel())
        rows = call.input_rows(layer.weight.shape[2:], 3, everywhere)
        weight = layer.weight.view(call.groups, 6 // call.groups, -1)
        product = torch.einsum("gntk,gok->gnto", rows, weight)
        torch.testing.assert_close(product, call.output_rows(output, 3))


def test_flattened_weights_are_layers_only_where_they_are_matrices():
    w, x = torch.randn(4, 5, 3), torch.randn(7, 3)
    with LayerRecorder([w]) as recorder:
        linear(x, torch.flatten(input=w, start_dim=0, end_dim=1))
        linear(x, w.flatten(0, 1))
        linear(torch.randn(7, 15), w.flatten(1))
    assert [call.inputs.shape[1] for call in recorder.calls] == [15]


def test_calls_on_parts_of_a_weight_add_up_to_its_gradient():
    generator = torch.Generator().manual_seed(0)
    w, b, x = (torch.randn(s, generator=generator) for s in ((6, 3), (6,), (4, 5, 3)))
    w, b, some = w.requires_grad_(), b.requires_grad_(), torch.tensor([0, 3, 5])
    aten, parts = torch.ops.aten, [torch.ops.aten.slice.Tensor, torch.ops.aten.index_select.default]
    rows = [(0, 0, 6, 2), (0, some)]

    def total():
        return sum(
            aten.linear.default(x[:, :n], part(w, *r), part(b, *r)).sin().sum()
            for part, r, n in zip(parts, rows, (1, 5), strict=True)
        )

    with LayerRecorder([w, b]) as recorder:
        recorded = total()
        aten.linear.default(x, w, aten.slice.Tensor(b.repeat(2), 0, 0, 6))
    *calls, last = recorder.calls
    assert last.bias is None
    assert [call.bias for call in calls] == [1, 1]
    gradients = torch.autograd.grad(recorded, [call.output for call in calls])
    of_w, of_b = torch.autograd.grad(total(), [w, b])
    found = sum(
        call.output_rows(g, 4).flatten(0, 2).T
        @ call.scaled_rows((w, b), (1.0, 1.0), 4).flatten(0, 2)
        for call, g in zip(calls, gradients, strict=True)
    )
    torch.testing.assert_close(found, torch.cat([of_w, of_b[:, None]], 1))


def test_convolutions_with_parts_of_a_weight_are_left_out():
    w, x = torch.randn(6, 3, 2), torch.randn(4, 3, 5)
    aten = torch.ops.aten
    with LayerRecorder([w]) as recorder:
        aten.conv1d.default(x, aten.slice.Tensor(w, 0, 0, 4))
        aten.linear.default(torch.randn(4, 6), aten.slice.Tensor(w, 0, 1, 4).flatten(1))
    (call,) = recorder.calls
    assert call.part[0].tolist() == [1, 2, 3]


def test_convolutions_without_an_axis_of_samples_are_left_out():
    w = torch.randn(6, 3, 2)
    with LayerRecorder([w]) as recorder:
        torch.conv1d(torch.randn(3, 5), w)
        torch.conv1d(torch.randn(4, 3, 5), w)
    (call,) = recorder.calls
    assert call.inputs.shape == (4, 3, 5)


def test_factors_of_output_weights_of_very_different_size():
    first, second = torch.eye(2, 4)
    omega = torch.stack([1e8 * first, second, torch.zeros(4), first + second])
    outer, columns = spanning(omega)
    assert len(columns) == 2
    for found, row in zip(outer @ columns, omega, strict=True):
        assert (found - row).norm() <= 1e-6 * row.norm()
    assert spanning(torch.zeros(3, 4))[1].tolist() == [[0.0] * 4]
