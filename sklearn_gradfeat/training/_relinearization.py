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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sklearn_gradfeat.data import number_of_first_rank, on_all_ranks, row_blocks
from sklearn_gradfeat.linearized import LinearModel
from sklearn_gradfeat.solvers import Solution, penalised
from sklearn_gradfeat.training._progress import Progress
from sklearn_gradfeat.training._two_stage_fit import FirstStage, FitResult, TwoStageFit

Array = npt.NDArray[np.float64]

# Share of the promised decrease that a move must reach.
_SUFFICIENT = 0.1
# A linear model whose move does not is fitted again, with a proximal term that is larger by this
# factor at least.
_ATTEMPTS, _GROWTH = 12, 4
# The proximal term that a move was found to need, times this, is that of the next linear model.
_RELAXED = 0.5
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
    rounds = _Rounds(stages.has_coarse_space(first), gradient_alpha, progress)
    while True:
        if progress is not None:
            progress.linearization(len(path))
        step = rounds.step(stages, first, path[-1])
        solutions.append(step.solution)
        yield _result(stages, first, step.model, gradient_alpha, solutions, path), stages
        if step.solution.status == "interrupted":
            return
        if step.promised <= stages.settings.tol * (unmoved - path[-1] + step.promised):
            return
        moved = rounds.moved(stages, first, path[-1], step)
        if moved is None:
            return
        stages, first, solutions[-1] = moved
        path.append(_objective(stages, first, gradient_alpha))
        yield _result(stages, first, first.model, gradient_alpha, solutions, path), stages


class _Step(NamedTuple):
    """The optimum of a linear model, and by how much the objective should fall there."""

    model: LinearModel
    solution: Solution
    promised: float
    # The sum of the squares of the move, in the units of the penalty.
    squares: float


class _Rounds:
    """The linear models and moves of all rounds.

    Parameters
    ----------
    in_coarse_space : bool
        Whether linear models are minima over the coarse space.
    gradient_alpha : float
        The penalty.
    progress : Progress or None
        Follows the iterations.
    """

    def __init__(
        self, in_coarse_space: bool, gradient_alpha: float, progress: Progress | None
    ) -> None:
        self._in_coarse_space, self._progress = in_coarse_space, progress
        self._gradient_alpha, self._proximal = gradient_alpha, 0.0

    def step(
        self,
        stages: TwoStageFit,
        first: FirstStage,
        objective: float,
        start: LinearModel | None = None,
    ) -> _Step:
        """Return the optimum of the linear model with the proximal term, from ``start``."""
        proximal, gradient_alpha = self._proximal, self._gradient_alpha
        tol = stages.settings.tol
        if self._in_coarse_space:
            model, solution = stages.fit_in_coarse_space(
                first, gradient_alpha, max(_COARSE_TOL, tol), self._progress, proximal
            )
        else:
            model, solution = stages.fit_gradient(
                first, gradient_alpha, start or first.model, self._progress, max(_TOL, tol), proximal
            )

        def squares() -> Array:
            every = stages.point, model.displacements
            return np.array([_squares(stages, values) for values in every])

        of_point, of_move = stages.journal.numbers("squares of point and move", squares)
        # The optimum is that of a penalty of both together, which differs by a constant.
        total = gradient_alpha + proximal
        constant = gradient_alpha * proximal / total * of_point / 2 if proximal else 0.0
        value = solution.objective_path[-1] + constant - proximal / 2 * of_move
        return _Step(model, solution, objective - value, float(of_move))

    def moved(
        self, stages: TwoStageFit, first: FirstStage, objective: float, step: _Step
    ) -> tuple[TwoStageFit, FirstStage, Solution] | None:
        """Move to the optimum of a linear model, or of one with a larger proximal term.

        Returns
        -------
        (TwoStageFit, FirstStage, Solution) or None
            The stages there, the fit of the output weights, and the iterations of all linear
            models; None if no step decreases ``F``.
        """
        iterations = step.solution
        for _ in range(_ATTEMPTS):
            model = step.model
            trial = stages.moved(model.total)
            observed = math.inf
            if _is_finite(trial):
                start = replace(model, omega=model.weights)
                found = trial.fit_activation(first.alpha, start, self._progress)
                fall = objective - _objective(trial, found, self._gradient_alpha)
                observed = max(2 * (step.promised - fall) / step.squares, 0.0)
                if fall > _SUFFICIENT * step.promised:
                    found.inverses = first.inverses.with_layers()
                    self._proximal = _RELAXED * observed
                    return trial, found, iterations
            scale = 2 * step.promised / step.squares
            least = max(_GROWTH * self._proximal, scale)
            self._proximal = max(observed, least) if math.isfinite(observed) else _GROWTH * least
            step = self.step(stages, first, objective, model)
            iterations = _together(iterations, step.solution)
            if step.solution.status == "interrupted" or not step.promised > 0:
                return None
        return None


def _together(former: Solution, following: Solution) -> Solution:
    """Return a solution with the iterations and passes of both."""
    return replace(
        following,
        n_iter=former.n_iter + following.n_iter,
        n_passes=former.n_passes + following.n_passes,
    )


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
    return gradient_alpha / 2 * _squares(stages, stages.point)


def _squares(stages: TwoStageFit, values: Mapping[str, Tensor]) -> float:
    """Return the sum of the squares of displacements, in the units of the penalty."""
    if not values:
        return 0.0
    u = stages.head.flatten(tuple(values.values()))
    return number_of_first_rank(float(u.double().square().sum()))


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
