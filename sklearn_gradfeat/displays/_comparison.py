"""Models side by side, with error bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import is_classifier
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_gradfeat.displays._axes import single_axes
from sklearn_gradfeat.displays._scores import (
    SampleScore,
    differences,
    fold_scores,
    name_of,
    sample_scores,
    standard_error,
    with_features,
)


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
