"""Probabilities from squared errors: the scale that turns their predictions into logits.

It is the inverse of a temperature [1]_, one for all classes or one for each label. It is chosen on
samples that the model did not see, since on its own it would be too sure of itself.

References
----------
.. [1] C. Guo, G. Pleiss, Y. Sun, K. Weinberger, On Calibration of Modern Neural Networks,
   ICML 2017, arXiv:1706.04599.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax

from sklearn_gradfeat.training._penalties import known_logits
from sklearn_gradfeat.training._problem import Classification
from sklearn_gradfeat.training._stages import Prepared, train, unwatched

_N_PARTS = 5  # of the samples
_ENOUGH = 100  # samples that calibrate
_LOGARITHMS = (-6.0, 9.0)  # of the scales that are possible


def calibrated(
    prepared: Prepared, problem: Classification, alpha: float, gradient_alpha: float
) -> Classification:
    """Return the problem with the scales that fit samples best that were left out.

    A fifth of the samples is left out of a fit to the others; with few samples another fifth of
    another fit, and so on. The only sample of a class is in all fits.

    Parameters
    ----------
    prepared : Prepared
        The samples.
    problem : Classification
        Their targets, for squared errors.
    alpha, gradient_alpha : float
        The penalties.

    Returns
    -------
    Classification
        Without scales if no class has two samples.
    """
    rows = np.arange(len(problem.weights))
    outputs, scored = [], []
    for part in _parts(problem.targets, problem.weights > 0):
        left_in, left_out = np.delete(rows, part), rows[part]
        stages = prepared.subset(left_in).stages(problem.part(left_in))
        model, _ = train(stages, alpha, gradient_alpha, None, unwatched)
        features = prepared.subset(left_out).samples
        outputs.append(known_logits(features, stages.linearized, model).double().cpu().numpy())
        scored.append(left_out)
    if not scored:
        return problem
    of_all = np.concatenate(scored)
    found = best_scales(np.concatenate(outputs), problem.targets[of_all], problem.weights[of_all])
    return replace(problem, scale=found)


def _parts(
    targets: npt.NDArray[Any], counted: npt.NDArray[np.bool_]
) -> Iterator[npt.NDArray[np.intp]]:
    """Iterate over fifths of each class, among those that count, until there are enough."""
    classes = np.zeros(len(targets), int) if targets.ndim == 2 else targets
    place = np.full(len(targets), -1)
    for label in np.unique(classes):
        members = np.flatnonzero((classes == label) & counted)
        if len(members) > 1:
            place[members] = np.arange(len(members)) % _N_PARTS
    n_scored = 0
    for i in reversed(range(_N_PARTS)):
        part = np.flatnonzero(place == i)
        if len(part) and n_scored < _ENOUGH:
            yield part
            n_scored += len(part)


def best_scales(
    outputs: npt.NDArray[Any], targets: npt.NDArray[Any], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the factors that make logits of outputs, by the smallest log-loss.

    Parameters
    ----------
    outputs : ndarray of shape (n_samples, n_outputs)
        Predictions of zero mean error, one for two classes.
    targets : ndarray of shape (n_samples,) or (n_samples, n_labels)
        Class indices, or zeros and ones. They are taken for certain up to one in
        ``n_samples + 2``, as Platt scaling does, so that there is a best factor.
    weights : ndarray of shape (n_samples,)
        Non-negative.

    Returns
    -------
    ndarray of shape (n_outputs,)
        Positive, and one number for all classes, so that no prediction changes.
    """
    doubt, n_outputs = 1 / (len(outputs) + 2), outputs.shape[1]
    if n_outputs > 1 and targets.ndim == 1:
        sure = np.eye(n_outputs)[targets]
        believed = (1 - doubt) * sure + doubt / (n_outputs - 1) * (1 - sure)
        one = _smallest(lambda f: -(weights @ (believed * log_softmax(f * outputs, axis=1)).sum(1)))
        return np.full(n_outputs, one)
    columns = targets.reshape(len(targets), -1)
    believed = (1 - doubt) * columns + doubt * (1 - columns)

    def loss(factor: float, b: npt.NDArray[Any], output: npt.NDArray[Any]) -> float:
        logits = factor * output
        return -float(weights @ (b * log_expit(logits) + (1 - b) * log_expit(-logits)))

    labels = zip(believed.T, outputs.T, strict=True)
    return np.array([_smallest(partial(loss, b=b, output=output)) for b, output in labels])


def _smallest(loss: Callable[[float], float]) -> float:
    """Return the factor with the smallest loss."""
    found = minimize_scalar(
        lambda logarithm: loss(math.exp(logarithm)),
        bounds=_LOGARITHMS, method="bounded", options={"xatol": 1e-8},
    )  # fmt: skip
    return math.exp(found.x)
