"""The user's module after a fit: the same in every respect."""

import copy
import functools
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.backbones._copies import converted_copy, frozen_copy
from tests.networks import build


def zoo(kind):
    return copy.deepcopy(build(kind)[0]).float()


def parametrized(normalize):
    network = zoo("plain")
    normalize(network[2])
    return network.eval()


def hook_norm(normalize):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return parametrized(normalize)


def frozen_and_parametrized():
    network = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), nn.ReLU(), nn.Conv2d(4, 5, 3)
    )
    return network.requires_grad_(False)


def with_hooks():
    network = zoo("plain")
    network[0].register_forward_hook(lambda _layer, _inputs, output: output * 2)
    network.register_forward_pre_hook(lambda layer, inputs: (inputs[0] + layer[0].bias[0],))
    network.register_full_backward_hook(lambda _layer, _inputs, _outputs: None)
    network[2].weight.register_hook(lambda gradient: gradient * 2)
    return network


def with_replaced_forward():
    """``forward`` is a closure over the original, with batch norms that may be training."""
    network = zoo("residual").train()
    original = network.forward

    @functools.wraps(original)
    def forward(x):
        return 2 * original(x)

    network.forward = forward
    return network


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(50, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.third.weight = self.second.weight

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1))))))


class Stateful(nn.Module):
    """Buffers that are not in the state dict, a cache that is built late, and an odd attribute."""

    def __init__(self):
        super().__init__()
        self.net = zoo("plain")
        self.register_buffer("hidden", torch.full((5, 1, 1), 2.0), persistent=False)
        self.cache, self.calls, self.odd = None, [], self.hidden * 2

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.ones(5, 1, 1, dtype=x.dtype)
        return self.net(x) * self.hidden * self.cache


def half_trained():
    """A network in training mode, with frozen layers and gradients."""
    network = nn.Sequential(zoo("residual"), nn.Dropout(0.5), nn.Linear(4, 4)).train()
    network[0].eval()
    network[0].stem.requires_grad_(False)
    network(torch.ones(2, 2, 5, 5)).sum().backward()
    return network


MODULES = {
    **{kind: functools.partial(zoo, kind) for kind in ("plain", "residual", "transformer")},
    "weight_norm": functools.partial(parametrized, parametrizations.weight_norm),
    "spectral_norm": functools.partial(parametrized, parametrizations.spectral_norm),
    "orthogonal": functools.partial(parametrized, parametrizations.orthogonal),
    "hook weight_norm": functools.partial(hook_norm, nn.utils.weight_norm),
    "hook spectral_norm": functools.partial(hook_norm, nn.utils.spectral_norm),
    "frozen and parametrized": frozen_and_parametrized,
    "hooks": with_hooks,
    "replaced forward": with_replaced_forward,
    "tied": Tied,
    "stateful": Stateful,
    "half trained": half_trained,
}


def described(module):
    """Return everything that a fit must leave alone; tensors by identity, version and value."""
    state = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        held = {k: v for k, v in vars(layer).items() if not k.startswith("__")}
        hooks = {k: list(v.items()) for k, v in held.items() if k.endswith("_hooks") and v}
        others = {k: id(v) for k, v in held.items() if not isinstance(v, bool)}
        own = [name for name in dir(type(layer)) if not name.startswith("__")]
        state[path] = id(layer), type(layer), layer.training, hooks, others, own
    for name, value in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        gradient = None if value.grad is None else (id(value.grad), value.grad.tolist())
        state[f"tensor {name}"] = (
            *(id(value), value._version, value.data_ptr(), value.dtype, value.requires_grad),
            *(value.tolist(), gradient, list((value._backward_hooks or {}).items())),
        )
    state["keys"] = list(module.state_dict())
    return state


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_fit_and_predict_leave_the_module_alone(name):
    torch.manual_seed(0)
    module = MODULES[name]()
    X = np.random.default_rng(0).normal(size=(12, 2, 5, 5)).astype(np.float32)
    reference = copy.deepcopy(module).eval() if name == "half trained" else None
    before, generator = described(module), torch.get_rng_state()
    model = GradientFeatureClassifier(module, alpha=0.1, max_iter=2, tol=1, gradient_alpha=0.1)
    model.fit(X, np.arange(12) % 3)
    model.predict_proba(X)
    assert described(module) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert isinstance(model.gradient_coef_, dict)
    evaluated = (module if reference is None else reference).eval()
    frozen = frozen_copy(module, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        expected = evaluated(torch.from_numpy(X))
        assert torch.allclose(frozen(torch.from_numpy(X)), expected, rtol=1e-5, atol=1e-6)


class ByReference(nn.Module):
    """A network that reaches its second layer by a reference that a deep copy shares."""

    def __init__(self, reference):
        super().__init__()
        self.first, self.second = nn.Linear(50, 6), nn.Linear(6, 6)
        self.scale = reference(self.second)

    def forward(self, x):
        return self.first(x.flatten(1)) * self.scale()


def by_global(layer):
    variables = {"layer": layer}
    exec("def scale():\n    return (lambda: layer.weight.sum())()", variables)
    return variables["scale"]


def by_recursion(layer):
    def scale(n=3):
        return layer.weight.sum() if n == 0 else scale(n - 1)

    return scale


REFERENCES = {
    "list": lambda layer: lambda held=[layer]: held[0].weight.sum(),
    "partial": lambda layer: functools.partial(lambda d: d["a"][0].weight.sum(), d={"a": (layer,)}),
    "keyword": lambda layer: lambda *, held=layer: held.weight.sum(),
    "method": lambda layer: lambda f=layer.get_parameter: f("weight").sum(),
    "weak": lambda layer: functools.partial(lambda held: held().weight.sum(), weakref.ref(layer)),
    "global": by_global,
    "recursion": by_recursion,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_functions_of_a_copy_refer_to_the_copy(name):
    network = ByReference(REFERENCES[name])
    frozen = frozen_copy(network, torch.device("cpu"), torch.float64)
    x = torch.ones(2, 2, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        before = frozen(x)
        network.second.weight.zero_()
        assert torch.equal(frozen(x), before)
        frozen.second.weight.zero_()
        assert not frozen(x).any()


@pytest.mark.parametrize("name", REFERENCES)
def test_functions_of_a_copy_in_another_precision_refer_to_the_copy(name):
    frozen = frozen_copy(ByReference(REFERENCES[name]), torch.device("cpu"), torch.float32)
    wide = converted_copy(frozen, torch.device("cpu"), torch.float64)
    x = torch.ones(2, 2, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        np.testing.assert_allclose(wide(x), frozen(x.float()), rtol=1e-5)
        wide.second.weight.zero_()
        assert not wide(x).any()
        assert frozen(x.float()).any()


def test_head_of_a_network_with_closures_computes_in_double_precision():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = rows()

        def forward(self, x):
            return 2 * self.net(x)

    def rows():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh())

    replaced = rows()
    original = replaced.forward
    replaced.forward = lambda x: 2 * original(x)
    X = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
    options = {"alpha": 0.1, "gradient_alpha": 0.1, "gradient_layers": "all", "tol": 1e-10}
    found, expected = (
        GradientFeatureClassifier(net, **options).fit(X, np.arange(24) % 3).predict_proba(X)
        for net in (replaced, Twice())
    )
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_layers_in_closures_are_copied_too():
    network = with_replaced_forward()
    frozen = frozen_copy(network, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        before = frozen(torch.ones(2, 2, 5, 5))
        network.stem.weight.zero_()
        assert torch.equal(frozen(torch.ones(2, 2, 5, 5)), before)


def test_parametrized_weights_of_a_frozen_network_can_be_chosen():
    X = np.random.default_rng(0).normal(size=(12, 2, 5, 5)).astype(np.float32)
    model = GradientFeatureClassifier(
        frozen_and_parametrized(), gradient_layers="0", alpha=0.1, gradient_alpha=0.1
    )
    assert model.fit(X, np.arange(12) % 3).gradient_layers_ == ["0.bias", "0.weight"]
