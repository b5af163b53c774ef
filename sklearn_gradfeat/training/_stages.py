"""One fit: what it starts from, the output weights, then the linear model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from sklearn_gradfeat.backbones import Network
from sklearn_gradfeat.cache import CachedSamples
from sklearn_gradfeat.curvature import Inverses
from sklearn_gradfeat.data import Result, accumulation_device, in_smaller_batches
from sklearn_gradfeat.linearized import (
    LinearizedHead,
    LinearModel,
    Loss,
    TangentObjective,
    TangentTerm,
)
from sklearn_gradfeat.solvers import Solution, minimize, preconditioned_norm
from sklearn_gradfeat.training._problem import Problem

# The tolerance of the first stage, as a share, where a second follows: its iterations are cheap,
# and in the second every one that it left undone costs a pass over the head.
_FIRST_STAGE = 0.01
# Where Newton steps are exact, one or two more reach it from any tolerance.
_EXACT = 1e-16


@dataclass(frozen=True)
class Settings:
    """The parameters of an estimator that training depends on, but for the penalties."""

    features: str
    parametrization: str
    fit_intercept: bool
    tol: float
    max_iter: int
    omega_seed: int | None  # None where Ω is fitted


Monitor: TypeAlias = Callable[[str, int, float, Callable[[], LinearModel]], bool]


def unwatched(stage: str, iteration: int, value: float, model: Callable[[], LinearModel]) -> bool:
    """Let the solver go on."""
    return False


@dataclass(frozen=True)
class FirstStage:
    """The outcome of the first stage, where second stages start.

    Attributes
    ----------
    alpha : float
        Its penalty.
    model : LinearModel
        The model without displacements.
    solution : Solution
        How the solver ended.
    reference : float
        The norm that tolerances refer to.
    inverses : Inverses
        Those of the second stages.
    """

    alpha: float
    model: LinearModel
    solution: Solution
    reference: float
    inverses: Inverses


class TwoStageFit:
    """Both stages on the same samples, for any penalties.

    What does not depend on the penalties is computed once.

    Parameters
    ----------
    samples : CachedSamples
        Activations and boundary of the training samples.
    network : Network
        Its head, with the parameters that are differentiated.
    loss : Loss
        The loss in the logits.
    settings : Settings
        Tolerance and the kind of model.
    """

    def __init__(
        self, samples: CachedSamples, network: Network, loss: Loss, settings: Settings
    ) -> None:
        self.samples, self.loss, self.settings = samples, loss, settings
        self.parameters = network.parameters
        self.linearized = LinearizedHead(network.head, network.parameters, settings.parametrization)
        self.like = samples.activation.new_empty(0)
        self.inverses = Inverses()

    def objective(
        self, alpha: float, activation: Tensor | None, tangent: TangentTerm | None
    ) -> TangentObjective:
        """Return the objective of a model with these terms."""
        return TangentObjective(
            self.loss,
            activation,
            tangent,
            alpha,
            self.settings.fit_intercept,
            len(self.samples.activation),
            self.like,
            self.loss.weights.device,
        )

    def tangent(self, base: LinearModel, gradient_alpha: float) -> TangentTerm:
        """Return the gradient features at the output weights of the first stage."""
        return TangentTerm(self.linearized, self.samples.batches, base.omega, gradient_alpha)

    def second(self, base: FirstStage, gradient_alpha: float) -> TangentObjective:
        """Return the objective of the linear model whose first stage is given."""
        activation = self.samples.activation if self.settings.features == "full" else None
        return self.objective(base.alpha, activation, self.tangent(base.model, gradient_alpha))

    def intercept(self, free: Tensor) -> Tensor:
        """Return the intercept, zeros where it is not part of the model."""
        return free if self.settings.fit_intercept else self.like.new_zeros(self.loss.n_outputs)

    def fit_activation(
        self, alpha: float, warm: LinearModel | None, monitor: Monitor
    ) -> FirstStage:
        """Fit the output weights, from those of ``warm`` on."""
        objective = self.objective(alpha, self.samples.activation, None)
        zero = self.like.new_zeros(sum(objective.sizes))
        nothing = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

        def model(x: Tensor) -> LinearModel:
            parts = objective.split(x)
            return LinearModel(
                parts.weights, self.intercept(parts.intercept), parts.weights, nothing
            )

        settings, inverse = self.settings, self.inverses.at(objective)
        reference = _norm_at_zero(objective, zero, inverse)
        start = zero
        if warm is not None and math.isfinite(reference):
            weights = warm.omega if self.settings.omega_seed is None else warm.weights
            start = _join(weights, warm.intercept, zero[:0], self.settings)
        solution = _minimize(
            objective,
            start,
            self.inverses,
            reference,
            settings,
            1.0 if settings.features == "activation" else _FIRST_STAGE,
            lambda n, value, x: monitor("activation", n, value, lambda: model(x)),
        )
        fitted = model(solution.x)
        if settings.omega_seed is not None:
            fitted = replace(fitted, omega=_random_like(fitted.omega, settings.omega_seed))
        return FirstStage(alpha, fitted, solution, reference, Inverses())

    def fit_gradient(
        self, base: FirstStage, gradient_alpha: float, start: LinearModel, monitor: Monitor
    ) -> tuple[LinearModel, Solution]:
        """Fit the linear model to the accuracy of the first stage, from ``start`` on."""
        kind = self.settings.features
        full = kind == "full"
        objective = self.second(base, gradient_alpha)

        def model(x: Tensor) -> LinearModel:
            parts = objective.split(x)
            weights = parts.weights if full else torch.zeros_like(base.model.weights)
            moved = self.linearized.displacements(parts.u)
            named = dict(zip(self.parameters, moved, strict=True))
            return LinearModel(weights, self.intercept(parts.intercept), base.model.omega, named)

        u = self.linearized.flatten(tuple(start.displacements[name] for name in self.parameters))
        weights = start.weights if full else start.weights[:, :0]
        solution = _minimize(
            objective,
            _join(weights, start.intercept, u, self.settings),
            base.inverses,
            base.reference,
            self.settings,
            1.0,
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
    inverses: Inverses,
    reference: float,
    settings: Settings,
    share: float,
    callback: Callable[[int, float, Tensor], bool],
) -> Solution:
    """Minimise until a Newton step promises a share of ``tol`` of what it did at the zero model.

    Where Newton steps are exact it goes on to rounding, which takes one or two. Within ``tol`` it
    has converged.
    """
    inverse, tol = inverses.at(objective), settings.tol * share
    if inverses.exact_for(objective):
        tol = min(tol, _EXACT)
    solution = minimize(
        objective,
        start,
        inverse,
        tolerance=math.sqrt(tol) * reference,
        max_iter=settings.max_iter,
        callback=callback,
        curvature_pairs=inverses.curvature_pairs,
        coarse=inverses.coarse(objective),
    )
    inverses.learn(solution)
    if solution.norm <= math.sqrt(settings.tol) * reference:
        return replace(solution, status="converged")
    return solution


def _norm_at_zero(
    objective: TangentObjective,
    zero: Tensor,
    inverse: Callable[[Tensor], Callable[[Tensor], Tensor]],
) -> float:
    """Return the norm of the gradient of the model that predicts nothing.

    Where that model is the optimum, its gradient is rounding noise, and no yardstick.
    """
    logits = objective.forward(zero)
    gradient = objective.adjoint(objective.loss.gradient(logits))
    norm = preconditioned_norm(gradient, inverse(logits))
    eps = torch.finfo(zero.dtype).eps
    noise = 100 * eps * math.sqrt(objective.loss.value(logits) / max(objective.alpha, eps))
    return norm if norm > noise else math.inf


class Prepared(NamedTuple):
    """The samples as the linear model takes them, whatever its penalties and targets."""

    network: Network
    samples: CachedSamples
    settings: Settings
    attributes: dict[str, Any]

    def subset(self, rows: npt.NDArray[np.intp]) -> Prepared:
        """Return some of the samples."""
        return self._replace(samples=self.samples.subset(rows))

    def stages(self, problem: Problem) -> TwoStageFit:
        """Return both stages for targets and weights."""
        loss = problem.loss(accumulation_device(self.samples.activation.device))
        return TwoStageFit(self.samples, self.network, loss, self.settings)

    def attempt(self, run: Callable[[Prepared], Result]) -> Result:
        """Return what ``run`` makes of the samples, in smaller batches if memory runs out."""
        return in_smaller_batches(
            lambda size: run(self._replace(samples=self.samples.in_batches(size))),
            self.samples.batch_size,
        )


def train(
    stages: TwoStageFit,
    alpha: float,
    gradient_alpha: float,
    warm: LinearModel | None,
    monitor: Monitor,
) -> tuple[LinearModel, dict[str, Solution]]:
    """Fit the output weights, then the linear model that starts from them.

    Parameters
    ----------
    stages : TwoStageFit
        Both stages on the training samples.
    alpha, gradient_alpha : float
        The penalties.
    warm : LinearModel or None
        Where to start; None starts from zero.
    monitor : callable
        Called after every iteration as ``monitor(stage, iteration, objective, model)``,
        with a function that returns the model; returning True stops the stage.

    Returns
    -------
    (LinearModel, dict of str to Solution)
        The model, and how each stage ended: ``"activation"`` and, unless that is all
        there is, the value of ``features``.
    """
    kind = stages.settings.features
    base = stages.fit_activation(alpha, warm, monitor)
    solutions = {"activation": base.solution}
    if kind == "activation":
        return base.model, solutions
    # Where the zero model is the optimum, nothing warm may take its place.
    start = warm if warm is not None and math.isfinite(base.reference) else base.model
    model, solution = stages.fit_gradient(base, gradient_alpha, start, monitor)
    return model, {**solutions, kind: solution}


def warn_unless_converged(stage: str, solution: Solution, settings: Settings) -> None:
    """Warn with what was reached and what to try."""
    reached = (
        f"The fit of the {stage} features stopped after {solution.n_iter} iterations, where "
        f"a Newton step promises to lower the objective by another {solution.norm**2 / 2:.1e}; "
        f"tol={settings.tol:g} is not met"
    )
    penalties = "alpha" if stage == "activation" else "alpha, gradient_alpha"
    if solution.status == "max_iter":
        warnings.warn(
            f"{reached}. Increase max_iter={settings.max_iter}, {penalties} or tol.",
            ConvergenceWarning,
            stacklevel=2,
        )
    elif solution.status == "stalled":
        warnings.warn(
            f"{reached}, because rounding allows no further progress. Increase tol or alpha, "
            "or set precision='float64'.",
            ConvergenceWarning,
            stacklevel=2,
        )


def warn_of_search(n_unfinished: int, n_models: int, settings: Settings) -> None:
    """Warn once of all models of a search that did not converge."""
    if n_unfinished:
        warnings.warn(
            f"{n_unfinished} of {n_models} fits of the search stopped before they met "
            f"tol={settings.tol:g}, so their scores are not those of the optimum. Increase "
            f"max_iter={settings.max_iter} or tol, or leave out the smallest penalties.",
            ConvergenceWarning,
            stacklevel=2,
        )
