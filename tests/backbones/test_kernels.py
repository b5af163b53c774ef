"""Convolutions that the captured graph replaces by matrix products."""

import pytest
import torch

from sklearn_gradfeat.backbones import freeze
from tests.networks import build


@pytest.mark.parametrize(("kind", "n_convolutions"), [("plain", 1), ("whole", 0)])
def test_kernel_as_large_as_its_input_is_a_matrix_product(kind, n_convolutions):
    module, names = build(kind)
    example = torch.ones(2, 2, 5, 5, dtype=torch.float64)
    network = freeze(module, example, torch.float64, None).network(names)
    found = [node for node in network.graph.graph.nodes if "conv2d" in str(node.target)]
    assert len(found) == n_convolutions
