"""The terms of the logits as functions of the input."""

import numpy as np
import torch

from sklearn_gradfeat.inspection._attribution import InputTerm
from tests.tiny import X, Y, estimator


def test_terms_have_the_scales_of_activation_layers():
    model = estimator(activation_layer=["1", "3"], precision="float64").fit(X, Y)
    term = InputTerm(*model._extractor_and_model(), "full")
    x = term.inputs(X[:3])
    expected = model.decision_function(X[:3]) - model.intercept_
    np.testing.assert_allclose(term.values(x).cpu(), expected, atol=1e-12)
    move = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    change = (term.values(x + 1e-6 * move) - term.values(x - 1e-6 * move))[:, 1] / 2e-6
    gradient = term.gradient(x, [1, 1, 1])
    torch.testing.assert_close((gradient * move).sum((1, 2, 3)), change, rtol=1e-5, atol=1e-8)
