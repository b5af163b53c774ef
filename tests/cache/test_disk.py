"""The store on disk: shared by processes, and safe against damage, full disks and kills."""

import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from sklearn.base import clone

import sklearn_gradfeat
from sklearn_gradfeat import config_context, set_config
from sklearn_gradfeat.cache import _disk, _disk_file
from sklearn_gradfeat.cache._disk import DiskStore, disk_store
from sklearn_gradfeat.cache._disk_record import decode, encode, read_layout
from sklearn_gradfeat.cache._store import Boundary, HeldChunk
from tests.cache.stores import FORKS, Owner, chunk, fork, in_child, key, model, names, passes
from tests.tiny import X, Y

ROOT = Path(sklearn_gradfeat.__file__).parents[1]


@pytest.fixture
def closed_store(counted, path):
    """Return a directory with a store that nobody has open."""
    refit(counted, path)
    _disk._stores.popitem()[1]._environment.close()
    return path


def refit(counted, path):
    return model(counted, feature_store=path).fit(X, Y)


def test_later_process_finds_all_samples(counted, path):
    features = model(counted, feature_store=path).fit(X, Y)
    code = (
        "import pickle, sys; import tests.counting; from tests.tiny import X, Y\n"
        "features = pickle.load(sys.stdin.buffer)\n"
        "features.predict(X); features.fit(X, Y)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, input=pickle.dumps(features)
    )
    assert passes(counted) == 24


def test_truncated_file_raises(counted, closed_store):
    file = closed_store / "features.mdb"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"cannot be used: .* Delete the file"):
        refit(counted, closed_store)
    file.unlink()
    refit(counted, closed_store)
    assert passes(counted) == 48


@pytest.mark.parametrize("what", ["text", "zeros", "head"])
def test_file_that_is_not_a_store_raises(counted, closed_store, what):
    file = closed_store / "features.mdb"
    content = bytearray(file.read_bytes())
    content[: 4096 * 2 if what == "head" else None] = os.urandom(8192)
    file.write_bytes({"text": b"hello" * 5000, "zeros": bytes(50_000), "head": content}[what])
    with pytest.raises(ValueError, match=r"cannot be used: .* Delete the file"):
        refit(counted, closed_store)


@pytest.mark.parametrize("seed", range(8))
def test_random_page_never_gives_wrong_results(counted, closed_store, seed):
    rng, file = np.random.default_rng(seed), closed_store / "features.mdb"
    content = np.fromfile(file, np.uint8)
    page = int(rng.integers(2, len(content) // 4096)) * 4096
    content[page : page + 4096] = rng.integers(0, 256, 4096)
    content.tofile(file)
    expected = model(counted, feature_store=None).fit(X, Y)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The feature store .* holds damaged records")
            features = refit(counted, closed_store)
    except ValueError as error:
        assert "Delete the file" in str(error)
    else:
        np.testing.assert_allclose(features.coef_, expected.coef_, rtol=1e-3, atol=1e-5)


def test_damaged_record_is_computed_again(counted, closed_store):
    file = closed_store / "features.mdb"
    content = bytearray(file.read_bytes())
    place = max(range(0, len(content), 4096), key=lambda i: len(set(content[i : i + 4096])))
    content[place + 2000] ^= 1  # within the numbers, which fill most of the file
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="holds damaged records: their samples are computed"):
        features = refit(counted, closed_store)
    assert passes(counted) == 48
    features.predict(X)
    clone(features).fit(X, Y)
    assert passes(counted) == 48


def test_other_database_raises(path):
    path.mkdir()
    with lmdb.open(str(path / "features.mdb"), subdir=False) as other, other.begin(write=True) as t:
        t.put(b"something", b"else")
    with pytest.raises(ValueError, match="it was not made by sklearn-gradfeat"):
        disk_store(path)


def test_newer_format_raises(closed_store):
    with (
        lmdb.open(str(closed_store / "features.mdb"), subdir=False) as newer,
        newer.begin(write=True) as transaction,
    ):
        transaction.put(b"format", b'{"name": "sklearn-gradfeat features", "version": 2}')
    with pytest.raises(ValueError, match=r"its format is 2, this version reads 1\. Delete"):
        disk_store(closed_store)


def test_path_of_a_file_raises(counted, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="The feature store does not exist and cannot be created"):
        model(counted, feature_store=tmp_path / "file").fit(X, Y)


def test_lmdb_not_installed(counted, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match=r"pip install 'sklearn-gradfeat\[disk\]'"):
        model(counted, feature_store=path).fit(X, Y)


@pytest.mark.parametrize("mark", [torch.Tensor.conj, torch._neg_view])
def test_record_of_a_tensor_that_is_only_marked(mark):
    tensor = mark(torch.view_as_complex(torch.arange(8.0).reshape(2, 2, 2)))
    record = memoryview(encode(names(0, 2), (tensor,)))
    assert torch.equal(decode(record, read_layout(record))[0], tensor)


def test_full_store_warns_once_and_computes(counted, path):
    images, y = np.tile(X, (20, 1, 2, 2)), np.tile(Y, 20)
    images += np.arange(len(images), dtype=np.float32)[:, None, None, None] / len(images)
    features = model(counted, feature_store=path, batch_size=64)
    with config_context(store_bytes=2**20):
        with pytest.warns(UserWarning, match="accepts no more samples .*: others are computed"):
            features.fit(images, y)
        assert (path / "features.mdb").stat().st_size <= 2**20
        start = passes(counted)
        clone(features).fit(images, y)
    assert 0 < passes(counted) - start < len(images)
    expected = model(counted, feature_store=None).fit(images, y)
    np.testing.assert_allclose(features.coef_, expected.coef_, rtol=1e-3, atol=1e-5)


def test_full_disk_warns_once_and_computes(counted, path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_disk, "write_lock", full)
    features = model(counted, feature_store=path, batch_size=8)
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        features.fit(X, Y)
    assert len(caught) == 1
    assert hasattr(features, "coef_")


def test_full_disk_without_a_store(counted, path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)  # not on every system
    with pytest.warns(UserWarning, match="the disk is full: all samples are computed") as caught:
        features = model(counted, feature_store=path).fit(X, Y)
    assert len(caught) == 1
    expected = model(counted, feature_store=None).fit(X, Y)
    assert np.array_equal(features.coef_, expected.coef_)
    monkeypatch.undo()
    clone(features).fit(X, Y)  # there is room again
    start = passes(counted)
    clone(features).fit(X, Y)
    assert passes(counted) == start


def test_read_only_store_is_read(counted, closed_store, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_disk_file, "file_lock", denied)
    features = refit(counted, closed_store)
    assert passes(counted) == 24
    features.predict(X + 1)
    features.predict(X + 1)
    assert passes(counted) == 72
    with pytest.raises(
        PermissionError, match="The feature store does not exist and cannot be created"
    ):
        refit(counted, closed_store / "new")


@pytest.mark.skipif(os.name == "nt", reason="Windows does not delete a file that is open")
def test_deleted_store_is_created_again(counted, path):
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
def test_size_set_by_another_process_is_adopted(path):
    owner = Owner()
    large = chunk(3 * 2**20)  # not in the child, which has none of torch's threads
    with config_context(store_bytes=2**20):
        store = disk_store(path)

    def grow():
        set_config(store_bytes=2**24)
        store.add(key(owner), names(0), large, ())

    assert os.waitpid(in_child(grow), 0)[1] == 0
    assert None not in store.find(key(owner), names(0))
    assert None not in store.find(key(owner), names(0))


def sample(start):
    return [start.to_bytes(8, "big") + bytes([i]) * 8 for i in range(4)]


@fork
@FORKS
def test_killed_writer_leaves_a_valid_store(path, tmp_path):
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


def test_draft_that_a_kill_left_is_removed(path):
    path.mkdir()
    for name in ("a" * 32, "b"):
        (path / f"features.mdb.{name}").touch()
    disk_store(path)
    assert {file.name for file in path.glob("features.mdb.*")} == {"features.mdb.b"}


@fork
@FORKS
def test_killed_readers_leave_room_for_others(path):
    def read_and_die():
        with DiskStore(path).reading():
            os.kill(os.getpid(), signal.SIGKILL)

    def read_for_ever():
        with DiskStore(path).reading():
            (path / "reads").touch()
            time.sleep(60)

    reader = in_child(read_for_ever)
    while not (path / "reads").exists():
        time.sleep(0.01)
    try:
        for _ in range(4):
            os.waitpid(in_child(read_and_die), 0)
        lines = DiskStore(path)._environment.readers().splitlines()
        assert [int(line.split()[0]) for line in lines[1:]] == [reader]
    finally:
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)
