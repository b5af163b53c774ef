"""All penalties of a grid on the same samples, from strong to weak."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sklearn_gradfeat.cache import CachedSamples
from sklearn_gradfeat.curvature import largest_curvature, leave_one_out, tangent_gram
from sklearn_gradfeat.linearized import LinearizedHead, LinearModel
from sklearn_gradfeat.solvers import Solution
from sklearn_gradfeat.training._stages import TwoStageFit, unwatched

# Penalties by number are spread over so many powers of ten below the largest curvature.
_DECADES = 4

Penalties = npt.NDArray[np.float64]


class Grid(NamedTuple):
    """The penalties to try in every combination; None where there are no displacements."""

    alphas: Penalties
    gradient_alphas: Penalties | None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of values of each."""
        return len(self.alphas), 1 if self.gradient_alphas is None else len(self.gradient_alphas)

    def parameters(self, pair: Sequence[int]) -> dict[str, float | None]:
        """Return the penalties at a place in the grid, by name."""
        i, j = pair
        of_gradient = None if self.gradient_alphas is None else float(self.gradient_alphas[j])
        return {"alpha": float(self.alphas[i]), "gradient_alpha": of_gradient}


class Candidate(NamedTuple):
    """The model of one pair of penalties, and where that is in the grid.

    ``logits`` are those of the samples that score it, where they are no logits of the model.
    """

    pair: tuple[int, int]
    model: LinearModel
    converged: bool
    logits: Tensor | None = None


def place(alphas: Any, gradient_alphas: Any, stages: TwoStageFit) -> Grid:
    """Return the penalties as given, or so many from the largest curvature downward.

    At that penalty the direction that the samples say most about is shrunk by half, and any
    other one by more. The gradient features depend on the first stage; its penalty is then the
    one in the middle.

    Parameters
    ----------
    alphas, gradient_alphas : int or array-like
        Penalties of the weights and of the displacements, or how many of them to choose.
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

    def gradient_term() -> Any:
        middle = float(np.sort(chosen)[len(chosen) // 2])
        base = stages.fit_activation(middle, None, unwatched)
        return stages.objective(0.0, None, stages.tangent(base.model, 0.0))

    return Grid(chosen, _values(gradient_alphas, gradient_term))


def _values(given: Any, objective: Callable[[], Any]) -> Penalties:
    """Return penalties that were given, or as many below the curvature of an objective."""
    if not isinstance(given, Integral):
        return np.array(given, dtype=np.float64)
    largest = largest_curvature(objective()) or 1.0
    spread: Penalties = largest * np.logspace(0, -_DECADES, int(given))
    return spread


def penalty_path(stages: TwoStageFit, grid: Grid) -> Iterator[Candidate]:
    """Fit the models of all penalties in a grid, each from its stronger neighbour on.

    The first stage is fitted once for each ``alpha``. Models with strong penalties are the
    easiest to fit from nothing, and every next one is close to the one before.

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
    former = None
    for i in _descending(grid.alphas):
        base = stages.fit_activation(float(grid.alphas[i]), former, unwatched)
        former = model = base.model
        if grid.gradient_alphas is None:
            yield Candidate((i, 0), model, _converged(base.solution))
            continue
        for j in _descending(grid.gradient_alphas):
            penalty = float(grid.gradient_alphas[j])
            model, solution = stages.fit_gradient(base, penalty, model, unwatched)
            yield Candidate((i, j), model, _converged(base.solution, solution))


def left_out_path(stages: TwoStageFit, grid: Grid) -> Iterator[Candidate]:
    """Predict every sample by the models of all others, for all penalties in a grid.

    Parameters
    ----------
    stages : TwoStageFit
        Both stages on all samples, for squared errors.
    grid : Grid
        The penalties, in any order, all above zero.

    Yields
    ------
    Candidate
        With the model of the first stage.

    Raises
    ------
    ValueError
        If there is one sample only, or no Gram matrix that is cheap.
    """
    if int((stages.loss.weights > 0).sum()) < 2:
        raise ValueError("cv='loo' needs at least 2 samples with a positive weight.")
    former = None
    for i in _descending(grid.alphas):
        alpha = float(grid.alphas[i])
        base = stages.fit_activation(alpha, former, unwatched)
        former, converged = base.model, _converged(base.solution)
        if grid.gradient_alphas is None:
            objective = stages.objective(alpha, stages.samples.activation, None)
            yield Candidate((i, 0), base.model, converged, leave_one_out(objective, None))
            continue
        gram = tangent_gram(stages.tangent(base.model, 0.0), len(stages.samples.activation))
        if gram is None:
            raise ValueError(
                "cv='loo' takes gradient layers that are linear, or convolutions as large as their "
                "input. Set gradient_layers to such, or cv to a number of folds."
            )
        for j in _descending(grid.gradient_alphas):
            objective = stages.second(base, float(grid.gradient_alphas[j]))
            yield Candidate((i, j), base.model, converged, leave_one_out(objective, gram))


def _descending(penalties: Penalties) -> list[int]:
    """Return positions from the largest to the smallest."""
    order: list[int] = np.argsort(-penalties, kind="stable").tolist()
    return order


def _converged(*stages: Solution) -> bool:
    """Whether all stages met the tolerance."""
    return all(solution.status == "converged" for solution in stages)


def known_logits(features: CachedSamples, head: LinearizedHead, model: LinearModel) -> Tensor:
    """Return the logits of a model for samples whose features are at hand.

    Parameters
    ----------
    samples : CachedSamples
        Activations and boundary of the samples.
    head : LinearizedHead
        The head of the network.
    model : LinearModel
        The linear model.

    Returns
    -------
    tensor of shape (n_samples, n_outputs)
    """
    logits = model.intercept + features.activation @ model.weights.T
    if model.displacements:
        u = head.flatten(tuple(model.displacements.values()))
        for rows, boundary in features.batches():
            logits[rows] += head.jvp(boundary, u) @ model.omega.T
    return logits
