"""Loading: files of other versions and of other networks, formats, devices."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

import sklearn_gradfeat
from sklearn_gradfeat import load
from sklearn_gradfeat.io._archive import read_archive
from tests.tiny import NET, X, Y, data, estimator, tiny_net


def double(batch):
    return 2 * batch


def same(model, loaded, X=X):
    return np.array_equal(model.predict_proba(X), loaded.predict_proba(X))


# --- the network ------------------------------------------------------------------------------


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
        (nn.Sequential(*NET[:4], nn.Flatten()), "other results. Its code has changed"),
        (nn.Sequential(NET[0], nn.Tanh(), *NET[2:]), "other results. Its code has changed"),
    ],
    ids=["fewer", "more", "shape", "fails", "width", "function"],
)
def test_other_architecture(saved, backbone, message):
    with pytest.raises(ValueError, match=f"does not fit .*{message}"):
        load(saved, backbone.eval())


def test_compiled_module(saved):
    compiled = torch.compile(tiny_net(), backend="eager")
    assert same(load(saved, NET), load(saved, compiled))


class Counting(nn.Module):
    """A network that counts its samples."""

    def __init__(self):
        super().__init__()
        self.net = tiny_net()
        self.register_buffer("n_seen", torch.zeros(()))

    def forward(self, x):
        self.n_seen += len(x)
        return self.net(x)


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured as a graph")
def test_network_that_counts_its_samples(path):
    model = estimator(Counting()).fit(X, Y)
    model.save(path)
    assert same(model, load(path, Counting))


def test_other_sample_shape(saved):
    with pytest.raises(ValueError, match=r"shape \(1, 6, 6\).*fitted with samples of shape"):
        load(saved, NET).predict(X[:, :, :6, :6])


def test_transform_that_was_not_there(saved):
    with pytest.raises(ValueError, match="fitted without `preprocess`"):
        load(saved, NET, preprocess=double)


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


# --- estimators -------------------------------------------------------------------------------


def test_unknown_estimator(saved, monkeypatch):
    monkeypatch.setattr("sklearn_gradfeat.estimators._load._ESTIMATORS", {"Other": None})
    with pytest.raises(ValueError, match=r"holds a GradientFeatureClassifier.*It has Other"):
        load(saved, NET)


def test_every_estimator_can_be_loaded():
    public = [getattr(sklearn_gradfeat, name) for name in sklearn_gradfeat.__all__]
    estimators = {kind.__name__ for kind in public if hasattr(kind, "save")}
    assert estimators == set(sklearn_gradfeat.estimators._load._ESTIMATORS)


# --- formats ----------------------------------------------------------------------------------


FORMAT_1 = {
    # Before head_leak, gradient_backbone and omega.
    "format_1_oldest": [
        [0.345196, 0.330961, 0.323843],
        [0.334526, 0.333193, 0.332281],
        [0.313598, 0.337658, 0.348743],
        [0.373484, 0.324124, 0.302392],
    ],
    # With the defaults of gradient_backbone, head_leak and omega.
    "format_1_plain": [
        [0.346137, 0.330787, 0.323076],
        [0.334164, 0.333378, 0.332458],
        [0.312125, 0.337978, 0.349897],
        [0.376946, 0.323142, 0.299911],
    ],
    # With head_leak=0.1.
    "format_1": [
        [0.354478, 0.330797, 0.314725],
        [0.333588, 0.334153, 0.332259],
        [0.302833, 0.337925, 0.359241],
        [0.393709, 0.322018, 0.284274],
    ],
}


@pytest.mark.parametrize("name", FORMAT_1)
def test_files_of_format_1(name, path):
    stored = Path(__file__).with_name(f"{name}.safetensors")
    loaded = load(stored, tiny_net)
    slope = 0.1 if name == "format_1" else None
    assert loaded.negative_slope == slope
    assert not {"head_leak", "gradient_backbone", "omega"} & set(vars(loaded))
    assert list(loaded.classes_) == ["cat", "dog", "eel"]
    assert np.allclose(loaded.predict_proba(data(4)[0]), FORMAT_1[name], atol=1e-5)
    loaded.save(path)
    assert read_archive(path)[0]["format"] == 2
    assert same(loaded, load(path, tiny_net))
    assert clone(loaded).fit(X, Y).negative_slope == slope


def test_newer_format(saved, monkeypatch):
    monkeypatch.setattr("sklearn_gradfeat.io._archive.FORMAT", 1)
    with pytest.raises(ValueError, match=r"has format 2.*reads formats up to 1: upgrade"):
        load(saved, NET)


# --- devices ----------------------------------------------------------------------------------


def test_device_can_be_changed(saved):
    assert load(saved, NET, device=torch.device("cpu")).device == torch.device("cpu")


def test_device_that_is_not_here(saved):
    with pytest.raises(ValueError, match="nonsense"):
        load(saved, NET, device="nonsense")


@pytest.mark.cuda
@pytest.mark.parametrize(("source", "target"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_from_device_to_device(source, target, path):
    model = estimator(device=source).fit(X, Y)
    expected = model.predict_proba(X)
    model.save(path)
    loaded = load(path, NET, device=target)
    assert np.allclose(loaded.predict_proba(X), expected, atol=1e-4)
    back = pickle.loads(pickle.dumps(model)).set_params(device=target)
    assert np.allclose(back.predict_proba(X), expected, atol=1e-4)
