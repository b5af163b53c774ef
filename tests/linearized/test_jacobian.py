"""Products against dense Jacobians, laws, and the curvature."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sklearn_gradfeat.backbones._frozen import FrozenBackbone
from sklearn_gradfeat.curvature._kfac import factors
from sklearn_gradfeat.linearized._jacobian import LinearizedHead
from tests.networks import NETWORKS, build
from tests.oracles import dense_jacobian

X = np.random.RandomState(0).randn(6, 2, 5, 5)


def linearized(kind, parametrization="standard"):
    module, names = build(kind)
    network = FrozenBackbone(module, torch.tensor(X[:2]), torch.float64, None).network(names)
    boundary = network.trunk(torch.tensor(X))
    return LinearizedHead(network.head, network.parameters, parametrization), boundary, module


def jacobian(kind, head, module):
    J = dense_jacobian(module, head.names, X)
    if kind == "residual":  # folded: ∂/∂W' = ∂/∂W · σ/γ per output channel
        for block in module.block[1:]:
            scale = torch.cat(
                [
                    (torch.sqrt(bn.running_var + bn.eps) / bn.weight)
                    .repeat_interleave(conv.weight[0].numel())
                    .detach()
                    for conv, bn in ((block.conv1, block.bn1), (block.conv2, block.bn2))
                ]
            )
        J = J * scale.numpy()
    return J


@pytest.mark.parametrize("kind", NETWORKS)
def test_products_match_dense_jacobian(kind):
    head, boundary, module = linearized(kind)
    J = jacobian(kind, head, module)
    rng = np.random.RandomState(1)
    u, g = rng.randn(head.size), rng.randn(*J.shape[:2])
    np.testing.assert_allclose(head.jvp(boundary, torch.tensor(u)), J @ u, rtol=1e-9, atol=1e-11)
    expected = np.einsum("nd,ndp->p", g, J)
    np.testing.assert_allclose(head.vjp(boundary, torch.tensor(g)), expected, rtol=1e-9, atol=1e-11)
    tangent, pulled = head.jvp_then_vjp(boundary, torch.tensor(u), lambda t: t**2)
    np.testing.assert_allclose(tangent, J @ u, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(
        pulled, np.einsum("nd,ndp->p", (J @ u) ** 2, J), rtol=1e-8, atol=1e-10
    )
    head._forward_mode = False
    np.testing.assert_allclose(head.jvp(boundary, torch.tensor(u)), J @ u, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", NETWORKS)
def test_jvp_is_the_derivative_of_the_head(kind):
    head, boundary, _ = linearized(kind, "ntk")
    u = torch.randn(head.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = 1e-6

    def moved(t):
        shifted = [v + t * d for v, d in zip(head.values, head.displacements(u), strict=True)]
        return head.head(tuple(shifted), boundary).detach()

    difference = (moved(step) - moved(-step)) / (2 * step)
    torch.testing.assert_close(head.jvp(boundary, u), difference, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def transformer():
    return linearized("transformer", "ntk")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_linear_and_adjoint(transformer, seed, factor):
    head, boundary, _ = transformer
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, head.size, dtype=torch.float64, generator=generator)
    g = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    ju, jv = head.jvp(boundary, u), head.jvp(boundary, v)
    torch.testing.assert_close(head.jvp(boundary, u + factor * v), ju + factor * jv)
    torch.testing.assert_close((ju * g).sum(), u @ head.vjp(boundary, g))


def test_missing_forward_mode_falls_back_exactly():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    W = torch.randn(3, 4, dtype=torch.float64)
    z = torch.randn(5, 4, dtype=torch.float64)
    head = LinearizedHead(lambda p, b: Square.apply(b[0] @ p[0].T), {"w": W}, "standard")
    u = torch.randn(12, dtype=torch.float64)
    expected = 2 * (z @ W.T) * (z @ u.view(3, 4).T)
    torch.testing.assert_close(head.jvp((z,), u), expected)
    assert not head._forward_mode
    tangent, _ = head.jvp_then_vjp((z,), u, lambda t: t)
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("kind", ["plain", "whole", "grouped", "normed"])
def test_curvature_with_one_position_is_exact_in_the_diagonal(kind):
    """With one sample the factors are exact where a layer is met at one position."""
    head, boundary, module = linearized(kind)
    one = tuple(z[:1] for z in boundary)
    d = head.activation(one).shape[1]
    column = torch.randn(1, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, diagonals = factors(head, [(slice(0, 1), one)], column, torch.ones(1).double())
    J = dense_jacobian(module, head.names, X[:1])[0]
    pieces = head.pieces(torch.tensor(column.numpy()[0] @ J))
    for i, diagonal in diagonals.items():
        torch.testing.assert_close(diagonal, pieces[i] ** 2)
    for i, factor in found.items():
        factor.sum_rows()
        if kind in ("normed", "whole"):
            gradient = torch.cat([pieces[i].flatten(1), pieces[factor.bias][:, None]], 1).reshape(
                -1
            )
            exact = gradient[:, None] * gradient
            torch.testing.assert_close(torch.kron(factor.output[0], factor.inputs[0]), exact)
        else:
            assert factor.inputs.shape[0] == factor.groups == (2 if kind == "grouped" else 1)
    assert found


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"padding": "same", "dilation": 2},
                                     {"stride": 2, "groups": 2}])  # fmt: skip
def test_patches_times_weight_is_the_convolution(options):
    from sklearn_gradfeat.curvature._layer_rows import LayerRecorder

    for conv, x in (
        (torch.nn.Conv1d, torch.randn(3, 4, 9)),
        (torch.nn.Conv2d, torch.randn(3, 4, 7, 8)),
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


@pytest.mark.parametrize(("kind", "n_convolutions"), [("plain", 1), ("whole", 0)])
def test_kernel_as_large_as_its_input_is_a_matrix_product(kind, n_convolutions):
    module, names = build(kind)
    network = FrozenBackbone(module, torch.tensor(X[:2]), torch.float64, None).network(names)
    found = [node for node in network.graph.graph.nodes if "conv2d" in str(node.target)]
    assert len(found) == n_convolutions
