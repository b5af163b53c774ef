"""The two stages of the method: fit the output weights, then the whole linear model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sklearn_gradfeat._losses import Loss
from sklearn_gradfeat.features import Features
from sklearn_gradfeat.solvers import Solution, minimize, preconditioned_norm
from sklearn_gradfeat.tangent import (
    Head,
    LinearizedHead,
    Preconditioner,
    TangentObjective,
    TangentTerm,
)


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


@dataclass(frozen=True)
class Model:
    """A linear model, with the displacements in the units of the parameters.

    ``weights`` and ``omega`` have shape (n_outputs, n_features), ``intercept`` has shape
    (n_outputs,), and ``displacements`` those of the parameters that they displace.
    """

    weights: Tensor
    intercept: Tensor
    omega: Tensor
    displacements: dict[str, Tensor]


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
    activation = features.activation
    like = activation.new_empty(0)
    common = (settings.alpha, settings.fit_intercept, len(activation), like, loss.weights.device)
    first = TangentObjective(loss, activation, None, *common)
    zero = like.new_zeros(sum(first.sizes))
    intercept = like.new_zeros(loss.n_outputs)

    def first_model(x: Tensor) -> Model:
        parts = first.split(x)
        bias = parts.intercept if settings.fit_intercept else intercept
        nothing = {name: torch.zeros_like(p) for name, p in parameters.items()}
        return Model(parts.weights, bias, parts.weights, nothing)

    # Both stages are solved to the same accuracy, relative to the start of the first.
    reference = _norm_at_zero(first, zero)
    solution = _minimize(
        first,
        zero if warm is None else _join(warm.omega, warm.intercept, zero[:0], settings),
        reference,
        settings,
        lambda n, value, x: monitor("activation", n, value, lambda: first_model(x)),
    )
    solutions = {"activation": solution}
    base = first_model(solution.x)
    if settings.features == "activation":
        return base, solutions

    linearized = LinearizedHead(head, parameters, settings.parametrization)
    term = TangentTerm(linearized, features.batches, base.omega, settings.gradient_alpha)
    full = settings.features == "full"
    second = TangentObjective(loss, activation if full else None, term, *common)

    def second_model(x: Tensor) -> Model:
        parts = second.split(x)
        weights = parts.weights if full else torch.zeros_like(base.weights)
        bias = parts.intercept if settings.fit_intercept else intercept
        moved = dict(zip(parameters, linearized.displacements(parts.u), strict=True))
        return Model(weights, bias, base.omega, moved)

    def vector(model: Model) -> Tensor:
        u = linearized.flatten(tuple(model.displacements[name] for name in parameters))
        weights = model.weights if full else model.weights[:, :0]
        return _join(weights, model.intercept, u, settings)

    solutions[settings.features] = solution = _minimize(
        second,
        vector(base if warm is None else warm),
        reference,
        settings,
        lambda n, value, x: monitor(settings.features, n, value, lambda: second_model(x)),
    )
    return second_model(solution.x), solutions


def _join(weights: Tensor, intercept: Tensor, u: Tensor, settings: Settings) -> Tensor:
    """Lay the parts of a model out as the objective does."""
    bias = intercept if settings.fit_intercept else intercept[:0]
    return torch.cat([weights.reshape(-1), bias, u])


def _minimize(
    objective: TangentObjective,
    start: Tensor,
    reference: float,
    settings: Settings,
    callback: Callable[[int, float, Tensor], bool],
) -> Solution:
    """Minimise until the gradient is ``settings.tol`` times ``reference``."""
    return minimize(
        objective,
        start,
        lambda logits: Preconditioner(objective, logits),
        tolerance=settings.tol * reference,
        max_iter=settings.max_iter,
        callback=callback,
    )


def _norm_at_zero(objective: TangentObjective, zero: Tensor) -> float:
    """Return the norm of the gradient of the model that predicts nothing."""
    logits = objective.forward(zero)
    gradient = objective.adjoint(objective.loss.gradient(logits))
    return preconditioned_norm(gradient, Preconditioner(objective, logits))
