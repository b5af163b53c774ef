"""The networks of the package: a random perceptron, and encoders pretrained without labels."""

from __future__ import annotations

import functools
import math
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from sklearn_gradfeat.backbones._images import ImagePreprocess

_WIDTH = 256
_DEPTH = 2


@functools.lru_cache(maxsize=16)
def random_mlp(n_features: int, seed: int) -> nn.Sequential:
    """Return a wide multi-layer perceptron with random weights, in float64.

    Equal arguments give the same object, so that folds and candidates share its graph.

    Weights are drawn from N(0, 2 / fan_in) and biases from N(0, 0.01), as in the NTK
    parametrization [1]_ at initialisation, with the gain that keeps the scale of the
    activations through ReLUs.

    Parameters
    ----------
    n_features : int
        Number of columns of the input.
    seed : int
        Seed of the weights.

    Returns
    -------
    nn.Sequential
        Two linear layers, each with a ReLU after it; 256 activations.

    References
    ----------
    .. [1] A. Jacot, F. Gabriel, C. Hongler, Neural Tangent Kernel: Convergence and
       Generalization in Neural Networks, NeurIPS 2018, arXiv:1806.07572.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    fan_in = n_features
    for _ in range(_DEPTH):
        linear = nn.Linear(fan_in, _WIDTH, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.normal_(0, math.sqrt(2 / fan_in), generator=generator)
            linear.bias.normal_(0, 0.1, generator=generator)
        layers += [linear, nn.ReLU()]
        fan_in = _WIDTH
    return nn.Sequential(*layers)


SLOPE = 0.01
_LAYERS = ((32, 5, 1), (64, 4, 2), (128, 4, 1), (256, 4, 2), (512, 4, 1))


class ConvNet(nn.Module):
    """Five convolutions without padding: the encoder of [1]_, table 3.

    A leaky ReLU follows every convolution. The output of the last one, which is a single
    position for 32 x 32 pixels, is averaged into 512 activations.

    Parameters
    ----------
    negative_slope : float, default=0.01
        Slope of the leaky ReLUs below zero.

    Attributes
    ----------
    conv1, conv2, conv3, conv4, conv5 : nn.Conv2d
        The convolutions, from the image upwards.

    References
    ----------
    .. [1] F. Mu, Y. Liang, Y. Li, Gradients as Features for Deep Representation
       Learning, ICLR 2020, arXiv:2004.05529.
    """

    def __init__(self, negative_slope: float = SLOPE) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        channels = 3
        for i, (out_channels, size, stride) in enumerate(_LAYERS, start=1):
            setattr(self, f"conv{i}", nn.Conv2d(channels, out_channels, size, stride))
            channels = out_channels

    def forward(self, images: Tensor) -> Tensor:
        """Return the activations of a batch of images.

        Parameters
        ----------
        images : Tensor of shape (n_samples, 3, height, width)
            Colours between -1 and 1; at least 32 x 32 pixels.

        Returns
        -------
        Tensor of shape (n_samples, 512)
        """
        hidden = images
        for convolution in self.children():
            hidden = leaky_relu(convolution(hidden), self.negative_slope)
        return hidden.mean(dim=(2, 3))


# The best one first: it is the default for images.
SHIPPED = ("convnet-rotation", "convnet-vae")
_SIDES = (32, 32)


class ToConvNet(nn.Module):
    """Convert colour images to the input of the networks: 32 x 32 pixels in [-1, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        """Prepare images of shape (n_samples, 3, height, width), uint8 or in [0, 1]."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if images.shape[2:] != _SIDES:
            images = interpolate(images, _SIDES, mode="bilinear", antialias=True)
        return 2 * images - 1


def load_shipped(name: str) -> tuple[ConvNet, ImagePreprocess]:
    """Return a pretrained network of the package, and its input transform.

    Parameters
    ----------
    name : str
        One of ``SHIPPED``. A card of that name beside the weights describes the network.

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
