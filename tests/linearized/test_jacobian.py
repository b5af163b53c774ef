"""Jacobian products against dense Jacobians, finite differences and their laws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sklearn_gradfeat.backbones import freeze
from sklearn_gradfeat.backbones._eager import module_out_channels
from sklearn_gradfeat.backbones._frozen import FrozenBackbone
from sklearn_gradfeat.linearized._jacobian import LinearizedHead
from tests.networks import NETWORKS, build
from tests.oracles import dense_jacobian


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(6, 2, 5, 5))


def linearized(kind, images, parametrization="standard"):
    module, names = build(kind)
    x = torch.tensor(images)
    network = freeze(module, x[:2], torch.float64, None).network(names)
    head = LinearizedHead(network.head, network.parameters, parametrization)
    return head, network.trunk(x), module


def jacobian(kind, head, module, images):
    J = dense_jacobian(module, head.names, images)
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
def test_products_match_dense_jacobian(kind, images):
    head, boundary, module = linearized(kind, images)
    J = jacobian(kind, head, module, images)
    rng = np.random.default_rng(1)
    u, g = rng.normal(size=head.size), rng.normal(size=J.shape[:2])
    np.testing.assert_allclose(head.jvp(boundary, torch.tensor(u)), J @ u, rtol=1e-9, atol=1e-11)
    expected = np.einsum("nd,ndp->p", g, J)
    np.testing.assert_allclose(head.vjp(boundary, torch.tensor(g)), expected, rtol=1e-9, atol=1e-11)
    tangent, pulled = head.jvp_then_vjp(boundary, torch.tensor(u), lambda t: t**2)
    np.testing.assert_allclose(tangent, J @ u, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(
        pulled, np.einsum("nd,ndp->p", (J @ u) ** 2, J), rtol=1e-8, atol=1e-10
    )
    activation, tangent = head.activation_and_jvp(boundary, torch.tensor(u))
    torch.testing.assert_close(activation, head.activation(boundary))
    np.testing.assert_allclose(tangent, J @ u, rtol=1e-9, atol=1e-11)
    head._forward_mode = False
    np.testing.assert_allclose(head.jvp(boundary, torch.tensor(u)), J @ u, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", NETWORKS)
def test_jvp_is_the_derivative_of_the_head(kind, images):
    head, boundary, _ = linearized(kind, images, "ntk")
    u = torch.randn(head.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = 1e-6

    def moved(t):
        shifted = [v + t * d for v, d in zip(head.values, head.displacements(u), strict=True)]
        return head.head(tuple(shifted), boundary).detach()

    difference = (moved(step) - moved(-step)) / (2 * step)
    torch.testing.assert_close(head.jvp(boundary, u), difference, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def transformer(images):
    return linearized("transformer", images, "ntk")


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


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 6))
def test_batches_and_order_do_not_matter(transformer, order, batch_size):
    head, boundary, _ = transformer
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(head.size, dtype=torch.float64, generator=generator)
    g = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    parts = torch.tensor(order).split(batch_size)
    batches = [tuple(z[part] for z in boundary) for part in parts]
    tangents = torch.cat([head.jvp(batch, u) for batch in batches])
    torch.testing.assert_close(tangents, head.jvp(boundary, u)[torch.tensor(order)])
    pulled = sum(head.vjp(batch, g[part]) for batch, part in zip(batches, parts, strict=True))
    torch.testing.assert_close(pulled, head.vjp(boundary, g))


def test_missing_forward_mode_falls_back_exactly():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    generator = torch.Generator().manual_seed(0)
    W, z, u = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((3, 4), (5, 4), (12,))
    )
    head = LinearizedHead(lambda p, b: Square.apply(b[0] @ p[0].T), {"w": W}, "standard")
    expected = 2 * (z @ W.T) * (z @ u.view(3, 4).T)
    torch.testing.assert_close(head.jvp((z,), u), expected)
    assert not head._forward_mode
    tangent, _ = head.jvp_then_vjp((z,), u, lambda t: t)
    torch.testing.assert_close(tangent, expected)
    activation, tangent = head.activation_and_jvp((z,), u)
    torch.testing.assert_close(activation, (z @ W.T) ** 2)
    torch.testing.assert_close(tangent, expected)


class Product(nn.Module):
    """A matrix that samples are multiplied with from the left."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize(
    ("module", "example", "channels"),
    [
        (nn.Conv2d(4, 6, 2), torch.randn(2, 4, 5, 5), None),
        (nn.ConvTranspose2d(4, 6, 2), torch.randn(2, 4, 5, 5), 6),
        (nn.ConvTranspose1d(4, 6, 2, groups=2), torch.randn(2, 4, 5), 6),
        (nn.Embedding(9, 3), torch.ones(2, 4, dtype=torch.int64), 3),
        (nn.Linear(5, 7), torch.randn(2, 5), None),
        (Product(), torch.randn(2, 5), 7),
    ],
)
def test_output_channels_of_the_ntk_scale(module, example, channels):
    frozen = FrozenBackbone(nn.Sequential(module, nn.Tanh()), example, torch.float32, None)
    network = frozen.network(["0.weight"])
    head = LinearizedHead(network.head, network.parameters, "ntk", network.out_channels)
    assert head.scales == pytest.approx([(channels or len(module.weight)) ** -0.5])
    if not isinstance(module, Product):
        assert module_out_channels(module).get("weight") == channels
