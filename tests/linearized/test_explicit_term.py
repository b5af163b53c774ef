"""The gradient term from explicit rows, against Jacobian products."""

import numpy as np
import pytest
import torch

from sklearn_gradfeat.linearized import ExplicitTerm, _explicit_term
from tests.curvature.problems import image_term, normal
from tests.networks import build
from tests.oracles import dense_jacobian, ntk_scales

N = 5


@pytest.mark.parametrize("block", [1, 2**19])
def test_maps_are_those_of_jacobian_products(block, monkeypatch):
    monkeypatch.setattr(_explicit_term, "_BLOCK", block)
    term, _ = image_term("plain", N)
    module, names = build("plain")
    J = dense_jacobian(module, names, normal(N, 2, 5, 5)) * ntk_scales(module, names)
    rows = torch.from_numpy(np.einsum("cd,ndp->ncp", term.omega, J))
    explicit = ExplicitTerm.from_rows(term, rows)
    u, logits, cotangent = normal(term.head.size), normal(N, 3, seed=1), normal(N, 3, seed=2)
    expected = term.add_forward(u, logits)
    torch.testing.assert_close(explicit.add_forward(u, logits), expected)
    torch.testing.assert_close(explicit.adjoint(cotangent), term.adjoint(cotangent))

    def cotangent_of(some, moved):
        return cotangent[some] * moved.square()

    found = explicit.add_forward_adjoint(u, logits, cotangent_of)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], term.adjoint(cotangent * expected.square()))
