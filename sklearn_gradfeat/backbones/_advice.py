"""Advice on networks and samples that do not fit together."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}
# Layers that hold the class scores in networks of torchvision, timm and transformers.
_CLASSIFIERS = {"fc", "_fc", "classifier", "head", "heads", "last_linear", "logits"}
# ImageNet, with or without a class for the background, and its larger variants.
_NUMBERS_OF_CLASSES = {1000, 1001, 11221, 11821, 21841, 21843}
# Values of images from 0 to 255: so many levels; if they are no integers, such a maximum.
_MIN_LEVELS = 32
_MIN_MAXIMUM = 128


def layout_advice(module: object, batch: Tensor) -> str:
    """Return a line on the shape that the first convolution takes, if the batch has another.

    Parameters
    ----------
    module : object
        The network that failed on the batch.
    batch : tensor
        Its input.

    Returns
    -------
    str
        The line, or an empty string.
    """
    layers = module.modules() if isinstance(module, nn.Module) else ()
    first = next((layer for layer in layers if isinstance(layer, _CONVOLUTIONS)), None)
    if first is None or not first.in_channels:  # a lazy layer has no channels yet
        return ""
    channels, n_axes = first.in_channels, len(first.kernel_size)
    if batch.ndim == n_axes + 2 and batch.shape[1] == channels:
        return ""
    advice = ""
    if batch.ndim == n_axes + 2 and batch.shape[-1] == channels:
        order = (0, n_axes + 1, *range(1, n_axes + 1))
        advice = f" The channels of X are last: pass X.transpose{order}, or permute in preprocess."
        advice += " ImageFiles has channels='first'." * (n_axes == 2)
    elif batch.ndim == 2:
        advice = " The samples of X are flat: pass X in the shape that it had before"
        side = round((batch.shape[1] / channels) ** (1 / n_axes))
        fits = channels * side**n_axes == batch.shape[1]
        shape = (-1, channels, *[side] * n_axes)
        advice += f", such as X.reshape{shape}." if fits else "."
    elif batch.ndim == n_axes + 1:
        repeated = "" if channels == 1 else f", repeated to {channels} channels"
        advice = f" X has no axis of channels: pass X[:, None]{repeated}."
    return (
        "The first convolution of the backbone takes batches of shape "
        f"(n_samples, {channels}, {_AXES[n_axes]}).{advice}\n"
    )


def classifier(module: nn.Module) -> str | None:
    """Return the name of the last layer if it seems to compute class scores of ImageNet."""
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if any(True for _ in layer.parameters(recurse=False))
    ]
    if not layers:
        return None
    name, last = layers[-1]
    named = bool(_CLASSIFIERS & set(name.split(".")))
    scores = isinstance(last, nn.Linear) and last.out_features in _NUMBERS_OF_CLASSES
    return name if named and scores else None


def warn_of_class_scores(module: nn.Module) -> None:
    """Warn if the last layer is a classifier for ImageNet, whose output is a poor activation."""
    name = classifier(module)
    if name is not None:
        width = cast(nn.Linear, module.get_submodule(name)).out_features
        warnings.warn(
            f"The backbone ends in the layer {name!r} with {width} outputs, which seem to be class "
            "scores. The features below this layer are better activations: replace it by "
            f"torch.nn.Identity(). To keep the scores, set activation_layer={name!r}.",
            UserWarning,
            stacklevel=2,
        )


def warn_of_unscaled_images(module: nn.Module, batch: Tensor) -> None:
    """Warn if a convolution receives images with the numbers of their files, 0 to 255.

    Parameters
    ----------
    module : nn.Module
        The network. One that scales its input itself gets no warning.
    batch : tensor
        A batch of its input.
    """
    if batch.ndim != 4 or batch.is_complex():
        return
    levels = batch.unique()
    if len(levels) < _MIN_LEVELS or not (levels[0] >= 0 and levels[-1] <= 255):
        return
    if levels[-1] < _MIN_MAXIMUM and (levels != levels.round()).any():
        return
    with torch.no_grad(), _FirstConvolution() as first:
        module(batch)
    found = first.input
    if found is None or found.shape != batch.shape or not torch.equal(found.to(batch), batch):
        return
    warnings.warn(
        f"The images of X have values from {levels[0]:g} to {levels[-1]:g}, which the backbone "
        "does not scale. Set preprocess to the transform of its pretraining, such as "
        "weights.transforms() of torchvision.",
        UserWarning,
        stacklevel=2,
    )


class _FirstConvolution(TorchFunctionMode):
    """Keeps the input of the first convolution."""

    input: Tensor | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.input is None and function in (torch.conv1d, torch.conv2d, torch.conv3d):
            self.input = args[0]
        return function(*args, **(kwargs or {}))
