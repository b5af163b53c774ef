"""The objective in the course of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_gradfeat.inspection._axes import single_axes, unwrap


class ObjectiveDisplay:
    """The objective after every iteration of a fit.

    Use :meth:`from_estimator`. All parameters are kept as attributes.

    Parameters
    ----------
    objective_paths : dict of str to ndarray of shape (n_iter + 1,)
        The objective at the start and after every iteration, by the name of the fit; after every
        move of a fit with several linearisations.
    n_passes : dict of str to int
        Passes over the data that every fit took, shown in the legend. An iteration takes
        one or two; ``objective_paths`` does not tell which.

    Attributes
    ----------
    lines_ : list of matplotlib Line2D
        One curve for each fit.
    ax_ : matplotlib Axes
        The axes.
    figure_ : matplotlib Figure
        Their figure.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.preprocessing import scale
    >>> from sklearn_gradfeat import GradientFeatureClassifier, ObjectiveDisplay
    >>> X, y = load_iris(return_X_y=True)
    >>> model = GradientFeatureClassifier(random_state=0).fit(scale(X), y)
    >>> ObjectiveDisplay.from_estimator(model)  # doctest: +SKIP
    <...>
    """

    def __init__(
        self, *, objective_paths: Mapping[str, npt.NDArray[Any]], n_passes: Mapping[str, int]
    ) -> None:
        self.objective_paths = objective_paths
        self.n_passes = n_passes

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        *,
        name: str | None = None,
        quantity: str = "gap",
        ax: Any = None,
        **line_kw: Any,
    ) -> ObjectiveDisplay:
        """Draw the objective of fitted estimators.

        Parameters
        ----------
        estimator : estimator or dict of str to estimator
            A fitted estimator of this package, a pipeline that ends in one or a search for
            one; or several by name.
        name : str, default=None
            Label of a single estimator; None is the value of its ``features``.
        quantity : {"gap", "objective"}, default="gap"
            See :meth:`plot`.
        ax : matplotlib Axes, default=None
            Axes to draw on; their content remains. None makes a figure.
        **line_kw : dict
            Keywords of ``Axes.plot``.

        Returns
        -------
        ObjectiveDisplay
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        paths, passes, several = {}, {}, []
        named = estimator if isinstance(estimator, Mapping) else {name: estimator}
        for label, each in named.items():
            fitted = unwrap(each)[0]
            key = fitted.features if label is None else label
            paths[key], passes[key] = fitted.objective_path_, fitted.n_passes_
            several.append(fitted.n_linearizations != 1)
        display = cls(objective_paths=paths, n_passes=passes)
        display.plot(ax, quantity=quantity, **line_kw)
        if any(several):
            both = "Iteration, or linearization"
            display.ax_.set_xlabel("Linearization" if all(several) else both)
        return display

    def plot(self, ax: Any = None, *, quantity: str = "gap", **line_kw: Any) -> ObjectiveDisplay:
        """Draw the curves.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw on; their content remains. None makes a figure.
        quantity : {"gap", "objective"}, default="gap"
            ``"gap"`` is the objective minus its last value in the same fit, on a logarithmic
            scale. It is less than the distance to the optimum, so every curve drops steeply
            at its end, even if the fit did not converge.
        **line_kw : dict
            Keywords of ``Axes.plot``.

        Returns
        -------
        ObjectiveDisplay
        """
        if quantity not in ("gap", "objective"):
            raise ValueError(f"quantity must be 'gap' or 'objective', got {quantity!r}.")
        self.ax_ = single_axes(self, ax)
        self.figure_ = self.ax_.figure
        self.lines_ = []
        for name, path in self.objective_paths.items():
            values = np.array(path, dtype=np.float64)
            if quantity == "gap":
                values = values[:-1] - values[-1]
                values[values <= 0] = np.nan  # steps lost in rounding have no logarithm
            n_passes = self.n_passes[name]
            label = f"{name} ({n_passes} pass{'es' * (n_passes != 1)})"
            style = {"marker": ".", "label": label, **line_kw}
            self.lines_ += self.ax_.plot(np.arange(len(values)), values, **style)
        self.ax_.set_xlabel("Iteration")
        self.ax_.set_ylabel("Objective above its last value" if quantity == "gap" else "Objective")
        self.ax_.set_yscale("log" if quantity == "gap" else "linear")
        self.ax_.xaxis.get_major_locator().set_params(integer=True)
        self.ax_.legend()
        return self
