"""Copies of modules: plain parameters, and everything that cannot be copied."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat.backbones._copies import stored_weights, with_weights
from sklearn_gradfeat.backbones._frozen import FrozenBackbone
from tests.backbones.test_sources import same
from tests.tiny import X, Y, estimator, tiny_net


@pytest.mark.parametrize(
    "normalize",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        pytest.param(
            nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")
        ),
        pytest.param(
            nn.utils.spectral_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")
        ),
    ],
)
def test_reparametrized_weights_are_plain_ones(normalize):
    network = tiny_net()
    normalize(network[2])
    network.eval()
    with torch.no_grad():
        network(torch.from_numpy(X))
    before = copy.deepcopy({name: value.detach() for name, value in network.state_dict().items()})
    model = estimator(network).fit(X, Y)
    assert sorted(model.gradient_layers_) == ["2.bias", "2.weight"]
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_refused():
    with pytest.raises(TypeError, match=r"TorchScript module.* Pass the torch.nn.Module"):
        estimator(torch.jit.trace(tiny_net(), torch.from_numpy(X))).fit(X, Y)


def test_compiled_module():
    module = tiny_net()
    compiled = torch.compile(module, backend="eager")
    model = estimator(compiled).fit(X, Y)
    assert same(model, estimator(module).fit(X, Y))


def test_batch_norm_without_running_statistics_is_refused():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(
        ValueError, match=r"Layer '1' of backbone normalises over the batch.* Build"
    ):
        estimator(network).fit(X, Y)


def test_module_that_cannot_be_copied():
    network = tiny_net()
    network.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"backbone cannot be copied .* Store tensors in it"):
        estimator(network).fit(X, Y)


class Singleton(nn.Linear):
    """A layer that its copies share."""

    def __deepcopy__(self, memo):
        return self


def test_copies_that_share_a_layer_are_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), Singleton(6, 6))
    with pytest.raises(ValueError, match=r"its copy shares '2' with it. Take __deepcopy__ out"):
        estimator(network).fit(X, Y)
    assert network[2].training
    assert network[2].weight.requires_grad


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_errors_of_copies_are_explained():
    network = tiny_net()
    network.attached = torch.jit.script(scripted_function)
    with pytest.raises(ValueError, match=r"backbone cannot be copied .*no object that copy"):
        estimator(network).fit(X, Y)


# --- tensors that a cast would change ----------------------------------------------------------


class Fourier(nn.Module):
    """A filter with complex weights."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(1, 4, 1)
        self.filter = nn.Parameter(torch.randn(4, 8, 5, dtype=torch.cfloat))
        self.outer = nn.Conv2d(4, 6, 1)

    def forward(self, x):
        spectrum = torch.fft.rfft2(self.inner(x), norm="ortho") * self.filter
        return self.outer(torch.fft.irfft2(spectrum, s=(8, 8), norm="ortho").relu())


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("layers", ["inner", "outer"])
def test_complex_weights_keep_their_imaginary_part(precision, layers):
    torch.manual_seed(0)
    network = Fourier()
    model = estimator(
        network, gradient_layers=layers, precision=precision, activation_layer=None
    ).fit(X, Y)
    kept = model._extractor.backbone.module.module.filter
    assert kept.dtype == getattr(torch, precision).to_complex()
    assert torch.equal(kept.to(torch.cfloat), network.filter)
    plain = estimator(
        network, features="activation", precision=precision, tol=1e-8, activation_layer=None
    ).fit(X, Y)
    with torch.no_grad():
        activation = network(torch.from_numpy(X)).mean((2, 3)).numpy()
    expected = activation @ plain.coef_.T + plain.intercept_
    np.testing.assert_allclose(plain.decision_function(X), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"'filter' is not a floating point tensor"):
        estimator(network, gradient_layers="filter", activation_layer=None).fit(X, Y)


def scripted_function(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


class Named(nn.Parameter):
    """A subclass of tensors that carries state."""


def with_tensor(tensor):
    network = tiny_net()
    network[2].register_buffer("odd", tensor)
    return network


def subclassed():
    network = tiny_net()
    network[2].weight = Named(network[2].weight.detach())
    return network


def packed():
    return nn.Sequential(nn.Flatten(), torch.ao.nn.quantized.dynamic.Linear(64, 6))


def scripted():
    network = tiny_net()
    network[2] = torch.jit.script(network[2])
    return network


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: with_tensor(torch.eye(3).to_sparse()), r"'2\.odd' of backbone has the layout"),
        (lambda: with_tensor(torch.eye(3).to_sparse_csr()), r"'2\.odd' of backbone has the layout"),
        (
            lambda: with_tensor(torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)),
            r"'2\.odd' of backbone is quantised \(torch.qint8\)",
        ),
        (
            lambda: with_tensor(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
            r"'2\.odd' of backbone is a nested tensor",
        ),
        (lambda: tiny_net().to("meta"), r"'0\.weight' of backbone is on the meta device"),
        (subclassed, r"'2\.weight' of backbone is a tensor of the class Named"),
        (packed, r"Layer '1\._packed_params' of backbone.* packed weights.*before quantisation"),
        (scripted, r"Layer '2' of backbone is a TorchScript module.* Pass the torch.nn.Module"),
    ],
)
def test_tensors_that_a_copy_would_change_are_refused(build, match):
    with pytest.raises((ValueError, TypeError), match=match):
        estimator(build()).fit(X, Y)


# --- tensors apart from their module -----------------------------------------------------------


def test_pickles_of_backbone_and_module_share_equal_tensors():
    module = tiny_net()
    frozen = FrozenBackbone(module, torch.zeros(2, 1, 8, 8), torch.float32, None)
    with torch.no_grad():
        module[2].bias += 1
    shared = dict(frozen.sharing(module).module.module.named_parameters())
    for name, value in module.named_parameters():
        assert (shared[name] is value) == (name != "2.bias")
    own = frozen.sharing(module).apart()
    assert not any(
        value is other
        for value, other in zip(own.module.module.parameters(), module.parameters(), strict=True)
    )
    assert not any(value.requires_grad for value in own.module.parameters())
    assert all(value.requires_grad for value in module.parameters())
    kept = dict(frozen.module.module.named_parameters())
    assert not any(kept[name] is value for name, value in module.named_parameters())


def test_weights_apart_from_their_module():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    weights = stored_weights(module)
    assert list(weights) == [
        *("0.weight", "0.bias", "1.weight", "1.bias"),
        *("1.running_mean", "1.running_var", "1.num_batches_tracked"),
    ]
    lazy = nn.Sequential(nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d())
    example = torch.from_numpy(X[:2])
    for architecture in (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), lazy):
        filled = with_weights(architecture, weights, example, torch.float32)
        assert torch.equal(filled(example), module(example))


class BuiltLate(nn.Module):
    """A layer that builds an own layer and a table in its first pass."""

    def __init__(self):
        super().__init__()
        self.inner = None
        self.register_buffer("places", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.inner is None:
            self.inner = nn.Conv2d(2, 3, 1)
        if len(self.places) != x.shape[-1]:
            self.places = torch.arange(x.shape[-1]).to(x)
        return self.inner(x) + self.places


def test_weights_of_layers_and_tables_that_are_built_late():
    module, fresh = (nn.Sequential(nn.Conv2d(1, 2, 3), BuiltLate()) for _ in range(2))
    example = torch.from_numpy(X[:2])
    expected = module(example)
    filled = with_weights(fresh, stored_weights(module), example, torch.float32)
    assert torch.equal(filled(example), expected)
    assert fresh[1].inner is None


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3, bias=False)), r"the module lacks '0\.bias'"),
        (nn.Sequential(nn.Conv2d(1, 2, 5)), r"'0\.weight' has shape \(2, 1, 5, 5\) instead of"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.PReLU()), r"has, beyond those weights, '1\.weight'"),
    ],
)
def test_weights_of_another_architecture(other, match):
    weights = stored_weights(nn.Sequential(nn.Conv2d(1, 2, 3)))
    with pytest.raises(ValueError, match=match):
        with_weights(other, weights, torch.zeros(2, 1, 8, 8), torch.float32)
