"""Stores on disk beside files of others, on full disks, on damaged disks, and with no room."""

import errno
import json
import os
import resource
import signal
import warnings
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from sklearn_gradfeat import config_context
from sklearn_gradfeat.cache import _disk
from sklearn_gradfeat.cache._disk import DiskStore, disk_store
from sklearn_gradfeat.cache._store import HeldChunk
from tests.cache.stores import FORKS, Owner, chunk, fork, in_child, key, model, names, passes
from tests.tiny import X, Y

posix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and flock")


def refit(counted, path):
    return model(counted, feature_store=path).fit(X, Y)


def close(path):
    _disk._stores.popitem()[1]._environment.close()
    return path


# --- files of others --------------------------------------------------------------------------


def test_files_of_others_stay_as_they_are(counted, path):
    path.mkdir()
    others = ["state", f"state.{os.getpid()}", "write.lock", "data.mdb", "features", "lock.mdb"]
    for name in others:
        (path / name).write_text("precious")
    features = refit(counted, path)
    close(path)
    refit(counted, path).predict(X)
    assert passes(counted) == 24
    assert {name: (path / name).read_text() for name in others} == dict.fromkeys(others, "precious")
    new = {file.name for file in path.iterdir()} - set(others)
    assert {name for name in new if not name.endswith(".lock")} == {
        "features.mdb",
        "features.mdb-lock",
    }
    assert np.array_equal(features.coef_, refit(counted, path).coef_)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("features.mdb", "cannot be used: not an LMDB data file"),
        ("features.mdb-lock", "'features.mdb-lock' beside it is not a file of LMDB"),
    ],
)
def test_file_of_another_under_our_name(path, name, message):
    path.mkdir()
    (path / name).write_text("precious" * 1000)
    with pytest.raises(ValueError, match=message):
        disk_store(path)
    assert (path / name).read_text() == "precious" * 1000


@pytest.mark.parametrize("name", ["features.mdb", "features.mdb-lock"])
def test_directory_under_our_name(path, name):
    (path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"not a regular file.* another path as feature_store"):
        disk_store(path)


@posix
@pytest.mark.parametrize("name", ["features.mdb", "features.mdb-lock", "write.lock"])
def test_pipe_under_our_name(path, name):
    path.mkdir()
    os.mkfifo(path / name)
    with pytest.raises((ValueError, OSError), match=r"not a regular file"):
        disk_store(path)


@posix
def test_links_in_the_place_of_locks_are_refused(path, tmp_path):
    path.mkdir()
    (path / "write.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"The feature store does not exist and cannot be created"):
        disk_store(path)
    (path / "write.lock").unlink()
    (path / "features.mdb-lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="not a regular file"):
        disk_store(path)
    assert not (tmp_path / "elsewhere").exists()


@posix
def test_lock_that_cannot_be_opened_computes(counted, path):
    features = refit(counted, path)
    locks = [file for file in path.glob("*.lock") if file.name != "write.lock"]
    assert len(locks) == 1
    locks[0].unlink()
    locks[0].mkdir()
    with pytest.warns(UserWarning, match="accepts no more samples"):
        again = model(counted, feature_store=path).fit(X + 1, Y)
    assert again.coef_.shape == features.coef_.shape


@pytest.mark.parametrize(
    "stamp",
    [b"[" * 100_000, b"1e999", b"[1]", b"\xff", json.dumps({"name": 1, "version": []}).encode()],
    ids=["deep", "infinite", "list", "binary", "types"],
)
def test_stamp_of_another(path, stamp):
    path.mkdir()
    with lmdb.open(str(path / "features.mdb"), subdir=False) as other, other.begin(write=True) as t:
        t.put(b"format", stamp)
    with pytest.raises(ValueError, match="it was not made by sklearn-gradfeat"):
        disk_store(path)


# --- paths ------------------------------------------------------------------------------------


def test_only_the_directory_itself_is_created(path):
    with pytest.raises(FileNotFoundError, match="or of a new one in an existing directory"):
        disk_store(path / "a" / "b")
    assert not path.exists()


def test_home_is_not_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("~", "~/store", Path("~/store")):
        with pytest.raises(ValueError, match=r"'~', which is not expanded .*expanduser"):
            disk_store(path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"feature_store is an empty path\. .*'\.' is the current"):
        disk_store("")


# --- room -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1000])
def test_store_without_room_writes_nothing(counted, path, size):
    with config_context(store_bytes=size):
        refit(counted, path).predict(X)
    assert not path.exists()


@pytest.mark.parametrize("size", [2**15, 100_000])
def test_small_bounds_hold(path, size):
    owner = Owner()
    with config_context(store_bytes=size):
        store = disk_store(path)
        with pytest.warns(UserWarning, match="accepts no more samples"):
            for start in range(0, 200, 4):
                store.add(key(owner), names(start), chunk(4000), ())
        assert None not in store.find(key(owner), names(0)) or size == 2**15
    assert (path / "features.mdb").stat().st_size <= size


@fork
@FORKS
@pytest.mark.parametrize("room", [0, 4096, 10_000, 131_072 + 4096, 160_000])
def test_full_disk_leaves_no_part_of_a_store(path, room):
    owner = Owner()

    def create():
        # This limit fails like a full disk: at any byte of a file, with an errno.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, -1))
        try:
            DiskStore(path).add(key(owner), names(0), HeldChunk(large), ())
        except OSError as error:
            assert error.errno == errno.EFBIG

    large = (torch.zeros(4, 10**5, dtype=torch.uint8),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert os.waitpid(in_child(create), 0)[1] == 0
    store = disk_store(path)
    assert not list(path.glob("features.mdb.*"))
    store.add(key(owner), names(4), HeldChunk(large), ())
    assert None not in store.find(key(owner), names(4))


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_flips_that_keep_size_and_time(counted, path, seed):
    expected = refit(counted, path)
    file = close(path) / "features.mdb"
    content, status = file.read_bytes(), file.stat()
    rng = np.random.default_rng(seed)
    for _ in range(4):
        damaged = bytearray(content)
        page = int(rng.integers(len(content) // 4096)) * 4096
        damaged[page + int(rng.integers(32))] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The feature store .* holds damaged records")
                features = refit(counted, path)
        except ValueError as error:
            assert "Delete the file" in str(error)
        else:
            close(path)
            np.testing.assert_allclose(features.coef_, expected.coef_, rtol=1e-3, atol=1e-5)


def test_record_that_is_gone(path):
    store, owner = disk_store(path), Owner()
    kept = store.add(key(owner), names(0), chunk(400), ())
    with store._environment.begin(write=True) as transaction:
        transaction.delete(kept.number)
    with (
        pytest.raises(ValueError, match=r"damaged: a record is missing.* Delete the file"),
        kept.opened(),
    ):
        pass
