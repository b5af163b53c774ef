"""Fits on a CUDA device, against those on the CPU."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
)
from sklearn_gradfeat.data import _ranks
from sklearn_gradfeat.inspection import SaliencyDisplay
from tests.tiny import NET, X, Y, estimator

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


def both(make, X=X, y=Y, **options):
    """Return the same estimator fitted on the CPU and on the device."""
    return [make(device=device).fit(X, y, **options) for device in ("cpu", DEVICE)]


def assert_alike(cpu, device, atol=1e-4):
    assert device.objective_path_[-1] == pytest.approx(cpu.objective_path_[-1], rel=1e-4)
    np.testing.assert_allclose(device.decision_function(X), cpu.decision_function(X), atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_linearizations": 3},
        {"activation_layer": ["1", "3"]},
        {"gradient_layers": "all"},
        {"alpha": "auto", "gradient_alpha": "auto"},
        {"gradient_alpha": math.inf},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_classifier(options):
    assert_alike(*both(lambda **o: estimator(tol=1e-8, max_iter=300, **options, **o)), atol=1e-2)


def test_sample_weight():
    weights = np.random.default_rng(0).random(len(Y))
    models = both(lambda **o: estimator(tol=1e-8, max_iter=300, **o), sample_weight=weights)
    assert_alike(*models, atol=1e-2)


def test_multilabel():
    labels = np.stack([Y == 0, Y > 0], 1).astype(int)
    assert_alike(*both(lambda **o: estimator(tol=1e-8, max_iter=300, **o), y=labels), atol=1e-2)


def test_huber():
    options = {"loss": "huber", "alpha": 0.1, "gradient_alpha": 0.1, "tol": 1e-8}
    cpu, device = both(lambda **o: GradientFeatureRegressor(NET, **options, **o), y=Y * 1.0)
    np.testing.assert_allclose(device.predict(X), cpu.predict(X), atol=1e-2)


def test_search():
    grid = {"alphas": [1e-2, 1e-1], "gradient_alphas": [1e-2, 1e-1], "cv": 3}
    cpu, device = both(lambda **o: GradientFeatureClassifierCV(NET, **grid, **o))
    np.testing.assert_allclose(device.scores_, cpu.scores_, atol=1e-3)


@pytest.mark.parametrize("n_parameters", [2, 4])
def test_batch_norms_and_attention(n_parameters):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    stem = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 8)]
    net = nn.Sequential(*stem, layer, nn.Flatten())
    options = {"alpha": 0.1, "gradient_alpha": 0.1, "tol": 1e-7, "max_iter": 200}
    layers = [name for name, _ in net.named_parameters()][-n_parameters:]
    assert_alike(
        *both(lambda **o: GradientFeatureClassifier(net, gradient_layers=layers, **options, **o)),
        atol=1e-2,
    )


def test_device_is_that_of_the_products():
    model = estimator(device="auto").fit(X, Y)
    probabilities = model.to_torch(DEVICE)(torch.from_numpy(X).to(DEVICE))
    assert probabilities.device.type == DEVICE
    np.testing.assert_allclose(probabilities.cpu(), model.predict_proba(X), atol=1e-4)


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_collectives_of_nccl(backend, tmp_path, monkeypatch):
    """One rank communicates with itself, since NCCL wants a device for every rank."""
    alone = estimator(alpha="auto", gradient_alpha="auto", device=DEVICE).fit(X, Y)
    url = f"file://{tmp_path / 'store'}"
    dist.init_process_group(backend, init_method=url, rank=0, world_size=1)
    group = _ranks._Group()
    monkeypatch.setattr(_ranks._Group, "current", group)
    try:
        found = estimator(alpha="auto", gradient_alpha="auto", device=DEVICE).fit(X, Y)
        assert group._beats.n_calls > 0
        content = torch.arange(5.0, device=DEVICE)
        assert torch.equal(group.sum(content), content)
        assert torch.equal(group.sum(content.cpu()), content.cpu())
        assert group.gather("rank") == ["rank"]
    finally:
        group.close()
        dist.destroy_process_group()
    np.testing.assert_allclose(found.predict_proba(X), alone.predict_proba(X), atol=1e-4)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(8, 8), nn.Linear(4, 3)
        self.recurrent = nn.ModuleList([nn.LSTM(8, 4, batch_first=True), nn.GRU(4, 4)])

    def forward(self, x):
        rows = self.recurrent[0](self.below(x[:, 0]).relu())[0]
        return self.above(self.recurrent[1](rows.transpose(0, 1))[0][-1])


@pytest.mark.parametrize("layers", ["recurrent.*", "below", "all"])
def test_recurrent_layers(layers):
    torch.manual_seed(0)
    net = Recurrent()
    options = {"gradient_layers": layers, "alpha": 0.1, "gradient_alpha": 0.1, "tol": 1e-7}
    assert_alike(
        *both(lambda **o: GradientFeatureClassifier(net, max_iter=200, **options, **o)), atol=1e-2
    )


MEAN = torch.full((1, 8, 8), 0.1)


@pytest.mark.parametrize(
    "preprocess",
    [
        lambda x: x - MEAN,
        lambda x: torch.from_numpy(x.numpy() - MEAN.numpy()),
        nn.Sequential(nn.BatchNorm2d(1, affine=False).eval()),
        lambda x: x - MEAN.to(x.device),
    ],
    ids=["tensor", "numpy", "module", "moves"],
)
@pytest.mark.filterwarnings("ignore:preprocess cannot be pickled")
def test_transform(preprocess, tmp_path):
    cpu, device = both(lambda **o: estimator(preprocess=preprocess, tol=1e-8, **o))
    assert_alike(cpu, device, atol=1e-2)
    if isinstance(preprocess, nn.Module):
        module = cpu.to_torch(DEVICE)
        found = module(torch.from_numpy(X).to(DEVICE))
        np.testing.assert_allclose(found.cpu(), cpu.predict_proba(X), atol=1e-4)
        device.save(tmp_path / "model")


def test_saliency():
    models = both(lambda **o: estimator(tol=1e-8, max_iter=300, **o))
    found = [SaliencyDisplay.from_estimator(model, X[:2]).saliency for model in models]
    np.testing.assert_allclose(found[1], found[0], atol=1e-2 * np.abs(found[0]).max())


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_precision(precision):
    models = both(lambda **o: estimator(precision=precision, tol=1e-8, max_iter=300, **o))
    atol = {"float32": 1e-3, "float64": 1e-6, "bfloat16": 0.3}[precision]
    np.testing.assert_allclose(*(m.decision_function(X) for m in models), atol=atol)


def test_file_of_trunk_outputs(tmp_path):
    models = [estimator(device=DEVICE, feature_store=store).fit(X, Y) for store in (None, tmp_path)]
    np.testing.assert_allclose(*(m.decision_function(X) for m in models), atol=1e-4)


@pytest.mark.parametrize(
    "above",
    [nn.Sequential(*NET[4:]), nn.Sequential(nn.Conv2d(64, 4, 3, 4), nn.ReLU(), nn.Flatten())],
    ids=["images are the inputs of the layer", "inputs of the layer take twice the memory"],
)
def test_little_memory(above):
    net = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), above)
    images = np.random.default_rng(0).normal(size=(2048, 1, 32, 32)).astype(np.float32)
    labels = np.arange(2048) % 2
    # Less memory may mean another preconditioner, so the fits must reach the optimum.
    options = {"alpha": 0.1, "gradient_alpha": 0.1, "tol": 1e-5, "device": DEVICE}
    expected = GradientFeatureClassifier(net, batch_size=64, **options).fit(images, labels)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = GradientFeatureClassifier(net, batch_size=2048, **options).fit(images, labels)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert any("Memory ran out" in str(w.message) for w in seen)
    np.testing.assert_allclose(
        found.decision_function(images), expected.decision_function(images), atol=1e-2
    )
