"""One fit: what it starts from, the output weights, then the linear model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning

from sklearn_gradfeat._arrays import accumulation_device
from sklearn_gradfeat._memory import Result, in_smaller_batches
from sklearn_gradfeat._model import Model
from sklearn_gradfeat._stages import Monitor, Settings, Stages
from sklearn_gradfeat._targets import Problem
from sklearn_gradfeat.backbones import Network
from sklearn_gradfeat.features import Features
from sklearn_gradfeat.solvers import Solution


class Prepared(NamedTuple):
    """The samples as the linear model takes them, whatever its penalties and targets."""

    network: Network
    features: Features
    settings: Settings
    attributes: dict[str, Any]

    def subset(self, rows: npt.NDArray[np.intp]) -> Prepared:
        """Return some of the samples."""
        return self._replace(features=self.features.subset(rows))

    def stages(self, problem: Problem) -> Stages:
        """Return both stages for targets and weights."""
        loss = problem.loss(accumulation_device(self.features.activation.device))
        return Stages(self.features, self.network, loss, self.settings)

    def attempt(self, run: Callable[[Prepared], Result]) -> Result:
        """Return what ``run`` makes of the samples, in smaller batches if memory runs out."""
        return in_smaller_batches(
            lambda size: run(self._replace(features=self.features.in_batches(size))),
            self.features.batch_size,
        )


def train(
    stages: Stages, alpha: float, gradient_alpha: float, warm: Model | None, monitor: Monitor
) -> tuple[Model, dict[str, Solution]]:
    """Fit the output weights, then the linear model that starts from them.

    Parameters
    ----------
    stages : Stages
        Both stages on the training samples.
    alpha, gradient_alpha : float
        The penalties.
    warm : Model or None
        Where to start; None starts from zero.
    monitor : callable
        Called after every iteration as ``monitor(stage, iteration, objective, model)``,
        with a function that returns the model; returning True stops the stage.

    Returns
    -------
    (Model, dict of str to Solution)
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
