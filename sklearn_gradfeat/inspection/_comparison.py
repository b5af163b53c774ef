"""Models side by side, with error bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import clone, is_classifier
from sklearn.model_selection import check_cv, cross_validate
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_consistent_length

from sklearn_gradfeat.estimators import BaseGradientFeature
from sklearn_gradfeat.inspection._axes import single_axes

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


class FeatureComparisonDisplay:
    """Scores of several models with their standard errors.

    Use :meth:`from_estimator`, :meth:`from_predictions` or :meth:`from_scores`. All
    parameters are kept as attributes.

    A bar is one standard error to each side, ``sqrt((1 / n + r) s²)`` for the variance
    ``s²`` of n scores (with n - 1 degrees of freedom) and the ``r`` below. About two of
    three such bars cover the expected score.

    Bars of two models say little about their difference, since easy samples and folds are
    easy for both. ``plot(reference=...)`` draws the paired differences to one model.

    Parameters
    ----------
    scores : dict of str to ndarray of shape (n_scores,)
        The scores by model: of test samples, of folds or of repetitions. The same position
        means the same sample, fold or repetition. A single score has no bar.
    test_train_ratio : float, default=0.0
        ``r``. Scores of folds are correlated since their training sets overlap; 1 / n
        alone would make the bars too short. The size of the test sets over that of the
        training sets corrects for it [1]_; it is a heuristic. Zero is for scores that are
        independent, such as those of test samples.
    score_name : str, default="score"
        Label of the axis.

    Attributes
    ----------
    means_ : dict of str to float
        The mean scores as drawn.
    errors_ : dict of str to float
        Their standard errors, NaN for a single score.
    errorbar_ : matplotlib ErrorbarContainer
        The points and bars.
    ax_ : matplotlib Axes
        The axes.
    figure_ : matplotlib Figure
        Their figure.

    References
    ----------
    .. [1] C. Nadeau, Y. Bengio, Inference for the Generalization Error, Machine Learning 52,
       2003.

    Examples
    --------
    >>> from sklearn_gradfeat import FeatureComparisonDisplay
    >>> accuracies = {"activation": [0.71, 0.74, 0.70], "full": [0.78, 0.79, 0.76]}
    >>> FeatureComparisonDisplay.from_scores(accuracies, test_train_ratio=0.5)  # doctest: +SKIP
    <...>
    """

    def __init__(
        self,
        *,
        scores: Mapping[str, npt.NDArray[Any]],
        test_train_ratio: float = 0.0,
        score_name: str = "score",
    ) -> None:
        self.scores = scores
        self.test_train_ratio = test_train_ratio
        self.score_name = score_name

    @classmethod
    def from_scores(
        cls,
        scores: Mapping[str, Any],
        *,
        test_train_ratio: float = 0.0,
        score_name: str = "score",
        reference: str | None = None,
        ax: Any = None,
        **errorbar_kw: Any,
    ) -> FeatureComparisonDisplay:
        """Draw scores that are known.

        Parameters
        ----------
        scores : dict of str to array-like of shape (n_scores,) or float
            The scores by model, those of fine-tuning among them if you like.
        test_train_ratio : float, default=0.0
            For scores of cross-validation, the size of a test set over that of a training
            set: 1 / (k - 1) for k folds. Zero for independent scores.
        score_name : str, default="score"
            Label of the axis.
        reference : str, default=None
            See :meth:`plot`.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        **errorbar_kw : dict
            Keywords of ``Axes.errorbar``.

        Returns
        -------
        FeatureComparisonDisplay
        """
        arrays = {name: np.atleast_1d(np.asarray(each, float)) for name, each in scores.items()}
        display = cls(scores=arrays, test_train_ratio=test_train_ratio, score_name=score_name)
        return display.plot(ax, reference=reference, **errorbar_kw)

    @classmethod
    def from_predictions(
        cls,
        y_true: Any,
        y_preds: Mapping[str, Any],
        *,
        sample_score: SampleScore | None = None,
        reference: str | None = None,
        ax: Any = None,
        **errorbar_kw: Any,
    ) -> FeatureComparisonDisplay:
        """Draw the mean scores of predictions for one test set.

        The bars are about which test samples were drawn, not about which training samples;
        for accuracies they are binomial standard errors. They vanish for a model that is
        always right, which a few samples do not prove.

        Parameters
        ----------
        y_true : array-like of shape (n_samples,) or (n_samples, n_outputs)
            The targets.
        y_preds : dict of str to array-like
            The predictions by model, in the shape of ``y_true``.
        sample_score : callable, default=None
            ``sample_score(y_true, y_pred)`` returns one score for every sample. None is
            whether a class, or all labels, are right, or the squared error where ``y_true``
            is continuous.
        reference : str, default=None
            See :meth:`plot`.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        **errorbar_kw : dict
            Keywords of ``Axes.errorbar``.

        Returns
        -------
        FeatureComparisonDisplay
        """
        check_matplotlib_support(f"{cls.__name__}.from_predictions")
        scores, name = sample_scores(y_true, y_preds, sample_score)
        return cls.from_scores(scores, score_name=name, reference=reference, ax=ax, **errorbar_kw)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any,
        *,
        features: Sequence[str] = ("activation", "gradient", "full"),
        others: Mapping[str, Any] | None = None,
        cv: Any = None,
        scoring: Any = None,
        params: Mapping[str, Any] | None = None,
        n_jobs: int | None = None,
        reference: str | None = None,
        ax: Any = None,
        **errorbar_kw: Any,
    ) -> FeatureComparisonDisplay:
        """Cross-validate an estimator with other ``features``, on the same splits.

        Parameters
        ----------
        estimator : estimator
            An estimator of this package, a pipeline that ends in one or a search for one.
            Clones are fitted. ``features`` is all that differs: the penalties are the same
            unless a search chooses them.
        X : array-like of shape (n_samples, ...)
            The samples.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            The targets.
        features : sequence of str, default=("activation", "gradient", "full")
            The values of ``features`` to compare.
        others : dict of str to estimator, default=None
            More models by name, such as a fine-tuned network.
        cv : int, splitter or iterable, default=None
            As in :func:`sklearn.model_selection.cross_validate`; pass the splits
            themselves where they depend on groups.
        scoring : str or callable, default=None
            One score, as in the same place; None is ``score`` of the estimators.
        params : dict, default=None
            Passed to ``fit``, such as ``{"sample_weight": ...}``.
        n_jobs : int, default=None
            Number of folds to run in parallel.
        reference : str, default=None
            See :meth:`plot`.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        **errorbar_kw : dict
            Keywords of ``Axes.errorbar``.

        Returns
        -------
        FeatureComparisonDisplay
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        models = {value: with_features(estimator, value) for value in features}
        models |= dict(others or {})
        options = {"scoring": scoring, "params": params, "n_jobs": n_jobs}
        scores, ratio = fold_scores(models, X, y, cv, **options)
        default = "accuracy" if is_classifier(estimator) else "R²"
        return cls.from_scores(
            scores,
            test_train_ratio=ratio,
            score_name=default if scoring is None else name_of(scoring),
            reference=reference,
            ax=ax,
            **errorbar_kw,
        )

    def plot(
        self, ax: Any = None, *, reference: str | None = None, **errorbar_kw: Any
    ) -> FeatureComparisonDisplay:
        """Draw points with error bars, the first model at the top.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a figure.
        reference : str, default=None
            A model: the points are then the mean differences to it, paired by sample, fold
            or repetition, and the bars are those of the differences.
        **errorbar_kw : dict
            Keywords of ``Axes.errorbar``.

        Returns
        -------
        FeatureComparisonDisplay
        """
        scores = self.scores if reference is None else differences(self.scores, reference)
        self.means_ = {name: float(each.mean()) for name, each in scores.items()}
        ratio = self.test_train_ratio
        self.errors_ = {name: standard_error(each, ratio) for name, each in scores.items()}
        self.ax_ = single_axes(self, ax)
        self.figure_ = self.ax_.figure
        rows = np.arange(len(scores))
        style = {"fmt": "o", "capsize": 4, **errorbar_kw}
        self.errorbar_ = self.ax_.errorbar(
            list(self.means_.values()), rows, xerr=list(self.errors_.values()), **style
        )
        self.ax_.set_yticks(rows, list(scores))
        self.ax_.set_ylim(len(scores) - 0.5, -0.5)
        label = f"{self.score_name[:1].upper()}{self.score_name[1:]}"
        if reference is not None:
            self.ax_.axvline(0, color="0.6", linewidth=1, zorder=0)
            label += f", less that of {reference}"
        self.ax_.set_xlabel(f"{label} (± standard error)")
        return self
