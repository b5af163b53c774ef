"""Smaller batches where memory runs out."""

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressorCV,
)
from sklearn_gradfeat.curvature import _preconditioner, _sample_space
from sklearn_gradfeat.data import BatchSize, free_bytes, is_out_of_memory, unless_out_of_memory
from sklearn_gradfeat.linearized import LinearizedHead

ROOM = 20
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnSsyevd`"),
]
# The ways in which such errors are recognised: by class, by message.
KINDS = ERRORS[:3]
SMALLER = r"Trying again with (30|15) samples in a batch. Set batch_size=(30|15)"


def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((60, 3, 4)).astype(np.float32), rng.integers(3, size=60)


X, y = data()


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))


@pytest.fixture
def fit(network):
    def fit(kind=GradientFeatureClassifier, X=X, **options):
        single = {"alpha": 0.1, "gradient_alpha": 0.1}
        penalties = single if kind is GradientFeatureClassifier else {}
        options = {"feature_store": None, "batch_size": 60, **penalties, **options}
        return kind(network, **options).fit(X, y)

    return fit


class Cramped:
    """A transform that has room for some samples."""

    def __init__(self, room, error):
        self.room, self.error = room, error

    def __call__(self, batch):
        if len(batch) > self.room:
            raise self.error
        return batch


def cramped(function, n_samples):
    """Return a function that runs out of memory for more than ``ROOM`` samples."""

    def limited(*arguments, **options):
        if n_samples(*arguments) > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(*arguments, **options)

    return limited


# --- the batch size --------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_a_computation_is_repeated_with_half_the_size(error):
    batch_size, tried = BatchSize(61), []

    def compute():
        tried.append(batch_size.size)
        if batch_size.size > ROOM:
            raise error
        return "done"

    with pytest.warns(RuntimeWarning, match=r"Trying again with (31|16) samples") as caught:
        assert batch_size.retry(compute) == "done"
    assert len(caught) == 2
    assert tried == [61, 31, 16]
    assert (batch_size.size, batch_size.reduced) == (16, True)


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_slices_that_failed_are_halved_and_the_others_kept(error):
    batch_size, done = BatchSize(10), []

    def compute(rows):
        if rows.stop - rows.start > (10 if rows.start < 10 else 3):
            raise error
        done.append(rows)
        return rows.start

    with pytest.warns(RuntimeWarning, match=r"Trying again with (5|3) samples") as caught:
        assert batch_size.run(compute, 24) == [0, 10, 13, 16, 19, 22]
    assert len(caught) == 2
    assert done[-1] == slice(22, 24)
    assert batch_size.run(compute, 9) == [0, 3, 6]


def test_enough_memory_changes_nothing():
    batch_size = BatchSize(10)
    assert batch_size.retry(lambda: 1) == 1
    assert batch_size.run(lambda rows: rows, 12) == [slice(0, 10), slice(10, 12)]
    assert (batch_size.size, batch_size.reduced) == (10, False)


def test_no_room_for_a_single_sample():
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for compute in (lambda size: size.retry(fail), lambda size: size.run(fail, 2)):
        with (
            pytest.warns(RuntimeWarning, match="with 1 samples"),
            pytest.raises(torch.OutOfMemoryError, match="CUDA"),
        ):
            compute(BatchSize(2))


def test_other_errors_are_raised():
    def fail(*_):
        raise RuntimeError("something else")

    for compute in (lambda size: size.retry(fail), lambda size: size.run(fail, 2)):
        with pytest.raises(RuntimeError, match="something else"):
            compute(BatchSize(2))


def test_the_failed_attempt_is_freed():
    alive = []

    class Tensors:
        def __init__(self):
            alive.append(self)

        def __del__(self):
            alive.append("freed")

    batch_size = BatchSize(2)

    def compute():
        assert not alive or alive == ["freed"]
        held = Tensors()
        alive.clear()
        if batch_size.size == 2:
            raise MemoryError(str(held))

    with pytest.warns(RuntimeWarning, match="with 1 samples"):
        batch_size.retry(compute)


def test_the_host_has_no_memory_besides():
    assert free_bytes(torch.device("cpu")) == 0


@pytest.mark.parametrize(
    ("free", "allocated", "reserved", "fraction", "expected"),
    [
        (600, 100, 100, 1.0, 600),
        (500, 100, 400, 1.0, 800),  # 300 are reserved and not used
        (900, 100, 100, 0.5, 400),
        (300, 100, 200, 0.5, 400),  # others have 500
        (300, 700, 700, 0.5, 0),
    ],
)
def test_free_bytes_of_a_device(free, allocated, reserved, fraction, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction)
    assert free_bytes(torch.device("cuda", 0)) == expected


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_a_result_that_is_not_needed_is_left_out(error):
    def fail():
        raise error

    assert unless_out_of_memory(fail) is None
    assert unless_out_of_memory(lambda: 1) == 1


@pytest.mark.parametrize("error", [RuntimeError("something else"), ValueError("out of memory")])
def test_other_errors_are_none_of_memory(error):
    def fail():
        raise error

    assert not is_out_of_memory(error)
    with pytest.raises(type(error), match=str(error)):
        unless_out_of_memory(fail)


# --- fits and predictions --------------------------------------------------------------------


@pytest.mark.parametrize("error", KINDS, ids=lambda error: type(error).__name__)
def test_frozen_layers(fit, network, error):
    """Later batches stay smaller: there are two failures in a fit, and two in predictions."""
    transform = Cramped(ROOM, error)
    model = GradientFeatureClassifier(
        network,
        preprocess=transform,
        feature_store=None,
        batch_size=60,
        alpha=0.1,
        gradient_alpha=0.1,
    )
    with pytest.warns(RuntimeWarning, match=SMALLER) as caught:
        model.fit(X, y)
    assert len(caught) == 2
    twice = np.concatenate([X, X])
    with pytest.warns(RuntimeWarning, match=SMALLER) as caught:
        probabilities = model.predict_proba(twice)
    assert len(caught) == 2
    expected = fit(batch_size=15)
    assert np.array_equal(model.coef_, expected.coef_)
    np.testing.assert_allclose(probabilities, expected.predict_proba(twice), rtol=1e-5)


SEARCH = {"alphas": [0.1], "gradient_alphas": [0.1, 0.01], "cv": 2}


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("jvp_then_vjp", GradientFeatureClassifier, {}),
        ("jvp_then_vjp", GradientFeatureClassifierCV, SEARCH),
        ("jvp", GradientFeatureClassifierCV, SEARCH),
        ("vjp", GradientFeatureClassifierCV, {**SEARCH, "gradient_alphas": 1}),
    ],
)
def test_passes_over_the_head(fit, name, kind, options, monkeypatch):
    expected = fit(kind, batch_size=15, **options)
    function = cramped(getattr(LinearizedHead, name), lambda _, boundary, *__: len(boundary[0]))
    monkeypatch.setattr(LinearizedHead, name, function)
    with pytest.warns(RuntimeWarning, match=SMALLER) as caught:
        model = fit(kind, **options)
    assert len(caught) == 2
    np.testing.assert_allclose(model.coef_, expected.coef_, rtol=1e-3, atol=1e-5)


def test_kronecker_factors(fit, monkeypatch):
    expected = fit(batch_size=15)
    through = _preconditioner.network_batches

    def limited(head, batches, columns):
        return through(head, map(_refuse_large, batches), columns)

    monkeypatch.setattr(_preconditioner, "network_batches", limited)
    with pytest.warns(RuntimeWarning, match=SMALLER):
        model = fit()
    np.testing.assert_allclose(model.coef_, expected.coef_, rtol=1e-3, atol=1e-5)


def _refuse_large(batch):
    if batch[0].stop - batch[0].start > ROOM:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return batch


@pytest.mark.parametrize("options", [{"cv": "loo"}, {"cv": 2}], ids=str)
def test_gram_matrix_of_the_samples(fit, options, monkeypatch):
    samples = X.reshape(60, 12).astype(np.float64)
    options = {"alphas": [0.1], "gradient_alphas": [0.1], **options}
    expected = fit(GradientFeatureRegressorCV, X=samples, batch_size=15, **options)
    rows = _sample_space._layer_rows
    monkeypatch.setattr(_sample_space, "_layer_rows", cramped(rows, lambda *given: given[-1]))
    with pytest.warns(RuntimeWarning, match=SMALLER):
        model = fit(GradientFeatureRegressorCV, X=samples, **options)
    np.testing.assert_allclose(model.scores_, expected.scores_, rtol=1e-6)
    np.testing.assert_allclose(model.coef_, expected.coef_, rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("ignore:preprocess cannot be pickled:UserWarning")
def test_the_example_fits_and_nothing_else(fit):
    class Growing(Cramped):
        calls = 0

        def __call__(self, batch):
            self.calls += 1
            if self.calls > 4:  # the example, before that two samples together and alone
                self.room = 0
            return super().__call__(batch)

    with (
        pytest.warns(RuntimeWarning, match="Trying again"),
        pytest.raises(torch.OutOfMemoryError, match="CUDA"),
    ):
        fit(preprocess=Growing(60, ERRORS[0]), batch_size=4)


def test_other_errors_of_a_transform(fit):
    with pytest.raises(ValueError, match=r"preprocess failed on .*something else"):
        fit(preprocess=Cramped(ROOM, RuntimeError("something else")))
