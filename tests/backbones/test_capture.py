"""One export for every architecture, with the tensors of each network."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sklearn_gradfeat.backbones import _capture
from sklearn_gradfeat.backbones._capture import capture
from sklearn_gradfeat.backbones._graph import ActivationModule
from sklearn_gradfeat.backbones._split import batch_axis, extract
from tests.tiny import X, Y, estimator

EXAMPLE = torch.zeros(2, 1, 8, 8)


@pytest.fixture
def exports(monkeypatch):
    """Yield the list of exported modules, from an empty start."""
    made, original = [], _capture._export

    def counted(module, example):
        made.append(module)
        return original(module, example)

    monkeypatch.setattr(_capture, "_export", counted)
    monkeypatch.setattr(_capture, "_exported", type(_capture._exported)())
    return made


def network(stride=1, seed=0, tied=False, act=nn.ReLU):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3, stride), nn.BatchNorm2d(4), act(), nn.Conv2d(4, 4, 1), act()]
    layers += [nn.Conv2d(4, 4, 1), nn.Flatten()]
    nn.init.normal_(layers[1].running_mean)
    if tied:
        layers[5].weight = layers[3].weight
    return nn.Sequential(*layers)


def assert_captured(module, layer=None):
    whole = ActivationModule(module.eval(), layer).requires_grad_(False)
    captured = capture(whole, EXAMPLE)
    x = torch.randn(3, 1, 8, 8)
    graph = extract(captured, [captured.input], [captured.output])
    torch.testing.assert_close(graph(x)[0], whole(x))
    return captured


def test_one_export_for_equal_architectures(exports):
    first, second = assert_captured(network()), assert_captured(network(seed=1))
    assert len(exports) == 1
    assert list(first.parameters) == list(second.parameters)
    weight = first.tensors[first.parameters["0.weight"]]
    assert not torch.equal(weight, second.tensors[second.parameters["0.weight"]])


@pytest.mark.parametrize(
    "other", [{"stride": 2}, {"tied": True}, {"act": nn.GELU}], ids=lambda o: next(iter(o))
)
def test_another_architecture_is_exported(exports, other):
    assert_captured(network())
    assert_captured(network(**other))
    assert len(exports) == 2


def test_another_activation_layer_is_exported(exports):
    assert_captured(network())
    assert_captured(network(), "3")
    assert len(exports) == 2


def test_folding_leaves_the_kept_graph_as_it_is(exports):
    models = [estimator(network(seed=seed)).fit(X, Y) for seed in (0, 1, 0)]
    assert len(exports) == 1
    assert np.array_equal(models[0].predict_proba(X), models[2].predict_proba(X))
    assert not np.array_equal(models[0].predict_proba(X), models[1].predict_proba(X))


def test_functions_of_packages_that_were_replaced(exports, monkeypatch):
    assert_captured(network())
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: torch.tanh(x))
    assert_captured(network())
    assert len(exports) == 2


class OfTheUser(nn.Sequential):
    pass


@pytest.mark.parametrize("place", ["class", "attribute", "hook"])
def test_code_that_may_change_under_its_name_is_exported(exports, place):
    for _ in range(2):
        module = network()
        if place == "class":
            module = OfTheUser(module)
        elif place == "attribute":
            module.helper = assert_captured
        else:
            module[0].register_forward_hook(lambda *_: None)
        assert_captured(module)
    assert len(exports) == 2


def test_tensors_that_are_attributes_count_by_value(exports):
    for factor in (3.0, 3.0, 3.000001):
        module = network()
        module.factor = torch.tensor([1.0, factor])
        assert_captured(module)
    assert len(exports) == 2


def test_few_graphs_are_kept(exports, monkeypatch):
    monkeypatch.setattr(_capture, "_KEPT", 2)
    for stride in (1, 2, 3, 3, 2, 1):
        assert_captured(network(stride))
    assert len(exports) == 4


@pytest.mark.skipif(
    torch.__version__.startswith("2.9."), reason="fake tensors of torch 2.9 need a driver of CUDA"
)
def test_graph_for_cuda_has_a_free_batch_size(exports):
    """Fake tensors take the place of a device, whose kernels are chosen by the batch size."""
    with FakeTensorMode(), torch.device("cuda"):
        attention = nn.TransformerEncoderLayer(36, 2, 8, batch_first=True)
        module = nn.Sequential(*network()[:5], nn.Flatten(2), attention, nn.Flatten())
        whole = ActivationModule(module.eval(), None).requires_grad_(False)
        example = torch.zeros(2, 1, 8, 8)
    captured = capture(whole, example)
    assert len(exports) == 1
    assert batch_axis(captured.output, captured) == 0
