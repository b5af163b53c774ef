"""The feature store: what is computed once, what again, and what happens to a store on disk."""

import copy
import functools
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import joblib
import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_predict
from torch import nn

import sklearn_gradfeat
from sklearn_gradfeat import GradientFeatureClassifier, _config, config_context, set_config
from sklearn_gradfeat.features import FeatureKey, MemoryStore, _disk, disk_store, memory_store
from sklearn_gradfeat.features._chunks import Boundary, HeldChunk, Place
from sklearn_gradfeat.features._trunk import Trunk
from tests.tiny import NET, X, Y, data, estimator, tiny_net

ROOT = Path(sklearn_gradfeat.__file__).parents[1]
GRID = {"alpha": np.geomspace(1, 100, 8)}
FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


class Counted:
    """A transform that notes how many samples every process passes to the trunk.

    The first samples also go through it when a network is frozen, which is no such pass.
    """

    def __init__(self, file):
        self.file = file

    def __call__(self, batch):
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_name != "build_extractor":
            frame = frame.f_back
        if frame is None:
            with open(self.file, "a") as log:
                log.write(f"{len(batch)}\n")
        return batch


class Halved(Counted):
    def __call__(self, batch):
        return super().__call__(batch) / 2


@pytest.fixture
def counted(tmp_path):
    return Counted(str(tmp_path / "passes"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


def passes(counted):
    """Return the number of samples that went through the trunk."""
    log = Path(counted.file)
    return sum(map(int, log.read_text().split())) if log.exists() else 0


def model(counted, backbone=NET, **parameters):
    return estimator(backbone, preprocess=counted, **{"alpha": 1.0, **parameters})


# --- once per sample -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "n_jobs"), [("auto", 1), ("path", 1), ("path", 2)])
def test_grid_search_passes_every_sample_once(counted, path, monkeypatch, kind, n_jobs):
    in_process, compute = [], Trunk._compute
    monkeypatch.setattr(
        Trunk, "_compute", lambda self, raw: in_process.append(len(raw)) or compute(self, raw)
    )
    images, y = data(30)
    features = model(counted, feature_store=path if kind == "path" else "auto")
    search = GridSearchCV(features, GRID, cv=5, n_jobs=n_jobs).fit(images, y)
    assert passes(counted) == 30
    assert n_jobs > 1 or sum(in_process) == 30
    GridSearchCV(clone(features), GRID, cv=5, n_jobs=n_jobs).fit(images, y)
    search.predict_proba(images[::-1])
    assert passes(counted) == 30


def test_stores_take_a_quarter_of_the_memory_unless_told(monkeypatch):
    monkeypatch.setattr("sklearn_gradfeat._config._memory", lambda: 4000)
    assert (_config.store_bytes(), _config.memory_store_bytes()) == (1000, 1000)
    with config_context(store_bytes=7):
        assert (_config.store_bytes(), _config.memory_store_bytes()) == (7, 7)


def test_workers_share_among_their_tasks(counted):
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        GridSearchCV(model(counted), GRID, cv=5, n_jobs=2).fit(X, Y)
    assert passes(counted) <= 3 * len(X)  # two workers, and the fit at the end


def test_store_does_not_change_results(counted, path):
    def scores(store):
        features = estimator(feature_store=store)
        return cross_val_predict(features, X, Y, cv=3, method="decision_function")

    expected = scores(None)
    np.testing.assert_allclose(scores("auto"), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(scores(path), expected, rtol=1e-3, atol=1e-4)


def test_none_computes_every_time(counted):
    features = model(counted, feature_store=None)
    features.fit(X, Y).predict(X)
    assert passes(counted) == 48


@pytest.mark.parametrize("kind", ["auto", "path"])
def test_predictions_are_stored_too(counted, path, kind):
    features = model(counted, feature_store=path if kind == "path" else "auto").fit(X, Y)
    new = X + 1
    expected = features.predict_proba(new)
    assert passes(counted) == 48
    assert np.array_equal(features.predict_proba(new), expected)
    clone(features).fit(new, Y)
    assert passes(counted) == 48


@pytest.mark.parametrize("kind", ["auto", "path", None])
def test_repeated_samples_are_computed_once(counted, path, kind):
    again = np.tile(np.arange(6), 4)
    features = model(counted, feature_store=path if kind == "path" else kind)
    features.fit(X[again], Y[again])
    assert passes(counted) == (24 if kind is None else 6)
    expected = model(counted, feature_store=None).fit(X[again], Y[again])
    np.testing.assert_allclose(features.coef_, expected.coef_, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["auto", "path"])
def test_lazy_samples_are_read_once_per_fit(counted, path, kind):
    class Lazy:
        shape, dtype, rows = X.shape, X.dtype, 0

        def __getitem__(self, rows):
            self.rows += len(X[rows])
            return X[rows]

    lazy = Lazy()
    model(counted, feature_store=path if kind == "path" else kind, batch_size=5).fit(lazy, Y)
    assert lazy.rows <= len(X) + 2  # the first two also show what samples look like
    model(counted, feature_store=path if kind == "path" else kind).fit(X, Y)
    assert passes(counted) == 24


def test_equal_networks_of_one_factory_share(counted):
    features = model(counted, tiny_net)
    features.fit(X, Y)
    clone(features).set_params(alpha=2.0).fit(X, Y)
    assert passes(counted) == 24


def test_later_session_finds_everything(counted, path):
    features = model(counted, feature_store=path).fit(X, Y)
    code = (
        "import pickle, sys; from tests.tiny import X, Y\n"
        "features = pickle.load(sys.stdin.buffer)\n"
        "features.predict(X); features.fit(X, Y)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, input=pickle.dumps(features)
    )
    assert passes(counted) == 24


def test_random_network_for_rows_is_not_stored():
    before = memory_store().nbytes
    rows = X.reshape(24, -1)
    GradientFeatureClassifier(max_iter=300, alpha=1.0, random_state=0).fit(rows, Y)
    assert memory_store().nbytes == before


def test_rows_of_a_module_keep_their_bits_in_any_company(counted):
    rows = X.reshape(24, -1).astype(float)
    network = nn.Sequential(nn.Linear(64, 33), nn.Tanh(), nn.Linear(33, 7)).double()
    features = model(counted, network).fit(rows, Y)
    new = rows + 1
    expected = clone(features).set_params(feature_store=None).fit(rows, Y).decision_function(new)
    features.decision_function(new[:5])  # leaves 19 of the next batch
    np.testing.assert_allclose(features.decision_function(new), expected, rtol=1e-12)
    one_by_one = np.vstack([features.decision_function(row[None] + 1) for row in new])
    other = features.decision_function(new + 1)
    np.testing.assert_allclose(one_by_one, other, rtol=1e-12)


def test_progress_bar_counts_what_is_computed(counted, capsys):
    features = model(counted, verbose=1)
    features.fit(X[:18], Y[:18])
    assert "18/18" in capsys.readouterr().err
    features.predict(X)
    assert "6/6" in capsys.readouterr().err


# --- what makes a sample another one ---------------------------------------------------------


def edited(features):
    features.backbone[0].weight.data.mul_(2)
    return features


CHANGES = {
    "weights edited through .data": edited,
    "weights of the head": lambda f: f.backbone[2].bias.data.add_(1) is not None and f,
    "preprocess": lambda f: f.set_params(preprocess=Halved(f.preprocess.file)),
    "precision": lambda f: f.set_params(precision="float64"),
    "autocast": lambda f: f.set_params(precision="bfloat16"),
    "gradient_layers": lambda f: f.set_params(gradient_layers=2, features="activation"),
    "activation_layer": lambda f: f.set_params(activation_layer="3"),
    "features": lambda f: f.set_params(features="activation"),
}
SAMENESS = {
    "clone": clone,
    "copy": copy.deepcopy,
    "pickle": lambda f: pickle.loads(pickle.dumps(f)),
    "solver": lambda f: f.set_params(alpha=3.0, max_iter=30, parametrization="standard"),
    "batch size": lambda f: f.set_params(batch_size=7),
    "names": lambda f: f.set_params(backbone=nn.Sequential(*f.backbone)),
    "list of layers": lambda f: f.set_params(gradient_layers=["2"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_computed_anew(counted, path, change):
    features = model(counted, tiny_net(), feature_store=path).fit(X, Y)
    changed = CHANGES[change](features).fit(X, Y)
    assert passes(counted) == 48
    alone = clone(changed).set_params(feature_store=None).fit(X, Y)
    np.testing.assert_allclose(changed.coef_, alone.coef_, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("same", SAMENESS)
def test_same_function_is_shared(counted, path, same):
    for store in ("auto", path):
        features = model(counted, feature_store=store).fit(X, Y)
        SAMENESS[same](features).fit(X, Y)
    assert passes(counted) == 48


@pytest.mark.parametrize("other", [X.astype(np.float64), X.reshape(24, 1, 4, 16)])
def test_dtype_and_shape_are_part_of_a_sample(counted, path, other):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 5))
    for samples in (X, other):
        model(counted, net, feature_store=path, precision="float32").fit(samples, Y)
    assert passes(counted) == 48


def test_transform_without_a_value_is_not_shared(path):
    lock = threading.Lock()
    seen = []

    def transform(batch):
        with lock:
            seen.append(len(batch))
        return batch

    for store in ("auto", path):
        estimator(preprocess=transform, feature_store=store).fit(X, Y)
    assert seen.count(24) == 2


def test_network_without_a_graph_is_stored_in_memory_alone(counted, path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 4)

        def forward(self, x):
            return self.layer(x.flatten(1) if x.sum() > -1e9 else x)

    network = Branching()
    for store, expected in (("auto", 24), (path, 48)):
        features = model(counted, network, features="activation", feature_store=store)
        start = passes(counted)
        features.fit(X, Y).predict(X)
        assert passes(counted) - start == expected
    assert disk_store(path)._environment.stat()["entries"] == 1  # its version


# --- in memory -------------------------------------------------------------------------------


class Owner:
    """Stands for a network."""


def key(owner, digest=b"k" * 16):
    return FeatureKey(digest, True, owner)


def chunk(size, n=4):
    return HeldChunk((torch.zeros(n, size // n, dtype=torch.uint8),))


def names(start, n=4):
    return [bytes([start + i]) * 16 for i in range(n)]


def test_least_recently_used_leaves_first():
    store, owner = MemoryStore(), Owner()
    with config_context(store_bytes=3 * (4000 + 4 * 256)):
        for start in (0, 4, 8):
            store.add(key(owner), names(start), chunk(4000), ())
        assert None not in store.find(key(owner), names(0) + names(4) + names(8))
        store.find(key(owner), names(0))
        store.add(key(owner), names(12), chunk(4000), ())
        found = [store.find(key(owner), names(s))[0] is not None for s in (0, 4, 8, 12)]
        assert found in ([True, False, True, True], [True, True, False, True])
        assert store.nbytes <= 3 * (4000 + 4 * 256)


def test_chunks_in_use_do_not_leave_for_others():
    store, owner = MemoryStore(), Owner()
    with config_context(store_bytes=2 * (4000 + 4 * 256)):
        used = {store.add(key(owner), names(s), chunk(4000), ()) for s in (0, 4)}
        store.add(key(owner), names(8), chunk(4000), used)
        assert store.find(key(owner), names(8)) == [None] * 4
        assert None not in store.find(key(owner), names(0) + names(4))


def test_bound_holds_and_can_be_lowered():
    store, owner = MemoryStore(), Owner()
    with config_context(store_bytes=20_000):
        for start in range(0, 80, 4):
            store.add(key(owner), names(start), chunk(3000), ())
            assert store.nbytes <= 20_000
        assert store.nbytes > 10_000
        set_config(store_bytes=5000)
        assert store.nbytes <= 5000
    with config_context(store_bytes=0):
        assert store.nbytes == 0


def test_fit_works_beyond_the_bound(counted):
    expected = model(counted, feature_store=None).fit(X, Y)
    start = passes(counted)
    with config_context(store_bytes=4000):
        before = memory_store().nbytes
        features = model(counted, batch_size=3).fit(X, Y)
        assert before < memory_store().nbytes <= 4000
        clone(features).fit(X, Y)
    assert 24 < passes(counted) - start < 48  # what there was room for was found again
    np.testing.assert_allclose(features.coef_, expected.coef_, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [tiny_net, lambda: functools.partial(tiny_net)])
def test_memory_is_freed_with_its_network(counted, kind):
    gc.collect()
    before = memory_store().nbytes
    backbone = kind()
    features = model(counted, backbone).fit(X, Y)
    kept = weakref.ref(features._extractor.backbone)
    assert memory_store().nbytes > before
    del features
    gc.collect()
    assert memory_store().nbytes > before
    del backbone
    gc.collect()
    assert kept() is None
    assert memory_store().nbytes == before


def test_equal_networks_keep_what_they_share():
    store, one, two = MemoryStore(), Owner(), Owner()
    store.add(key(one), names(0), chunk(4000), ())
    assert None in store.find(key(two, b"other" + bytes(11)), names(0))
    store.find(key(one), names(0))
    store.find(key(two), names(0))
    del one
    gc.collect()
    assert None not in store.find(key(two), names(0))
    del two
    gc.collect()
    assert store.nbytes == 0


def test_pickle_has_no_features():
    images, y = data(300)
    small, large = (estimator(tiny_net()).fit(images[:n], y[:n]) for n in (30, 300))
    assert abs(len(pickle.dumps(small)) - len(pickle.dumps(large))) < 2000


def test_stored_tensors_are_views_where_they_can_be():
    features = HeldChunk((torch.arange(12).reshape(6, 2),))
    (taken,) = Boundary([Place(features, row) for row in (1, 2, 3, 5)]).take(slice(0, 3))
    assert taken.data_ptr() == features.tensors[0][1:].data_ptr()


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_boundary_takes_what_indexing_takes(draw):
    sizes = draw.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    chunks = [HeldChunk((torch.rand(n, 2), torch.rand(n))) for n in sizes]
    place = st.builds(
        lambda c, r: Place(chunks[c], r % sizes[c]),
        st.integers(0, len(sizes) - 1),
        st.integers(0, 4),
    )
    places = draw.draw(st.lists(place, min_size=1, max_size=12))
    step = draw.draw(st.integers(1, 3))
    rows = slice(draw.draw(st.integers(0, len(places) - 1)), len(places), step)
    for i, taken in enumerate(Boundary(places).take(rows)):
        expected = [place.chunk.tensors[i][place.row] for place in places[rows]]
        assert torch.equal(taken, torch.stack(expected))


def test_transform_may_reuse_its_memory(counted):
    class Reusing:
        def __init__(self):
            self.memory = torch.empty(6, 8)

        def __call__(self, batch):
            self.memory[: len(batch)] = batch.flatten(1)[:, :8]
            return self.memory[: len(batch)]

    net = nn.Sequential(nn.Linear(8, 4), nn.Tanh())
    fitted = [
        estimator(net, preprocess=transform, batch_size=6, feature_store=store).fit(X, Y)
        for transform, store in (
            (Reusing(), "auto"),
            (lambda batch: batch.flatten(1)[:, :8], None),
        )
    ]
    np.testing.assert_allclose(fitted[0].coef_, fitted[1].coef_, rtol=1e-3, atol=1e-5)


# --- threads and forks -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "path"])
def test_threads_share_without_computing_twice(counted, path, kind):
    features = model(counted, feature_store=path if kind == "path" else "auto", batch_size=5)
    with joblib.parallel_config("threading", n_jobs=4):
        search = GridSearchCV(features, {"alpha": [1.0, 2.0, 4.0]}, cv=3).fit(X, Y)
    assert passes(counted) == 24
    expected = GridSearchCV(clone(features), {"alpha": [1.0, 2.0, 4.0]}, cv=3).fit(X, Y)
    assert search.best_params_ == expected.best_params_


def test_threads_that_change_the_index_at_once():
    store, failures = MemoryStore(), []

    def work(seed):
        rng, owner = np.random.default_rng(seed), Owner()
        try:
            for _ in range(300):
                start = int(rng.integers(0, 200))
                found = store.find(key(owner), names(start))
                store.add(key(owner), names(start), chunk(400), {p.chunk for p in found if p})
                if rng.random() < 0.2:
                    owner = Owner()
        except BaseException as error:
            failures.append(error)

    with config_context(store_bytes=20_000):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    gc.collect()
    assert not failures
    assert store.nbytes == 0


def in_child(function):
    """Call a function in a forked process; return its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return child


@fork
@FORKS
@pytest.mark.parametrize("kind", ["auto", "path"])
def test_forked_child_finds_and_adds(path, kind):
    owner, label = Owner(), b"fork" * 4
    store = memory_store() if kind == "auto" else disk_store(path)
    store.add(key(owner, label), names(0), chunk(400), ())
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            store.find(key(owner, label), names(0) * 50)

    def grandchild():
        assert None not in store.find(key(owner, label), names(4))

    def work():
        assert None not in store.find(key(owner, label), names(0))
        with store.computing(key(owner, label)):
            store.add(key(owner, label), names(4), chunk(400), ())
        assert None not in store.find(key(owner, label), names(4))
        assert os.waitpid(in_child(grandchild), 0)[1] == 0

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(5):
            assert os.waitpid(in_child(work), 0)[1] == 0
    finally:
        stop.set()
        thread.join()
    assert (None in store.find(key(owner, label), names(4))) == (kind == "auto")


# --- on disk ---------------------------------------------------------------------------------


@pytest.fixture
def written(counted, path):
    """Return a directory with a store that nobody has open."""
    refit(counted, path)
    _disk._stores.popitem()[1]._environment.close()
    return path


def refit(counted, path):
    return model(counted, feature_store=path).fit(X, Y)


def test_truncated_store_is_refused(counted, written):
    file = written / "features.mdb"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"cannot be used: .* Delete the file"):
        refit(counted, written)
    file.unlink()
    refit(counted, written)
    assert passes(counted) == 48


@pytest.mark.parametrize("what", ["text", "zeros", "head"])
def test_file_that_is_no_store_is_refused(counted, written, what):
    file = written / "features.mdb"
    content = bytearray(file.read_bytes())
    content[: 4096 * 2 if what == "head" else None] = os.urandom(8192)
    file.write_bytes({"text": b"hello" * 5000, "zeros": bytes(50_000), "head": content}[what])
    with pytest.raises(ValueError, match=r"cannot be used: .* Delete the file"):
        refit(counted, written)


@pytest.mark.parametrize("seed", range(8))
def test_garbage_never_gives_wrong_features(counted, written, seed):
    rng, file = np.random.default_rng(seed), written / "features.mdb"
    content = np.fromfile(file, np.uint8)
    page = int(rng.integers(2, len(content) // 4096)) * 4096
    content[page : page + 4096] = rng.integers(0, 256, 4096)
    content.tofile(file)
    expected = model(counted, feature_store=None).fit(X, Y)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The feature store .* holds damaged records")
            features = refit(counted, written)
    except ValueError as error:
        assert "Delete the file" in str(error)
    else:
        np.testing.assert_allclose(features.coef_, expected.coef_, rtol=1e-3, atol=1e-5)


def test_damaged_record_is_computed_again(counted, written):
    file = written / "features.mdb"
    content = bytearray(file.read_bytes())
    place = max(range(0, len(content), 4096), key=lambda i: len(set(content[i : i + 4096])))
    content[place + 2000] ^= 1  # within the numbers, which fill most of the file
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="holds damaged records: their samples are computed"):
        features = refit(counted, written)
    assert passes(counted) == 48
    features.predict(X)
    clone(features).fit(X, Y)
    assert passes(counted) == 48


def test_other_database_is_refused(path):
    path.mkdir()
    with lmdb.open(str(path / "features.mdb"), subdir=False) as other, other.begin(write=True) as t:
        t.put(b"something", b"else")
    with pytest.raises(ValueError, match="it was not made by sklearn-gradfeat"):
        disk_store(path)


def test_newer_store_is_refused(written):
    with (
        lmdb.open(str(written / "features.mdb"), subdir=False) as newer,
        newer.begin(write=True) as transaction,
    ):
        transaction.put(b"format", b'{"name": "sklearn-gradfeat features", "version": 2}')
    with pytest.raises(ValueError, match=r"its format is 2, this version reads 1\. Delete"):
        disk_store(written)


def test_path_that_is_a_file_is_refused(counted, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="There is no feature store and none can be made"):
        model(counted, feature_store=tmp_path / "file").fit(X, Y)


def test_store_without_lmdb(counted, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match=r"pip install 'sklearn-gradfeat\[disk\]'"):
        model(counted, feature_store=path).fit(X, Y)


def test_full_store_warns_once_and_computes(counted, path):
    images, y = np.tile(X, (20, 1, 2, 2)), np.tile(Y, 20)
    images += np.arange(len(images), dtype=np.float32)[:, None, None, None] / len(images)
    features = model(counted, feature_store=path, batch_size=64)
    with config_context(store_bytes=2**20):
        with pytest.warns(UserWarning, match="takes no more .*: what it lacks is computed"):
            features.fit(images, y)
        assert (path / "features.mdb").stat().st_size <= 2**20
        start = passes(counted)
        clone(features).fit(images, y)
    assert 0 < passes(counted) - start < len(images)
    expected = model(counted, feature_store=None).fit(images, y)
    np.testing.assert_allclose(features.coef_, expected.coef_, rtol=1e-3, atol=1e-5)


def test_full_disk_warns_once_and_computes(counted, path, monkeypatch):
    def full(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sklearn_gradfeat.features._disk.note_state", full)
    features = model(counted, feature_store=path, batch_size=8)
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        features.fit(X, Y)
    assert len(caught) == 1
    assert hasattr(features, "coef_")


def test_disk_that_is_full_before_there_is_a_store(counted, path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)  # not on every system
    with pytest.warns(UserWarning, match="the disk is full: features are computed") as caught:
        features = model(counted, feature_store=path).fit(X, Y)
    assert len(caught) == 1
    expected = model(counted, feature_store=None).fit(X, Y)
    assert np.array_equal(features.coef_, expected.coef_)
    monkeypatch.undo()
    clone(features).fit(X, Y)  # there is room again
    start = passes(counted)
    clone(features).fit(X, Y)
    assert passes(counted) == start


def test_read_only_store_is_read(counted, written, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sklearn_gradfeat.features._environment.file_lock", denied)
    features = refit(counted, written)
    assert passes(counted) == 24
    features.predict(X + 1)
    features.predict(X + 1)
    assert passes(counted) == 72
    with pytest.raises(PermissionError, match="There is no feature store and none can be made"):
        refit(counted, written / "new")


@pytest.mark.skipif(os.name == "nt", reason="Windows does not delete a file that is open")
def test_deleted_store_starts_anew(counted, path):
    features = refit(counted, path)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    clone(features).fit(X, Y)
    clone(features).fit(X, Y)
    assert passes(counted) == 48


def test_same_directory_by_another_name(path):
    store = disk_store(path)
    (path.parent / "link").symlink_to(path)
    assert disk_store(path.parent / "link") is store
    assert disk_store(str(path)) is store


@fork
@FORKS
def test_larger_store_of_another_process_is_followed(path):
    owner = Owner()
    with config_context(store_bytes=2**20):
        store = disk_store(path)

    def grow():
        set_config(store_bytes=2**24)
        store.add(key(owner), names(0), chunk(3 * 2**20), ())

    os.waitpid(in_child(grow), 0)
    assert None not in store.find(key(owner), names(0))
    assert None not in store.find(key(owner), names(0))


def sample(start):
    return [start.to_bytes(8, "big") + bytes([i]) * 8 for i in range(4)]


@fork
@FORKS
def test_killed_writer_leaves_a_whole_store(path, tmp_path):
    store, owner, log = disk_store(path), Owner(), tmp_path / "log"

    def write():
        for start in range(10**9):
            tensors = (torch.full((4, 5000), start, dtype=torch.int32),)
            with store.computing(key(owner)):
                store.add(key(owner), sample(start), HeldChunk(tensors), ())
            with log.open("ab") as file:
                file.write(b".")

    for seed in range(8):
        log.unlink(missing_ok=True)
        child = in_child(write)
        while not log.exists():
            time.sleep(0.01)
        time.sleep(np.random.default_rng(seed).uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        _disk._stores.popitem()[1]._environment.close()
        store = disk_store(path)
        for start in range(log.stat().st_size):
            found = store.find(key(owner), sample(start))
            assert None not in found
            (taken,) = Boundary(found).take(slice(None))
            assert torch.equal(taken, torch.full((4, 5000), start, dtype=torch.int32))
        with store.computing(key(owner)):  # its locks are free
            store.add(key(owner), names(seed * 4), chunk(400), ())
        assert None not in store.find(key(owner), names(seed * 4))
