"""Model files: layouts of arrays, atomic and verified writing, and files from strangers."""

import os

import numpy as np
import pytest
import torch

import sklearn_gradfeat.io._archive as archive
from sklearn_gradfeat import GradientFeatureClassifierCV, load
from sklearn_gradfeat.io._archive import NotStorableError, pack, read_archive, write_archive
from tests.tiny import NET, X, Y, estimator, tiny_net


@pytest.fixture(scope="module")
def fitted():
    return estimator().fit(X, Y)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(fitted, path):
    fitted.save(path)
    return path


# --- layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3).T,
        np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4)),
        np.arange(10)[::-1],
        np.arange(10, dtype=np.float32)[::3],
        np.broadcast_to(np.float64(3), (2, 3)),
        np.arange(4, dtype=">f4"),
        np.array(7.0),
        np.empty((0, 3)),
        np.array([[True, False]]).T,
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_arrays_of_every_layout(array, path):
    arrays = {"raw": array.astype(array.dtype.newbyteorder("="), copy=False)}
    packed = pack(array, "packed", arrays)
    write_archive(path, {"value": packed}, arrays)
    _, found = read_archive(path)
    for value in found.values():
        assert value.shape == array.shape
        assert np.array_equal(value, array)


def test_network_with_channels_last(path):
    network = tiny_net().to(memory_format=torch.channels_last)
    model = estimator(network).fit(X, Y)
    model.save(path)
    loaded = load(path, tiny_net().to(memory_format=torch.channels_last))
    assert np.array_equal(loaded.predict_proba(X), model.predict_proba(X))
    loaded = load(path, tiny_net)
    np.testing.assert_allclose(loaded.predict_proba(X), model.predict_proba(X), rtol=1e-5)


def test_reversed_penalties(path):
    rows = X.reshape(len(X), -1)[:, :5].astype(np.float64)
    model = GradientFeatureClassifierCV(
        alphas=np.logspace(-2, 0, 2)[::-1], gradient_alphas=[0.1], cv=2, tol=0.1
    ).fit(rows, Y)
    model.save(path)
    loaded = load(path)
    assert np.array_equal(loaded.predict_proba(rows), model.predict_proba(rows))
    assert np.array_equal(loaded.alphas, model.alphas)


def test_keys_that_look_alike(path):
    arrays = {}
    packed = pack({1: np.ones(2), "1": np.zeros(2)}, "value", arrays)
    assert len(arrays) == 2
    assert archive.unpack(packed, arrays)[1][0] == 1


def test_masked_array():
    with pytest.raises(NotStorableError, match="value is a masked array, whose mask"):
        pack(np.ma.masked_array([1.0, 2.0], [True, False]), "value", {})


# --- writing ----------------------------------------------------------------------------------


def wrong(arrays, metadata):
    return archive_save({name: array + 1 for name, array in arrays.items()}, metadata)


archive_save = archive.save


@pytest.mark.parametrize("save", [wrong, lambda arrays, metadata: b"\0" * 100])
def test_save_reads_what_it_wrote(save, saved, fitted, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(archive, "save", save)
    with pytest.raises(OSError, match=r"not saved, since the file that was written cannot be read"):
        fitted.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_link_to_a_file_stays(saved, fitted):
    link = saved.with_name("link")
    link.symlink_to(saved.name)
    before = saved.stat().st_ino
    fitted.save(link)
    assert link.is_symlink()
    assert saved.stat().st_ino != before
    load(link, NET)


def test_long_name(tmp_path, fitted):
    path = tmp_path / ("m" * 243 + ".safetensors")
    fitted.save(path)
    load(path, NET)


def test_devices_pipes_and_folders_are_not_replaced(tmp_path, fitted):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, "/dev/null"):
        with pytest.raises(OSError, match="not a regular file"):
            fitted.save(path)
    assert pipe.is_fifo()
