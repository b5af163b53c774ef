"""Kronecker factors against dense Jacobians."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sklearn_gradfeat.curvature import _kfac
from sklearn_gradfeat.curvature._kfac import enough_samples, loss_columns
from tests.curvature.problems import (
    MLP_LAYERS,
    batches,
    classes,
    image_term,
    mlp,
    module_term,
    network_factors,
    normal,
    unequal_weights,
)
from tests.networks import build
from tests.oracles import dense_jacobian, ntk_scales


@pytest.mark.parametrize("kind", ["plain", "whole", "grouped", "normed"])
def test_curvature_with_one_position_is_exact_in_the_diagonal(kind):
    """With one sample the factors are exact where a layer is met at one position."""
    tangent, boundary = image_term(kind, n=6)
    head, one = tangent.head, tuple(z[:1] for z in boundary)
    column = normal(1, tangent.omega.shape[1])
    found, diagonals = network_factors(
        head, [(slice(0, 1), one)], column, torch.ones(1).double(), 1
    )
    module, names = build(kind)
    assert list(names) == head.names
    J = dense_jacobian(module, names, normal(6, 2, 5, 5)[:1])[0] * ntk_scales(module, names)
    pieces = head.pieces(torch.tensor(column.numpy()[0] @ J))
    for i, diagonal in diagonals.items():
        torch.testing.assert_close(diagonal, pieces[i] ** 2)
    for i, factor in found.items():
        factor.sum_rows()
        if kind in ("normed", "whole"):
            gradient = torch.cat([pieces[i].flatten(1), pieces[factor.bias][:, None]], 1)
            exact = gradient.reshape(-1, 1) * gradient.reshape(-1)
            product = torch.kron(factor.output[0], factor.inputs[0]) / factor.inputs[0].trace()
            torch.testing.assert_close(product, exact)
        else:
            assert factor.inputs.shape[0] == factor.groups == (2 if kind == "grouped" else 1)
    assert found


def grams(found):
    """The Gram matrices of all factors, as one flat vector."""
    for factor in found.values():
        factor.sum_rows()
    matrices = [m for factor in found.values() for m in (factor.output, factor.inputs)]
    return torch.cat([matrix.reshape(-1) for matrix in matrices])


def samplewise(boundary):
    """The gradients of every sample, from a function of single samples."""

    def gradient(chosen, sample, column):
        return (chosen[0] * (sample[0] @ column),)

    return _kfac._each(gradient, (normal(3),), boundary, normal(4, seed=1))


def test_heads_that_vmap_refuses_run_in_a_loop(monkeypatch):
    expected = samplewise((normal(5, 4),))

    def refused(*_, **__):
        raise RuntimeError("vmap: the operator is not supported")

    monkeypatch.setattr(_kfac, "vmap", refused)
    torch.testing.assert_close(samplewise((normal(5, 4),)), expected)


def test_no_loop_where_memory_runs_out(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(_kfac, "vmap", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA"):
        samplewise((normal(5, 4),))


def test_blocks_of_a_gram_matrix(monkeypatch):
    monkeypatch.setattr(_kfac, "_WIDTH", 3)
    rows, half = normal(2, 5, 8), normal(2, 8, 8)
    total = half + half.mT
    expected = total + rows.mT @ rows
    _kfac._add_gram(total, rows)
    torch.testing.assert_close(total, expected)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(9)), st.integers(1, 9))
def test_batches_and_order_do_not_matter(order, size):
    x, weights, columns = normal(9, 3), unequal_weights(9), normal(2, 4, seed=1)
    head = module_term(mlp(), MLP_LAYERS, x).head
    found, _ = network_factors(head, [(slice(0, 9), (x,))], columns, weights, 9)
    moved = torch.tensor(order)
    again, _ = network_factors(head, batches((x[moved],), size), columns, weights[moved], 9)
    torch.testing.assert_close(grams(again), grams(found))


def test_columns_are_a_root_of_the_curvature():
    loss, omega = classes(12), normal(3, 5)
    curvature = loss.mean_curvature(normal(12, 3, seed=1))
    columns = loss_columns(omega, curvature)
    assert columns.shape == (2, 5)  # a softmax does not depend on the sum of all logits
    torch.testing.assert_close(columns.T @ columns, omega.T @ curvature @ omega)


def test_number_of_samples_grows_with_the_widest_layer():
    numbers = []
    for width in (3, 300, 30_000):
        module = torch.nn.Linear(width, 2, dtype=torch.float64)
        x = torch.ones(4, width, dtype=torch.float64)
        numbers.append(enough_samples(module_term(module, ["weight"], x).head, (x,)))
    assert numbers == [128, 600, 1024]


def sample_gradients(kind, head, images, columns):
    """The gradients of every sample and column in weight and bias of each layer, from dense ones.

    They have the shape (groups, n, n_outputs, n_inputs).
    """
    module, names = build(kind)
    J = torch.from_numpy(dense_jacobian(module, names, images) * ntk_scales(module, names))
    flat = (columns @ J).flatten(0, 1)
    return [torch.stack(list(one)) for one in zip(*(head.pieces(row) for row in flat), strict=True)]


@pytest.mark.parametrize("kind", ["plain", "grouped"])
@pytest.mark.parametrize(("least", "n", "tolerance"), [(25, 6, 1e-7), (4, 300, 0.15)])
def test_factors_are_the_partial_traces_of_the_curvature(monkeypatch, kind, least, n, tolerance):
    """Exact with as many rows as positions, and with fewer rows up to the noise of their signs."""
    monkeypatch.setattr(_kfac, "_MIN_ROWS", least)
    tangent, boundary = image_term(kind, n=n)
    head, columns, weights = tangent.head, normal(2, tangent.omega.shape[1]), unequal_weights(n)
    found, _ = network_factors(head, batches(boundary, 100), columns, weights, n)
    gradients = sample_gradients(kind, head, normal(n, 2, 5, 5), columns)
    w = weights.repeat_interleave(2)[:, None, None]
    for i, factor in found.items():
        factor.sum_rows()
        weight = gradients[i].unflatten(1, (factor.groups, -1)).flatten(3)
        bias = gradients[factor.bias].unflatten(1, (factor.groups, -1))[..., None]
        for group in range(factor.groups):
            M = torch.cat([weight[:, group], bias[:, group]], 2)
            exact = [(w * M @ M.mT).sum(0), (w * M.mT @ M).sum(0)]
            for matrix, other in zip((factor.output, factor.inputs), exact, strict=True):
                assert torch.dist(matrix[group], other) < tolerance * other.norm()
    assert found


def test_factors_do_not_depend_on_the_batches():
    """Nor on the order of the samples, where there are more positions than rows."""
    n = 40
    tangent, boundary = image_term("plain", n=n)
    head, columns, weights = tangent.head, normal(2, tangent.omega.shape[1]), unequal_weights(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    shuffled = tuple(z[order] for z in boundary)
    found = [
        network_factors(head, batches(boundary, 40), columns, weights, 1000)[0],
        network_factors(head, batches(boundary, 7), columns, weights, 1000)[0],
        network_factors(head, batches(shuffled, 9), columns, weights[order], 1000)[0],
    ]
    for one in found:
        for factor in one.values():
            factor.sum_rows()
    for i, factor in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[i].output, factor.output)
            torch.testing.assert_close(other[i].inputs, factor.inputs)
