"""The file format: damage, foreign files, values."""

import json
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save_file
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

from sklearn_gradfeat import load
from sklearn_gradfeat.io._archive import NotStorableError, pack, unpack
from tests.tiny import NET, X


def rewrite(path, change):
    """Change the document in a file, or its arrays, without keeping its digest right."""
    with safe_open(path, framework="numpy") as archive:
        metadata = archive.metadata()
    document, arrays = json.loads(metadata["sklearn_gradfeat"]), load_file(path)
    change(document, arrays)
    save_file(arrays, path, {**metadata, "sklearn_gradfeat": json.dumps(document)})


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated(saved, size):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged"):
        load(saved, NET)


def test_every_flipped_byte_is_noticed(saved):
    contents = saved.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(contents), 60):
        changed = bytearray(contents)
        changed[place] ^= 1
        saved.write_bytes(changed)
        with pytest.raises(ValueError, match=r"damaged|not of a model|has format"):
            load(saved, NET)


@pytest.mark.parametrize(
    "change",
    [
        lambda document, _: document["parameters"].update(alpha=2),
        lambda _, arrays: arrays["attributes.coef_"].__setitem__(0, 0),
        lambda _, arrays: arrays.pop("attributes.omega_"),
    ],
)
def test_changed_contents(saved, change):
    rewrite(saved, change)
    with pytest.raises(ValueError, match="damaged: its contents do not match"):
        load(saved, NET)


def test_foreign_files(path, fitted):
    path.write_bytes(pickle.dumps(fitted))
    with pytest.raises(ValueError, match="no file of a saved model"):
        load(path)
    save_file({"weight": np.ones(3)}, path)
    with pytest.raises(ValueError, match="safetensors file, but not of a model"):
        load(path)
    for header in ("[]", "{", '"format"', '{"format": null}'):
        save_file({"weight": np.ones(3)}, path, {"sklearn_gradfeat": header})
        with pytest.raises(ValueError, match="header cannot be read"):
            load(path)


def test_weights_in_half_precision_are_foreign(path):
    torch_save_file({"a": torch.zeros(3, dtype=torch.bfloat16)}, path)
    with pytest.raises(ValueError, match="not of a model that was saved"):
        load(path)


def test_missing_file(path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(path)


def test_nothing_is_unpickled(saved, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("something was unpickled")

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, refuse)
    assert load(saved, NET).predict(X).shape == (24,)
    (length,) = struct.unpack("<Q", saved.read_bytes()[:8])
    header = json.loads(saved.read_bytes()[8 : 8 + length])
    assert set(header.pop("__metadata__")) == {"sklearn_gradfeat", "digest"}
    assert {entry["dtype"] for entry in header.values()} <= {"F32", "F64", "I64"}


# --- values -----------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text() | st.booleans(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(PLAIN)
@settings(deadline=None, max_examples=50)
def test_plain_values(value):
    arrays = {}
    back = unpack(json.loads(json.dumps(pack(value, "value", arrays))), arrays)
    assert repr(back) == repr(value)
    assert not arrays


@pytest.mark.parametrize("value", [object(), {1: len}, [{1}], b"bytes", np.array([object()])])
def test_values_that_are_refused(value):
    with pytest.raises(NotStorableError, match="value"):
        pack(value, "value", {})


@pytest.mark.parametrize(
    "value",
    [torch.device("cpu"), np.arange(3.0), np.array(["a", "ß"]), np.float32(0.5)],
    ids=lambda value: type(value).__name__,
)
def test_other_values(value):
    arrays = {}
    back = unpack(json.loads(json.dumps(pack(value, "value", arrays))), arrays)
    assert np.array_equal(back, value)


@pytest.mark.parametrize(
    "splitter",
    [KFold(3, shuffle=True, random_state=4), StratifiedKFold(2), GroupKFold(3)],
    ids=lambda splitter: type(splitter).__name__,
)
def test_splitters(splitter):
    back = unpack(json.loads(json.dumps(pack(splitter, "value", {}))), {})
    assert type(back) is type(splitter)
    assert vars(back) == vars(splitter)
