"""Fitted models as torch modules: eager, through torch.export, and in ONNX Runtime."""

import copy
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import nn
from torchvision.models import get_model

from sklearn_gradfeat import GradientFeatureClassifier
from tests.backbones.test_architectures import prepared
from tests.networks import build
from tests.tiny import NET, X, Y, estimator

IMAGES = np.random.default_rng(0).normal(size=(12, 2, 5, 5)).astype(np.float32)
BATCH = torch.export.Dim("batch")


def proba(module, samples):
    with torch.no_grad():
        return module(torch.from_numpy(samples)).numpy()


def exported(module, samples):
    return torch.export.export(
        module, (torch.from_numpy(samples[:3]),), dynamic_shapes=({0: BATCH},)
    )


def in_onnx(module, samples):
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        return torch.onnx.export(exported(module, samples), dynamo=True, verbose=False)


def in_onnx_runtime(module, samples, path):
    onnxruntime = pytest.importorskip("onnxruntime")
    in_onnx(module, samples).save(path)
    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    return lambda batch: session.run(None, {entry.name: batch})[0]


# --- the module ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "y"),
    [
        ("full", Y),
        ("activation", Y > 0),
        ("gradient", Y > 0),
        ("full", np.stack([Y > 0, Y > 1], 1).astype(int)),
    ],
    ids=["full-classes", "activation-binary", "gradient-binary", "full-labels"],
)
def test_module_agrees_with_the_estimator(features, y):
    model = estimator(features=features).fit(X, y)
    module = model.to_torch()
    for n in (1, 2, 7, 24):
        assert np.allclose(proba(module, X[:n]), model.predict_proba(X[:n]), atol=1e-6)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_model_without_coefficients():
    net = nn.Sequential(*NET, nn.Linear(6, 5))
    nn.init.zeros_(net[-1].weight)
    model = estimator(net, gradient_layers=["0.weight"]).fit(X, Y)
    assert not model.coef_.any()
    np.testing.assert_allclose(proba(model.to_torch(), X), model.predict_proba(X), rtol=1e-6)


def test_module_is_independent_of_the_estimator():
    model = estimator().fit(X, Y)
    expected = model.predict_proba(X)
    module = model.to_torch()
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.zero_()
    assert np.array_equal(model.predict_proba(X), expected)


def test_tabular_data_are_float64():
    rows = np.random.default_rng(0).normal(size=(30, 4))
    y = (rows[:, 0] > 0).astype(int)
    model = GradientFeatureClassifier(alpha=0.1, tol=1e-2, random_state=0, gradient_alpha=0.1)
    for dtype, tolerance in (("float64", 1e-14), ("float32", 1e-7)):
        model.fit(rows.astype(dtype), y)
        found = proba(model.to_torch(), rows.astype(dtype))
        assert found.dtype == np.float64
        assert np.allclose(found, model.predict_proba(rows.astype(dtype)), rtol=0, atol=tolerance)


class Scale(nn.Module):
    """A transform that pickle accepts."""

    def forward(self, x):
        return x / 255


def test_transform_that_is_a_module_is_part_of_it():
    images = (X * 20 + 100).clip(0, 255).astype(np.uint8)
    model = estimator(preprocess=Scale()).fit(images, Y)
    assert np.allclose(proba(model.to_torch(), images), model.predict_proba(images), atol=1e-6)
    program = exported(model.to_torch(), images)
    assert np.allclose(proba(program.module(), images), model.predict_proba(images), atol=1e-6)


def test_transform_that_is_a_function_is_left_to_the_caller():
    model = estimator(preprocess=torch.tanh).fit(X, Y)
    found = proba(model.to_torch(), np.tanh(X))
    assert np.allclose(found, model.predict_proba(X), atol=1e-6)


def test_input_of_another_layout():
    model = estimator().fit(X, Y)
    wide = torch.from_numpy(X).to(memory_format=torch.channels_last)
    assert np.allclose(model.to_torch()(wide), model.predict_proba(X), atol=1e-6)


def test_bfloat16_is_exported_in_float32():
    model = estimator(precision="bfloat16").fit(X, Y)
    assert np.allclose(proba(model.to_torch(), X), model.predict_proba(X), atol=0.05)


def test_unfitted():
    with pytest.raises(NotFittedError, match="not fitted yet"):
        estimator().to_torch()


def test_network_without_a_graph():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(*NET)

        def forward(self, x):
            return self.net(x) if x.sum() > -1e9 else self.net(-x)

    with pytest.warns(UserWarning, match="cannot be captured"):
        model = estimator(Branching()).fit(X, Y)
    with pytest.raises(ValueError, match=r"cannot be exported: torch\.export refuses it"):
        model.to_torch()


@pytest.mark.cuda
def test_module_on_another_device():
    model = estimator(device="cpu").fit(X, Y)
    found = model.to_torch("cuda")(torch.from_numpy(X).cuda())
    assert np.allclose(found.cpu(), model.predict_proba(X), atol=1e-4)


# --- torch.export and ONNX -------------------------------------------------------------------

RUN = """
import sys, numpy, torch
sys.modules["sklearn_gradfeat"] = sys.modules["sklearn"] = None
program = torch.export.load(sys.argv[1]).module()
for n in (1, 5, 24):
    x = torch.from_numpy(numpy.load(sys.argv[2]))[:n]
    expected = numpy.load(sys.argv[3])[:n]
    assert numpy.allclose(program(x).numpy(), expected, atol=1e-6), n
"""


def test_exported_program_runs_without_this_package(tmp_path):
    model = estimator().fit(X, Y)
    torch.export.save(exported(model.to_torch(), X), tmp_path / "model.pt2")
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "p.npy", model.predict_proba(X))
    files = [str(tmp_path / name) for name in ("model.pt2", "x.npy", "p.npy")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", RUN, *files], check=True)


def fit(kind):
    if kind == "tabular":
        rows = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
        return GradientFeatureClassifier(alpha=0.1, tol=1e-2, gradient_alpha=0.1).fit(
            rows, Y[:12]
        ), rows
    module, names = build(kind)
    module = copy.deepcopy(module).float()
    if kind == "transformer":  # one layer is enough
        module.encoder.layers = module.encoder.layers[1:]
        names = [name.replace("layers.1", "layers.0") for name in names]
    model = estimator(module, gradient_layers=names, max_iter=100)
    return model.fit(IMAGES, Y[:12]), IMAGES


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("plain", "residual")]


@pytest.mark.parametrize("kind", ["tabular", "transformer", *SLOW])
def test_onnx(kind, tmp_path):
    model, samples = fit(kind)
    run = in_onnx_runtime(model.to_torch(), samples, tmp_path / "model.onnx")
    for n in (1, 5, 12):
        assert np.allclose(run(samples[:n]), model.predict_proba(samples[:n]), atol=1e-5)


def test_onnx_of_a_merged_model_is_a_plain_network():
    """It has no derivative. The linear layer may be a product and a sum instead of one operator."""
    model = estimator(gradient_layers="all").fit(X, Y).merge(X, Y)
    plain = nn.Sequential(*NET, nn.Linear(6, 3), nn.Softmax(1)).eval()
    programs = [in_onnx(module, X) for module in (model.to_torch(), plain)]
    found, expected = (len(program.model_proto.graph.node) for program in programs)
    assert found <= expected + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "mobilenet_v3_small", "convnext_tiny"])
def test_onnx_of_architectures(name, tmp_path):
    module, x = prepared(partial(get_model, name), 224 if name == "vit_b_16" else 64)
    model = estimator(module, max_iter=3, tol=0.5, alpha=1.0).fit(x.numpy(), [0, 1, 2])
    run = in_onnx_runtime(model.to_torch(), x.numpy(), tmp_path / "model.onnx")
    for n in (1, 3):
        assert np.allclose(run(x[:n].numpy()), model.predict_proba(x[:n]), atol=1e-4)
