"""Fine-tuning of the top convolutions of a ConvNet, with the recipes of the paper and its code."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy, leaky_relu, linear
from torch.optim.lr_scheduler import StepLR


@dataclass(frozen=True)
class Recipe:
    """How a network is fine-tuned; the learning rate is the published one."""

    optimizer: Callable
    rate: float
    batch_size: int
    iterations: int
    halve_every: int
    clip: float = float("inf")


ADAM = partial(torch.optim.Adam, betas=(0.5, 0.999), weight_decay=1e-6)
SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-5)
RECIPES = {
    "Adam": Recipe(ADAM, 1e-3, 64, 80_000, 20_000),
    "SGD": Recipe(SGD, 1e-1, 128, 50_000, 10_000, clip=10.0),
}


class Convolutions(nn.Module):
    """The convolutions from ``bottom`` upwards, with rectifiers and the pooling."""

    def __init__(self, network, bottom):
        super().__init__()
        self.slope = network.slope
        self.layers = copy.deepcopy(nn.ModuleList(list(network.children())[bottom:]))

    def forward(self, hidden):
        for layer in self.layers:
            if hidden.shape[2:] == layer.kernel_size:  # as a matrix product: faster on CPUs
                hidden = linear(hidden.flatten(1), layer.weight.flatten(1), layer.bias)
                hidden = hidden[:, :, None, None]
            else:
                hidden = layer(hidden)
            hidden = leaky_relu(hidden, self.slope)
        return hidden.mean((2, 3))


class Head(nn.Module):
    """The convolutions from ``bottom`` upwards, with a linear classifier."""

    def __init__(self, network, bottom, weights, intercept):
        super().__init__()
        self.convolutions = Convolutions(network, bottom)
        self.classifier = nn.Linear(weights.shape[1], len(weights))
        self.classifier.weight.data = torch.from_numpy(weights).float()
        self.classifier.bias.data = torch.from_numpy(intercept).float()

    def forward(self, hidden):
        return self.classifier(self.convolutions(hidden))


@torch.inference_mode()
def below(network, bottom, preprocess, X, device):
    """Return what the frozen convolutions make of the images, in host memory."""
    network = copy.deepcopy(network).to(device)
    parts = []
    for batch in torch.from_numpy(X).split(500):
        hidden = preprocess(batch.to(device))
        for layer in list(network.children())[:bottom]:
            hidden = leaky_relu(layer(hidden), network.slope)
        parts.append(hidden.cpu())
    return torch.cat(parts)


@torch.inference_mode()
def predict(head, z):
    """Return the most probable class of every sample, as numpy's array."""
    device = head.classifier.weight.device
    return torch.cat([head(batch.to(device)).argmax(1).cpu() for batch in z.split(500)]).numpy()


def accuracy(head, z, y):
    """Return the share of samples that a head gets right."""
    return float((predict(head, z) == y.numpy()).mean())


def fine_tune(head, train, held_out, recipe, rate, patience, seed):
    """Train a head in place, up to its best epoch on held-out samples; return that accuracy.

    It stops after ``patience`` epochs without a better one.
    """
    (z, y), device = train, head.classifier.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = recipe.optimizer(head.parameters(), lr=rate)
    schedule = StepLR(optimizer, recipe.halve_every, 0.5)
    best, state, waited, iteration = accuracy(head, *held_out), head.state_dict(), 0, 0
    state = copy.deepcopy(state)
    while iteration < recipe.iterations and waited < patience:
        for rows in torch.randperm(len(z), generator=generator).split(recipe.batch_size):
            loss = cross_entropy(head(z[rows].to(device)), y[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            iteration += 1
        score = accuracy(head, *held_out)
        waited += 1
        if score > best:
            best, state, waited = score, copy.deepcopy(head.state_dict()), 0
    head.load_state_dict(state)
    return best


def fine_tune_with_skorch(head, train, held_out, recipe, rate, patience, seed):
    """Train a head in place, likewise, with skorch's loop and callbacks."""
    from skorch import NeuralNetClassifier
    from skorch.callbacks import EarlyStopping, GradientNormClipping, LRScheduler
    from skorch.dataset import Dataset
    from skorch.helper import predefined_split

    halving = LRScheduler(StepLR, step_size=recipe.halve_every, gamma=0.5, step_every="batch")
    stop = EarlyStopping(
        "valid_acc", lower_is_better=False, patience=patience, load_best=True, sink=lambda _: None
    )
    torch.manual_seed(seed)
    net = NeuralNetClassifier(
        head,
        criterion=nn.CrossEntropyLoss,
        optimizer=recipe.optimizer.func,
        **{f"optimizer__{name}": value for name, value in recipe.optimizer.keywords.items()},
        lr=rate,
        batch_size=recipe.batch_size,
        max_epochs=math.ceil(recipe.iterations * recipe.batch_size / len(train[0])),
        iterator_train__shuffle=True,
        train_split=predefined_split(Dataset(*held_out)),
        callbacks=[halving, stop, GradientNormClipping(recipe.clip)],
        device=head.classifier.weight.device,
        verbose=0,
    )
    net.fit(*train)
