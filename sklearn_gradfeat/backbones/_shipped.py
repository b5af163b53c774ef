"""The networks that come with the package: the paper's encoder, pretrained without labels."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sklearn_gradfeat.backbones._convnet import SLOPE, ConvNet
from sklearn_gradfeat.backbones._images import ImagePreprocess

# The best one first: it is the default for images.
SHIPPED = ("convnet-rotation", "convnet-vae")
_SIDES = (32, 32)


class ToConvNet(nn.Module):
    """From colour images to what the networks were trained on: 32 x 32, in [-1, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        """Prepare images of shape (n_samples, 3, height, width), uint8 or in [0, 1]."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if images.shape[2:] != _SIDES:
            images = interpolate(images, _SIDES, mode="bilinear", antialias=True)
        return 2 * images - 1


def load_shipped(name: str) -> tuple[ConvNet, ImagePreprocess]:
    """Return a network that is part of the package, and its input transform.

    Parameters
    ----------
    name : str
        One of ``SHIPPED``. The card of that name beside the weights says what it is.

    Returns
    -------
    (ConvNet, ImagePreprocess)
    """
    with as_file(files(__package__) / "weights" / f"{name}.safetensors") as path:
        return load_convnet(path)


def load_convnet(path: Path) -> tuple[ConvNet, ImagePreprocess]:
    """Return a network from a file of ``examples/pretraining``, and its input transform."""
    with safe_open(path, "pt") as file:
        network = ConvNet(float((file.metadata() or {}).get("slope", SLOPE)))
        network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return network, ImagePreprocess(ToConvNet())
