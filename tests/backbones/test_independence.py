"""Networks whose activations are no function of single samples, in evaluation mode."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sklearn_gradfeat import load
from sklearn_gradfeat.backbones._independence import check_independence
from tests.backbones.test_copies import BuiltLate
from tests.tiny import X, Y, estimator


class Applied(nn.Module):
    """A function between two layers."""

    def __init__(self, function):
        super().__init__()
        self.lower, self.function, self.upper = nn.Conv2d(1, 4, 3), function, nn.Conv2d(4, 6, 3)

    def forward(self, x):
        return self.upper(self.function(self.lower(x)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Counter(nn.Module):
    """A layer with state that changes in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


RANDOM = {
    "torch.nn.functional.dropout": Function(F.dropout),
    "torch.rand": Function(lambda x: x * (torch.rand(len(x), 1, 6, 6, device=x.device) > 0.3)),
    "torch.nn.functional.rrelu": Function(lambda x: F.rrelu(x, training=True)),
    "torch.Tensor.mul": Counter(),
    "torch.Tensor.multiply": Function(lambda x: x.multiply(np.random.default_rng().normal())),
}
BATCH = {
    "torch.nn.functional.batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "torch.Tensor.mean": lambda x: x - x.mean(0),
    "torch.Tensor.max": lambda x: x / x.abs().max(),
    "torch.Tensor.sort": lambda x: x.sort(0).values,
    "torch.Tensor.cumsum": lambda x: x.cumsum(0),
    "torch.Tensor.flip": lambda x: x + x.flip(0),
    "torch.Tensor.div": lambda x: x / len(x),
    "torch.Tensor.__getitem__": lambda x: x - x[:1],
    "torch.nn.functional.softmax": lambda x: F.softmax(x, 0),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_networks_are_refused(name):
    match = rf"another activation in every run.*The cause is {name} in the layer 'function'"
    with pytest.raises(ValueError, match=match):
        estimator(Applied(RANDOM[name])).fit(X, Y)


TRANSFORMS = {
    "noise": lambda x: x + torch.randn_like(x),
    "dropout": lambda x: F.dropout(x, 1e-6),
    "numpy": lambda x: x * np.random.default_rng().normal(),
    "mean": lambda x: x - x.mean(0),
    "max": lambda x: x / x.abs().max(),
}


@pytest.mark.filterwarnings("ignore:preprocess cannot be pickled")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_random_transforms_and_those_of_batches_are_refused(name):
    with pytest.raises(ValueError, match=r"preprocess must map every sample on its own.*Take"):
        estimator(preprocess=TRANSFORMS[name]).fit(X, Y)


# Two runs on two samples hardly ever differ.
RARE = {
    "torch.nn.functional.dropout": lambda x: F.dropout(x, 1e-6),
    "torch.Tensor.bernoulli_": lambda x: x * x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - 1e-6),
    "torch.rand": lambda x: x if torch.rand(()) > 1e-6 else 2 * x,
    "torch.multinomial": lambda x: x * (1 + torch.multinomial(torch.tensor([1.0, 1e-6]), 1)),
    "torch.poisson": lambda x: x + torch.poisson(torch.full_like(x, 1e-6)),
    "torch.Tensor.mul": lambda x: x.mul(1 + (random.random() < 1e-6)),
    "torch.Tensor.multiply": lambda x: x.multiply(1 + (random.gauss(0, 1) > 6)),
    "torch.Tensor.div": lambda x: x.div(1 + (np.random.rand() > 1 - 1e-6)),
    "torch.Tensor.divide": lambda x: x.divide(np.random.choice([1.0, 2.0], p=[1 - 1e-6, 1e-6])),
}


@pytest.mark.parametrize("name", RARE)
def test_random_numbers_that_hardly_ever_matter(name):
    match = rf"another activation in every run.*The cause is {name} in the layer 'function'"
    with pytest.raises(ValueError, match=match):
        check_independence(Applied(Function(RARE[name])), torch.from_numpy(X[:2]))


class OwnGenerator(nn.Module):
    """A layer that draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x):
        return x if torch.rand((), generator=self.generator) > 1e-6 else 2 * x


def test_random_numbers_of_an_own_generator_that_hardly_ever_matter():
    with pytest.raises(ValueError, match=r"another activation in every run.*torch\.rand"):
        check_independence(Applied(OwnGenerator()), torch.from_numpy(X[:2]))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 0 * torch.randn_like(x),
        lambda x: x if torch.rand(()) >= 0 else 2 * x,
        lambda x: x if random.normalvariate() > -100 else 2 * x,
        lambda x: x if np.random.randn() > -100 else 2 * x,
        lambda x: x if random.randrange(5) < 5 else 2 * x,
        lambda x: x if np.random.permutation(5).sum() == 10 else 2 * x,
    ],
)
def test_random_numbers_that_never_matter(function):
    network = Applied(Function(function))
    random.seed(0)
    np.random.seed(0)
    states = []
    for run in (lambda: check_independence(network, torch.from_numpy(X[:2])), lambda: None):
        run()
        states.append((random.random(), np.random.rand()))
    assert states[0] != states[1]  # the generators are random again


def test_numpy_with_another_generator():
    former = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        with pytest.raises(ValueError, match=r"another activation in every run"):
            often = Function(lambda x: x * np.random.rand())
            check_independence(Applied(often), torch.from_numpy(X[:2]))
    finally:
        np.random.set_bit_generator(former)


@pytest.mark.parametrize("name", BATCH)
@pytest.mark.parametrize("equal", [False, True])
def test_networks_that_depend_on_the_batch_are_refused(name, equal):
    samples = X.copy()
    if equal:
        samples[:2] = 0
    match = rf"depends on the rest of its batch.*The cause is {name} in the layer 'function'"
    with pytest.raises(ValueError, match=match):
        estimator(Applied(Function(BATCH[name]))).fit(samples, Y)


def test_equal_indices_show_no_influence_and_others_do():
    table = nn.Embedding(9, 4)
    ids = torch.tensor([[3, 1, 2], [3, 1, 2]])
    check_independence(nn.Sequential(table, nn.Flatten()), ids)
    with pytest.raises(ValueError, match=r"depends on the rest of its batch"):
        check_independence(nn.Sequential(table, Function(lambda x: x - x.mean(0))), ids)


class Shifted(nn.Module):
    """A layer whose shift is the mean of the first batch."""

    def __init__(self):
        super().__init__()
        self.shift, self.is_ready = nn.Parameter(torch.zeros(())), False

    def forward(self, x):
        if not self.is_ready:
            self.shift.data.copy_(x.mean())
            self.is_ready = True
        return x - self.shift


def test_parameters_that_the_first_batch_sets():
    network = nn.Sequential(nn.Conv2d(1, 6, 3), Shifted())
    with pytest.raises(ValueError, match=r"its parameter '1\.shift' in a forward pass.*Call it on"):
        estimator(network).fit(X, Y)
    network(torch.from_numpy(X))
    estimator(network).fit(X, Y)


class Centred(nn.Module):
    """A layer that keeps the mean of its first batch, in a buffer or an attribute."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.mean = kind, None
        if kind != "attribute":
            self.register_buffer("shift", torch.zeros(4, 1, 1))

    def forward(self, x):
        if self.kind == "buffer":
            if not self.shift.any():
                self.shift.copy_(x.mean((0, 2, 3), keepdim=True)[0])
            return x - self.shift
        if self.mean is None:
            self.mean = x.mean((0, 2, 3), keepdim=True)
        return x - self.mean if self.kind == "attribute" else x - self.mean - self.shift


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured")
@pytest.mark.parametrize("kind", ["buffer", "attribute", "both"])
def test_state_that_the_first_batch_sets(kind):
    network = Applied(Centred(kind))
    with pytest.raises(ValueError, match=r"backbone keeps state of the first batch.*Call it on"):
        estimator(network, device="cpu").fit(X, Y)
    assert network.function.mean is None
    network(torch.from_numpy(X)).sum().backward()
    estimator(network, device="cpu").fit(X, Y)


def test_layers_that_are_built_late(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), BuiltLate())
    model = estimator(network, device="cpu").fit(X, Y)
    model.save(tmp_path / "model")
    before = torch.get_rng_state()
    loaded = load(tmp_path / "model", network)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(loaded.predict_proba(X), model.predict_proba(X))
    assert network[1].inner is None


# Two or three samples have no influence on each other.
LARGE = {
    "more than three": lambda x: x - x.mean(0) if len(x) > 3 else x,
    "more than eight": lambda x: x - x.mean(0) if len(x) > 8 else x,
    "the fifth": lambda x: x - x[4:5].sum(0),
    "parts of eight": lambda x: torch.cat([part - part[4:].sum(0) for part in x.split(8)]),
}


@pytest.mark.parametrize("features", ["activation", "full"])
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.filterwarnings("ignore:The backbone cannot be captured")
def test_networks_that_depend_on_large_batches_are_refused(name, features):
    model = estimator(Applied(Function(LARGE[name])), features=features, batch_size=12)
    for _ in range(2):  # the outputs of the first fit are not used in the second one
        with pytest.raises(ValueError, match=r"rest of its batch.*in a batch of 12 samples, and"):
            model.fit(X, Y)


class LimitedExperts(nn.Module):
    """A mixture of two experts that take four samples of a batch each. It has a graph."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(64, 2)
        self.experts = nn.ModuleList(nn.Linear(64, 6) for _ in range(2))

    def forward(self, x):
        x = x.flatten(1)
        shares = self.gate(x).softmax(1)
        chosen = F.one_hot(shares.argmax(1), 2)
        shares = shares * chosen * (chosen.cumsum(0) <= 4)
        return sum(shares[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


@pytest.mark.parametrize("options", [{}, {"features": "activation"}, {"feature_store": None}])
def test_experts_of_limited_capacity_are_refused(options):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"rest of its batch.*in a batch of 24 samples, and"):
        estimator(LimitedExperts(), **options).fit(X, Y)


@pytest.mark.filterwarnings("ignore:preprocess cannot be pickled")
@pytest.mark.parametrize("name", LARGE)
def test_transforms_that_depend_on_large_batches_are_refused(name):
    with pytest.raises(ValueError, match=r"preprocess must map every sample on its own.*Take"):
        estimator(preprocess=LARGE[name], batch_size=12).fit(X, Y)


def test_random_numbers_above_the_activation_do_no_harm():
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), Function(F.dropout))
    before = torch.get_rng_state()
    estimator(network, activation_layer="1").fit(X, Y)
    assert torch.equal(torch.get_rng_state(), before)


def test_rounding_in_low_precision_is_no_dependence():
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))).bfloat16()
    network = Function(lambda x: layers(x.bfloat16()).float())
    check_independence(network, torch.randn(2, 64))


def test_amplified_rounding_is_no_dependence():
    """A norm of one number divides rounding errors by the root of its small constant."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 64), nn.GroupNorm(64, 64, eps=1e-12)).eval()
    nn.init.normal_(network[0].weight, std=30.0)
    nn.init.ones_(network[1].bias)
    x = torch.randn(2, 7)
    output = network(x)
    assert (network(x[[-1, -1, -1]]) - output[[-1, -1, -1]]).norm() > 1e-2 * output.norm()
    check_independence(network, x)


def test_networks_outside_of_their_domain_are_left_to_later_checks():
    check_independence(Function(lambda x: torch.log(x) * 1.0), -torch.ones(2, 3))
