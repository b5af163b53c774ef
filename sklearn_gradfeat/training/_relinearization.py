"""Linearise, move, linearise again: the prox-linear method [1]_ [2]_ [3]_.

Let ``u`` be the displacement of θ₂ in the units of the penalty. Around the point ``(Ω, b, u)``, the
linear model is the first-order approximation of the network with its output weights. So its optimum
is a direction in which the objective of the network falls::

    F(W, b, u) = Σᵢ ωᵢ loss(b + W f(xᵢ; u), yᵢ) + alpha/2 ‖W‖² + gradient_alpha/2 ‖u‖²

A linearisation is followed by

1. a move of ``u`` towards the optimum;
2. a fit of the output weights at the new ``u``, which are the ``Ω`` of the next linearisation.

If ``F`` falls by too small a share of what the linear model promises, the linear model is fitted
again with a proximal term ``ρ/2 ‖u - uₖ‖²`` around its point ``uₖ``. The first ``ρ`` is the one
with which this term is the error of the linear model at the move, and half of the last one is that
of the next linearisation. So ``F`` never increases, and the method stops at a stationary point. The
first linear model has no such term, and is the one of the paper. The models in their order are: the
linear model around the pretrained parameters; the network after the first move; the linear model
around this point; and so on.

Where the first linear model has a coarse space and passes need the network, all linear models are
minima over its leading directions of the curvature, with the rows of the samples at the point. So a
linear model takes one pass, and none but the first needs factors of the curvature. The point at the
end is then stationary along these directions.

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

import copy
import math
from collections.abc import Mapping, Sequence
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
# A linear model whose move falls short of this share is fitted again, so often at most, with a
# proximal term that is larger by this factor at least.
_ATTEMPTS, _GROWTH = 12, 4
# Where the proximal term shortens the move, so much less may be promised before the method ends.
_SHORTENED = 0.01
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
    stronger: Sequence[float] = (),
) -> FitResult:
    """Return the last of some linear models and moved networks.

    Parameters
    ----------
    stages : TwoStageFit
        Both stages at the pretrained parameters.
    alpha, gradient_alpha : float
        The penalties. With an infinite ``gradient_alpha`` the first model is the only one.
    n_models : int
        One is the linear model around the pretrained parameters. An even number ends with a moved
        network, an odd one with a linear model. The method ends earlier where a linear model
        promises to decrease ``F`` by less than ``tol`` times its fall so far (a hundredth of that
        where the proximal term shortens the move), where no move decreases it, or where a callback
        stops the fit.
    warm : LinearModel or None
        Where to start, unless the pretrained parameters are better; None starts at these.
    progress : Progress or None
        Follows the iterations.
    stronger : sequence of float
        The penalties of the first linearisations, which end at moved networks. A warm start takes
        their place.

    Returns
    -------
    FitResult
        Its ``network_path`` holds ``F`` before the first linearisation and after each move.
    """
    if math.isinf(gradient_alpha):
        return stages.fit(alpha, gradient_alpha, warm, progress)
    run = _started(stages, alpha, gradient_alpha, warm, progress)
    if run.is_moved:
        n_models, stronger = n_models - 2 * len(stronger), ()
    ends_linear = n_models % 2 == 1
    has_moved = False
    for number in range((n_models + 1) // 2):
        found = run.linear(stronger[number] if number < len(stronger) else gradient_alpha)
        # Where the method ends early, the model is of the kind that was asked for.
        if not has_moved or ends_linear or found.is_interrupted:
            result = found
        if found.is_interrupted or (ends_linear and 2 * number + 1 == n_models):
            break
        moved = run.moved()
        if moved is not None and not ends_linear:
            result, has_moved = moved, True
        if moved is None and (run.is_interrupted or number >= len(stronger)):
            break
    # After stronger penalties, the last move may be one of theirs.
    return result if result.gradient_alpha == run.gradient_alpha else run.network()


def _started(
    stages: TwoStageFit,
    alpha: float,
    gradient_alpha: float,
    warm: LinearModel | None,
    progress: Progress | None,
) -> Relinearization:
    """Return the method at the pretrained parameters, or at the warm start if that is better."""
    first = stages.fit_activation(alpha, progress=progress)
    if warm is not None and not first.is_zero:
        unmoved = _objective(stages, first, gradient_alpha)
        warm = stages.problem.reduced(warm)
        trial = stages.moved(warm.total)
        if _is_finite(trial):
            found = trial.fit_activation(alpha, warm, progress)
            if _objective(trial, found, gradient_alpha) < unmoved:
                return Relinearization(trial, found, progress, unmoved)
    return Relinearization(stages, first, progress)


class _Step(NamedTuple):
    """The optimum of a linear model, and by how much the objective should fall there."""

    model: LinearModel
    solution: Solution
    promised: float
    # The sum of the squares of the move, in the units of the penalty.
    squares: float


class Relinearization:
    """The method, one linear model or one move at a time.

    Parameters
    ----------
    stages : TwoStageFit
        Both stages where it starts.
    first : FirstStage
        The fit of the output weights there.
    progress : Progress or None
        Follows the iterations.
    unmoved : float or None
        ``F`` at the pretrained parameters. None if it starts there.

    Attributes
    ----------
    stages, first : TwoStageFit, FirstStage
        Those at the point.
    is_moved : bool
        Whether it starts at other parameters than the pretrained ones.
    gradient_alpha : float
        The penalty of the last linear model; infinite before the first one.
    """

    def __init__(
        self,
        stages: TwoStageFit,
        first: FirstStage,
        progress: Progress | None = None,
        unmoved: float | None = None,
    ) -> None:
        self.stages, self.first, self.is_moved = stages, first, unmoved is not None
        self._progress, self._unmoved = progress, unmoved
        self._in_coarse_space = stages.has_coarse_space(first)
        self.gradient_alpha = math.inf
        self._proximal = 0.0
        self._path: list[float] = []
        # As long as a solution exists, so do its unknowns in the journal; the point needs all.
        self._solutions: list[Solution] = []
        self._spent: list[tuple[int, int]] = []
        self._step: _Step | None = None

    def copy(self) -> Relinearization:
        """Return a copy that goes on from the same point, with the same rows of the samples."""
        found = copy.copy(self)
        found._path, found._solutions = list(self._path), list(self._solutions)
        found._spent = list(self._spent)
        return found

    def linear(self, gradient_alpha: float) -> FitResult:
        """Return the linear model around the point.

        ``gradient_alpha`` is at most that of the former linear model, so ``F`` does not increase.
        """
        if gradient_alpha != self.gradient_alpha:
            self.gradient_alpha = gradient_alpha
            value = _objective(self.stages, self.first, gradient_alpha)
            self._path[-1:] = [value]
            self._unmoved = value if self._unmoved is None else self._unmoved
        if self._progress is not None:
            self._progress.linearization(len(self._solutions) + 1)
        self._step = self._fitted()
        self._solutions.append(self._step.solution)
        self._spent.append((0, 0))
        return self._result(self._step.model)

    def network(self) -> FitResult:
        """Return the network at the point."""
        return self._result(self.first.model)

    @property
    def is_interrupted(self) -> bool:
        """Whether a callback ended the last linear model."""
        return bool(self._solutions) and self._solutions[-1].status == "interrupted"

    def moved(self) -> FitResult | None:
        """Move to the optimum of the linear model, or of one with a larger proximal term.

        Returns
        -------
        FitResult or None
            The network there; None if ``F`` does not decrease.
        """
        former = self._proximal
        found = self._moved()
        if found is None:  # another penalty may need no such term
            self._proximal = former
        return found

    def _moved(self) -> FitResult | None:
        step = self._step
        assert step is not None and self._unmoved is not None
        tol, objective = self.stages.settings.tol, self._path[-1]
        rounding = torch.finfo(torch.float64).eps * abs(objective)
        for _ in range(_ATTEMPTS):
            if self.is_interrupted:
                return None
            least = tol * (self._unmoved - objective + step.promised)
            if self._proximal * step.squares > step.promised / 2:
                least *= _SHORTENED  # the linear model promises little because the move is short
            if step.promised <= max(least, rounding):
                return None
            trial = self.stages.moved(step.model.total)
            scale = 2 * step.promised / step.squares if step.squares else 0.0
            needed = _GROWTH * max(self._proximal, scale)
            if _is_finite(trial):
                start = replace(step.model, omega=step.model.weights)
                found = trial.fit_activation(self.first.alpha, start, self._progress)
                value = _objective(trial, found, self.gradient_alpha)
                kept = (objective - value) / step.promised
                needed = max((1 - kept) * scale, 0.0)
                if kept > _SUFFICIENT:
                    # The rows at the point take memory, and copies of the stages live on.
                    found = replace(found, inverses=self.first.inverses.with_layers())
                    self.stages, self.first, self._step = trial, found, None
                    self._proximal = _RELAXED * needed
                    self._path.append(value)
                    return self.network()
            self._proximal = max(needed, _GROWTH * self._proximal)
            # An unfinished optimum may be worse than the point with a larger term.
            converged = step.solution.status == "converged"
            step = self._fitted(step.model if converged else self.first.model)
            n_iter, n_passes = self._spent[-1]
            last = self._solutions[-1]
            self._spent[-1] = n_iter + last.n_iter, n_passes + last.n_passes
            self._solutions[-1] = step.solution
        return None

    def _fitted(self, start: LinearModel | None = None) -> _Step:
        """Return the optimum of the linear model with the proximal term, from ``start``."""
        stages, first, proximal = self.stages, self.first, self._proximal
        gradient_alpha, tol = self.gradient_alpha, self.stages.settings.tol
        if self._in_coarse_space:
            model, solution = stages.fit_in_coarse_space(
                first, gradient_alpha, max(_COARSE_TOL, tol), self._progress, proximal
            )
        else:
            model, solution = stages.fit_gradient(
                first,
                gradient_alpha,
                start or first.model,
                self._progress,
                max(_TOL, tol),
                proximal,
            )

        def squares() -> Array:
            every = stages.point, model.displacements
            return np.array([_squares(stages, values) for values in every])

        of_point, of_move = stages.journal.numbers("squares of point and move", squares)
        value = solution.objective_path[-1] - proximal / 2 * of_move
        if proximal:  # the solver has one penalty in place of both, which differs by a constant
            value += gradient_alpha * proximal / (gradient_alpha + proximal) * of_point / 2
        return _Step(model, solution, self._path[-1] - value, float(of_move))

    def _result(self, model: LinearModel) -> FitResult:
        """Return a model with the results of the solver."""
        stages, first = self.stages, self.first
        solutions = [
            replace(
                solution, n_iter=solution.n_iter + n_iter, n_passes=solution.n_passes + n_passes
            )
            for solution, (n_iter, n_passes) in zip(self._solutions, self._spent, strict=True)
        ]
        return FitResult(
            stages.problem.restored(model),
            {"activation": first.solution, stages.settings.features: solutions[-1]},
            first.alpha,
            self.gradient_alpha,
            separated=stages.separated(first),
            unmoved=not any(bool(move.any()) for move in model.total.values())
            and not first.is_zero,
            linearizations=tuple(solutions),
            network_path=tuple(self._path),
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
        squares = (
            activation[rows].square().sum()
            for rows in row_blocks(*activation.shape, device=activation.device)
        )
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
