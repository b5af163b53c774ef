"""The two stages of the method: fit the output weights, then the whole linear model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from sklearn_gradfeat._losses import Loss
from sklearn_gradfeat._model import Model
from sklearn_gradfeat.features import Features
from sklearn_gradfeat.solvers import Solution, minimize, preconditioned_norm
from sklearn_gradfeat.tangent import (
    Head,
    LinearizedHead,
    Preconditioner,
    SampleInverse,
    TangentObjective,
    TangentTerm,
    tangent_gram,
)

# The tolerance of the first stage, as a share, where a second follows: its iterations are cheap,
# and in the second every one that it left undone costs a pass over the head.
_FIRST_STAGE = 0.01


@dataclass(frozen=True)
class Settings:
    """The parameters of an estimator that training depends on."""

    features: str
    parametrization: str
    alpha: float
    gradient_alpha: float
    fit_intercept: bool
    tol: float
    max_iter: int
    omega_seed: int | None  # None where Ω is fitted


Monitor: TypeAlias = Callable[[str, int, float, Callable[[], Model]], bool]


def train(
    features: Features,
    head: Head,
    parameters: dict[str, Tensor],
    loss: Loss,
    settings: Settings,
    warm: Model | None,
    monitor: Monitor,
) -> tuple[Model, dict[str, Solution]]:
    """Fit the output weights, then the linear model that starts from them.

    Parameters
    ----------
    features : Features
        Activations and boundary of the training samples.
    head : callable
        The head of the network.
    parameters : dict of str to tensor
        The differentiated parameters.
    loss : Loss
        The loss in the logits.
    settings : Settings
        Penalties, tolerance and the kind of model.
    warm : Model or None
        Where to start; None starts from zero.
    monitor : callable
        Called after every iteration as ``monitor(stage, iteration, objective, model)``,
        with a function that returns the model; returning True stops the stage.

    Returns
    -------
    (Model, dict of str to Solution)
        The model, and how each stage ended: ``"activation"`` and, unless that is all
        there is, the value of ``settings.features``.
    """
    stages = _Stages(features, head, parameters, loss, settings)
    base, solution, reference = stages.fit_activation(warm, monitor)
    solutions = {"activation": solution}
    if settings.features == "activation":
        return base, solutions
    if settings.omega_seed is not None:
        base = replace(base, omega=_random_like(base.omega, settings.omega_seed))
    model, solution = stages.fit_gradient(base, warm, reference, monitor)
    return model, {**solutions, settings.features: solution}


class _Stages:
    """Both stages on the same samples."""

    def __init__(
        self,
        features: Features,
        head: Head,
        parameters: dict[str, Tensor],
        loss: Loss,
        settings: Settings,
    ) -> None:
        self.features, self.loss, self.settings = features, loss, settings
        self.head, self.parameters = head, parameters
        self.like = features.activation.new_empty(0)

    def objective(self, activation: Tensor | None, tangent: TangentTerm | None) -> TangentObjective:
        """Return the objective of a model with these terms."""
        return TangentObjective(
            self.loss,
            activation,
            tangent,
            self.settings.alpha,
            self.settings.fit_intercept,
            len(self.features.activation),
            self.like,
            self.loss.weights.device,
        )

    def intercept(self, free: Tensor) -> Tensor:
        """Return the intercept, zeros where it is not part of the model."""
        return free if self.settings.fit_intercept else self.like.new_zeros(self.loss.n_outputs)

    def fit_activation(self, warm: Model | None, monitor: Monitor) -> tuple[Model, Solution, float]:
        """Fit the output weights; return them with the norm that tolerances refer to."""
        objective = self.objective(self.features.activation, None)
        zero = self.like.new_zeros(sum(objective.sizes))
        nothing = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

        def model(x: Tensor) -> Model:
            parts = objective.split(x)
            return Model(parts.weights, self.intercept(parts.intercept), parts.weights, nothing)

        start = zero
        if warm is not None:
            start = _join(warm.omega, warm.intercept, zero[:0], self.settings)
        reference = _norm_at_zero(objective, zero)
        settings = self.settings
        solution = _minimize(
            objective,
            start,
            reference,
            settings.tol * (1 if settings.features == "activation" else _FIRST_STAGE),
            settings.max_iter,
            lambda n, value, x: monitor("activation", n, value, lambda: model(x)),
        )
        if solution.norm <= math.sqrt(settings.tol) * reference:
            solution = replace(solution, status="converged")
        return model(solution.x), solution, reference

    def fit_gradient(
        self, base: Model, warm: Model | None, reference: float, monitor: Monitor
    ) -> tuple[Model, Solution]:
        """Fit the linear model to the accuracy of the first stage, starting from it."""
        kind = self.settings.features
        linearized = LinearizedHead(self.head, self.parameters, self.settings.parametrization)
        gradient_alpha = self.settings.gradient_alpha
        term = TangentTerm(linearized, self.features.batches, base.omega, gradient_alpha)
        full = kind == "full"
        objective = self.objective(self.features.activation if full else None, term)

        def model(x: Tensor) -> Model:
            parts = objective.split(x)
            weights = parts.weights if full else torch.zeros_like(base.weights)
            moved = dict(zip(self.parameters, linearized.displacements(parts.u), strict=True))
            return Model(weights, self.intercept(parts.intercept), base.omega, moved)

        start = base if warm is None else warm
        u = linearized.flatten(tuple(start.displacements[name] for name in self.parameters))
        weights = start.weights if full else start.weights[:, :0]
        solution = _minimize(
            objective,
            _join(weights, start.intercept, u, self.settings),
            reference,
            self.settings.tol,
            self.settings.max_iter,
            lambda n, value, x: monitor(kind, n, value, lambda: model(x)),
        )
        return model(solution.x), solution


def _random_like(omega: Tensor, seed: int) -> Tensor:
    """Return normal numbers with the mean square of ``omega``, so that penalties mean the same."""
    # Apart from the weights of a random network, which are drawn from the seed itself.
    drawn = np.random.default_rng([seed, 1]).standard_normal(omega.shape)
    return torch.from_numpy(drawn).to(omega) * omega.square().mean().sqrt()


def _join(weights: Tensor, intercept: Tensor, u: Tensor, settings: Settings) -> Tensor:
    """Lay the parts of a model out as the objective does."""
    bias = intercept if settings.fit_intercept else intercept[:0]
    return torch.cat([weights.reshape(-1), bias, u])


def _minimize(
    objective: TangentObjective,
    start: Tensor,
    reference: float,
    tol: float,
    max_iter: int,
    callback: Callable[[int, float, Tensor], bool],
) -> Solution:
    """Minimise until a Newton step promises ``tol`` of what it did at the zero model."""
    return minimize(
        objective,
        start,
        _inverse_hessian(objective),
        tolerance=math.sqrt(tol) * reference,
        max_iter=max_iter,
        callback=callback,
    )


def _inverse_hessian(
    objective: TangentObjective,
) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    """Return the function that inverts the Hessian at given logits: exactly where cheap."""
    gram = None
    if objective.tangent is not None:
        gram = tangent_gram(objective.tangent, objective.n_samples)
    if gram is None:
        return lambda logits: Preconditioner(objective, logits)
    return lambda logits: SampleInverse(objective, gram, logits)


def _norm_at_zero(objective: TangentObjective, zero: Tensor) -> float:
    """Return the norm of the gradient of the model that predicts nothing.

    Where that model is the optimum, its gradient is rounding noise, and no yardstick.
    """
    logits = objective.forward(zero)
    gradient = objective.adjoint(objective.loss.gradient(logits))
    norm = preconditioned_norm(gradient, Preconditioner(objective, logits))
    eps = torch.finfo(zero.dtype).eps
    noise = 100 * eps * math.sqrt(objective.loss.value(logits) / max(objective.alpha, eps))
    return norm if norm > noise else math.inf
