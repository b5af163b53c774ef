"""The influence of the pixels of an image on a logit."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils._optional_dependencies import check_matplotlib_support
from torch import Tensor

from sklearn_gradfeat.data import validate_new_samples
from sklearn_gradfeat.estimators import BaseGradientFeature
from sklearn_gradfeat.inspection._attribution import InputTerm
from sklearn_gradfeat.inspection._axes import grid_of_axes, unwrap
from sklearn_gradfeat.linearized import to_numpy

_MOST_CHANNELS = 4


class SaliencyDisplay:
    """Images, with the influence of every pixel on the gradient term of a logit.

    Use :meth:`from_estimator`. All parameters are kept as attributes.

    The images are those that the network receives, after ``preprocess``, which may resize and
    crop them. The maps take the whole network into account, including the frozen layers, and
    are computed in the precision of the gradient layers.

    Parameters
    ----------
    images : ndarray of shape (n_samples, height, width, n_channels)
        The images as the network receives them.
    saliency : ndarray of shape (n_samples, height, width)
        A number for every pixel, see ``method`` of :meth:`from_estimator`.
    targets : array-like of shape (n_samples,)
        The class, label or output of every image, shown above it.
    method : {"gradient", "occlusion"}, default="gradient"
        The method that computed the saliency.
    term : {"gradient", "activation", "full"}, default="gradient"
        The term of the logit that the saliency is for.

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
    """

    def __init__(
        self,
        *,
        images: npt.NDArray[Any],
        saliency: npt.NDArray[Any],
        targets: Any,
        method: str = "gradient",
        term: str = "gradient",
    ) -> None:
        self.images = images
        self.saliency = saliency
        self.targets = targets
        self.method = method
        self.term = term

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        *,
        target: Any = None,
        term: str = "gradient",
        method: str = "gradient",
        patch: int | None = None,
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
            None is the one with the largest logit in each. Of two classes the first has
            the negative logit of the second.
        term : {"gradient", "activation", "full"}, default="gradient"
            The term of the logit: ``Ω J(x) w₂``, ``W f(x)``, or their sum. A network that
            moved, by several linearisations or ``merge``, has ``"activation"`` alone.
        method : {"gradient", "occlusion"}, default="gradient"
            ``"gradient"`` is the norm over the channels of the derivative in a pixel. The
            gradient term of a network with ReLUs has jumps, which a derivative does not show.
            ``"occlusion"`` shows them: it is the decrease of the term when a patch around
            the pixel is replaced by the mean colour of the image.
        patch : int, default=None
            Side of a patch; None is an eighth of the shorter side of the image. Patches
            tile the image, and each takes one pass through the network.
        ax : matplotlib Axes or array-like of axes, default=None
            See :meth:`plot`.

        Returns
        -------
        SaliencyDisplay
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        if method not in ("gradient", "occlusion"):
            raise ValueError(f"method must be 'gradient' or 'occlusion', got {method!r}.")
        if patch is not None and not (isinstance(patch, Integral) and patch > 0):
            raise ValueError(f"patch must be None or a positive integer, got {patch!r}.")
        fitted, X = unwrap(estimator, X)
        extractor, model = fitted._extractor_and_model()
        _check_term(fitted, term, model.moves)
        X = validate_new_samples(fitted, X)
        model_term = InputTerm(extractor, model, term)
        x = model_term.inputs(X)
        axis = _channel_axis(x)
        columns, signs, targets = _outputs(fitted, X, target)
        if method == "gradient":
            saliency = to_numpy(model_term.gradient(x, columns).norm(dim=axis))
        else:
            drops = _occlusion(model_term, x.movedim(axis, -1), patch, axis)
            saliency = drops[np.arange(len(x)), ..., columns] * signs[:, None, None]
        display = cls(
            images=to_numpy(x.movedim(axis, -1)),
            saliency=saliency,
            targets=targets,
            method=method,
            term=term,
        )
        return display.plot(ax)

    def plot(self, ax: Any = None) -> SaliencyDisplay:
        """Draw the images and their maps.

        Parameters
        ----------
        ax : matplotlib Axes or array-like of axes, default=None
            Axes to divide, or two axes for each image: first those of the images, then those
            of the maps. None makes a figure.

        Returns
        -------
        SaliencyDisplay
        """
        n_images = len(self.images)
        self.axes_ = grid_of_axes(self, ax, (2, n_images), (1.0 + 1.7 * n_images, 3.8))
        self.figure_ = self.axes_[0, 0].figure
        largest = float(np.abs(self.saliency).max())
        signed = self.method == "occlusion"
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
        name = "logit" if self.term == "full" else f"{self.term} term"
        label = f"{'effect on' if signed else 'derivative of'} the\n{name}"
        place = {"shrink": 0.45, "anchor": (0.0, 0.0), "pad": 0.05 / n_images}
        self.colorbar_ = self.figure_.colorbar(
            below[0], ax=list(self.axes_.flat), label=label, aspect=12, **place
        )
        return self


def _check_term(fitted: BaseGradientFeature, term: str, has_gradient: bool) -> None:
    """Raise an error for a term that is unknown or not in the model."""
    if term not in ("gradient", "activation", "full"):
        raise ValueError(f"term must be 'gradient', 'activation' or 'full', got {term!r}.")
    if fitted.features not in ("full", term):
        raise ValueError(
            f"term={term!r} is not in a model that was fitted with features="
            f"{fitted.features!r}. Pass term={fitted.features!r}."
        )
    if term == "gradient" and fitted.linearization_point_ and not has_gradient:
        raise ValueError(
            "The gradient term is zero: the network moved, by several linearisations or merge(), "
            "and its logits are the activation term. Pass term='activation'."
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


def _occlusion(term: InputTerm, images: Tensor, patch: int | None, axis: int) -> npt.NDArray[Any]:
    """Return the effect of patches on the logits, (n_samples, height, width, n_outputs)."""
    n_samples, height, width, _ = images.shape
    side = max(1, min(height, width) // 8) if patch is None else patch
    whole = term.values(images.movedim(-1, axis))
    mean = images.mean(dim=(1, 2), keepdim=True)
    effects = np.empty((n_samples, height, width, whole.shape[1]), to_numpy(whole).dtype)
    for top in range(0, height, side):
        for left in range(0, width, side):
            rows, columns = slice(top, top + side), slice(left, left + side)
            covered = images.clone()
            covered[:, rows, columns] = mean
            change = to_numpy(whole - term.values(covered.movedim(-1, axis)))
            effects[:, rows, columns] = change[:, None, None]
    return effects


def _outputs(
    fitted: BaseGradientFeature, X: Any, target: Any
) -> tuple[list[int], npt.NDArray[Any], list[Any]]:
    """Return for every sample the column of its logit, its sign and its name."""
    logits = fitted._logits(X)
    n_samples, n_outputs = logits.shape
    classes = list(getattr(fitted, "classes_", range(n_outputs)))
    binary = n_outputs == 1 and len(classes) == 2
    if target is None:
        chosen = list(logits[:, 0] > 0) if binary else list(logits.argmax(axis=1))
    elif target in classes:
        chosen = [classes.index(target)] * n_samples
    else:
        raise ValueError(f"target={target!r} is none of {', '.join(map(repr, classes))}.")
    names = [classes[int(i)] for i in chosen]
    signs = np.where(chosen, 1.0, -1.0) if binary else np.ones(n_samples)
    return [0 if binary else int(i) for i in chosen], signs, names


def _visible(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an image scaled to [0, 1]; in grey unless it has three channels."""
    shown = image if image.shape[2] == 3 else image.mean(axis=2)
    low, high = shown.min(), shown.max()
    stretched: npt.NDArray[Any] = (shown - low) / (high - low or 1.0)
    return stretched
