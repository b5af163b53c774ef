"""Which pixels of an image move a logit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils._optional_dependencies import check_matplotlib_support
from torch import Tensor

from sklearn_gradfeat._attribution import InputGradients
from sklearn_gradfeat._base import BaseGradientFeature
from sklearn_gradfeat._input import validate_new_samples
from sklearn_gradfeat._model import to_numpy
from sklearn_gradfeat.displays._axes import grid_of_axes
from sklearn_gradfeat.displays._fitted import unwrap

_MOST_CHANNELS = 4


class SaliencyDisplay:
    """Images, and which of their pixels move the gradient term of a logit.

    Use :meth:`from_estimator`. All parameters are kept as attributes.

    The derivative is in the image as the network receives it, after ``preprocess``: that is
    what is drawn, resized and cropped, whatever ``X`` was. It goes through the whole
    network, the frozen layers below the gradient layers included, in the precision of the
    gradient layers.

    Parameters
    ----------
    images : ndarray of shape (n_samples, height, width, n_channels)
        The images as the network receives them.
    saliency : ndarray of shape (n_samples, height, width)
        A number for every pixel: for ``method="gradient"`` the norm of the derivative over
        the channels, for ``"integrated"`` the sum of its contributions, which has a sign.
    targets : array-like of shape (n_samples,)
        The class, label or output of every image, shown above it.
    method : {"gradient", "integrated"}
        What the numbers are.

    Attributes
    ----------
    images_ : list of matplotlib AxesImage
        The images, then the maps, which share one scale.
    colorbar_ : matplotlib Colorbar
        The scale of the maps.
    axes_ : ndarray of matplotlib Axes of shape (2, n_samples)
        Images above, maps below.
    figure_ : matplotlib Figure
        Their figure.

    References
    ----------
    .. [1] M. Sundararajan, A. Taly, Q. Yan, Axiomatic Attribution for Deep Networks,
       ICML 2017, arXiv:1703.01365.
    """

    def __init__(
        self,
        *,
        images: npt.NDArray[Any],
        saliency: npt.NDArray[Any],
        targets: Any,
        method: str = "gradient",
    ) -> None:
        self.images = images
        self.saliency = saliency
        self.targets = targets
        self.method = method

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        *,
        target: Any = None,
        term: str = "gradient",
        method: str = "gradient",
        n_steps: int = 32,
        ax: Any = None,
    ) -> SaliencyDisplay:
        """Compute and draw the saliency of a few images.

        Parameters
        ----------
        estimator : estimator
            An estimator of this package that was fitted on images, a pipeline that ends in
            one or a search for one.
        X : array-like of shape (n_samples, ...)
            A few images; for a pipeline, before its steps.
        target : object, default=None
            A class of ``classes_``, or the number of a label or output, for all images;
            None is the predicted one of each. Of two classes the first has the negative
            logit of the second.
        term : {"gradient", "activation", "full"}, default="gradient"
            The term of the logit: ``Ω J(x) w₂``, ``W f(x)``, or their sum.
        method : {"gradient", "integrated"}, default="gradient"
            The derivative at the image, or integrated gradients [1]_: its mean on the
            way there from an image of zeros, times the image. These add up to the
            difference that the image makes to the term. Zero is the mean colour for
            networks whose ``preprocess`` subtracts it, and black for others.
        n_steps : int, default=32
            Points on that way; the sum is as exact as they are many.
        ax : matplotlib Axes or array-like of axes, default=None
            See :meth:`plot`.

        Returns
        -------
        SaliencyDisplay
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        if method not in ("gradient", "integrated"):
            raise ValueError(f"method must be 'gradient' or 'integrated', got {method!r}.")
        fitted, X = unwrap(estimator, X)
        _check_term(fitted, term)
        X = validate_new_samples(fitted, X)
        extractor, model = fitted._extractor_and_model()
        gradients = InputGradients(extractor, model, term)
        x = gradients.inputs(X)
        axis = _channel_axis(x)
        columns, signs, targets = _outputs(fitted, X, target)
        outputs, factors = torch.tensor(columns).to(x.device), torch.tensor(signs).to(x)
        if method == "gradient":
            saliency = gradients(x, outputs, factors).norm(dim=axis)
        else:
            mean = torch.zeros_like(x)
            for step in range(n_steps):
                mean += gradients(x * ((step + 0.5) / n_steps), outputs, factors) / n_steps
            saliency = (x * mean).sum(axis)
        display = cls(
            images=to_numpy(x.movedim(axis, -1)),
            saliency=to_numpy(saliency),
            targets=targets,
            method=method,
        )
        return display.plot(ax)

    def plot(self, ax: Any = None) -> SaliencyDisplay:
        """Draw the images and their maps.

        Parameters
        ----------
        ax : matplotlib Axes or array-like of axes, default=None
            Where to draw: axes that are divided, or two for each image, those of the images
            first. None makes a figure.

        Returns
        -------
        SaliencyDisplay
        """
        n_images = len(self.images)
        self.axes_ = grid_of_axes(self, ax, (2, n_images), (1.0 + 1.7 * n_images, 3.8))
        self.figure_ = self.axes_[0, 0].figure
        largest = float(np.abs(self.saliency).max())
        signed = self.method == "integrated"
        style = {"cmap": "RdBu_r" if signed else "magma", "vmax": largest}
        style["vmin"] = -largest if signed else 0.0
        above = [
            axes.imshow(_visible(image), cmap="gray")
            for axes, image in zip(self.axes_[0], self.images, strict=True)
        ]
        below = [
            axes.imshow(each, **style)
            for axes, each in zip(self.axes_[1], self.saliency, strict=True)
        ]
        self.images_ = [*above, *below]
        for axes, name in zip(self.axes_[0], self.targets, strict=True):
            axes.set_title(str(name))
        for axes in self.axes_.flat:
            axes.set(xticks=[], yticks=[])
        label = "contribution" if signed else "norm of derivative"
        self.colorbar_ = self.figure_.colorbar(below[0], ax=list(self.axes_[1]), label=label)
        return self


def _check_term(fitted: BaseGradientFeature, term: str) -> None:
    """Refuse a term that does not exist, or not in this model."""
    if term not in ("gradient", "activation", "full"):
        raise ValueError(f"term must be 'gradient', 'activation' or 'full', got {term!r}.")
    if fitted.features not in ("full", term):
        raise ValueError(
            f"term={term!r} is not in a model that was fitted with features="
            f"{fitted.features!r}. Pass term={fitted.features!r}."
        )


def _channel_axis(x: Tensor) -> int:
    """Return the axis of the channels in a batch of images as the network receives it."""
    shape = tuple(x.shape[1:])
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            "SaliencyDisplay draws images: the network must receive a floating point batch of "
            "shape (n_samples, channels, height, width); here a sample has shape "
            f"{shape} and dtype {x.dtype}."
        )
    return 3 if shape[0] > _MOST_CHANNELS >= shape[2] else 1


def _outputs(
    fitted: BaseGradientFeature, X: Any, target: Any
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], list[Any]]:
    """Return for every sample the column of its logit, its sign and its name."""
    logits = fitted._logits(X)
    n_samples, n_outputs = logits.shape
    classes = list(getattr(fitted, "classes_", range(n_outputs)))
    binary = n_outputs == 1 and len(classes) == 2
    if target is None:
        chosen = (logits[:, 0] > 0).astype(np.int64) if binary else logits.argmax(axis=1)
    elif target in classes:
        chosen = np.full(n_samples, classes.index(target))
    else:
        raise ValueError(f"target={target!r} is none of {', '.join(map(repr, classes))}.")
    names = [classes[i] for i in chosen]
    if binary:
        return np.zeros(n_samples, np.int64), np.where(chosen == 1, 1.0, -1.0), names
    return chosen, np.ones(n_samples), names


def _visible(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an image in [0, 1], stretched to all of it; in grey unless it has three channels."""
    shown = image if image.shape[2] == 3 else image.mean(axis=2)
    low, high = shown.min(), shown.max()
    stretched: npt.NDArray[Any] = (shown - low) / (high - low or 1.0)
    return stretched
