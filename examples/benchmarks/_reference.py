"""The linear model, trained as in the paper and its published code, and its evaluation."""

from __future__ import annotations

import copy
import math
import time

import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.functional import cross_entropy, leaky_relu, linear
from torch.optim.lr_scheduler import StepLR


class Convolutions(nn.Module):
    """The convolutions from number ``bottom`` upwards, with leaky ReLUs and the pooling."""

    def __init__(self, network, bottom):
        super().__init__()
        self.negative_slope = network.negative_slope
        self.layers = copy.deepcopy(nn.ModuleList(list(network.children())[bottom:]))

    def forward(self, hidden):
        for layer in self.layers:
            if hidden.shape[2:] == layer.kernel_size:  # as a matrix product: faster on CPUs
                hidden = linear(hidden.flatten(1), layer.weight.flatten(1), layer.bias)
                hidden = hidden[:, :, None, None]
            else:
                hidden = layer(hidden)
            hidden = leaky_relu(hidden, self.negative_slope)
        return hidden.mean((2, 3))


class LinearModel(nn.Module):
    """The linear model with the topmost convolution as θ₂, in the NTK parametrization."""

    def __init__(self, network, omega, intercept):
        super().__init__()
        self.whole, self.top = (Convolutions(network, bottom) for bottom in (0, -1))
        self.requires_grad_(False)
        self.to(omega.device).register_buffer("omega", omega.clone())
        self.weights, self.intercept = (nn.Parameter(t.clone()) for t in (omega, intercept))
        top = dict(self.top.layers[0].named_parameters())
        self.u = nn.ParameterDict({name: torch.zeros_like(p) for name, p in top.items()})
        self.scales = {"weight": math.sqrt(1 / len(top["weight"])), "bias": math.sqrt(0.1)}

    def forward(self, images):
        return self.logits(self.whole, images)

    def logits(self, network, hidden):
        """Return the logits; ``hidden`` is the input of ``network``, the last convolutions."""
        top, last = network.layers[-1], f"layers.{len(network.layers) - 1}."
        values = {last + name: getattr(top, name) for name in self.scales}
        tangents = {last + name: scale * self.u[name] for name, scale in self.scales.items()}
        activation, moved = jvp(
            lambda parameters: functional_call(network, parameters, (hidden,)),
            (values,),
            (tangents,),
        )
        return linear(activation, self.weights, self.intercept) + moved @ self.omega.T

    @torch.no_grad()
    def load(self, fitted):
        """Copy the parameters of a fitted estimator."""
        self.weights.copy_(torch.from_numpy(fitted.coef_))
        self.intercept.copy_(torch.from_numpy(fitted.intercept_))
        for moved in fitted.gradient_coef_.values():
            name = "weight" if moved.ndim > 1 else "bias"
            self.u[name].copy_(torch.from_numpy(moved) / self.scales[name])
        return self

    def penalty(self, alpha, gradient_alpha):
        """Return the penalty terms of the objective."""
        u = sum(float(p.detach().double().square().sum()) for p in self.u.values())
        weights = float(self.weights.detach().double().square().sum())
        return (alpha * weights + gradient_alpha * u) / 2


class Evaluation:
    """Evaluates the objective and the test accuracy of a linear model."""

    def __init__(self, network, preprocess, task, arguments, device):
        bottom = len(list(network.children())) - 1
        self.z, self.z_test = (
            convolutions(network, bottom, preprocess, X, device) for X in (task.X, task.X_test)
        )
        self.y, self.y_test = torch.from_numpy(task.y), torch.from_numpy(task.y_test)
        self.penalties = arguments.alpha, arguments.gradient_alpha

    @torch.no_grad()
    def __call__(self, model):
        """Return the objective on all training images, and the test accuracy in percent."""
        device = model.omega.device

        def logits(z):
            parts = [model.logits(model.top, batch.to(device)) for batch in z.split(500)]
            return torch.cat(parts).cpu().double()

        loss = float(cross_entropy(logits(self.z), self.y)) + model.penalty(*self.penalties)
        right = (logits(self.z_test).argmax(1) == self.y_test).double().mean()
        return {"objective": loss, "accuracy": 100 * float(right)}


@torch.inference_mode()
def convolutions(network, bottom, preprocess, X, device):
    """Return the output of the first ``bottom`` convolutions, in host memory; None means all."""
    network = copy.deepcopy(network).to(device)
    parts = []
    for batch in torch.from_numpy(X).split(500):
        hidden = preprocess(batch.to(device))
        for layer in list(network.children())[:bottom]:
            hidden = leaky_relu(layer(hidden), network.negative_slope)
        parts.append(hidden.cpu())
    return torch.cat(parts)


def optimizer(model, recipe, arguments):
    """Return the published optimizer with the penalties of the fit, and its schedule."""
    groups = [
        {"params": [model.weights], "weight_decay": arguments.alpha},
        {"params": [model.intercept], "weight_decay": 0.0},
        {"params": list(model.u.values()), "weight_decay": arguments.gradient_alpha},
    ]
    steps = recipe.optimizer(groups, lr=recipe.rate)
    return steps, StepLR(steps, recipe.halve_every, 0.5)


def minibatches(n_samples, recipe, seed):
    """Iterate over the row numbers of random minibatches, as many as the recipe has."""
    generator, iteration = torch.Generator().manual_seed(seed), 0
    while iteration < recipe.iterations:
        for rows in torch.randperm(n_samples, generator=generator).split(recipe.batch_size):
            yield rows
            iteration += 1


def train(model, recipe, preprocess, task, arguments, seed):
    """Train in place; yield the total seconds after every ``arguments.every`` iterations."""
    X, y, device = torch.from_numpy(task.X), torch.from_numpy(task.y), model.omega.device
    steps, schedule = optimizer(model, recipe, arguments)
    parameters = [model.weights, model.intercept, *model.u.values()]
    seconds, start = 0.0, time.perf_counter()
    for iteration, rows in enumerate(minibatches(len(y), recipe, seed), 1):
        loss = cross_entropy(model(preprocess(X[rows].to(device))), y[rows].to(device))
        steps.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        steps.step()
        schedule.step()
        if iteration % arguments.every == 0:
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            yield seconds
            start = time.perf_counter()
