"""Image batches of any common layout, converted to the input of named networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_CHANNELS = (1, 3)


class ImagePreprocess(nn.Module):
    """Convert layout, dtype and channels, then apply the transform of a network.

    It is a module, so that an exported model can contain it. The exported form does not check
    the range of the values.

    Parameters
    ----------
    transform : callable
        Maps a batch of shape (n_samples, 3, height, width), uint8 or floating point in
        [0, 1], to the input of the network.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, batch: Tensor) -> Tensor:
        """Prepare a batch of images in NCHW, NHWC or grey (n_samples, height, width)."""
        images = channels_first(batch)
        if images.is_floating_point():
            if not torch.compiler.is_exporting():
                _check_range(images)
            images = images.float()
        elif images.dtype != torch.uint8:
            raise ValueError(
                f"Images must be uint8, or floating point in [0, 1]; X has dtype {images.dtype}. "
                "Convert X, with astype(numpy.uint8) if it ranges from 0 to 255, or set preprocess."
            )
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        prepared: Tensor = self.transform(images)
        return prepared


def _check_range(images: Tensor) -> None:
    """Raise an error unless floating point images lie in [0, 1]."""
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"Floating point images must lie in [0, 1], X has values from {low:g} to "
            f"{high:g}. Scale X, such as X / 255 for values up to 255, pass uint8 images, or set "
            "preprocess."
        )


def check_images(shape: tuple[int, ...]) -> None:
    """Raise an error unless samples of this shape may be images."""
    if len(shape) not in (2, 3):
        raise ValueError(
            "A named backbone takes images: X of shape (n_samples, channels, height, width), "
            "(n_samples, height, width, channels) or (n_samples, height, width). "
            f"The samples of X have shape {shape}. Reshape X, or pass backbone, a torch module "
            "for such samples."
        )
    if len(shape) == 2 and set(shape) & set(_CHANNELS):
        raise ValueError(
            f"Samples of shape {shape} may be grey images, or lack an axis. Give X the shape "
            "(n_samples, channels, height, width), or pass backbone, a torch module for such "
            "samples."
        )


def channels_first(batch: Tensor) -> Tensor:
    """Return images as (n_samples, channels, height, width) with 1 or 3 channels."""
    shape = tuple(batch.shape[1:])
    check_images(shape)
    if batch.ndim == 3:
        return batch[:, None]
    first, last = shape[0] in _CHANNELS, shape[2] in _CHANNELS
    if first and last:
        raise ValueError(
            f"Samples of shape {shape} may have their channels first or last. "
            "Pass preprocess, a callable that gets a batch as a tensor and puts them first."
        )
    if not first and not last:
        raise ValueError(
            f"Samples of shape {shape} have neither 1 nor 3 channels, first or last. "
            "Convert the images in X to grey or RGB, or set preprocess."
        )
    return batch if first else batch.permute(0, 3, 1, 2)
