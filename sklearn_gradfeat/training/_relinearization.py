"""Linearise, move, linearise again: the prox-linear method [1]_ [2]_ [3]_.

Let ``u`` be the displacement of θ₂ in the units of the penalty. Around the point ``(Ω, b, u)``, the
linear model is the first-order approximation of the network with its output weights. So its optimum
is a direction in which the objective of the network falls::

    F(W, b, u) = Σᵢ ωᵢ loss(b + W f(xᵢ; u), yᵢ) + alpha/2 ‖W‖² + gradient_alpha/2 ‖u‖²

A linearisation is followed by

1. a move of ``u`` towards the optimum;
2. a fit of the output weights at the new ``u``, which are the ``Ω`` of the next linearisation.

If ``F`` does not fall by a share of what the linear model promises, the move is halved. So ``F``
never increases, and the method stops at a stationary point. The first linear model is the one of
the paper. The models in their order are: the linear model around the pretrained parameters;
the network after the first move; the linear model around this point; and so on.

Where the first linear model has a coarse space, all linear models are minima over its leading
directions of the curvature, with the rows of the samples at the point. So a linear model takes one
pass, and none but the first needs factors of the curvature. The point at the end is then stationary
along these directions.

References
----------
.. [1] J. V. Burke, Descent methods for composite nondifferentiable optimization problems,
   Mathematical Programming 33, 1985.
.. [2] A. S. Lewis, S. J. Wright, A proximal method for composite minimization, Mathematical
   Programming 158, 2016.
.. [3] D. Drusvyatskiy, A. S. Lewis, Error bounds, quadratic growth, and linear convergence of
   proximal methods, Mathematics of Operations Research 43, 2018.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from sklearn_gradfeat.data import number_of_first_rank, on_all_ranks, row_blocks
from sklearn_gradfeat.linearized import LinearModel
from sklearn_gradfeat.solvers import Solution, penalised
from sklearn_gradfeat.training._progress import Progress
from sklearn_gradfeat.training._two_stage_fit import FirstStage, FitResult, TwoStageFit

# Share of the promised decrease that a step must reach.
_SUFFICIENT = 1e-4
_HALVINGS = 12
# Least tolerance of a linear model. The next linearisation corrects the rest, and exact optima were
# found to predict worse.
_TOL = 0.2
# The same over the coarse space, where iterations are cheap.
_COARSE_TOL = 0.02


def fit_in_turn(
    stages: TwoStageFit,
    alpha: float,
    gradient_alpha: float,
    n_models: int,
    warm: LinearModel | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Return the last of some linear models and moved networks.

    Parameters
    ----------
    stages, alpha, gradient_alpha, warm, progress
        As in :func:`relinearized`.
    n_models : int
        One is the linear model around the pretrained parameters. An even number ends with a moved
        network, an odd one with a linear model.

    Returns
    -------
    FitResult
    """
    linear = n_models % 2
    models = relinearized(stages, alpha, gradient_alpha, warm, progress)
    for number, (found, _) in enumerate(itertools.islice(models, n_models), 1):
        # Where the method ends early, the model is of the kind that was asked for.
        if number == 1 or number % 2 == linear or found.is_interrupted:
            result = found
    return result


def relinearized(
    stages: TwoStageFit,
    alpha: float,
    gradient_alpha: float,
    warm: LinearModel | None = None,
    progress: Progress | None = None,
    first: FirstStage | None = None,
) -> Iterator[tuple[FitResult, TwoStageFit]]:
    """Iterate over the linear models and the moved networks, in turn.

    It ends where a linear model promises to decrease ``F`` by less than ``tol`` times its fall so
    far, where no move decreases it, or where a callback stops the fit.

    Parameters
    ----------
    stages : TwoStageFit
        Both stages at the pretrained parameters.
    alpha, gradient_alpha : float
        The penalties. With an infinite ``gradient_alpha`` the first model is the only one.
    warm : LinearModel or None
        Where to start, unless the pretrained parameters are better; None starts at these.
    progress : Progress or None
        Follows the iterations.
    first : FirstStage or None
        The fit of the output weights at the pretrained parameters; None fits them.

    Yields
    ------
    FitResult
        Its ``network_path`` holds ``F`` before the first linearisation and after each move.
    TwoStageFit
        Both stages at the point of the model.
    """
    if math.isinf(gradient_alpha):
        yield stages.fit(alpha, gradient_alpha, warm, progress), stages
        return
    first = first or stages.fit_activation(alpha, progress=progress)
    unmoved = _objective(stages, first, gradient_alpha)
    if warm is not None and not first.is_zero:
        warm = stages.problem.reduced(warm)
        trial = stages.moved(warm.total)
        if _is_finite(trial):
            found = trial.fit_activation(alpha, warm, progress)
            if _objective(trial, found, gradient_alpha) < unmoved:
                stages, first = trial, found
    path = [_objective(stages, first, gradient_alpha)]
    solutions: list[Solution] = []
    in_coarse_space, tol = stages.has_coarse_space(first), stages.settings.tol
    while True:
        if progress is not None:
            progress.linearization(len(path))
        if in_coarse_space:
            model, solution = stages.fit_in_coarse_space(
                first, gradient_alpha, max(_COARSE_TOL, tol), progress
            )
        else:
            model, solution = stages.fit_gradient(
                first, gradient_alpha, first.model, progress, max(_TOL, tol)
            )
        solutions.append(solution)
        yield _result(stages, first, model, gradient_alpha, solutions, path), stages
        end = solution.objective_path[-1]
        promised = path[-1] - end
        if solution.status == "interrupted" or promised <= tol * (unmoved - end):
            return
        moved = _move(stages, first, model, gradient_alpha, path[-1], promised, progress)
        if moved is None:
            return
        stages, first = moved
        path.append(_objective(stages, first, gradient_alpha))
        yield _result(stages, first, first.model, gradient_alpha, solutions, path), stages


def _objective(stages: TwoStageFit, first: FirstStage, gradient_alpha: float) -> float:
    """Return ``F`` with the output weights of a first stage, from its logits."""

    def compute() -> float:
        objective = stages.objective(first.alpha, stages.samples.activation, None)
        x = first.solution.x
        value = stages.loss.value(objective.forward(x)) + penalised(objective, x, x) / 2
        return value + _penalty(stages, gradient_alpha)

    return stages.journal.number("objective of the network", compute)


def _is_finite(stages: TwoStageFit) -> bool:
    """Whether the activations and their squares are finite."""

    def compute() -> bool:
        activation = stages.samples.activation
        squares = (activation[rows].square().sum() for rows in row_blocks(*activation.shape))
        return on_all_ranks(all(bool(torch.isfinite(square)) for square in squares))

    return bool(stages.journal.number("activations are finite", compute))


def _penalty(stages: TwoStageFit, gradient_alpha: float) -> float:
    """Return ``gradient_alpha/2 ‖u‖²`` at the point."""
    if not stages.point:
        return 0.0
    u = stages.head.flatten(tuple(stages.point.values()))
    return gradient_alpha / 2 * number_of_first_rank(float(u.double().square().sum()))


def _move(
    stages: TwoStageFit,
    first: FirstStage,
    model: LinearModel,
    gradient_alpha: float,
    objective: float,
    promised: float,
    progress: Progress | None,
) -> tuple[TwoStageFit, FirstStage] | None:
    """Move to the optimum of a linear model, or as far towards it as ``F`` falls.

    Returns
    -------
    (TwoStageFit, FirstStage) or None
        The stages there, and the fit of the output weights; None if no step decreases ``F``.
    """
    step = 1.0
    for _ in range(_HALVINGS):
        total = {
            name: step * move + (model.point[name] if model.point else 0.0)
            for name, move in model.displacements.items()
        }
        weights = torch.lerp(first.model.weights, model.weights, step)
        intercept = torch.lerp(first.model.intercept, model.intercept, step)
        trial, start = stages.moved(total), replace(model, omega=weights, intercept=intercept)
        if _is_finite(trial):
            found = trial.fit_activation(first.alpha, start, progress)
            value = _objective(trial, found, gradient_alpha)
            if value < objective - _SUFFICIENT * step * promised:
                found.inverses = first.inverses.with_layers()
                return trial, found
        step /= 2
    return None


def _result(
    stages: TwoStageFit,
    first: FirstStage,
    model: LinearModel,
    gradient_alpha: float,
    solutions: Sequence[Solution],
    path: Sequence[float],
) -> FitResult:
    """Return a model with the results of the solver."""
    return FitResult(
        stages.problem.restored(model),
        {"activation": first.solution, stages.settings.features: solutions[-1]},
        first.alpha,
        gradient_alpha,
        separated=stages.separated(first),
        unmoved=not any(bool(move.any()) for move in model.total.values()) and not first.is_zero,
        linearizations=tuple(solutions),
        network_path=tuple(path),
    )
