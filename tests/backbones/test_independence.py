"""Networks whose activations are no function of single samples, in evaluation mode."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sklearn_gradfeat.backbones._independence import check_independence
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
    "torch.rand": Function(lambda x: x * (torch.rand(len(x), 1, 6, 6) > 0.3)),
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
}


@pytest.mark.parametrize("name", RARE)
def test_random_numbers_that_hardly_ever_matter(name):
    match = rf"another activation in every run.*The cause is {name} in the layer 'function'"
    with pytest.raises(ValueError, match=match):
        check_independence(Applied(Function(RARE[name])), torch.from_numpy(X[:2]))


@pytest.mark.parametrize(
    "function",
    [lambda x: x + 0 * torch.randn_like(x), lambda x: x if torch.rand(()) >= 0 else 2 * x],
)
def test_random_numbers_that_never_matter(function):
    check_independence(Applied(Function(function)), torch.from_numpy(X[:2]))


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
