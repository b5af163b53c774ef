"""Fine-tuning of the gradient layers, by the recipes of the paper and of its published code."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.optim.lr_scheduler import StepLR

from sklearn_gradfeat.data import BatchSize


@dataclass(frozen=True)
class Recipe:
    """The settings of fine-tuning; ``rate`` is the published learning rate."""

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


def gradient_network(fitted, device):
    """Return the extractor of a fitted estimator, and its network, cut below θ₂."""
    extractor = fitted._extractor.on(device)
    return extractor, extractor.network(extractor.backbone.choose(fitted.gradient_layers))


class Head(nn.Module):
    """The layers to fine-tune: pretrained gradient layers and a fitted classifier.

    Parameters
    ----------
    fitted : GradientFeatureClassifier
        A logistic regression on the activations. Its batch norms are folded into convolutions.
    device : torch.device
        The device of the training.
    """

    def __init__(self, fitted, device):
        super().__init__()
        _, self.network = gradient_network(fitted, device)
        self.layers = nn.ParameterList(p.clone() for p in self.network.parameters.values())
        weights, intercept = (torch.tensor(a) for a in (fitted.coef_, fitted.intercept_))
        if len(weights) < len(fitted.classes_):  # one logit for two classes
            weights, intercept = (torch.stack([0 * t[0], t[0]]) for t in (weights, intercept))
        self.classifier = nn.Linear(*weights.T.shape)
        self.classifier.weight.data = weights.float()
        self.classifier.bias.data = intercept.float()
        self.to(device)

    def forward(self, *boundary):
        """Return the logits."""
        return self.classifier(self.network.head(tuple(self.layers), boundary))

    @torch.inference_mode()
    def logits(self, boundary):
        """Return the logits as an array; ``boundary`` is in host memory."""
        device = self.classifier.weight.device
        batches = zip(*(t.split(500) for t in boundary), strict=True)
        parts = [self(*(t.to(device) for t in batch)).cpu() for batch in batches]
        return torch.cat(parts).numpy()


def below(fitted, X, device):
    """Return the inputs of the gradient layers, tensors in host memory."""
    extractor, network = gradient_network(fitted, device)
    parts = [
        [tensor.cpu() for tensor in boundary]
        for _, boundary in extractor.batches(X, network, BatchSize(500), verbose=False, store=None)
    ]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def fitted_to_rows(model, task):
    """Return a clone that is fitted without the held-out images, on which it would overfit."""
    fitted = clone(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fitted.fit(task.X[task.rows], task.y[task.rows])


def take(boundary, rows):
    """Return some samples of the inputs of the gradient layers."""
    return tuple(tensor[rows] for tensor in boundary)


def accuracy(logits, y):
    """Return the share of samples whose predicted class is correct."""
    return float((logits.argmax(1) == y).mean())


def fine_tune(head, train, held_out, recipe, rate, patience, seed, metric=accuracy):
    """Fine-tune a head in place until its best epoch, and return the best held-out score.

    ``train`` and ``held_out`` are pairs of the inputs of the gradient layers and the targets, an
    array of class indices or an indicator matrix. Training stops after ``patience`` epochs without
    a better score.
    """
    (z, targets), device = train, head.classifier.weight.device
    y = torch.from_numpy(targets)
    if y.ndim == 2:
        y, loss_of = y.float(), summed_binary_cross_entropy
    else:
        loss_of = cross_entropy

    def score():
        return metric(head.logits(held_out[0]), held_out[1])

    generator = torch.Generator().manual_seed(seed)
    optimizer = recipe.optimizer(head.parameters(), lr=rate)
    schedule = StepLR(optimizer, recipe.halve_every, 0.5)
    best, state, waited, iteration = score(), copy.deepcopy(head.state_dict()), 0, 0
    while iteration < recipe.iterations and waited < patience:
        for rows in torch.randperm(len(y), generator=generator).split(recipe.batch_size):
            loss = loss_of(head(*(t.to(device) for t in take(z, rows))), y[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            iteration += 1
        waited += 1
        if (now := score()) > best:
            best, state, waited = now, copy.deepcopy(head.state_dict()), 0
    head.load_state_dict(state)
    return best


def mean_average_precision(logits, y):
    """Return the average precision, averaged over the labels that occur."""
    occurs = y.any(0)
    return float(average_precision_score(y[:, occurs], logits[:, occurs], average="macro"))


def summed_binary_cross_entropy(logits, y):
    """Return the multilabel loss of the package: summed over labels, averaged over samples."""
    return binary_cross_entropy_with_logits(logits, y, reduction="sum") / len(y)


def fine_tune_with_skorch(head, train, held_out, recipe, rate, patience, seed):
    """Fine-tune a head in place likewise, with the training loop and callbacks of skorch."""
    from skorch import NeuralNetClassifier
    from skorch.callbacks import EarlyStopping, GradientNormClipping, LRScheduler
    from skorch.dataset import Dataset
    from skorch.helper import predefined_split

    halving = LRScheduler(StepLR, step_size=recipe.halve_every, gamma=0.5, step_every="batch")
    stop = EarlyStopping(
        "valid_acc", lower_is_better=False, patience=patience, load_best=True, sink=lambda _: None
    )
    ((z,), y), (held_out_z, held_out_y) = train, held_out  # a single input tensor
    torch.manual_seed(seed)
    net = NeuralNetClassifier(
        head,
        criterion=nn.CrossEntropyLoss,
        optimizer=recipe.optimizer.func,
        **{f"optimizer__{name}": value for name, value in recipe.optimizer.keywords.items()},
        lr=rate,
        batch_size=recipe.batch_size,
        max_epochs=math.ceil(recipe.iterations * recipe.batch_size / len(y)),
        iterator_train__shuffle=True,
        train_split=predefined_split(Dataset(*held_out_z, held_out_y)),
        callbacks=[halving, stop, GradientNormClipping(recipe.clip)],
        device=head.classifier.weight.device,
        verbose=0,
    )
    net.fit(z, y)
