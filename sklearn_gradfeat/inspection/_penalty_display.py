"""The held-out losses of penalties that a fit chose itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_gradfeat.inspection._axes import grid_of_axes, unwrap

_COLUMNS = "loss", "standard_error"


class PenaltyDisplay:
    """The held-out loss against the penalties that ``"auto"`` tried.

    There is one panel for each penalty that the fit chose. The losses of two panels may come from
    different samples. Use :meth:`from_estimator`. All parameters are kept as attributes.

    Parameters
    ----------
    paths : dict of str to dict of str to ndarray of shape (n_tried,)
        The columns ``"penalty"``, ``"loss"`` and ``"standard_error"``, by the name of the
        penalty. The standard error is that of the difference to the smallest loss. An infinite
        penalty stands for the model without a gradient term. With a column ``"alpha"``, there is
        one curve for each of its values.
    chosen : dict of str to float
        The chosen values, by the name of the penalty.

    Attributes
    ----------
    errorbars_ : list of matplotlib ErrorbarContainer
        The curves of losses with their standard errors, in the order of ``paths``.
    axes_ : ndarray of matplotlib Axes
        The axes, in the same order.
    figure_ : matplotlib Figure
        Their figure.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.preprocessing import scale
    >>> from sklearn_gradfeat import GradientFeatureClassifier, PenaltyDisplay
    >>> X, y = load_iris(return_X_y=True)
    >>> model = GradientFeatureClassifier(random_state=0).fit(scale(X), y)
    >>> PenaltyDisplay.from_estimator(model)  # doctest: +SKIP
    <...>
    """

    def __init__(
        self,
        *,
        paths: Mapping[str, Mapping[str, npt.NDArray[Any]]],
        chosen: Mapping[str, float],
    ) -> None:
        self.paths = paths
        self.chosen = chosen

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None, **line_kw: Any) -> PenaltyDisplay:
        """Draw ``validation_scores_`` of a fitted estimator.

        Parameters
        ----------
        estimator : estimator
            A classifier or regressor of this package that was fitted with ``alpha="auto"`` or
            ``gradient_alpha="auto"``, a pipeline that ends in one or a search for one.
        ax : matplotlib Axes or array-like of them, default=None
            See :meth:`plot`.
        **line_kw : dict
            Keywords of ``Axes.errorbar``.

        Returns
        -------
        PenaltyDisplay
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        fitted = unwrap(estimator)[0]
        if not hasattr(fitted, "validation_scores_"):
            raise TypeError(
                f"{cls.__name__} draws validation_scores_, which {type(fitted).__name__} does not "
                "have; its scores_ are the means over a grid. Pass a GradientFeatureClassifier or "
                "a GradientFeatureRegressor."
            )
        scores = fitted.validation_scores_
        if not len(scores["loss"]):
            raise ValueError(
                "validation_scores_ is empty, since the fit of the estimator compared no "
                "penalties. Fit it with alpha='auto' or gradient_alpha='auto', and with at least "
                "two samples of a class."
            )
        finite = np.isfinite(scores["gradient_alpha"])
        # The path of gradient_alpha starts with infinity, if the model has an activation term.
        first = (
            int(np.argmax(finite)) - (fitted.features == "full") if finite.any() else len(finite)
        )
        rows = {"alpha": slice(first), "gradient_alpha": slice(first, None)}
        paths = {
            name: {"penalty": scores[name][part], **{key: scores[key][part] for key in _COLUMNS}}
            for name, part in rows.items()
            if len(scores["loss"][part])
        }
        if "gradient_alpha" in paths:
            paths["gradient_alpha"]["alpha"] = scores["alpha"][rows["gradient_alpha"]]
        display = cls(paths=paths, chosen={name: getattr(fitted, f"{name}_") for name in paths})
        return display.plot(ax, **line_kw)

    def plot(self, ax: Any = None, **line_kw: Any) -> PenaltyDisplay:
        """Draw the losses.

        A vertical line marks the chosen value. A horizontal line is the loss without a gradient
        term, in a band of one standard error.

        Parameters
        ----------
        ax : matplotlib Axes or array-like of them, default=None
            Axes to draw on, as many as there are paths; or one to divide. None makes a figure.
        **line_kw : dict
            Keywords of ``Axes.errorbar``.

        Returns
        -------
        PenaltyDisplay
        """
        shape = (1, len(self.paths))
        self.axes_ = grid_of_axes(self, ax, shape, (4.5 * len(self.paths), 3.5))[0]
        self.figure_ = self.axes_[0].figure
        self.errorbars_ = []
        for axes, (name, path) in zip(self.axes_, self.paths.items(), strict=True):
            chosen = self.chosen[name]
            penalty, loss, error = (
                np.where(np.isfinite(path["loss"]), path[key], np.nan)
                for key in ("penalty", *_COLUMNS)
            )
            alphas = np.where(np.isfinite(penalty), path.get("alpha", 0.0), np.nan)
            every = np.unique(alphas[~np.isnan(alphas)])[::-1]
            by_penalty = np.argsort(penalty)
            for alpha in every:
                order = by_penalty[alphas[by_penalty] == alpha]
                label = f"alpha {alpha:.2g}" if len(every) > 1 else None
                style = {"fmt": ".-", "capsize": 3, "label": label, **line_kw}
                self.errorbars_.append(
                    axes.errorbar(penalty[order], loss[order], error[order], **style)
                )
            for mean, width in zip(loss[np.isinf(penalty)], error[np.isinf(penalty)], strict=True):
                label = "no gradient term" + ", chosen" * bool(np.isinf(chosen))
                axes.axhline(mean, color="C3", label=label)
                axes.axhspan(mean - width, mean + width, color="C3", alpha=0.2)
            if np.isfinite(chosen):
                axes.axvline(chosen, color="0.4", linestyle="--", label=f"chosen: {chosen:.2g}")
            axes.set_xscale("log")
            axes.set_xlabel(name)
            axes.set_ylabel("Held-out loss")
            axes.legend()
        return self
