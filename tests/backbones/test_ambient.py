"""Settings of torch around ``fit`` and ``predict``."""

import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import sklearn_gradfeat
from sklearn_gradfeat.backbones import is_recurrent
from tests.backbones.test_sources import same
from tests.tiny import X, Y, estimator, tiny_net


class Sensitive(nn.Module):
    """A network whose forward pass depends on the settings."""

    def __init__(self):
        super().__init__()
        self.net = tiny_net()

    def forward(self, x):
        ramp = torch.linspace(0, 1, 6) ** 3
        return self.net(x) * ramp.to(x) * (1.0 + torch.is_inference_mode_enabled())


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


# The network is another function when gradients are on, which is worth a warning.
@pytest.mark.filterwarnings("ignore:The derivative of the backbone")
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_do_not_change_results(setting, tmp_path):
    network = Sensitive()
    with SETTINGS[setting]():
        models = [estimator(network, feature_store=store).fit(X, Y) for store in (None, "auto")]
        found = [model.predict_proba(X) for model in models]
        models[0].save(tmp_path / "model")
        found.append(sklearn_gradfeat.load(tmp_path / "model", network).predict_proba(X))
        dtype, gradient = torch.get_default_dtype(), torch.is_grad_enabled()
    with SETTINGS[setting]():
        assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (dtype, gradient)
    for store in (None, "auto"):  # the store holds nothing else either
        expected = estimator(network, feature_store=store).fit(X, Y)
        assert all(same(model, expected) for model in models)
        found.append(expected.predict_proba(X))
    assert all(np.array_equal(proba, found[0]) for proba in found)


def test_module_that_was_built_in_inference_mode():
    with torch.inference_mode():
        network = Sensitive()
    assert same(estimator(network).fit(X, Y), estimator(Sensitive()).fit(X, Y))


# torch does not return from every one of these states, so each is tried in a process of its own.
ROUNDINGS = (
    "pass",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cudnn.fp32_precision = 'tf32'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
)
STATES = """
import os, sys, torch
from sklearn_gradfeat.backbones import neutral_state

def state():
    kinds = [torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul,
             torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul]
    return [kind.fp32_precision for kind in kinds]

def older():
    found = []
    for read in (lambda: torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append(None)
    return found

def check():
    before = state(), older()
    with neutral_state():
        assert state()[:2] == before[0][:2]  # those of cuDNN, without a device
    torch.cuda.is_available = lambda: True
    with neutral_state():
        assert set(state()) <= {"none", "ieee"}, state()
        inside = older()
    assert all(value in (False, "highest", None) for value in inside), inside
    assert (state(), older()) == before
    assert None in before[1] or None not in inside, inside

for setting in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(setting)
        check()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(setting)
"""


def test_float32_products_are_not_rounded():
    subprocess.run([sys.executable, "-W", "ignore", "-c", STATES, *ROUNDINGS], check=True)


class Gate(nn.Module):
    """A recurrent network that notes whether cuDNN was enabled in its forward passes."""

    def __init__(self):
        super().__init__()
        self.lstm, self.enabled = nn.LSTM(4, 3, batch_first=True), []

    def forward(self, x):
        self.enabled.append(torch.backends.cudnn.enabled)
        if float(x.sum()) == 0.5:  # torch.export refuses it
            return x[:, 0, 0, :3]
        return self.lstm(x[:, 0, :, :4])[0][:, -1]


def test_recurrent_layers_are_differentiated_without_cudnn():
    before = torch.backends.cudnn.enabled
    network = Gate()
    with pytest.warns(UserWarning, match="torch.export"):
        model = estimator(network, gradient_layers="all", activation_layer=None).fit(X, Y)
    frozen = model._extractor.backbone.module.module
    frozen.enabled.clear()
    model.score(X, Y)
    assert frozen.enabled and not any(frozen.enabled)
    assert torch.backends.cudnn.enabled == before


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x[:, 0])[0][:, -1]


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_found_in_a_graph(layer):
    network = Recurrent(layer(8, 3, batch_first=True))
    model = estimator(network, gradient_layers="all", activation_layer=None).fit(X, Y)
    assert is_recurrent(model._extractor.network(list(dict(network.named_parameters()))).graph)
    assert not is_recurrent(estimator().fit(X, Y)._extractor.network(["2.weight"]).graph)
