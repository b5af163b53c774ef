"""The linear models of all penalties of a grid, from strong to weak.

The model with the strongest penalties is close to zero, where the solver starts, and the model
with the next weaker penalties is close to it. The first stage is fitted once for each ``alpha``.
Default grids start at the largest curvature of the loss and go down by powers of ten, so that they
suit features and targets of any scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sklearn_gradfeat.curvature import largest_curvature, leave_one_out, tangent_gram
from sklearn_gradfeat.linearized import LinearModel, TangentObjective
from sklearn_gradfeat.solvers import Solution
from sklearn_gradfeat.training._two_stage_fit import TwoStageFit

# The powers of ten that a default grid covers, from the largest curvature down.
_DECADES = 4

Penalties = npt.NDArray[np.float64]


class Grid(NamedTuple):
    """The penalties to combine; ``gradient_alphas`` is None for models without displacements."""

    alphas: Penalties
    gradient_alphas: Penalties | None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of values of each."""
        return len(self.alphas), 1 if self.gradient_alphas is None else len(self.gradient_alphas)

    def parameters(self, pair: Sequence[int]) -> dict[str, float | None]:
        """Return the penalties at a place in the grid, by name."""
        i, j = pair
        gradient_alpha = None if self.gradient_alphas is None else float(self.gradient_alphas[j])
        return {"alpha": float(self.alphas[i]), "gradient_alpha": gradient_alpha}


class Candidate(NamedTuple):
    """The model of one pair of penalties.

    Attributes
    ----------
    pair : (int, int)
        The place in the grid.
    model : LinearModel
        The model; for leave-one-out predictions the model of the first stage.
    converged : bool
        Whether the fit met the tolerance.
    logits : tensor of shape (n_samples, n_outputs) or None
        Leave-one-out predictions of the training samples.
    """

    pair: tuple[int, int]
    model: LinearModel
    converged: bool
    logits: Tensor | None = None


def place_grid(alphas: Any, gradient_alphas: Any, stages: TwoStageFit) -> Grid:
    """Return the given penalties, or default ones from the largest curvature down.

    At a penalty of the size of the largest curvature, the strongest direction of the data shrinks
    by half, and every other one by more. The gradient term depends on the first stage; the grid
    of ``gradient_alpha`` uses the first stage with the middle ``alpha``.

    Parameters
    ----------
    alphas, gradient_alphas : int or array-like
        Penalties, or their number.
    stages : TwoStageFit
        Both stages on all samples.

    Returns
    -------
    Grid
    """
    activation = stages.samples.activation
    chosen = _values(alphas, lambda: stages.objective(0.0, activation, None))
    if stages.settings.features == "activation":
        return Grid(chosen, None)

    def gradient_term() -> TangentObjective:
        middle = float(np.sort(chosen)[len(chosen) // 2])
        first = stages.fit_activation(middle)
        return stages.objective(0.0, None, stages.tangent(first.model, 0.0))

    return Grid(chosen, _values(gradient_alphas, gradient_term))


def _values(given: Any, objective: Callable[[], TangentObjective]) -> Penalties:
    if not isinstance(given, Integral):
        return np.array(given, dtype=np.float64)
    largest = largest_curvature(objective()) or 1.0
    spread: Penalties = largest * np.logspace(0, -_DECADES, int(given))
    return spread


def penalty_path(stages: TwoStageFit, grid: Grid) -> Iterator[Candidate]:
    """Fit the models of all penalties in a grid.

    A first stage starts from the one with the next stronger ``alpha``. A second stage starts from
    the one with the next stronger ``gradient_alpha``, or from its first stage.

    Parameters
    ----------
    stages : TwoStageFit
        Both stages on the training samples.
    grid : Grid
        The penalties, in any order.

    Yields
    ------
    Candidate
    """
    restored, former = stages.problem.restored, None
    for i in _descending(grid.alphas):
        first = stages.fit_activation(float(grid.alphas[i]), former)
        former = model = first.model
        if grid.gradient_alphas is None:
            yield Candidate((i, 0), restored(model), _converged(first.solution))
            continue
        for j in _descending(grid.gradient_alphas):
            penalty = float(grid.gradient_alphas[j])
            model, solution = stages.fit_gradient(first, penalty, model)
            yield Candidate((i, j), restored(model), _converged(first.solution, solution))


def leave_one_out_path(stages: TwoStageFit, grid: Grid) -> Iterator[Candidate]:
    """Compute the leave-one-out predictions of squared errors for all penalties in a grid.

    Parameters
    ----------
    stages : TwoStageFit
        Both stages on all samples.
    grid : Grid
        The penalties, in any order, all above zero.

    Yields
    ------
    Candidate

    Raises
    ------
    ValueError
        If fewer than two samples have a positive weight, or if the gradient layers allow no cheap
        Gram matrix of the samples.
    """
    if int((stages.loss.weights > 0).sum()) < 2:
        raise ValueError("cv='loo' needs at least 2 samples with a positive weight.")
    former = None
    for i in _descending(grid.alphas):
        alpha = float(grid.alphas[i])
        first = stages.fit_activation(alpha, former)
        former = first.model
        if grid.gradient_alphas is None:
            objective = stages.objective(alpha, stages.samples.activation, None)
            yield _left_out(stages, (i, 0), first.model, first.solution, objective, None)
            continue
        tangent, n_samples = stages.tangent(first.model, 0.0), len(stages.samples.activation)
        gram = stages.samples.batch_size.retry(partial(tangent_gram, tangent, n_samples))
        if gram is None:
            raise ValueError(
                "cv='loo' needs gradient layers that are linear and see one vector per sample, or "
                "convolutions as large as their input. Choose such layers by gradient_layers, or "
                "set cv to a number of folds."
            )
        for j in _descending(grid.gradient_alphas):
            objective = stages.second_objective(first, float(grid.gradient_alphas[j]))
            yield _left_out(stages, (i, j), first.model, first.solution, objective, gram)


def _left_out(
    stages: TwoStageFit,
    pair: tuple[int, int],
    model: LinearModel,
    solution: Solution,
    objective: TangentObjective,
    gram: Tensor | None,
) -> Candidate:
    predictions = leave_one_out(objective, gram)
    predictions = predictions + predictions.new_tensor(stages.problem.offset)
    return Candidate(pair, stages.problem.restored(model), _converged(solution), predictions)


def _descending(penalties: Penalties) -> list[int]:
    """Return positions from the largest to the smallest."""
    order: list[int] = np.argsort(-penalties, kind="stable").tolist()
    return order


def _converged(*solutions: Solution) -> bool:
    return all(solution.status == "converged" for solution in solutions)
