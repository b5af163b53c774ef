"""The graph cut in two, trunk and head."""

import numpy as np
import torch
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier
from tests.tiny import X, Y


class Codebook(nn.Module):
    """Rows are rounded to indices into a table: a boundary of integers would be smallest."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.below, self.above = nn.Linear(3, 3), nn.Linear(64, 6)
        self.register_buffer("table", torch.randn(16, 32))

    def forward(self, x):
        codes = ((torch.tanh(self.below(x)) + 1) * 8).long().clamp(0, 15)[:, :2]
        return torch.tanh(self.above(self.table[codes].flatten(1)))


def test_trunk_and_head_of_different_precision_share_the_cut():
    rows = X.reshape(24, -1)[:, :3]
    narrow, wide = (
        GradientFeatureClassifier(Codebook(), precision=precision, alpha=0.1).fit(rows, Y)
        for precision in ("float32", "float64")
    )
    np.testing.assert_allclose(narrow.predict_proba(rows), wide.predict_proba(rows), atol=1e-4)
