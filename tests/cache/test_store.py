"""The store in memory, and the rules of sharing that both stores follow."""

import copy
import functools
import gc
import os
import pickle
import threading
import weakref

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_predict
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, config_context, set_config
from sklearn_gradfeat.cache._disk import disk_store
from sklearn_gradfeat.cache._runner import Trunk
from sklearn_gradfeat.cache._store import Boundary, HeldChunk, MemoryStore, Place, memory_store
from tests.cache.stores import (
    FORKS,
    Owner,
    chunk,
    fork,
    in_child,
    key,
    model,
    names,
    passes,
)
from tests.counting import Halved
from tests.tiny import NET, X, Y, data, estimator, tiny_net

GRID = {"alpha": np.geomspace(1, 100, 8)}


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


def test_workers_share_among_their_tasks(counted):
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        parallel = GridSearchCV(model(counted), GRID, cv=5, n_jobs=2).fit(X, Y)
    assert passes(counted) <= 3 * len(X)  # two workers, and the fit at the end
    alone = GridSearchCV(model(counted), GRID, cv=5).fit(X, Y)
    assert alone.best_params_ == parallel.best_params_
    for i in range(5):
        split = f"split{i}_test_score"
        assert np.array_equal(alone.cv_results_[split], parallel.cv_results_[split])
    assert np.array_equal(alone.predict_proba(X), parallel.predict_proba(X))


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


def test_random_network_for_tabular_data_is_not_stored():
    before = memory_store().nbytes
    rows = X.reshape(24, -1)
    GradientFeatureClassifier(max_iter=300, alpha=1.0, random_state=0, gradient_alpha=1.0).fit(
        rows, Y
    )
    assert memory_store().nbytes == before


def test_tabular_predictions_do_not_depend_on_stored_rows(counted):
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


def edited(features):
    features.backbone[0].weight.data.mul_(2)
    return features


CHANGES = {
    "weights edited through .data": edited,
    "weights of the head": lambda f: f.backbone[2].bias.data.add_(1) is not None and f,
    "preprocess": lambda f: f.set_params(preprocess=Halved(f.preprocess.file)),
    "precision": lambda f: f.set_params(precision="float64"),
    "autocast": lambda f: f.set_params(precision="bfloat16"),
    "rounded": lambda f: f.set_params(store_dtype="bfloat16"),
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
def test_change_is_computed_again(counted, path, change):
    network = copy.deepcopy(NET) if "weights" in change else NET
    features = model(counted, network, feature_store=path).fit(X, Y)
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


@pytest.mark.filterwarnings("ignore:preprocess cannot be pickled:UserWarning")
def test_transform_without_a_hash_is_not_shared(path):
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


def test_least_recently_used_chunk_is_evicted():
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


def test_chunks_in_use_are_not_evicted():
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


def test_pickle_has_no_stored_tensors():
    images, y = data(300)
    small, large = (estimator().fit(images[:n], y[:n]) for n in (30, 300))
    assert abs(len(pickle.dumps(small)) - len(pickle.dumps(large))) < 2000


def test_consecutive_rows_are_views():
    features = HeldChunk((torch.arange(12).reshape(6, 2),))
    (taken,) = Boundary([Place(features, row) for row in (1, 2, 3, 5)]).take(slice(0, 3))
    assert taken.data_ptr() == features.tensors[0][1:].data_ptr()


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_take_equals_indexing(draw):
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


@pytest.mark.filterwarnings("ignore:preprocess cannot be pickled:UserWarning")
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
