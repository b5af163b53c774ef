"""Trunk output and activations in files: equal results, no traces, and little memory."""

import errno
import mmap
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    config_context,
)
from sklearn_gradfeat.cache import _runner, _sample_files, disk_store
from sklearn_gradfeat.cache._sample_files import (
    FileBoundary,
    SampleFile,
    mapped_tensor,
    release_pages,
)
from sklearn_gradfeat.curvature import _factored_term
from tests.cache.stores import model, passes
from tests.tiny import NET, X, Y, data

TENSORS = (
    torch.arange(60, dtype=torch.float64).view(10, 2, 3),
    torch.arange(10),
    torch.complex(torch.arange(40.0), -torch.arange(40.0)).view(10, 4),
    torch.arange(10)[:, None] % 2 == 0,
)

STORE_FILES = {".mdb", ".mdb-lock", ".lock"}


def assert_equal(found, rows):
    for one, whole in zip(found, TENSORS, strict=True):
        assert one.dtype == whole.dtype
        assert one.is_contiguous()
        assert torch.equal(one, whole[rows])


@pytest.fixture
def streamed(tmp_path):
    """Stream every fit from a folder, and return the folder."""
    with config_context(memory_bytes=0):
        yield tmp_path


# --- the file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preadv", [True, False])
@pytest.mark.parametrize("max_gap", [0, 100, 2**16])
@pytest.mark.parametrize(
    "rows", [range(10), [3], [2, 3, 4, 8, 9], [0, 0, 5, 5, 6], [7, 1, 2, 9, 0]]
)
def test_any_rows_are_read(rows, max_gap, preadv, tmp_path, monkeypatch):
    monkeypatch.setattr(_sample_files, "_MAX_GAP", max_gap)
    if not preadv:
        monkeypatch.delattr(os, "preadv", raising=False)
    file = SampleFile(10, TENSORS, tmp_path)
    for start, stop in ((6, 10), (0, 6)):
        file.write(start, tuple(z[start:stop] for z in TENSORS))
    boundary = FileBoundary(file, np.arange(10)).subset(np.array(rows))
    assert_equal(boundary.take(slice(None)), list(rows))
    assert_equal(boundary.take(slice(0, 5, 2)), list(rows)[0:5:2])


def test_one_tensor_is_read_without_a_copy(tmp_path):
    file = SampleFile(10, TENSORS[:1], tmp_path)
    file.write(0, TENSORS[:1])
    (found,) = file.read(np.arange(10))
    assert torch.equal(found, TENSORS[0])
    assert found.untyped_storage().nbytes() == TENSORS[0].nbytes


def test_threads_read_their_own_rows(tmp_path):
    file = SampleFile(10, TENSORS, tmp_path)
    file.write(0, TENSORS)
    rows = [np.random.default_rng(i).permutation(10) for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        for found, expected in zip(threads.map(file.read, rows), rows, strict=True):
            assert_equal(found, expected)


def in_memory(tensor):
    """Return the resident bytes of a tensor's own map, from Linux."""
    start = f"{tensor.data_ptr():x}-"
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(start))
    return 1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_released_rows_leave_memory_and_keep_their_values(tmp_path):
    mapped = mapped_tensor((1000, 1024), torch.float32, tmp_path)
    values = torch.randn(1000, 1024)
    mapped.copy_(values)
    assert in_memory(mapped) == mapped.nbytes
    release_pages(mapped[200:])
    first_rows = in_memory(mapped)
    assert first_rows <= 200 * 4096
    release_pages(mapped[:0])
    release_pages(mapped[0, 1:5])
    assert in_memory(mapped) == first_rows - mmap.PAGESIZE
    assert torch.equal(mapped, values)


def test_other_tensors_are_not_released(tmp_path):
    address = mapped_tensor((1000, 1024), torch.float32, tmp_path).data_ptr()
    assert address not in _sample_files._MAPS
    values = torch.randn(1000, 1024)
    kept = values.clone()
    release_pages(values)
    assert torch.equal(values, kept)


def test_files_have_no_name_and_end_with_their_objects(tmp_path):
    def open_files():
        links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
        return sum(os.path.islink(link) and str(tmp_path) in os.readlink(link) for link in links)

    file = SampleFile(10, TENSORS, tmp_path)
    mapped = mapped_tensor((3, 4), torch.float32, tmp_path)
    assert torch.equal(mapped.fill_(2), torch.full((3, 4), 2.0))
    assert not list(tmp_path.iterdir())
    if sys.platform == "linux":
        assert open_files() > 0
        del file, mapped
        assert open_files() == 0


# --- estimators -------------------------------------------------------------------------------


def fitted_bits(kind, targets, parameters):
    images, labels = data(90)
    y = labels if targets == "classes" else images[:, 0, :2, 0] + labels[:, None]
    options = {"batch_size": 32, "max_iter": 40, "tol": 1e-4, "device": "cpu"}
    estimator = kind(NET, **options, **parameters)
    weights = np.random.default_rng(1).random(90)
    estimator.fit(images, y, sample_weight=weights)
    arrays = (estimator.coef_, estimator.intercept_, *estimator.gradient_coef_.values())
    return [*arrays, estimator.predict(images)]


FIXED = {"alpha": 0.1, "gradient_alpha": 0.1}


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        (GradientFeatureClassifier, FIXED),
        (GradientFeatureClassifier, {**FIXED, "feature_store": None}),
        (GradientFeatureClassifier, {**FIXED, "store_dtype": "bfloat16"}),
        (GradientFeatureClassifier, {**FIXED, "features": "activation"}),
        (GradientFeatureClassifier, {**FIXED, "gradient_layers": ["0", "2"]}),  # no trunk
        (GradientFeatureClassifier, {**FIXED, "n_linearizations": 2}),
        (GradientFeatureClassifier, {**FIXED, "activation_layer": ["1", "3"]}),
        (GradientFeatureClassifier, {"gradient_alpha": 0.1}),
        pytest.param(GradientFeatureClassifier, {}, marks=pytest.mark.slow),
        (GradientFeatureRegressor, FIXED),
        (GradientFeatureRegressor, {"n_linearizations": 2, "gradient_alpha": 0.1}),
        (GradientFeatureClassifierCV, {"alphas": [0.1, 1], "gradient_alphas": [0.1], "cv": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*stopped after:sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:The output of the frozen layers takes:UserWarning")
def test_streamed_fits_have_the_same_bits(kind, parameters, monkeypatch):
    monkeypatch.setattr(_factored_term, "_PASSES", 0)  # rows of layers are kept in memory alone
    targets = "values" if kind is GradientFeatureRegressor else "classes"
    expected = fitted_bits(kind, targets, parameters)
    mapped, empty = [], _runner.mapped_tensor
    monkeypatch.setattr(_runner, "mapped_tensor", lambda *a: mapped.append(a) or empty(*a))
    with config_context(memory_bytes=0):
        found = fitted_bits(kind, targets, parameters)
    assert mapped
    assert all(map(np.array_equal, found, expected))


def test_a_memory_map_has_the_bits_of_its_array(tmp_path):
    np.save(tmp_path / "X.npy", X)
    expected = model(None).fit(X, Y).decision_function(X)
    for mode in ("r", "r+", "c"):
        mapped = np.load(tmp_path / "X.npy", mmap_mode=mode)
        assert np.array_equal(model(None).fit(mapped, Y).decision_function(mapped), expected)


def test_the_warning_names_folder_and_size(streamed, monkeypatch):
    monkeypatch.setattr(_sample_files.tempfile, "tempdir", str(streamed))
    message = r"frozen layers takes 1\.\d+e-05 GB, more than memory_bytes=0.*" + str(streamed)
    with pytest.warns(UserWarning, match=message):
        model(None).fit(X, Y)
    assert not list(streamed.iterdir())


def test_a_path_is_the_folder_of_the_files(streamed, counted, monkeypatch):
    folders, temporary = set(), _sample_files._temporary_file
    monkeypatch.setattr(
        _sample_files, "_temporary_file", lambda n, f: folders.add(f) or temporary(n, f)
    )
    expected = model(counted, feature_store=streamed / "store").fit(X, Y).coef_
    assert folders == {streamed / "store"}
    again = model(counted, feature_store=streamed / "store").fit(X, Y)
    assert np.array_equal(again.coef_, expected)
    assert passes(counted) == len(X)
    assert {file.suffix for file in (streamed / "store").iterdir()} == STORE_FILES


@pytest.mark.filterwarnings("ignore:The output of the frozen layers takes:UserWarning")
def test_a_streamed_fit_fills_the_store_in_memory_once(streamed, counted):
    network = torch.nn.Sequential(*NET)
    with config_context(store_bytes=10_000):  # about half of the samples
        for _ in range(2):
            model(counted, network, batch_size=6).fit(X, Y)
    assert len(X) < passes(counted) < 2 * len(X)


# --- faults -----------------------------------------------------------------------------------


def test_an_interrupted_pass_leaves_nothing(streamed, monkeypatch):
    def interrupted(self, start, tensors):
        write(self, start, tensors)
        if start == 12:
            raise KeyboardInterrupt

    write, store = SampleFile.write, streamed / "store"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(SampleFile, "write", interrupted)
        model(None, feature_store=store, batch_size=6).fit(X, Y)
    assert set(streamed.iterdir()) == {store}
    found = model(None, feature_store=store, batch_size=6).fit(X, Y)
    with config_context(memory_bytes=10**9):
        assert np.array_equal(found.coef_, model(None, batch_size=6).fit(X, Y).coef_)


@pytest.mark.parametrize("n_files", [0, 1, 5])
def test_full_disk_raises_and_leaves_nothing(streamed, n_files, monkeypatch):
    """The activations are in the first file, the trunk output in the second one."""

    def limited(descriptor, offset, n_bytes):
        created.append(n_bytes)
        if len(created) > n_files:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(descriptor, offset, n_bytes)

    created, fallocate, store = [], os.posix_fallocate, streamed / "store"
    disk_store(store)
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", limited)
        message = "temporary file of .* GB, which cannot be created: No space left on device"
        with pytest.raises(OSError, match=message) as caught:
            options = {"alpha": "auto", "gradient_alpha": "auto", "device": "cpu"}
            model(None, feature_store=store, **options).fit(*data(60))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(store))
    assert {file.suffix for file in store.iterdir()} == STORE_FILES
    model(None, feature_store=store).fit(X, Y)


def test_a_folder_without_permission_to_write(streamed, monkeypatch):
    monkeypatch.setattr(_sample_files.os, "access", lambda *_: False)
    monkeypatch.setattr(_sample_files.tempfile, "tempdir", str(streamed))
    with pytest.warns(UserWarning, match=f"Temporary files in .*{streamed}"):
        model(None, feature_store=streamed / "store").fit(X, Y)


def fit_from_store(counted, store):
    with config_context(memory_bytes=0):
        return model(counted, feature_store=store, batch_size=6).fit(X, Y).coef_


@pytest.mark.slow
def test_processes_stream_at_once(counted, path):
    found = Parallel(n_jobs=3)(delayed(fit_from_store)(counted, path) for _ in range(6))
    expected = model(None, batch_size=6).fit(X, Y).coef_
    assert all(np.array_equal(coef, expected) for coef in found)
    assert passes(counted) == len(X)


GROWTH = """
import sys

import numpy as np
from torch import nn
from sklearn_gradfeat import GradientFeatureClassifier, set_config

X = np.load(sys.argv[1], mmap_mode="r")
y = np.arange(len(X)) % 2
network = nn.Sequential(
    nn.Conv2d(1, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
)
model = GradientFeatureClassifier(
    network, gradient_layers=["2"], alpha=0.1, gradient_alpha=0.1, max_iter=2, tol=0.5
)
set_config(memory_bytes=2**20, store_bytes=2**20)

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

model.fit(X[:1000], y[:1000])
before = peak()
model.fit(X, y).predict(X)
print((peak() - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the peak")
def test_memory_does_not_grow_with_the_samples(tmp_path):
    n = 20_000  # 320 MB of trunk output
    images = np.random.default_rng(0).standard_normal((n, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "X.npy", images)
    command = [sys.executable, "-W", "ignore", "-c", GROWTH, str(tmp_path / "X.npy")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert int(done.stdout) < 200  # MiB, with the pages of mapped files
