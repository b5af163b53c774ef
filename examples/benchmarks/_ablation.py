"""The linear model with random weights in place of pretrained or fitted ones: table 1 of [1].

The activations are always those of the pretrained network. Three parts of the gradient term are
replaced one by one, each to see how much it contributes:

* θ̄₁ and θ̄₂, the layers below and in the gradient layers, by :func:`partly_random`. The term then
  uses the Jacobian of another network, by :class:`GradientsElsewhere`.
* Ω, the output weights, by :class:`RandomOmegaClassifier`.

[1] F. Mu, Y. Liang, Y. Li, Gradients as Features for Deep Representation Learning, ICLR 2020,
    arXiv:2004.05529.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.training import FitResult, TwoStageFit, warn_unless_converged


def partly_random(network, layers, theta_1, theta_2, seed):
    """Return a copy of a ConvNet with random weights (He et al.) in some layers.

    Parameters
    ----------
    network : ConvNet
        The pretrained network.
    layers : list of str
        The names of the gradient layers, θ₂. All others are θ₁.
    theta_1, theta_2 : bool
        Whether these layers keep their pretrained weights.
    seed : int
        Seeds the random weights.

    Returns
    -------
    ConvNet
    """
    copied = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in copied.named_children():
            if not (theta_2 if name in layers else theta_1):
                nn.init.kaiming_normal_(layer.weight, network.negative_slope)
                nn.init.zeros_(layer.bias)
    return copied


class GradientsElsewhere(nn.Module):
    """The activations of a network ``f`` with the gradients of another network ``g``.

    It computes ``f(x) - g(x) + g(x)``, with two copies of ``g``. The value is ``f(x)``. With
    ``gradient_layers`` in the submodule ``gradient``, the second copy, the Jacobian is that of
    ``g``.

    Parameters
    ----------
    activation, gradient : nn.Module
        ``f`` and ``g``, whose outputs have the same shape.
    """

    def __init__(self, activation, gradient):
        super().__init__()
        self.activation = activation
        self.fixed, self.gradient = copy.deepcopy(gradient), copy.deepcopy(gradient)

    def forward(self, x):
        """Return the activations."""
        return (self.activation(x) - self.fixed(x)) + self.gradient(x)


class RandomOmegaClassifier(GradientFeatureClassifier):
    """A classifier whose output weights Ω are random instead of fitted.

    They are normal random numbers with the mean square of the fitted ones.
    """

    def fit(self, X, y):
        """Fit the activation term, draw Ω, and fit the whole model."""
        y = np.asarray(y)
        problem = self._problem(y, None)
        prepared = self._prepare(X, problem.weights)
        stages = TwoStageFit(prepared, problem)
        first = stages.fit_activation(self.alpha)
        omega = torch.from_numpy(
            check_random_state(self.random_state).standard_normal(first.model.omega.shape)
        ).to(first.model.omega)
        omega *= first.model.omega.norm() / omega.norm()
        first = replace(first, model=replace(first.model, omega=omega))
        model, solution = stages.fit_gradient(first, self.gradient_alpha, first.model)
        solutions = {"activation": first.solution, self.features: solution}
        result = FitResult(problem.restored(model), solutions, self.alpha, self.gradient_alpha)
        warn_unless_converged(result, prepared.settings)
        self.__dict__.update(prepared.attributes | problem.attributes | result.attributes())
        return self
