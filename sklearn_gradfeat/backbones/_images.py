"""Image batches of any common layout, brought to what named networks were trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_CHANNELS = (1, 3)


class ImagePreprocess:
    """Layout, number range and channels, then a network's own transform.

    Parameters
    ----------
    transform : callable
        Maps a batch of shape (n_samples, 3, height, width), uint8 or floating point in
        [0, 1], to the input of the network.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.transform = transform

    def __call__(self, batch: Tensor) -> Tensor:
        """Prepare a batch of images in NCHW, NHWC or grey (n_samples, height, width)."""
        images = channels_first(batch)
        if images.is_floating_point():
            low, high = float(images.min()), float(images.max())
            if low < 0 or high > 1:
                raise ValueError(
                    f"Floating point images must lie in [0, 1], X has values from {low:g} to "
                    f"{high:g}. Scale X, pass uint8 images, or set `preprocess` yourself."
                )
            images = images.float()
        elif images.dtype != torch.uint8:
            raise ValueError(
                f"Images must be uint8, or floating point in [0, 1]; X has dtype {images.dtype}."
            )
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.transform(images)


def check_images(shape: tuple[int, ...]) -> None:
    """Raise an error unless samples of this shape may be images."""
    if len(shape) not in (2, 3):
        raise ValueError(
            "A named backbone takes images: X of shape (n_samples, channels, height, width), "
            "(n_samples, height, width, channels) or (n_samples, height, width). "
            f"The samples of X have shape {shape}."
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
            "Pass `preprocess`, a callable on a batch tensor, to say which."
        )
    if not first and not last:
        raise ValueError(
            f"Samples of shape {shape} have neither 1 nor 3 channels, first or last. "
            "Convert the images to grey or RGB."
        )
    return batch if first else batch.permute(0, 3, 1, 2)
