"""One fit: the output weights, then the linear model."""

from __future__ import annotations

import math
import warnings

from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from sklearn_gradfeat._losses import Loss
from sklearn_gradfeat._model import Model
from sklearn_gradfeat._stages import Monitor, Settings, Stages
from sklearn_gradfeat.features import Features
from sklearn_gradfeat.solvers import Solution
from sklearn_gradfeat.tangent import Head


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
    stages = Stages(features, head, parameters, loss, settings)
    base = stages.fit_activation(settings.alpha, warm, monitor)
    solutions = {"activation": base.solution}
    if settings.features == "activation":
        return base.model, solutions
    # Where the zero model is the optimum, nothing warm may take its place.
    start = warm if warm is not None and math.isfinite(base.reference) else base.model
    model, solution = stages.fit_gradient(base, settings.gradient_alpha, start, monitor)
    return model, {**solutions, settings.features: solution}


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
