"""Training samples after the frozen layers, kept on the host or on the device."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    config_context,
)
from sklearn_gradfeat.cache._runner import CachedSamples
from sklearn_gradfeat.cache._sample_files import FileBoundary, SampleFile
from sklearn_gradfeat.cache._store import Boundary
from sklearn_gradfeat.data import BatchSize


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GradientFeatureClassifier, {"alpha": 0.1}),
        (GradientFeatureClassifier, {"alpha": 0.1, "store_dtype": "bfloat16"}),
        (GradientFeatureClassifierCV, {"alphas": [0.1], "gradient_alphas": [0.1], "cv": 2}),
    ],
)
@pytest.mark.parametrize("where", [Boundary, FileBoundary])
@pytest.mark.filterwarnings("ignore:The output of the frozen layers takes:UserWarning")
def test_a_device_keeps_the_boundary_where_it_has_room(kind, options, where, monkeypatch):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 3, 4)).astype(np.float32), rng.integers(3, size=60)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
    model = kind(network, feature_store=None, batch_size=16, gradient_layers=["1"], **options)
    expected = model.fit(X, y).decision_function(X)
    take, taken = where.take, []

    def counted(self, rows):
        taken.append(rows)
        return take(self, rows)

    monkeypatch.setattr(where, "take", counted)
    counts = []
    for room in (0, 100, 2**30):  # none, too little, enough
        monkeypatch.setattr("sklearn_gradfeat.cache._runner.free_bytes", lambda _, room=room: room)
        taken.clear()
        with config_context(memory_bytes=0 if where is FileBoundary else "auto"):
            model.fit(X, y)
        counts.append(len(taken))
        assert np.array_equal(model.decision_function(X), expected)
    assert counts[2] < counts[0] <= counts[1]


@pytest.mark.parametrize("where", [Boundary, FileBoundary])
@pytest.mark.filterwarnings("ignore:The output of the frozen layers takes:UserWarning")
def test_a_device_keeps_nothing_where_memory_runs_out(where, monkeypatch):
    """A smaller batch would not help: the model is that of a fit with the same batches."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 3, 4)).astype(np.float32), rng.integers(3, size=60)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
    options = {"feature_store": None, "batch_size": 16, "gradient_layers": ["1"]}
    model = GradientFeatureClassifier(network, alpha=0.1, **options)
    expected = model.fit(X, y).decision_function(X)
    attempts = []

    def full(_samples):
        attempts.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(CachedSamples, "_all_moved", full)
    monkeypatch.setattr("sklearn_gradfeat.cache._runner.free_bytes", lambda _: 2**30)
    with config_context(memory_bytes=0 if where is FileBoundary else "auto"):
        model.fit(X, y)
    assert len(attempts) == 1
    assert np.array_equal(model.decision_function(X), expected)


def test_a_full_device_has_no_room(monkeypatch):
    """Not that of the host either."""
    activation = torch.zeros(20, 3, device="meta")
    samples = CachedSamples(activation, Boundary([]), BatchSize(4), np.arange(20, dtype=np.uint64))
    monkeypatch.setattr("sklearn_gradfeat.cache._runner.free_bytes", lambda _: 0)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0))
    assert samples.room == samples.room_for_rows == 0


def test_rows_of_a_fold_have_less_room():
    X = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    activation = torch.from_numpy(X)
    whole = CachedSamples(activation, Boundary([]), BatchSize(4), np.arange(20, dtype=np.uint64))
    moved = whole.with_activation(2 * activation)
    assert whole.room_for_rows == moved.room_for_rows == whole.room > 0
    fold = replace(whole, part_of=(whole, torch.arange(10)))
    assert fold.room_for_rows == whole.room // 8


@pytest.mark.parametrize("rows", [range(20), range(0, 20, 3)])
def test_a_thread_reads_files_ahead_in_the_order_of_the_samples(rows, tmp_path):
    class Noted(FileBoundary):
        def take(self, samples):
            numbers.append(self._rows[samples].tolist())
            threads.append(threading.current_thread())
            taken[len(numbers) - 1].set()
            return super().take(samples)

    rows, values = np.array(rows), torch.randn(20, 3)
    file = SampleFile(20, (values,), tmp_path)
    file.write(0, (values,))
    numbers, threads, taken = [], [], [threading.Event() for _ in rows]
    names = np.arange(len(rows), dtype=np.uint64)
    samples = CachedSamples(values[rows], Noted(file, rows), BatchSize(4), names)
    n_batches = -(-len(rows) // 4)
    for number, (part, (found,)) in enumerate(samples.batches()):
        assert torch.equal(found, values[rows[part]])
        assert taken[min(number + 1, n_batches - 1)].wait(10)  # the next one, before it is needed
    assert len(numbers) == n_batches
    assert [i for part in numbers for i in part] == rows.tolist()
    (thread,) = set(threads)
    assert thread.name.startswith("read-ahead")
