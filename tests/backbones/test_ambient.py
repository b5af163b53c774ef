"""Settings of torch around ``fit`` and ``predict``."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import sklearn_gradfeat
from tests.backbones.test_sources import same
from tests.tiny import X, Y, estimator, tiny_net


class Sensitive(nn.Module):
    """A network whose forward pass depends on the settings."""

    def __init__(self):
        super().__init__()
        self.net = tiny_net()

    def forward(self, x):
        ramp = torch.linspace(0, 1, 6) ** 3
        return self.net(x) * ramp.to(x.dtype) * (1.0 + torch.is_inference_mode_enabled())


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
