"""Errors of a device whose memory is too small: none passes as an error of the network."""

import copy

import pytest
import torch
from torch import nn

from sklearn_gradfeat.backbones import _capture, _frozen, _independence, freeze
from sklearn_gradfeat.backbones._copies import _copy
from sklearn_gradfeat.backbones._eager import parameter_names
from sklearn_gradfeat.backbones._graph import ActivationModule, run_once
from tests.backbones.test_independence import LimitedExperts
from tests.tiny import X, Y, estimator, tiny_net

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
EXAMPLE = torch.from_numpy(X[:2])
errors = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


class Full(nn.Module):
    """A network for which there is no memory, with an own copy."""

    def __init__(self, error):
        super().__init__()
        self.layer, self.error = nn.Linear(8, 6), error

    def forward(self, x):
        raise self.error

    def __deepcopy__(self, memo):
        raise self.error


def _raise(error):
    def fail(*_arguments, **_options):
        raise error

    return fail


@errors
@pytest.mark.parametrize(
    "compute",
    [
        lambda full: run_once(full, EXAMPLE),
        lambda full: parameter_names(ActivationModule(full, None), EXAMPLE),
        _copy,
    ],
    ids=["run", "derivative", "copy"],
)
def test_steps_of_a_network(compute, error):
    with pytest.raises(type(error)) as caught:
        compute(Full(error))
    assert caught.value is error


@errors
def test_capture(error, monkeypatch):
    """It would pass as a network that has no graph."""
    monkeypatch.setattr(torch.export, "export", _raise(error))
    with pytest.raises(type(error)) as caught:
        _capture._export(ActivationModule(tiny_net(), None), EXAMPLE)
    assert caught.value is error


@errors
def test_comparison_of_shared_graphs(error):
    module = ActivationModule(tiny_net().eval(), None)
    captured = _capture.capture(module, EXAMPLE)
    assert _capture._agrees(captured, module, EXAMPLE)
    with pytest.raises(type(error)) as caught:
        _capture._agrees(captured, Full(error), EXAMPLE)
    assert caught.value is error


@errors
def test_comparison_of_graph_and_module(error, monkeypatch):
    frozen = copy.copy(freeze(tiny_net(), EXAMPLE, torch.float32, None))
    computed = frozen.computed
    assert frozen._is_function_of_module(computed)
    monkeypatch.setattr(_frozen, "extract", lambda *_: Full(error))
    with pytest.raises(type(error)) as caught:
        frozen._is_function_of_module(computed)
    assert caught.value is error


@errors
def test_comparison_of_dtypes(error, monkeypatch):
    frozen = freeze(tiny_net(), EXAMPLE, torch.float32, None)
    monkeypatch.setattr(_frozen, "converted_copy", lambda *_: Full(error))
    monkeypatch.setattr(frozen, "_others", {})
    with pytest.raises(type(error)) as caught:
        frozen.runs_in(torch.float64)
    assert caught.value is error


@errors
def test_comparison_of_derivatives(error, monkeypatch):
    frozen = freeze(tiny_net(), EXAMPLE, torch.float32, None)
    monkeypatch.setattr(frozen, "_compared", {})
    monkeypatch.setattr(frozen, "_probe", EXAMPLE)
    monkeypatch.setattr(_frozen, "_gradients", _raise(error))
    with pytest.raises(type(error)) as caught:
        frozen._differing(("2.weight",))
    assert caught.value is error


@errors
def test_runs_in_double_precision(error, monkeypatch):
    monkeypatch.setattr(_independence, "converted_copy", lambda *_: Full(error))
    with pytest.raises(type(error)) as caught:
        _independence._agree_in_double_precision(tiny_net(), EXAMPLE, [0, 1])
    assert caught.value is error


@errors
@pytest.mark.parametrize(("room", "size"), [(20, 12), (5, 3)])
def test_samples_of_a_batch_are_checked_among_fewer(error, room, size, monkeypatch):
    """Experts of limited capacity are found in a batch of 12, and not in one of 3 samples."""

    def limited(module, example):
        if len(example) > room:
            raise error
        return run_once(module, example)

    monkeypatch.setattr(_independence, "run_once", limited)
    torch.manual_seed(0)
    model = estimator(LimitedExperts(), features="activation", feature_store=None)
    with pytest.warns(RuntimeWarning, match=r"Trying again with (12|6|3) samples") as caught:
        if size > 3:
            with pytest.raises(ValueError, match=f"in a batch of {size} samples, and"):
                model.fit(X, Y)
        else:
            model.fit(X, Y)
    assert f"with {size} samples" in str(caught[-1].message)
