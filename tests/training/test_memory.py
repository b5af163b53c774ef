"""The largest memory of a fit, in vectors of the size of θ₂."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.curvature import _spectrum
from sklearn_gradfeat.solvers import _curvature_pairs, _steps
from sklearn_gradfeat.training import _two_stage_fit

WIDTH = 256


class LargestMemory(TorchDispatchMode):
    """Notes the largest size of all tensors of at least ``least`` bytes that are alive at once."""

    def __init__(self, least):
        super().__init__()
        self.least, self.largest = least, 0
        self.alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return output

    def note(self, storage):
        if storage.nbytes() < self.least or storage._cdata in self.alive:
            return
        self.alive[storage._cdata] = storage._weak_ref(), storage.nbytes()
        for key, (weak, _) in list(self.alive.items()):
            if torch.UntypedStorage._expired(weak):
                torch.UntypedStorage._free_weak_ref(weak)
                del self.alive[key]
        self.largest = max(self.largest, sum(size for _, size in self.alive.values()))


class Wide(torch.nn.Module):
    """A layer with many weights and few samples."""

    def __init__(self):
        super().__init__()
        self.wide, self.top = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 16)

    def forward(self, x):
        return self.top(torch.tanh(self.wide(x.flatten(1))))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_vectors_of_a_fit(monkeypatch):
    """Two curvature pairs are four of the vectors.

    The spectra of the preconditioner, the network and its frozen copy are four others.
    """
    monkeypatch.setattr(_curvature_pairs, "_ELEMENTS", 0)
    monkeypatch.setattr(_curvature_pairs, "_MATRIX", 0)
    monkeypatch.setattr(_steps, "_BLOCK", 2**10)
    monkeypatch.setattr(_spectrum, "block_size", lambda device: 2**10)
    monkeypatch.setattr(_two_stage_fit, "with_rows_if_cheap", lambda tangent, *_: tangent)
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 1, 1, WIDTH), dtype="float32"), rng.integers(0, 4, 60)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Wide()
    model = GradientFeatureClassifier(
        network, preprocess=torch.nn.Identity(), gradient_layers=["wide"], alpha=0.1,
        gradient_alpha=1e-4, batch_size=8, feature_store=None, tol=1e-9, max_iter=12, device="cpu",
    )  # fmt: skip
    model.fit(X, y)  # captures the graph of the network
    vector = 4 * (WIDTH + 1) * WIDTH
    with LargestMemory(vector // 3) as memory:
        model.fit(X, y)
    assert model.n_iter_ > 4
    assert memory.largest <= 12.0 * vector
