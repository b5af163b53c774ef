r"""Pretrain the ConvNet to predict by how many quarter turns an image was rotated [1].

    python examples/pretraining/rotation.py --data cifar10.zip --output runs/rotation \
        --export rotation.safetensors

[1] S. Gidaris, P. Singh, N. Komodakis, Unsupervised Representation Learning by Predicting Image
    Rotations, ICLR 2018, arXiv:1803.07728.
"""

from __future__ import annotations

import torch
from _common import mixed_precision, parser, run
from _images import augment, to_network
from _networks import N_FEATURES, Encoder
from torch import nn
from torch.nn.functional import cross_entropy


class Rotation(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        # The hidden layer takes features that serve rotations alone out of the encoder.
        self.classifier = nn.Sequential(
            nn.Linear(N_FEATURES, 512, bias=False),
            nn.BatchNorm1d(512),
            nn.ReLU(),
            nn.Linear(512, 4),
        )
        self.optimizers = [
            torch.optim.SGD(
                self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
            )
        ]

    def step(self, pixels):
        images, turns = rotate(to_network(augment(pixels)))
        with mixed_precision(images.device):
            logits = self.classifier(self.encoder(images))
        loss = cross_entropy(logits.float(), turns)
        (optimizer,) = self.optimizers
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss, "accuracy": (logits.argmax(1) == turns).float().mean()}


def rotate(images):
    """Rotate each quarter of a batch by another angle; return images and numbers of turns.

    Every image has one rotation per epoch, so a batch holds more images than with all four.
    """
    turns = torch.arange(len(images), device=images.device) % 4
    rotated = [torch.rot90(images[turns == k], k, dims=(2, 3)) for k in range(4)]
    return torch.cat(rotated).contiguous(memory_format=torch.channels_last), turns.sort().values


def main(argv=None):
    run(Rotation, parser(__doc__, epochs=28, batch_size=128).parse_args(argv))


if __name__ == "__main__":
    main()
