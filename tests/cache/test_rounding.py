"""Trunk output in bfloat16."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressorCV,
    config_context,
    load,
)
from sklearn_gradfeat.cache._disk import DiskStore
from sklearn_gradfeat.cache._rounding import rounded, unrounded
from sklearn_gradfeat.cache._sample_files import SampleFile
from sklearn_gradfeat.cache._store import MemoryStore
from tests.cache.stores import model, passes
from tests.tiny import NET, X, Y, estimator, tiny_net

ROUNDED = {"store_dtype": "bfloat16"}
TIGHT = {"precision": "float64", "tol": 1e-18, "max_iter": 1000}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_nearest_number_of_eight_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1000, generator=generator, dtype=dtype) * 10.0 ** torch.arange(-15, 35, 0.05)
    (narrow,) = rounded((z,))
    assert narrow.dtype == torch.bfloat16
    fraction, exponent = np.frexp(z.numpy())
    nearest = np.ldexp(np.rint(fraction * 2**8), exponent - 8)
    (found,) = unrounded((narrow,), dtype)
    assert found.dtype == dtype
    assert np.array_equal(found.numpy(), nearest)


def test_the_ends_of_float32_and_infinity():
    largest = torch.finfo(torch.float32).max
    top = torch.finfo(torch.bfloat16).max
    z = torch.tensor([largest, -largest, torch.inf, -torch.inf, torch.nan, 0.0])
    (narrow,) = rounded((z,))
    assert narrow[:4].tolist() == [top, -top, torch.inf, -torch.inf]
    assert narrow[4].isnan()
    assert narrow[5] == 0


def test_other_dtypes_are_not_rounded():
    z = (torch.arange(300), torch.arange(3) > 1, torch.tensor([1.001 + 1.001j]))
    assert all(map(torch.equal, rounded(z), z))


def test_numbers_beyond_float32_are_an_error():
    with pytest.raises(ValueError, match=r"beyond the range of bfloat16. Set store_dtype='auto'"):
        rounded((torch.tensor([1.0, -1e39], dtype=torch.float64),))
    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Tanh()).double()
    table = 1e39 * np.random.default_rng(0).standard_normal((24, 5))
    with pytest.raises(ValueError, match=r"store_dtype='auto', or scale X"):
        GradientFeatureClassifier(network, **ROUNDED, activation_layer=None).fit(table, Y)


@pytest.mark.parametrize("n_linearizations", [1, 2])
def test_same_model_as_for_rounded_inputs_of_the_head(n_linearizations):
    given = {**TIGHT, "alpha": 0.1, "n_linearizations": n_linearizations}
    with torch.no_grad():
        inputs = copy.deepcopy(NET[:2]).double()(torch.from_numpy(X).double())
    exact, narrow = (z.numpy() for z in (inputs, inputs.bfloat16().double()))
    found = estimator(**given, **ROUNDED, activation_layer=None).fit(X, Y)
    expected = estimator(nn.Sequential(*NET[2:]), **given, activation_layer=None).fit(narrow, Y)
    np.testing.assert_allclose(found.objective_path_[-1], expected.objective_path_[-1], rtol=1e-9)
    np.testing.assert_allclose(
        found.decision_function(X), expected.decision_function(narrow), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(found.transform(X), expected.transform(narrow), rtol=1e-12)
    other = estimator(nn.Sequential(*NET[2:]), **given, activation_layer=None).fit(exact, Y)
    gap = np.abs(found.decision_function(X) - other.decision_function(exact)).max()
    assert 1e-5 < gap < 0.01
    merged = found.merge(X, Y).decision_function(X)
    np.testing.assert_allclose(
        merged, expected.merge(narrow, Y).decision_function(narrow), rtol=1e-5, atol=1e-5
    )


PLACES = {"memory": MemoryStore, "disk": DiskStore, "file": SampleFile}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore:The output of the frozen layers takes:UserWarning")
def test_stored_bytes_halve(place, tmp_path, monkeypatch):
    owner, stored = PLACES[place], []
    name = "write" if place == "file" else "add"
    keep = getattr(owner, name)

    def noted(self, *arguments):
        given = arguments[1] if place == "file" else arguments[2].tensors
        stored.append((given[0].dtype, sum(z.nbytes for z in given)))
        return keep(self, *arguments)

    monkeypatch.setattr(owner, name, noted)
    network, sizes = tiny_net(), {}
    network[0].bias.data.fill_(0.123)  # no other test has stored its output
    for store_dtype in ("auto", "bfloat16"):
        stored.clear()
        store = {"memory": "auto", "disk": tmp_path / store_dtype, "file": None}[place]
        with config_context(memory_bytes=0 if place == "file" else "auto"):
            estimator(network, feature_store=store, store_dtype=store_dtype).fit(X, Y)
        (dtype,) = {kind for kind, _ in stored}
        sizes[dtype] = sum(size for _, size in stored)
    whole = X.shape[0] * 4 * 6 * 6 * 4
    assert sizes == {torch.float32: whole, torch.bfloat16: whole // 2}


def test_the_store_has_what_a_prediction_computes(counted, path):
    stored = model(counted, feature_store=path, **ROUNDED).fit(X, Y)
    expected = stored.decision_function(X)
    assert passes(counted) == len(X)
    alone = stored.set_params(feature_store=None).decision_function(X)
    assert passes(counted) == 2 * len(X)
    assert np.array_equal(alone, expected)


@pytest.mark.parametrize(
    "parameters", [{"features": "activation"}, {"gradient_layers": ["0", "2"]}]
)
def test_nothing_to_round(parameters):
    expected = estimator(**parameters).fit(X, Y)
    found = estimator(**parameters, **ROUNDED).fit(X, Y)
    assert np.array_equal(found.coef_, expected.coef_)
    assert np.array_equal(found.decision_function(X), expected.decision_function(X))


class Bag(nn.Module):
    """The mean of embeddings of token ids under a mask, then a layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(500, 8), nn.Linear(8, 4)

    def forward(self, x):
        ids, mask = x.unbind(1)
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        weights = mask[..., None].to(hidden)
        return (hidden * weights).sum(1) / weights.sum(1)


def test_masks_stay_integers(monkeypatch):
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.integers(257, 500, (20, 6)), np.ones((20, 6), int)], 1)
    tokens[:10, 1, 3:] = 0
    kinds, add = set(), MemoryStore.add

    def noted(self, key, names, chunk, used):
        kinds.update(z.dtype for z in chunk.tensors)
        return add(self, key, names, chunk, used)

    monkeypatch.setattr(MemoryStore, "add", noted)
    given = {"alpha": 0.1, "gradient_alpha": 0.1, "gradient_layers": ["layer"]}
    found = GradientFeatureClassifier(Bag(), **given, **ROUNDED, activation_layer=None).fit(
        tokens, np.arange(20) % 2
    )
    assert kinds == {torch.bfloat16, torch.int64}
    expected = GradientFeatureClassifier(Bag(), **given, activation_layer=None).fit(
        tokens, np.arange(20) % 2
    )
    np.testing.assert_allclose(
        found.decision_function(tokens), expected.decision_function(tokens), atol=0.02
    )


@pytest.mark.parametrize("kind", [GradientFeatureClassifierCV, GradientFeatureRegressorCV])
def test_cross_validation(kind):
    grid = {"alphas": [0.1, 1], "gradient_alphas": [0.1, 1], "cv": 2, **TIGHT}
    with torch.no_grad():
        inputs = copy.deepcopy(NET[:2]).double()(torch.from_numpy(X).double())
    narrow = inputs.bfloat16().double().numpy()
    found = kind(NET, **grid, **ROUNDED, activation_layer=None).fit(X, Y)
    expected = kind(nn.Sequential(*NET[2:]), **grid, activation_layer=None).fit(narrow, Y)
    np.testing.assert_allclose(found.scores_, expected.scores_, rtol=1e-6)
    np.testing.assert_allclose(found.predict(X), expected.predict(narrow), rtol=1e-5)


def test_a_file_keeps_the_rounding(tmp_path):
    fitted = estimator(**ROUNDED).fit(X, Y)
    fitted.save(tmp_path / "model")
    fitted.set_params(store_dtype="auto")  # of the next fit
    loaded = load(tmp_path / "model", NET)
    assert loaded.store_dtype == "bfloat16"
    assert np.array_equal(loaded.decision_function(X), fitted.decision_function(X))
    again = loaded.fit(X, Y)
    assert np.array_equal(again.coef_, fitted.coef_)


def test_an_exported_network_rounds_nothing():
    fitted = estimator(**ROUNDED).fit(X, Y)
    plain = fitted.to_torch()(torch.from_numpy(X)).numpy()
    rounded_result = fitted.predict_proba(X)
    assert not np.array_equal(plain, rounded_result)
    np.testing.assert_allclose(plain, rounded_result, atol=0.01)
