"""Model files: layouts of arrays, atomic and verified writing, and files from strangers."""

import json
import os
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch

import sklearn_gradfeat.io._archive as archive
from sklearn_gradfeat import GradientFeatureClassifierCV, load
from sklearn_gradfeat.io._archive import (
    NotStorableError,
    digest,
    pack,
    read_archive,
    unpack,
    write_archive,
)
from tests.tiny import NET, X, Y, estimator, tiny_net

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


# --- strangers --------------------------------------------------------------------------------


def forge(path, change=lambda document, arrays: None, text=None):
    """Change a file, with a right digest: it is no signature."""
    document, arrays = read_archive(path)
    change(document, arrays)
    text = json.dumps(document) if text is None else text(json.dumps(document))
    metadata = {"sklearn_gradfeat": text, "digest": digest(arrays, text)}
    path.write_bytes(archive_save(arrays, metadata))


def raw(path, header, body=b""):
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def set_in(*keys, value):
    def change(document, arrays):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


def with_layers(layers, scales):
    """Return the change of a document that gives it activation layers."""

    def change(document, arrays):
        document["extractor"] |= {"layers": layers, "scales": scales}

    return change


def without_layers(document, arrays):
    """Let a document lack the layers that its parameter promises."""
    document["parameters"]["activation_layer"] = ["3"]
    del document["extractor"]["layers"]


def test_machine_of_the_reader_is_not_chosen_by_the_file(tmp_path, saved):
    victim = tmp_path / "victim"
    forge(saved, set_in("parameters", "feature_store", value=str(victim)))
    forge(saved, set_in("parameters", "device", value={"device": "cuda:3"}))
    loaded = load(saved, NET)
    loaded.predict(X)
    assert (loaded.feature_store, loaded.device) == ("auto", "auto")
    assert not victim.exists()
    loaded = load(saved, NET, feature_store=victim, device="cpu")
    assert (loaded.feature_store, loaded.device) == (victim, "cpu")


def test_file_has_no_path_or_device_of_the_writer(path, tmp_path):
    estimator(feature_store=tmp_path / "secret", device="cpu").fit(X, Y).save(path)
    assert b"secret" not in path.read_bytes()
    assert not {"feature_store", "device"} & set(read_archive(path)[0]["parameters"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, a: d["attributes"].pop("sample_shape_"), "lacks 'sample_shape_'"),
        (lambda d, a: d.pop("versions"), "its header lacks 'versions'"),
        (set_in("estimator", value=[]), "which this version"),
        (set_in("backbone", value=""), "wrong value of 'backbone'"),
        (set_in("backbone", "name", value=3), "wrong value of 'name'"),
        (set_in("backbone", "dtype", value="save"), "wrong value of 'dtype'"),
        (set_in("extractor", "dtype", value=[]), "wrong value of 'dtype'"),
        (set_in("extractor", "negative_slope", value="x"), "negative_slope"),
        (set_in("extractor", "layers", value=["3", "3"]), "wrong value of 'layers'"),
        (set_in("extractor", "layers", value=[]), "wrong value of 'layers'"),
        (set_in("extractor", "scales", value=[1.0]), "wrong value of 'scales'"),
        (set_in("extractor", "rounds", value=1), "wrong value of 'rounds'"),
        (with_layers(["1", "3"], [1.0]), "wrong value of 'scales'"),
        (with_layers(["3"], [0.0]), "wrong value of 'scales'"),
        (with_layers(["3"], [float("nan")]), "wrong value of 'scales'"),
        (with_layers(["3"], [10**400]), "wrong value of 'scales'"),
        (without_layers, "extractor lacks 'layers'"),
        (set_in("parameters", "activation_layer", value={"tuple": [3]}), "'activation_layer'"),
        (set_in("parameters", "x", value=1), "no parameter 'x'"),
        (set_in("parameters", "alpha", value="x"), "'alpha' parameter"),
        (set_in("parameters", "backbone", value=3), "wrong value of 'backbone'"),
        (set_in("parameters", "activation_layer", value="a" * 10**6), "'activation_layer'"),
        (set_in("attributes", "feature_store", value="/victim"), "'feature_store', which is no"),
        (set_in("attributes", "predict", value=1), "'predict', which is no"),
        (set_in("attributes", "_extractor", value=1), "'_extractor', which is no"),
        (set_in("attributes", "coef_", value=1), "wrong value of 'coef_'"),
        (set_in("attributes", "coef_", value={"array": "probe"}), "shapes that do not fit"),
        (set_in("attributes", "classes_", value={"strings": ["a"], "dtype": "O"}), "do not fit"),
        (set_in("attributes", "classes_", value={"array": "none"}), "an unknown kind"),
        (lambda d, a: a.update({"attributes.classes_": np.full(3, np.nan)}), "are not distinct"),
        (
            set_in("attributes", "classes_", value={"strings": ["a", "b", "a"], "dtype": "O"}),
            "classes_ are not distinct numbers",
        ),
        (set_in("attributes", "n_iter_", value={"dict": [[[], 1]]}), "keys that cannot be hashed"),
        (set_in("attributes", "n_iter_", value={"dict": [1]}), "without pairs"),
        (set_in("attributes", "n_iter_", value={"device": "nonsense"}), "name of a device"),
        (
            set_in("parameters", "alpha", value={"splitter": "KFold", "arguments": {"dict": []}}),
            "'alpha' parameter",
        ),
        (
            set_in("parameters", "alpha", value={"splitter": "KFold", "arguments": 3}),
            "no valid arguments of KFold",
        ),
        (set_in("probe", value={"array": "attributes.coef_"}), "wrong value of 'probe'"),
        (set_in("backbone", "example", "shape", value=[2, 1, 8, 2**40]), "is too large"),
        (set_in("backbone", "example", "stride", value=[2**40, 64, 8, 1]), "gaps in memory"),
        (set_in("backbone", "example", "stride", value=[-1, 64, 8, 1]), "wrong value of 'stride'"),
        (set_in("attributes", "sample_shape_", value=[2**40]), "sample_shape_=.* is too large"),
        (
            set_in("attributes", "classes_", value={"strings": ["a"] * 3, "dtype": "<U250000000"}),
            "its header cannot be read",
        ),
        (
            set_in("attributes", "classes_", value={"strings": [["a"], "b"], "dtype": "O"}),
            "array of strings",
        ),
    ],
)
def test_documents_that_are_made_up(saved, change, message):
    forge(saved, change)
    with pytest.raises(ValueError, match=message):
        load(saved, NET)


@pytest.mark.parametrize(
    "text",
    [
        lambda text: "[" * 100_000 + "]" * 100_000,
        lambda text: text.replace('"format": 2', '"format": 1e999'),
        lambda text: text.replace('"format": 2', '"format": ' + "9" * 5000),
        lambda text: text.replace('"format": 2', '"format": true'),
        lambda text: '{"format": 2, "a": [' + "1," * 10**6 + "1]}",
        lambda text: "{}",
    ],
    ids=["deep", "infinite", "long", "type", "many", "empty"],
)
def test_headers_that_are_made_up(saved, text):
    forge(saved, text=text)
    with pytest.raises(ValueError, match=r"header cannot be read|damaged, or no file"):
        load(saved, NET)


def test_deep_values(saved):
    value = 1
    for _ in range(400):
        value = {"tuple": [value]}
    forge(saved, set_in("attributes", "other_", value=value))
    try:
        load(saved, NET)
    except ValueError as error:
        assert "damaged" in str(error)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"__metadata__": 3}',
        b'{"__metadata__": {"sklearn_gradfeat": 3}}',
        b'{"__metadata__": {"sklearn_gradfeat": "{}"}, "a": 3}',
        b'{"__metadata__": {"sklearn_gradfeat": "{}"}, "a": {"dtype": "F64", "shape": [1], '
        b'"data_offsets": [0, 9]}}',
        b'{"__metadata__": {"sklearn_gradfeat": "{}"}, "a": {"dtype": "F64", "shape": '
        b'[0, 9223372036854775807, 9], "data_offsets": [0, 0]}}',
        b'{"__metadata__": {"sklearn_gradfeat": "{}"}, "a": {"dtype": "F64", "shape": '
        b'[1000000000000], "data_offsets": [0, 8000000000000]}}',
        b'{"__metadata__": {"sklearn_gradfeat": "{}"}, "a": {"dtype": "U8", "shape": [true], '
        b'"data_offsets": [0, 1]}}',
        b'{"__metadata__": {"sklearn_gradfeat": "{}"}, "a": {"dtype": "BF16", "shape": [1], '
        b'"data_offsets": [0, 2]}}',
        b'{"a":' + b"[]," * 10**6,
        ('{"a":"' + "\U0001f600" + "a" * 10**7 + '"}').encode(),
    ],
    ids=range(13),
)
def test_containers_that_are_made_up(path, header):
    raw(path, header)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"damaged|not of a model"):
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 4 * len(header) + 2**21
    tracemalloc.stop()
    raw(path, header[:0], b"1")
    with pytest.raises(ValueError, match="damaged"):
        load(path)


def test_equal_hashes_take_linear_time():
    prime = 2**61 - 1
    pairs = [[i * prime, 0] for i in range(20_000)]
    start = time.perf_counter()
    with pytest.raises(ValueError, match="too many equal hashes"):
        unpack({"dict": pairs}, {})
    assert time.perf_counter() - start < 2


def test_pipes_and_folders_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="must be a regular file"):
            load(path)
