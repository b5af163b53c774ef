"""Batches that memory has no room for."""

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureClassifierCV
from sklearn_gradfeat.cache._store import Boundary
from sklearn_gradfeat.data._batches import free_bytes
from sklearn_gradfeat.linearized._jacobian import LinearizedHead

ROOM = 20
RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 3, 4)).astype(np.float32)
y = RNG.integers(3, size=60)
NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
COMPLAINTS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


class Cramped:
    """A transform with room for so many samples."""

    def __init__(self, room, error):
        self.room, self.error = room, error

    def __call__(self, batch):
        if len(batch) > self.room:
            raise self.error
        return batch


def fitted(kind=GradientFeatureClassifier, **options):
    options = {"backbone": NETWORK, "feature_store": None, "batch_size": 60, **options}
    return kind(**options).fit(X, y)


@pytest.mark.parametrize("error", COMPLAINTS)
def test_the_trunk_goes_on_with_less(error):
    model = GradientFeatureClassifier(
        NETWORK, preprocess=Cramped(ROOM, error), feature_store=None, batch_size=60
    )
    with pytest.warns(RuntimeWarning, match="Trying again with (30|15) samples") as caught:
        model.fit(X, y)
    assert [f"with {n} samples" in str(w.message) for n, w in zip((30, 15), caught, strict=True)]
    with pytest.warns(RuntimeWarning, match="Trying again with (30|15) samples"):
        probabilities = model.predict_proba(X)
    expected = fitted(batch_size=15)
    assert np.array_equal(model.coef_, expected.coef_)
    assert np.array_equal(probabilities, expected.predict_proba(X))


@pytest.mark.parametrize("kind", [GradientFeatureClassifier, GradientFeatureClassifierCV])
def test_the_head_goes_on_with_less(kind, monkeypatch):
    expected = fitted(kind, batch_size=15)
    passes = LinearizedHead.jvp_then_vjp

    def cramped(self, boundary, *arguments):
        if len(boundary[0]) > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return passes(self, boundary, *arguments)

    monkeypatch.setattr(LinearizedHead, "jvp_then_vjp", cramped)
    with pytest.warns(RuntimeWarning, match="Trying again with (30|15) samples"):
        model = fitted(kind)
    np.testing.assert_allclose(model.coef_, expected.coef_, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [GradientFeatureClassifier, GradientFeatureClassifierCV])
def test_a_device_keeps_the_boundary_where_it_has_room(kind, monkeypatch):
    options = {"kind": kind, "batch_size": 16, "gradient_layers": ["1"]}
    plain = fitted(**options)
    taken = []
    take = Boundary.take

    def counted(self, rows):
        taken.append(rows)
        return take(self, rows)

    monkeypatch.setattr(Boundary, "take", counted)
    counts = []
    for room in (0, 100, 2**30):  # none, too little, enough
        monkeypatch.setattr("sklearn_gradfeat.cache._runner.free_bytes", lambda _, room=room: room)
        taken.clear()
        model = fitted(**options)
        counts.append(len(taken))
        assert np.array_equal(model.decision_function(X), plain.decision_function(X))
    assert counts[2] < counts[0] <= counts[1]


def test_the_host_has_no_memory_besides():
    assert free_bytes(torch.device("cpu")) == 0


def test_no_room_for_a_single_sample():
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError, match="CUDA"), pytest.warns(RuntimeWarning):
        fitted(preprocess=_Growing(error))


class _Growing:
    """A transform that has room for the example of two samples, and for nothing after it."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls > 1:
            raise self.error
        return batch


def test_other_errors_are_not_swallowed():
    with pytest.raises(RuntimeError, match="something else"):
        fitted(preprocess=Cramped(ROOM, RuntimeError("something else")))
