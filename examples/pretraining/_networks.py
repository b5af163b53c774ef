"""The encoder during training, with batch norms, and the decoder, its mirror image."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import leaky_relu, linear
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sklearn_gradfeat.backbones._builtin import SLOPE, ConvNet

N_FEATURES = 512


class Encoder(nn.Module):
    """A ConvNet with a batch norm after every convolution, for 32 x 32 pixels."""

    def __init__(self, negative_slope=SLOPE):
        super().__init__()
        self.network = ConvNet(negative_slope)
        convolutions = self.network.children()
        self.norms = nn.ModuleList(nn.BatchNorm2d(layer.out_channels) for layer in convolutions)

    def forward(self, images):
        """Return the activations, of shape (n, 512)."""
        hidden = images
        for layer, norm in zip(self.network.children(), self.norms, strict=True):
            hidden = leaky_relu(norm(convolve(layer, hidden)), self.network.negative_slope)
        return hidden.flatten(1)

    def folded(self):
        """Return the equivalent ConvNet of the evaluation mode, with batch norms folded."""
        convnet = ConvNet(self.network.negative_slope)
        pairs = zip(self.network.named_children(), self.norms, strict=True)
        for (name, layer), norm in pairs:
            setattr(convnet, name, fuse_conv_bn_eval(layer.eval(), norm.eval()))
        return convnet.to(memory_format=torch.contiguous_format)


def convolve(layer, images):
    """Apply a convolution; as a matrix product where it covers its whole input.

    On a CPU the matrix product is several times faster. The convolution would take a third of the
    time of a step.
    """
    if images.shape[2:] != layer.kernel_size:
        return layer(images)
    return linear(images.flatten(1), layer.weight.flatten(1), layer.bias)[:, :, None, None]


def decoder(n_latent, width=32):
    """Return the mirror image of the encoder, from latent variables to 32 x 32 pixels.

    ``width`` is the number of channels of its last hidden layer; the encoder has 32.
    """
    sizes = ((4 * width, 4, 2), (2 * width, 4, 1), (width, 4, 2))
    channels = 8 * width
    layers = [nn.Linear(n_latent, channels * 16, bias=False), nn.Unflatten(1, (channels, 4, 4))]
    layers += [nn.BatchNorm2d(channels), nn.LeakyReLU(SLOPE)]
    for out_channels, size, stride in sizes:
        layers += [
            nn.ConvTranspose2d(channels, out_channels, size, stride, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(SLOPE),
        ]
        channels = out_channels
    return nn.Sequential(*layers, nn.ConvTranspose2d(channels, 3, 5))
