"""The check of the derivatives of the gradient layers, once per fit."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.training import _adjointness
from tests.backbones.test_sources import same
from tests.tiny import X, Y, estimator

IDS = np.random.default_rng(0).integers(0, 20, (24, 7))
IDS[:, :3] = 3


class Lookup(nn.Module):
    def __init__(self, table, **options):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.top, self.options = table, nn.Linear(6, 5), options
        nn.init.normal_(self.table.weight)

    def forward(self, ids):
        h = self.table(ids)
        if self.options:
            h = F.embedding(ids, self.table.weight, **self.options)
        return self.top(torch.tanh(h.mean(1) if h.ndim == 3 else h))


def lookup(network, **options):
    defaults = {"gradient_layers": "all", "precision": "float64"}
    defaults |= {"alpha": 0.1, "gradient_alpha": 0.1}
    return GradientFeatureClassifier(network, **defaults, **options).fit(IDS, Y)


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.filterwarnings("ignore:The derivative of the backbone:UserWarning")
def test_options_of_embeddings_do_not_change_the_derivative(options, functional):
    table = nn.Embedding(20, 6) if functional else nn.Embedding(20, 6, **options)
    model = lookup(Lookup(table, **options if functional else {}))
    assert same(model, lookup(Lookup(nn.Embedding(20, 6))))


def test_padding_rows_stay():
    model = lookup(Lookup(nn.Embedding(20, 6, padding_idx=3)))
    assert not model.gradient_coef_["table.weight"][3].any()
    assert model.gradient_coef_["table.weight"].any()


@pytest.mark.parametrize("options", [{}, {"sparse": True}])
def test_bags_are_means_of_embeddings(options):
    model = lookup(Lookup(nn.EmbeddingBag(20, 6, **options)))
    expected = lookup(Lookup(nn.Embedding(20, 6)))
    found = model.decision_function(IDS)
    np.testing.assert_allclose(found, expected.decision_function(IDS), atol=1e-4)


class LookupWithoutGraph(Lookup):
    def forward(self, ids):
        return super().forward(ids) if int(ids.sum()) else self.table.weight


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
def test_layers_without_a_second_derivative_are_refused():
    match = r"An operator that reads 'table\.weight' has no derivative.* Choose other gradient_lay"
    with pytest.raises(ValueError, match=match):
        lookup(LookupWithoutGraph(nn.EmbeddingBag(20, 6)))


class Doubled(torch.autograd.Function):
    """A function whose backward is not that of its forward."""

    @staticmethod
    def forward(x):
        return x * 1.0

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * 1.0


class WithFunction(nn.Module):
    def __init__(self, function, *, graph):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.function = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), function
        self.graph = graph

    def forward(self, x):
        if not self.graph and float(x.sum()) > 1e9:
            return self.a(x)
        return self.b(self.function(self.a(x)))


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured:UserWarning")
def test_derivatives_that_disagree_are_refused_by_name():
    match = r"backward derivative of the backbone disagree in 'a\.weight', 'a\.bias', so"
    with pytest.raises(ValueError, match=match):
        estimator(WithFunction(Doubled.apply, graph=False), gradient_layers="all").fit(X, Y)


@pytest.mark.filterwarnings("ignore:The gradient term is zero")
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_derivatives_of_zero_up_to_rounding_errors(precision):
    """A norm leaves nothing of channels that are the same everywhere."""
    flat = np.random.default_rng(0).normal(size=(len(X), 1, 1, 1)) * np.ones_like(X)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")
    network = nn.Sequential(layer, nn.GroupNorm(4, 4), nn.Sigmoid())
    model = estimator(network, gradient_layers="0", precision=precision).fit(flat, Y)
    expected = estimator(network, features="activation", precision=precision).fit(flat, Y)
    np.testing.assert_allclose(
        model.decision_function(flat), expected.decision_function(flat), atol=1e-4
    )


def test_infinite_derivatives_are_refused_by_name():
    samples = X.copy()
    samples[0] = 0
    network = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), Root())
    with pytest.raises(ValueError, match=r"in the gradient layer '0\.weight' is NaN or infinite"):
        estimator(network).fit(samples, Y)
    samples = np.roll(samples, 12, axis=0)  # not among the samples of the check
    with pytest.raises(ValueError, match=r"are NaN or infinite.* choose other gradient_layers"):
        estimator(network).fit(samples, Y)


class Root(nn.Module):
    def forward(self, x):
        return x.abs().sqrt()


def test_huge_activations_are_refused_with_a_remedy():
    network = nn.Sequential(nn.Linear(5, 3), nn.ReLU())
    samples = np.random.default_rng(0).normal(size=(24, 5)) * 1e200
    with pytest.raises(ValueError, match=r"activations are huge: .* Scale X"):
        estimator(network).fit(samples, Y)


# --- derivatives of the graph against those of autograd ----------------------------------------


class Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def without_gradient(x):
    with torch.no_grad():
        return x.tanh()


@pytest.mark.parametrize("function", [Rounded.apply, without_gradient])
def test_custom_derivatives_that_a_graph_loses_are_told(function):
    network = WithFunction(function, graph=True)
    with pytest.warns(
        UserWarning, match=r"derivative of the backbone in 'a\..* torch.autograd.Function"
    ):
        estimator(network, gradient_layers="all").fit(X, Y)


def test_straight_through_estimators_by_detach_keep_their_derivative():
    network = WithFunction(lambda x: x + (x.round() - x).detach(), graph=True)
    model = estimator(network, gradient_layers="all").fit(X, Y)
    assert model.gradient_coef_["a.weight"].any()


# --- where memory runs out ---------------------------------------------------------------------

FULL = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_fit_does_without_the_check_where_memory_runs_out(error, monkeypatch):
    attempts = []

    def full(*_):
        attempts.append(1)
        raise error

    expected = estimator().fit(X, Y)
    monkeypatch.setattr(_adjointness, "_derivatives_agree", full)
    assert same(estimator().fit(X, Y), expected)
    assert len(attempts) == 1


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_parameter_without_memory_is_not_named(error, monkeypatch):
    outcomes = [RuntimeError("no derivative"), error, RuntimeError("no derivative")]

    def fail(*_):
        raise outcomes.pop(0)

    monkeypatch.setattr(_adjointness, "_derivatives_agree", fail)
    match = r"An operator that reads '2\.bias' has no derivative .*: no derivative"
    with pytest.raises(ValueError, match=match):
        estimator().fit(X, Y)
