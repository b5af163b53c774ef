"""The contribution of each layer to the logits, and the size of its displacement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils._optional_dependencies import check_matplotlib_support

from sklearn_gradfeat.data import validate_new_samples
from sklearn_gradfeat.estimators import layer_of
from sklearn_gradfeat.inspection._attribution import logit_parts, relative_displacements
from sklearn_gradfeat.inspection._axes import grid_of_axes, unwrap


class LayerContributionDisplay:
    """The contribution of each gradient layer to the logits, and the size of its displacement.

    Use :meth:`from_estimator`. All parameters are kept as attributes.

    The logits are a sum: the intercept, the activation term ``W f(x)``, and for every layer
    of θ₂ its part of the gradient term ``Ω J(x) w₂``, with the displacement of that layer
    alone. The left bars are the standard deviations of these parts over the samples, as
    root mean squares over the outputs. The parts are correlated, so the bars do not add up.

    The right bars are ``‖w₂‖ / ‖θ₂‖``. The model is a first-order approximation of
    fine-tuning by ``w₂``, which is accurate for small displacements. There is no general
    threshold for a small one.

    Parameters
    ----------
    activation : ndarray of shape (n_samples, n_outputs)
        The activation term of the logits.
    parts : dict of str to ndarray of shape (n_samples, n_outputs)
        The part of every layer, from the bottom of the network to its top.
    relative_displacements : dict of str to float
        ``‖w₂‖ / ‖θ₂‖`` of every layer. A batch norm is folded into the layer before it, so
        θ₂ are the folded weights, as in ``gradient_coef_``. Infinite for a displaced layer
        of zeros.

    Attributes
    ----------
    bars_ : tuple of two matplotlib BarContainer
        The contributions, the activation last if the model has it; and the displacements.
    axes_ : ndarray of two matplotlib Axes
        The left one and the right one.
    figure_ : matplotlib Figure
        Their figure.
    """

    def __init__(
        self,
        *,
        activation: npt.NDArray[Any],
        parts: Mapping[str, npt.NDArray[Any]],
        relative_displacements: Mapping[str, float],
    ) -> None:
        self.activation = activation
        self.parts = parts
        self.relative_displacements = relative_displacements

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, *, by: str = "layer", ax: Any = None
    ) -> LayerContributionDisplay:
        """Draw the contributions to the logits of samples.

        Parameters
        ----------
        estimator : estimator
            A fitted estimator of this package with gradient layers, a pipeline that ends
            in one or a search for one.
        X : array-like of shape (n_samples, ...)
            Samples; for a pipeline, before its steps.
        by : {"layer", "parameter"}, default="layer"
            Whether the weight and the bias of a layer are taken together.
        ax : matplotlib Axes or array-like of two, default=None
            See :meth:`plot`.

        Returns
        -------
        LayerContributionDisplay
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        if by not in ("layer", "parameter"):
            raise ValueError(f"by must be 'layer' or 'parameter', got {by!r}.")
        fitted, X = unwrap(estimator, X)
        if not fitted.gradient_layers_:
            raise ValueError(
                f"The estimator was fitted with features={fitted.features!r}, so it has no "
                "gradient layers. Fit it with features='full' or 'gradient'."
            )
        groups: dict[str, list[str]] = {}
        for name in fitted.gradient_layers_:
            groups.setdefault(layer_of(name) if by == "layer" else name, []).append(name)
        extractor, model = fitted._extractor_and_model()
        X = validate_new_samples(fitted, fitted._new_tokens(X))
        activation, parts = logit_parts(extractor, model, X, fitted.batch_size, groups)
        display = cls(
            activation=activation,
            parts=parts,
            relative_displacements=relative_displacements(extractor, model, groups),
        )
        return display.plot(ax)

    def plot(self, ax: Any = None) -> LayerContributionDisplay:
        """Draw the bars.

        Parameters
        ----------
        ax : matplotlib Axes or array-like of two, default=None
            Axes to divide, or two axes to draw on. None makes a figure.

        Returns
        -------
        LayerContributionDisplay
        """
        spreads = {name: _spread(part) for name, part in self.parts.items()}
        if self.activation.any():
            spreads["activation"] = _spread(self.activation)
        shares = [self.relative_displacements[name] for name in self.parts]
        size = (8.0, 1.4 + 0.28 * len(spreads))
        self.axes_ = grid_of_axes(self, ax, (1, 2), size, sharey=True)[0]
        self.figure_ = self.axes_[0].figure
        left, right = self.axes_
        colors = ["C0"] * len(self.parts) + ["0.6"] * (len(spreads) - len(self.parts))
        rows = np.arange(len(spreads))
        self.bars_ = (
            left.barh(rows, list(spreads.values()), color=colors),
            right.barh(rows[: len(shares)], np.nan_to_num(shares, posinf=0.0), color="C1"),
        )
        left.set_yticks(rows, list(spreads))
        left.set_xlabel("Standard deviation in the logits")
        right.set_xlabel("‖w₂‖ / ‖θ₂‖")
        left.bar_label(self.bars_[0], [f"{v:.2g}" for v in spreads.values()], padding=3)
        right.bar_label(self.bars_[1], [_percentage(share) for share in shares], padding=3)
        for axes in self.axes_:
            axes.margins(x=0.3)  # room for the numbers
        right.xaxis.set_major_formatter(lambda share, _position: _percentage(share))
        return self


def _spread(part: npt.NDArray[Any]) -> float:
    """Return the standard deviation over the samples, as root mean square over outputs."""
    return float(np.sqrt(part.astype(np.float64).var(axis=0).mean()))


def _percentage(share: float) -> str:
    """Return a share as text."""
    if not np.isfinite(share):
        return "∞"
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"
