"""The linear models of many pairs of penalties, from strong to weak, and which pairs to try.

The model with the strongest penalties is close to zero, where the solver starts, and the model
with the next weaker penalties is close to it. The first stage is fitted once for each ``alpha``.

Lists of penalties are tried in all combinations. Where only the number of penalties is given, the
search is coarse to fine:

1. every ``alpha``, from the largest curvature of the loss down by powers of ten, without a
   gradient term;
2. every ``gradient_alpha`` with the best ``alpha``, by powers of ten around the curvature along
   the first step of the second stage;
3. the half powers of ten around the best pair.

If the best penalty is the first or the last, the steps 1 and 2 go on in that direction. Where the
coarse space has most of the parameters, the minima over it take the place of fits with a gradient
term; fits to a part of the samples share it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sklearn_gradfeat.curvature import (
    CoarsePath,
    Inverses,
    largest_curvature,
    leave_one_out,
    tangent_gram,
)
from sklearn_gradfeat.linearized import LinearModel, TangentObjective
from sklearn_gradfeat.solvers import Solution
from sklearn_gradfeat.training._relinearization import fit_in_turn
from sklearn_gradfeat.training._two_stage_fit import COARSE_TOL, FirstStage, TwoStageFit

# The ratio of neighbours on a path.
STEP = 10.0
# A gain by a smaller share counts as none.
FLAT = 1e-3
# Powers of ten by which a path goes on beyond its ends, while the score rises.
_FURTHER = 4

Pair = tuple[float, float]
Evaluate = Callable[[float | None, Sequence[Pair]], dict[Pair, float]]


class Candidate(NamedTuple):
    """The model of one pair of penalties.

    Attributes
    ----------
    pair : (float, float)
        ``alpha`` and ``gradient_alpha``.
    model : LinearModel
        The model; for leave-one-out predictions the model of the first stage.
    converged : bool
        Whether the fit met the tolerance.
    logits : tensor of shape (n_samples, n_outputs) or None
        Its logits for the samples to score, or leave-one-out predictions, where they are known.
    separated : tuple of str
        The penalties of zero without which the loss has no minimum, see :class:`FitResult`.
    """

    pair: Pair
    model: LinearModel
    converged: bool
    logits: Tensor | None = None
    separated: tuple[str, ...] = ()


class CoarseFits(NamedTuple):
    """Minima over the coarse space in place of fits to the training samples of a fold.

    Attributes
    ----------
    stages : TwoStageFit
        Both stages on all samples, where those outside of the fold have weight zero.
    held_out : ndarray of int
        The samples to score.
    inverses : Inverses
        The factors and the coarse space of the fit to all samples.
    """

    stages: TwoStageFit
    held_out: npt.NDArray[np.intp]
    inverses: Inverses


class Tried(NamedTuple):
    """All values of both penalties that were tried, and the best pair."""

    alphas: list[float]
    gradient_alphas: list[float]
    best: Pair


def search_grid(
    alphas: Any,
    gradient_alphas: Any,
    stages: TwoStageFit,
    evaluate: Evaluate,
) -> Tried:
    """Try pairs of penalties, see the top of this module.

    Parameters
    ----------
    alphas, gradient_alphas : int or array-like
        Penalties, or their number.
    stages : TwoStageFit
        Both stages on all samples.
    evaluate : callable
        ``evaluate(space, pairs)`` tries pairs, and returns the scores of all pairs that were tried
        so far. ``space`` is the ``alpha`` whose coarse space may take the place of all parameters,
        see :meth:`TwoStageFit.shared`, or None for exact fits.

    Returns
    -------
    Tried
    """
    features = stages.settings.features
    coarse = isinstance(alphas, Integral), isinstance(gradient_alphas, Integral)
    if features == "activation":
        gradient_alphas, coarse = [math.inf], (coarse[0], False)
    if not any(coarse):
        pairs = list(itertools.product(_floats(alphas), _floats(gradient_alphas)))
        return Tried(_floats(alphas), _floats(gradient_alphas), _best(evaluate(None, pairs)))

    if coarse[0]:
        start = largest_curvature(stages.objective(0.0, stages.samples.activation, None)) or 1.0
        alphas = start / STEP ** np.arange(alphas)
    without = math.inf if features != "gradient" else None
    if not coarse[1]:
        without = max(_floats(gradient_alphas))
    elif without is None:
        middle = stages.fit_activation(float(np.median(_floats(alphas))))
        without = stages.curvature_of_step(middle) or 1.0
    finite = math.isfinite(without)
    score = partial(evaluate, float(np.median(_floats(alphas))) if finite else None)
    alpha, _ = _line(_floats(alphas), lambda a: (a, without), score, coarse[0])
    if coarse[1]:
        scale = stages.curvature_of_step(stages.fit_activation(alpha)) or 1.0
        gradient_alphas = scale * STEP ** (1.0 - np.arange(gradient_alphas))
    line = _floats(gradient_alphas)
    if coarse[1] and features != "gradient":
        line = [math.inf, *line]
    if not finite and min(line) < math.inf:
        score = partial(evaluate, alpha)
    _, gradient_alpha = _line(line, lambda g: (alpha, g), score, coarse[1])
    around = _around(gradient_alpha, coarse[1])
    scores = score([(a, g) for a in _around(alpha, coarse[0]) for g in around])
    tried = [sorted({pair[i] for pair in scores}, reverse=True) for i in (0, 1)]
    return Tried(tried[0], tried[1], _best(scores))


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values]


def _best(scores: dict[Pair, float]) -> Pair:
    """Return the first of the pairs with the highest score; NaN is the lowest."""
    return max(scores, key=lambda pair: -math.inf if math.isnan(scores[pair]) else scores[pair])


def _line(
    values: list[float],
    pair_of: Callable[[float], Pair],
    evaluate: Callable[[Sequence[Pair]], dict[Pair, float]],
    further: bool,
) -> Pair:
    """Try values of one penalty, and go on while the best is the first or the last one."""
    values = sorted(values, reverse=True)

    def score() -> tuple[Pair, float]:
        pairs = [pair_of(value) for value in values]
        scores = evaluate(pairs)
        found = _best({pair: scores[pair] for pair in pairs})
        return found, scores[found]

    former = -math.inf
    for _ in range(_FURTHER):
        found, best = score()
        if not further or best <= former + FLAT * abs(former):
            return found
        if found == pair_of(values[-1]):
            values.append(values[-1] / STEP)
        elif found == pair_of(values[0]) and math.isfinite(values[0]):
            values.insert(0, values[0] * STEP)
        else:
            return found
        former = best
    return score()[0]


def _around(value: float, fine: bool) -> list[float]:
    """Return a penalty and, if it is to be refined, the half powers of ten around it."""
    if not fine or math.isinf(value):
        return [value]
    return [value * math.sqrt(STEP), value, value / math.sqrt(STEP)]


def penalty_path(
    stages: TwoStageFit, pairs: Sequence[Pair], coarse: CoarseFits | None = None
) -> Iterator[Candidate]:
    """Fit the models of pairs of penalties.

    A first stage starts from the one with the next stronger ``alpha``. A second stage starts from
    the one with the next stronger ``gradient_alpha``, or from its first stage.

    Parameters
    ----------
    stages : TwoStageFit
        Both stages on the training samples.
    pairs : sequence of (float, float)
        ``alpha`` and ``gradient_alpha``, in any order.
    coarse : CoarseFits or None
        Minima in place of fits with a gradient term. None fits, as with several linearisations.

    Yields
    ------
    Candidate
    """
    restored, first, model, path = stages.problem.restored, None, None, None
    for pair in sorted(pairs, reverse=True):
        alpha, gradient_alpha = pair
        if first is None or alpha != first.alpha:
            first = stages.fit_activation(alpha, None if first is None else first.model)
            model, path = first.model, None
        assert model is not None
        solutions = [first.solution]
        n_linearizations = stages.settings.n_linearizations or 1
        if math.isfinite(gradient_alpha) and n_linearizations > 1:
            result = fit_in_turn(stages, alpha, gradient_alpha, 2 * n_linearizations)
            converged = _converged(*result.solutions.values())
            yield Candidate(pair, result.model, converged, separated=result.separated)
            continue
        if math.isfinite(gradient_alpha) and coarse is not None:
            if path is None:
                first.inverses = coarse.inverses.with_layers()
                path = coarse.stages.coarse_path(first)
            yield _in_coarse_space(coarse, path, first, gradient_alpha)
            continue
        separated = stages.separated(first)
        if math.isfinite(gradient_alpha):
            model, solution = stages.fit_gradient(first, gradient_alpha, model)
            solutions.append(solution)
            separated += stages.separated(first, gradient_alpha, solution)
        yield Candidate(pair, restored(model), _converged(*solutions), separated=separated)


def _in_coarse_space(
    coarse: CoarseFits, path: CoarsePath, first: FirstStage, gradient_alpha: float
) -> Candidate:
    """Return the next model of a path over the coarse space."""
    stages, problem = coarse.stages, coarse.stages.problem
    tol = min(COARSE_TOL, stages.settings.tol)
    model, solution = stages.minimum_of(path, first, gradient_alpha, tol)
    separated = stages.separated(first) + stages.separated(first, gradient_alpha, solution)
    logits = path.logits[coarse.held_out]
    return Candidate(
        (first.alpha, gradient_alpha),
        problem.restored(model),
        _converged(first.solution, solution),
        logits + logits.new_tensor(problem.offset),
        separated,
    )


def leave_one_out_path(stages: TwoStageFit, pairs: Sequence[Pair]) -> Iterator[Candidate]:
    """Compute the leave-one-out predictions of squared errors for pairs of penalties.

    Parameters
    ----------
    stages : TwoStageFit
        Both stages on all samples.
    pairs : sequence of (float, float)
        ``alpha`` and ``gradient_alpha`` in any order, all above zero.

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
    first, gram = None, None
    for pair in sorted(pairs, reverse=True):
        alpha, gradient_alpha = pair
        if first is None or alpha != first.alpha:
            first, gram = stages.fit_activation(alpha, None if first is None else first.model), None
        if math.isinf(gradient_alpha):
            objective = stages.objective(alpha, stages.samples.activation, None)
            yield _left_out(stages, pair, first.model, first.solution, objective, None)
            continue
        if gram is None:
            tangent, n_samples = (
                stages.tangent(first.model.omega, 0.0),
                len(stages.samples.activation),
            )
            gram = stages.samples.batch_size.retry(partial(tangent_gram, tangent, n_samples))
        if gram is None:
            raise ValueError(
                "cv='loo' needs gradient layers that are linear and see one vector per sample, or "
                "convolutions as large as their input. Choose such layers by gradient_layers, or "
                "set cv to a number of folds."
            )
        objective = stages.second_objective(first, gradient_alpha)
        yield _left_out(stages, pair, first.model, first.solution, objective, gram)


def _left_out(
    stages: TwoStageFit,
    pair: Pair,
    model: LinearModel,
    solution: Solution,
    objective: TangentObjective,
    gram: Tensor | None,
) -> Candidate:
    predictions = leave_one_out(objective, gram)
    predictions = predictions + predictions.new_tensor(stages.problem.offset)
    return Candidate(pair, stages.problem.restored(model), _converged(solution), predictions)


def _converged(*solutions: Solution) -> bool:
    return all(solution.status == "converged" for solution in solutions)
