"""Probabilities from squared errors: the scale that turns their predictions into logits.

It is the inverse of a temperature [1]_, and it is chosen on samples that the model did not see,
since on its own it would be too sure of itself.

References
----------
.. [1] C. Guo, G. Pleiss, Y. Sun, K. Weinberger, On Calibration of Modern Neural Networks,
   ICML 2017, arXiv:1706.04599.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax

from sklearn_gradfeat._search import known_logits
from sklearn_gradfeat._stages import unwatched
from sklearn_gradfeat._targets import Classification
from sklearn_gradfeat._training import Prepared, train

_EVERY = 5  # one sample in so many calibrates
_LOGARITHMS = (-6.0, 9.0)  # of the scales that are possible


def calibrated(
    prepared: Prepared, problem: Classification, alpha: float, gradient_alpha: float
) -> Classification:
    """Return the problem with the scale that fits the samples left out best.

    Every fifth sample of a class, or of all for several labels, is left out of a fit to the others.
    With fewer there is none to leave out, and all serve for both.

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
    """
    left_out = _every_fifth(problem.targets, problem.weights > 0)
    rows = np.arange(len(left_out))
    fitted, scored = (rows[~left_out], rows[left_out]) if left_out.any() else (rows, rows)
    stages = prepared.subset(fitted).stages(problem.part(fitted))
    model, _ = train(stages, alpha, gradient_alpha, None, unwatched)
    outputs = known_logits(prepared.subset(scored).features, stages.linearized, model)
    scale = best_scale(
        outputs.double().cpu().numpy(), problem.targets[scored], problem.weights[scored]
    )
    return replace(problem, scale=scale)


def _every_fifth(targets: npt.NDArray[Any], counted: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Return a mask of every fifth sample of each class, among those that count."""
    classes = np.zeros(len(targets), int) if targets.ndim == 2 else targets
    mask = np.zeros(len(targets), bool)
    for label in np.unique(classes):
        members = np.flatnonzero((classes == label) & counted)
        mask[members[_EVERY - 1 :: _EVERY]] = True
    return mask


def best_scale(
    outputs: npt.NDArray[Any], targets: npt.NDArray[Any], weights: npt.NDArray[np.float64]
) -> float:
    """Return the factor that makes logits of outputs, by the smallest log-loss.

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
    float
        Positive, so that no prediction changes.
    """
    doubt, several = 1 / (len(outputs) + 2), outputs.shape[1] > 1 and targets.ndim == 1
    if several:
        sure = np.eye(outputs.shape[1])[targets]
        believed = (1 - doubt) * sure + doubt / (outputs.shape[1] - 1) * (1 - sure)
    else:
        columns = targets.reshape(len(targets), -1)
        believed = (1 - doubt) * columns + doubt * (1 - columns)

    def loss(logarithm: float) -> float:
        logits = math.exp(logarithm) * outputs
        if several:
            terms = believed * log_softmax(logits, axis=1)
        else:
            terms = believed * log_expit(logits) + (1 - believed) * log_expit(-logits)
        return -float(weights @ terms.sum(1))

    found = minimize_scalar(loss, bounds=_LOGARITHMS, method="bounded", options={"xatol": 1e-8})
    return math.exp(found.x)
