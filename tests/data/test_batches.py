"""Arrays, tensors, data frames, datasets and lazy arrays give the same fit, in every dtype."""

import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn
from torchvision.transforms import Normalize

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.data import Samples, resolve_device, row_blocks, warn_unless_picklable
from sklearn_gradfeat.data._containers import to_numpy_input
from tests.data.arrays import Items, Lazy, memory_map, with_value
from tests.tiny import X, Y, estimator


@pytest.fixture(scope="module")
def fitted():
    return estimator().fit(X, Y)


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.astype(a.dtype.newbyteorder(">")),
        lambda a: np.ascontiguousarray(a[:, :, ::-1])[:, :, ::-1],
        lambda a: np.ascontiguousarray(a[::-1])[::-1],
        np.asfortranarray,
        lambda a: np.repeat(a, 2, 0)[::2],
        lambda a: a.astype(object),
        lambda a: a.tolist(),
        lambda a: torch.from_numpy(a.copy()),
        lambda a: torch.from_numpy(a.copy()).requires_grad_(),
        Lazy,
    ],
    ids=["big-endian", "negative", "reversed", "fortran", "strided", "object", "list", "tensor",
         "grad", "lazy"],
)  # fmt: skip
def test_layouts(fitted, convert):
    unusual = convert(X)
    assert np.array_equal(fitted.predict_proba(unusual), fitted.predict_proba(X))
    model = estimator().fit(unusual, Y)
    assert np.array_equal(model.coef_, fitted.coef_)
    assert np.array_equal(model.predict_proba(unusual), fitted.predict_proba(X))
    assert model.sample_shape_ == (1, 8, 8)


def test_read_only_memory_map(fitted, tmp_path):
    mapped = memory_map(tmp_path, X)
    before = np.array(mapped)
    model = estimator().fit(mapped, Y)
    assert np.array_equal(model.predict_proba(mapped), fitted.predict_proba(X))
    assert np.array_equal(mapped, before)


@pytest.mark.parametrize("rows", [slice(3, 9), slice(0, 200, 3), slice(150, 200)])
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_memory_map_of_any_mode_and_offset(mode, rows, tmp_path):
    array = np.random.default_rng(0).standard_normal((200, 5, 9))  # 360 bytes, no part of a page
    np.save(tmp_path / "array.npy", array)
    mapped = np.load(tmp_path / "array.npy", mmap_mode=mode)
    if mode != "r":
        mapped[7] = array[7] = 3.0
    for part, expected in (
        (mapped, array),
        (mapped[20:], array[20:]),
        (mapped[:, 1:], array[:, 1:]),
    ):
        lazy = to_numpy_input(part)
        for _ in range(2):  # the second time from the file
            assert np.array_equal(lazy[rows], expected[rows])
    if mode == "r+":
        mapped.flush()
        assert np.array_equal(np.load(tmp_path / "array.npy"), array)


def test_copies_of_memory_maps(fitted, tmp_path):
    copied = memory_map(tmp_path, X).copy()
    assert isinstance(copied, np.memmap)
    assert np.array_equal(fitted.predict_proba(copied), fitted.predict_proba(X))


@pytest.mark.parametrize("shape", [(1, 1), (2**13, 2**10), (5, 2**23), (10**5, 3), (3, 0)])
def test_blocks_of_rows(shape):
    found = list(row_blocks(*shape))
    assert [i for block in found for i in range(block.start, block.stop)] == list(range(shape[0]))
    largest = max(block.stop - block.start for block in found)
    assert largest == 1 or largest * shape[1] <= 2**20


@pytest.mark.parametrize("preprocess", ["auto", torch.Tensor.float])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.uint64, bool])
def test_integers(dtype, preprocess):
    integers = np.clip(X * 2 + 3, 0, 8).astype(dtype)
    model = estimator(features="activation", preprocess=preprocess).fit(integers, Y)
    other = estimator(features="activation").fit(integers.astype(np.float32), Y)
    assert model.coef_.dtype == np.float32
    partly_new = np.concatenate([integers[:10], integers[:, :, ::-1]])
    assert np.array_equal(model.predict_proba(partly_new), other.predict_proba(partly_new))


def test_half_precision(fitted):
    model = estimator().fit(X.astype(np.float16), Y)
    assert model.coef_.dtype == np.float32
    expected = fitted.predict_proba(X)
    np.testing.assert_allclose(model.predict_proba(X.astype(np.float16)), expected, atol=0.02)


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_precision(fitted, precision):
    model = estimator(precision=precision).fit(X, Y)
    assert model.coef_.dtype == (np.float64 if precision == "float64" else np.float32)
    atol = 0.05 if precision == "bfloat16" else 1e-3
    np.testing.assert_allclose(model.predict_proba(X), fitted.predict_proba(X), atol=atol)
    assert precision == "float32" or not np.array_equal(model.coef_, fitted.coef_)


def test_bfloat16_tensor(fitted):
    half = torch.from_numpy(X).bfloat16()
    assert np.array_equal(fitted.predict(half), fitted.predict(half.float().numpy()))


def test_tensor_targets(fitted):
    model = estimator().fit(torch.from_numpy(X.copy()), torch.from_numpy(Y.copy()))
    assert np.array_equal(model.predict_proba(X), fitted.predict_proba(X))
    assert isinstance(model.classes_, np.ndarray)


def test_data_frame():
    pd = pytest.importorskip("pandas")
    rows = X.reshape(24, -1)[:, :3].astype(float)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    frame = pd.DataFrame(rows, columns=["a", "b", "c"])
    model = estimator(net).fit(frame, pd.Series(Y, index=np.arange(24)[::-1]))
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    assert np.array_equal(model.predict(frame), estimator(net).fit(rows, Y).predict(rows))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["b", "a", "c"]])


def test_tabular_data_computes_in_float64():
    rows = X.reshape(24, -1)[:, :3]
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    for dtype in (np.float64, np.int64, np.float32):
        model = estimator(net, features="activation").fit(rows.astype(dtype), Y)
        assert model.coef_.dtype == np.float64
    assert estimator(features="activation").fit(X, Y).coef_.dtype == np.float32


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_predictions_do_not_depend_on_other_rows(precision):
    rows = X.reshape(24, -1)[:, :3]
    model = GradientFeatureClassifier(
        precision=precision, random_state=0, alpha=0.1, gradient_alpha=0.1
    ).fit(rows, Y)
    together = model.decision_function(rows)
    alone = np.vstack([model.decision_function(row[None]) for row in rows])
    np.testing.assert_allclose(alone, together, rtol=1e-7, atol=1e-7)


def doubled(batch):
    return batch.mul_(2)


def test_input_is_not_changed():
    images, y, weights = X.copy(), Y.copy(), np.arange(1.0, 25)
    estimator(preprocess=doubled).fit(images, y, weights).predict(images)
    assert np.array_equal(images, X)
    assert np.array_equal(y, Y)
    assert np.array_equal(weights, np.arange(1.0, 25))


def test_preprocess_that_fails():
    """Such as a transform of torchvision for images with their channels last."""
    match = (
        r"preprocess failed on a batch of shape \(\d+, 8, 8, 1\).*size of tensor.*channels first"
    )
    with pytest.raises(ValueError, match=re.compile(match, re.DOTALL)) as error:
        estimator(preprocess=Normalize([0.5] * 3, [0.5] * 3)).fit(X.transpose(0, 2, 3, 1), Y)
    assert isinstance(error.value.__cause__, RuntimeError)


@pytest.mark.filterwarnings("ignore:preprocess cannot be pickled:UserWarning")
@pytest.mark.parametrize(
    ("preprocess", "match"),
    [
        (lambda batch: batch[:1], r"one row per sample.*returned \(1, 1, 8, 8\)"),
        (lambda batch: batch.numpy(), "must return a tensor.*returned ndarray"),
    ],
)
def test_bad_preprocess(preprocess, match):
    with pytest.raises(ValueError, match=match):
        estimator(preprocess=preprocess).fit(X, Y)


class WithTable(nn.Module):
    """A transform with a large tensor, and with a function that pickle may refuse."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.zeros(10**6))

    def forward(self, batch):
        return self.function(batch)


def test_preprocess_that_pickle_refuses():
    scale = 2.0

    def closure(batch):
        return batch * scale

    model = estimator(features="activation", preprocess=closure)
    with pytest.warns(UserWarning, match=r"preprocess cannot be pickled.*in a module.*torchvision"):
        model.fit(X, Y)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(model)
    for transform in (lambda batch: batch * 2, WithTable(closure)):
        with pytest.warns(UserWarning, match="preprocess cannot be pickled"):
            warn_unless_picklable(transform)


@pytest.mark.parametrize(
    "transform",
    ["auto", None, torch.tanh, WithTable(torch.tanh), partial(torch.mul, other=2), doubled],
)
def test_preprocess_that_pickle_accepts(transform):
    warn_unless_picklable(transform)  # no warning
    pickle.dumps(transform)


def test_the_check_of_preprocess_pickles_no_values(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__reduce_ex__", None)
    warn_unless_picklable(WithTable(torch.tanh))


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is present")
def test_absent_device():
    with pytest.raises(ValueError, match=r"device='meta' cannot be used here.*have no values"):
        estimator(device="meta").fit(X, Y)
    with pytest.raises(ValueError, match=r"device='cuda' cannot be used here.*device='auto'"):
        estimator(device="cuda").fit(X, Y)


def test_a_full_device_is_not_an_absent_one(fitted, monkeypatch):
    """A fitted estimator does not turn to another device either."""

    def full(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", full)
    for device in ("auto", "cuda"):
        with pytest.raises(RuntimeError, match="CUDA error: out of memory"):
            resolve_device(device)
    with pytest.raises(RuntimeError, match="CUDA error: out of memory"):
        fitted.predict_proba(X)


def test_transform_that_fails_on_the_device_runs_in_host_memory():
    """The device meta takes the place of a device without such operators."""

    def prepared(transform):
        samples = Samples(X, transform, torch.float32, torch.device("meta"))
        return [samples.batch(slice(n)) for n in (3, 4)], samples.subset(np.arange(2))

    seen = []

    def by_numpy(x):
        seen.append(x.device.type)
        return torch.from_numpy(np.asarray(x.numpy()) / 2)

    batches, subset = prepared(by_numpy)
    assert [(z.device.type, len(z)) for z in batches] == [("meta", 3), ("meta", 4)]
    assert len(subset.batch(slice(None))) == 2
    assert seen == ["meta", "cpu", "cpu", "cpu"]  # tried once

    seen.clear()
    prepared(lambda x: seen.append(x.device.type) or x / 2)
    assert seen == ["meta", "meta"]

    def fails(x):
        raise KeyError(x.device.type)

    with pytest.raises(KeyError, match="meta"):
        prepared(fails)


def test_lazy_is_read_in_batches(fitted):
    class Counting(Lazy):
        largest = 0

        def __getitem__(self, rows):
            part = super().__getitem__(rows)
            Counting.largest = max(Counting.largest, len(part))
            return part

    model = estimator(batch_size=7).fit(Counting(X), Y)
    proba = model.predict_proba(Counting(X))
    assert Counting.largest == 6  # four batches of 24 samples, all of one size
    np.testing.assert_allclose(proba, fitted.predict_proba(X), atol=1e-3)


@pytest.mark.parametrize(
    "convert",
    [
        torch.from_numpy,
        lambda X: torch.from_numpy(X).requires_grad_(),
        lambda X: list(torch.from_numpy(X).requires_grad_()),
        list,
        lambda X: Items(lambda row: X[row]),
        lambda X: Items(lambda row: torch.from_numpy(X[row]).requires_grad_()),
        lambda X: torch.utils.data.Subset(Items(lambda row: X[row]), range(24)),
        Lazy,
    ],
    ids=[
        "tensor",
        "grad",
        "list-of-tensors",
        "list",
        "dataset",
        "tensor-dataset",
        "subset",
        "lazy",
    ],
)
def test_in_a_grid_search(fitted, convert):
    unusual = convert(X.copy())
    grid = GridSearchCV(estimator(), {"alpha": [0.1, 10.0]}, cv=2, error_score="raise")
    search = grid.fit(unusual, Y)
    expected = clone(grid).fit(X, Y).cv_results_["mean_test_score"]
    assert np.array_equal(search.cv_results_["mean_test_score"], expected)
    assert np.array_equal(fitted.predict(unusual), fitted.predict(X))


def test_memory_map_in_a_grid_search(tmp_path):
    grid = GridSearchCV(estimator(), {"alpha": [0.1]}, cv=2, error_score="raise")
    mapped = grid.fit(memory_map(tmp_path, X), Y)
    assert mapped.best_score_ == clone(grid).fit(X, Y).best_score_


def test_lazy_nan_at_predict(fitted):
    with pytest.raises(ValueError, match="X contains NaN or infinity"):
        fitted.predict(Lazy(with_value(np.nan)))
