"""The small convolutional network of the paper, for images of 32 × 32 pixels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import leaky_relu

SLOPE = 0.01
_LAYERS = ((32, 5, 1), (64, 4, 2), (128, 4, 1), (256, 4, 2), (512, 4, 1))


class ConvNet(nn.Module):
    """Five convolutions without padding: the encoder of [1]_, table 3.

    A leaky rectifier follows every convolution. What remains of the image, a single
    position for 32 x 32 pixels, is averaged into 512 activations.

    Parameters
    ----------
    slope : float, default=0.01
        Slope of the leaky rectifiers below zero.

    Attributes
    ----------
    conv1, conv2, conv3, conv4, conv5 : nn.Conv2d
        The convolutions, from the image upwards.

    References
    ----------
    .. [1] F. Mu, Y. Liang, Y. Li, Gradients as Features for Deep Representation
       Learning, ICLR 2020, arXiv:2004.05529.
    """

    def __init__(self, slope: float = SLOPE) -> None:
        super().__init__()
        self.slope = slope
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
            hidden = leaky_relu(convolution(hidden), self.slope)
        return hidden.mean(dim=(2, 3))
