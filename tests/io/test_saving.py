"""Files and pickles of fitted models."""

import io
import json
import os
import pickle
import stat
import struct
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn

import sklearn_gradfeat
from sklearn_gradfeat import GradientFeatureClassifier, MaskedMean, load
from sklearn_gradfeat.io._archive import NotStorableError, pack, unpack
from tests.tiny import NET, X, Y, data, estimator, tiny_net

DATA = Path(__file__).parent / "data"
LABELS = np.stack([Y == 0, Y > 0, Y != 1], 1).astype(int)
ROWS = X.reshape(len(X), -1)[:, :5].astype(np.float64)


def double(batch):
    return 2 * batch


def triple(batch):
    return 3 * batch


def random_net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def lazy_net():
    return nn.Sequential(nn.LazyConv2d(3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


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


def rewrite(path, change):
    """Change the document in a file, or its arrays, without keeping its digest right."""
    with safe_open(path, framework="numpy") as archive:
        metadata = archive.metadata()
    document, arrays = json.loads(metadata["sklearn_gradfeat"]), load_file(path)
    change(document, arrays)
    save_file(arrays, path, {**metadata, "sklearn_gradfeat": json.dumps(document)})


def same(model, loaded, X=X):
    return np.array_equal(model.predict_proba(X), loaded.predict_proba(X))


class Encoder(nn.Module):
    """A language model that averages nothing where the mask is empty."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = nn.Embedding(200, 6), nn.Linear(6, 6)

    def forward(self, ids, attention_mask):
        return self.mix(self.table(ids)).tanh()


class Logarithm(nn.Module):
    """Not defined for what a file is checked with."""

    def forward(self, x):
        return (x - 5).log()


# --- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["full", "activation", "gradient"])
def test_predictions_are_the_same_to_the_last_bit(features, path):
    model = estimator(features=features).fit(X, Y)
    model.save(path)
    loaded = load(path, tiny_net)
    assert same(model, loaded)
    assert np.array_equal(loaded.predict(X), model.predict(X))
    for name, value in vars(model).items():
        if name.endswith("_") and name != "gradient_coef_":
            assert np.array_equal(getattr(loaded, name), value), name
            assert type(getattr(loaded, name)) is type(value), name
    assert list(loaded.gradient_coef_) == list(model.gradient_coef_)


@pytest.mark.parametrize(
    "y",
    [
        Y,
        Y.astype(np.int8),
        Y.astype(np.uint16),
        Y > 0,
        2.0 * Y,
        np.array(["cat", "dog", "Größe"])[Y],
        np.array(["cat", "dog", "Größe"], dtype=object)[Y],
        pd.Series(np.array(["cat", "dog", "eel"])[Y], dtype="string"),
        pd.Series(np.array(["cat", "dog", "eel"])[Y], dtype="category"),
        LABELS,
    ],
    ids=lambda y: f"{getattr(y, 'dtype', '')}-{np.ndim(y)}",
)
def test_every_kind_of_label(y, path):
    model = estimator(features="activation").fit(X, y)
    model.save(path)
    loaded = load(path, NET)
    assert loaded.classes_.dtype == model.classes_.dtype
    assert np.array_equal(loaded.predict(X), model.predict(X))
    assert same(model, loaded)


def test_random_network_needs_nothing(path):
    frame = pd.DataFrame(ROWS, columns=list("abcde"))
    model = GradientFeatureClassifier(alpha=0.1, tol=1e-2, class_weight={0: 2, 1: 1, 2: 1.5})
    model.fit(frame, Y).save(path)
    loaded = load(path)
    assert same(model, loaded, frame)
    assert list(loaded.feature_names_in_) == list("abcde")
    assert loaded.n_features_in_ == 5
    assert loaded.get_params() == model.get_params()


def test_weights_of_a_named_network_are_not_stored(path, monkeypatch):
    network = tiny_net()
    monkeypatch.setattr(
        "sklearn_gradfeat.backbones._resolve.load_named", lambda name: (network, double)
    )
    model = estimator("torchvision/tiny").fit(X, Y)
    model.save(path)
    assert not any(name.startswith("backbone") for name in load_file(path))
    loaded = load(path)
    assert loaded.backbone == "torchvision/tiny"
    assert same(model, loaded)
    assert same(model, load(path, NET, preprocess=double))
    with pytest.raises(ValueError, match=r"fitted with the transform .*double.*`preprocess`"):
        load(path, NET)
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="weights are not those that the model was fitted on"):
        load(path)


@pytest.mark.parametrize("backbone", [tiny_net, lazy_net])
def test_factory(backbone, path):
    model = estimator(backbone).fit(X, Y)
    model.save(path)
    loaded = load(path, backbone)
    assert loaded.backbone is backbone
    assert same(model, loaded)


def test_module_receives_the_weights_and_stays_as_it_is(saved, fitted):
    torch.manual_seed(1)
    other = nn.Sequential(
        *[type(layer)(1, 4, 3) if i == 0 else layer for i, layer in enumerate(tiny_net())]
    )
    before = other[0].weight.clone()
    loaded = load(saved, other)
    assert same(fitted, loaded)
    assert torch.equal(other[0].weight, before)
    assert torch.equal(loaded.backbone[0].weight, NET[0].weight)
    assert np.array_equal(clone(loaded).fit(X, Y).coef_, fitted.coef_)


def test_module_that_is_not_captured(path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()

        def forward(self, x):
            return self.net(x) if x.sum() > -1e9 else self.net(-x)

    with pytest.warns(UserWarning, match="cannot be captured"):
        model = estimator(Branching()).fit(X, Y)
    model.save(path)
    assert same(model, load(path, Branching()))


def test_own_transform(path):
    model = estimator(preprocess=double).fit(X, Y)
    model.save(path)
    with pytest.raises(ValueError, match=r"tests.test_persistence.double.*pass it as `preprocess`"):
        load(path, NET)
    loaded = load(path, NET, preprocess=double)
    assert loaded.preprocess is double
    assert same(model, loaded)
    with pytest.raises(ValueError, match=r"`preprocess` does not fit .* than tests.*double did"):
        load(path, NET, preprocess=triple)


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_precision(precision, path):
    model = estimator(precision=precision).fit(X, Y)
    model.save(path)
    assert same(model, load(path, tiny_net))


def test_token_ids(path):
    tokens = np.random.default_rng(0).integers(0, 7, (24, 5))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 6), nn.Tanh())
    model = estimator(network).fit(tokens, Y)
    model.save(path)
    assert same(model, load(path, network), tokens)


def test_masked_tokens(path):
    tokens = np.ones((12, 2, 8), int)
    tokens[:, 0] = np.arange(96).reshape(12, 8)
    model = GradientFeatureClassifier(MaskedMean(Encoder()), alpha=0.1).fit(tokens, [0, 1] * 6)
    model.save(path)
    assert same(model, load(path, MaskedMean(Encoder())), tokens)


def test_network_of_a_restricted_domain(path):
    rows = ROWS - ROWS.min() + 6
    model = estimator(Logarithm(), features="activation").fit(rows, Y)
    model.save(path)
    assert same(model, load(path, Logarithm()), rows)


def test_path_of_a_store(path, tmp_path):
    model = estimator(feature_store=tmp_path / "store").fit(X, Y)
    model.save(path)
    assert load(path, NET).feature_store == str(tmp_path / "store")


def test_refit_of_a_factory_has_the_weights_that_were_passed(path):
    options = {"alpha": 1e-3, "random_state": 0}
    model = GradientFeatureClassifier(random_net, **options).fit(X, Y)
    model.save(path)
    again = clone(load(path, random_net())).fit(X, Y)
    assert same(model, again)


def test_layout_of_the_input_is_kept(path):
    def last(batch):
        return batch.permute(0, 3, 1, 2)

    images = np.ascontiguousarray(X.repeat(2, 1).transpose(0, 2, 3, 1))
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = estimator(network, preprocess=last).fit(images, Y)
    model.save(path)
    assert same(model, load(path, network, preprocess=last), images)


def test_device_can_be_changed(saved):
    assert load(saved, NET, device=torch.device("cpu")).device == torch.device("cpu")


def test_parameters_come_back_in_their_types(path):
    model = estimator(
        gradient_layers=("2", "0*"), alpha=np.float64(0.25), max_iter=np.int64(7), random_state=3,
        device=torch.device("cpu"), batch_size=5, class_weight={0: 1.5}, tol=0.5,
    )  # fmt: skip
    model.fit(X, Y).save(path)
    loaded = load(path, NET).get_params()
    for name, value in model.get_params().items():
        if name != "backbone":
            assert loaded[name] == value


# --- what cannot be saved --------------------------------------------------------------------


def test_unfitted(path):
    with pytest.raises(NotFittedError):
        estimator().save(path)
    assert not path.exists()


def test_parameter_that_only_pickle_can_hold(path, fitted):
    model = clone(fitted).set_params(random_state=np.random.RandomState(0)).fit(X, Y)
    with pytest.raises(
        ValueError, match=r"pickle only: parameters.random_state is Random.*set_params"
    ):
        model.save(path)
    model.set_params(random_state=None).save(path)
    assert same(model, load(path, NET))


def test_subclass(path):
    class Mine(GradientFeatureClassifier):
        pass

    with pytest.raises(TypeError, match="Mine is none of them"):
        Mine(NET, alpha=0.1, tol=0.1).fit(X, Y).save(path)


# --- mismatches ------------------------------------------------------------------------------


def test_missing_code(saved):
    with pytest.raises(ValueError, match=r"a model over torch\.nn.*Sequential.*as `backbone`"):
        load(saved)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (nn.Sequential(*NET[:2], *NET[4:]), r"lacks '2.bias', '2.weight'"),
        (
            nn.Sequential(*NET, nn.BatchNorm1d(6)),
            r"beyond those weights, '6.weight', .* and 2 more",
        ),
        (
            nn.Sequential(nn.Conv2d(1, 4, 5), *NET[1:]),
            r"'0.weight' has shape \(4, 1, 5, 5\) instead of \(4, 1, 3, 3\)",
        ),
        (nn.Sequential(*NET[:4], nn.MaxPool2d(9), nn.Flatten()), "failed on a batch of shape"),
        (nn.Sequential(*NET[:4], nn.Flatten()), "computes something else"),
        (nn.Sequential(NET[0], nn.Tanh(), *NET[2:]), "computes something else"),
    ],
    ids=["fewer", "more", "shape", "fails", "width", "function"],
)
def test_other_architecture(saved, backbone, message):
    with pytest.raises(ValueError, match=f"does not fit .*{message}"):
        load(saved, backbone.eval())


def test_other_sample_shape(saved):
    with pytest.raises(ValueError, match=r"shape \(1, 6, 6\).*fitted with samples of shape"):
        load(saved, NET).predict(X[:, :, :6, :6])


def test_transform_that_was_not_there(saved):
    with pytest.raises(ValueError, match="fitted without `preprocess`"):
        load(saved, NET, preprocess=double)


def test_newer_format(saved):
    rewrite(saved, lambda document, _: document.update(format=2))
    with pytest.raises(ValueError, match=r"has format 2.*reads formats up to 1: upgrade"):
        load(saved, NET)


def test_unknown_estimator(path, saved, monkeypatch):
    monkeypatch.setattr("sklearn_gradfeat.estimators._loading._ESTIMATORS", {"Other": None})
    with pytest.raises(ValueError, match=r"holds a GradientFeatureClassifier.*It has Other"):
        load(saved, NET)


def test_every_estimator_can_be_loaded():
    public = [getattr(sklearn_gradfeat, name) for name in sklearn_gradfeat.__all__]
    estimators = {kind.__name__ for kind in public if hasattr(kind, "save")}
    assert estimators == set(sklearn_gradfeat.estimators._loading._ESTIMATORS)


# --- damage ----------------------------------------------------------------------------------


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


def test_device_that_is_not_here(saved):
    with pytest.raises((ValueError, RuntimeError), match=r"nonsense|device"):
        load(saved, NET, device="nonsense")


def test_missing_file(path):
    with pytest.raises(FileNotFoundError):
        load(path)


# --- how it is written -----------------------------------------------------------------------


def test_failure_leaves_the_former_file(saved, fitted, monkeypatch):
    before = saved.read_bytes()

    def fail(_descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        fitted.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_file_is_replaced(saved):
    other = estimator(alpha=1.0).fit(X, Y)
    other.save(str(saved))
    assert list(saved.parent.iterdir()) == [saved]
    assert same(other, load(str(saved), NET))


def test_permissions_are_those_of_any_new_file(saved):
    plain = saved.with_name("plain")
    plain.touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


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


# --- values ----------------------------------------------------------------------------------

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


# --- formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", [1])
def test_files_of_every_format_can_be_read(format_):
    path = DATA / f"format{format_}.safetensors"
    expected = json.loads((DATA / f"format{format_}.json").read_text())
    loaded = load(path, tiny_net)
    assert list(loaded.classes_) == ["cat", "dog", "eel"]
    assert loaded.gradient_layers_ == ["2.weight", "2.bias"]
    assert loaded.get_params()["gradient_layers"] == ("2",)
    assert np.allclose(loaded.predict_proba(data(4)[0]), expected["predict_proba"], atol=1e-5)


# --- pickles ---------------------------------------------------------------------------------


def size(model):
    stream = io.BytesIO()
    joblib.dump(model, stream)
    assert len(pickle.dumps(model)) < 1.1 * len(stream.getvalue())
    return len(stream.getvalue())


def test_pickles_and_files_hold_nothing_of_the_samples(path):
    sizes, files = [], []
    for n in (24, 96):
        model = estimator().fit(*data(n))
        model.save(path)
        sizes.append(size(model))
        files.append(path.stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 500
    assert abs(files[1] - files[0]) < 500


def test_pickle_holds_the_network_once():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
        nn.Linear(4, 20000), nn.Linear(20000, 4),
    )  # fmt: skip
    model = estimator(network, gradient_layers="0").fit(X, Y)
    weights = 4 * sum(p.numel() for p in network.parameters())
    assert weights < size(model) < 1.2 * weights


@pytest.mark.parametrize("trip", [lambda model: pickle.loads(pickle.dumps(model))])
def test_unpickled_backbone_is_independent_of_the_frozen_one(trip, fitted):
    back = trip(trip(fitted))
    with torch.no_grad():
        back.backbone[0].weight.zero_()
    assert same(fitted, back)
    assert back.backbone[0].weight.requires_grad


def test_pickle_after_a_change_of_the_module():
    network = tiny_net()
    model = estimator(network).fit(X, Y)
    with torch.no_grad():
        network[0].weight.add_(1)
    back = pickle.loads(pickle.dumps(model))
    assert same(model, back)
    assert torch.equal(back.backbone[0].weight, network[0].weight)


# --- devices ---------------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize(("source", "target"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_from_device_to_device(source, target, path):
    model = estimator(device=source).fit(X, Y)
    expected = model.predict_proba(X)
    model.save(path)
    loaded = load(path, NET, device=target)
    assert np.allclose(loaded.predict_proba(X), expected, atol=1e-4)
    back = pickle.loads(pickle.dumps(model)).set_params(device=target)
    assert np.allclose(back.predict_proba(X), expected, atol=1e-4)
