"""Scores of models: by test sample, by fold, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import clone, is_classifier
from sklearn.model_selection import check_cv, cross_validate
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_consistent_length

from sklearn_gradfeat._base import BaseGradientFeature

Scores = Mapping[str, npt.NDArray[Any]]
SampleScore = Callable[[npt.NDArray[Any], npt.NDArray[Any]], npt.NDArray[Any]]


def sample_scores(
    y_true: Any, y_preds: Mapping[str, Any], sample_score: SampleScore | None
) -> tuple[Scores, str]:
    """Return the scores of predictions by sample, and what they are called."""
    truth = np.asarray(y_true)
    own_score = sample_score is not None
    name = "" if sample_score is None else name_of(sample_score)
    if sample_score is None:
        continuous = type_of_target(truth).startswith("continuous")
        sample_score = _squared_error if continuous else _is_right
        name = "mean squared error" if continuous else "accuracy"
    scores = {}
    for model, y_pred in y_preds.items():
        check_consistent_length(truth, y_pred)
        if not own_score and np.shape(y_pred) != truth.shape:
            raise ValueError(
                f"The predictions of {model!r} have shape {np.shape(y_pred)}, y_true has "
                f"{truth.shape}. Pass predictions of the shape of y_true."
            )
        scores[model] = np.asarray(sample_score(truth, np.asarray(y_pred)), float)
    return scores, name


def fold_scores(
    models: Mapping[str, Any], X: Any, y: Any, cv: Any, **options: Any
) -> tuple[Scores, float]:
    """Return the scores of models by fold, and the size of test over that of training sets."""
    classifies = is_classifier(next(iter(models.values())))
    splits = list(check_cv(cv, y, classifier=classifies).split(X, y))
    scores = {
        name: cross_validate(model, X, y, cv=splits, error_score="raise", **options)["test_score"]
        for name, model in models.items()
    }
    return scores, float(np.mean([len(test) / len(train) for train, test in splits]))


def standard_error(scores: npt.NDArray[Any], test_train_ratio: float) -> float:
    """Return the standard error of the mean of correlated scores, NaN for a single one."""
    if len(scores) == 1:
        return float("nan")
    return float(np.sqrt((1 / len(scores) + test_train_ratio) * scores.var(ddof=1)))


def differences(scores: Scores, reference: str) -> Scores:
    """Return the scores less those of one model, for all the others."""
    if reference not in scores:
        raise ValueError(f"reference={reference!r} is none of {', '.join(scores)}.")
    base = scores[reference]
    others = {name: each for name, each in scores.items() if name != reference}
    for name, each in others.items():
        if each.shape != base.shape:
            raise ValueError(
                f"Differences need as many scores of {name!r} as of {reference!r}: they are "
                f"{len(each)} and {len(base)}."
            )
    return {name: each - base for name, each in others.items()}


def with_features(estimator: Any, value: str) -> Any:
    """Return a clone of an estimator, pipeline or search with ``features=value`` in it."""
    copy = clone(estimator)
    inner = copy
    while not isinstance(inner, BaseGradientFeature):
        if hasattr(inner, "steps"):
            inner = inner.steps[-1][1]
        elif hasattr(inner, "estimator"):
            inner = inner.estimator
        else:
            raise TypeError(
                "The comparison is of an estimator of sklearn_gradfeat, of a pipeline that ends "
                f"in one, or of a search for one; got {type(estimator).__name__}."
            )
    inner.set_params(features=value)
    return copy


def _is_right(y_true: npt.NDArray[Any], y_pred: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return whether every output of a sample is right."""
    right: npt.NDArray[Any] = (y_true == y_pred).reshape(len(y_true), -1).all(axis=1)
    return right


def _squared_error(y_true: npt.NDArray[Any], y_pred: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the squared error of every sample, its mean over the outputs."""
    squares: npt.NDArray[Any] = ((y_true - y_pred) ** 2).reshape(len(y_true), -1).mean(axis=1)
    return squares


def name_of(scoring: Any) -> str:
    """Return what a score is called."""
    if isinstance(scoring, str):
        return scoring.replace("neg_", "negative ").replace("_", " ")
    return str(getattr(scoring, "__name__", "score")).replace("_", " ")
