r"""Pretrain the ConvNet as the encoder of a bidirectional GAN [1, 2].

A discriminator learns to separate two kinds of pairs: an image with the latent variables that the
encoder draws for it, and random latent variables with the image that the generator makes of them.
Encoder and generator learn to make both kinds alike. --wasserstein replaces the Jensen-Shannon
divergence by the Wasserstein distance, with a penalty on the gradient [3].

    python examples/pretraining/bigan.py --data cifar10.zip --output runs/bigan \
        --export bigan.safetensors

[1] J. Donahue, P. Krähenbühl, T. Darrell, Adversarial Feature Learning, ICLR 2017,
    arXiv:1605.09782.
[2] V. Dumoulin et al., Adversarially Learned Inference, ICLR 2017, arXiv:1606.00704.
[3] I. Gulrajani et al., Improved Training of Wasserstein GANs, NeurIPS 2017, arXiv:1704.00028.
"""

from __future__ import annotations

from functools import partial

import torch
from _common import mixed_precision, parser, run
from _images import augment, to_network
from _networks import N_FEATURES, Encoder, decoder
from torch import nn
from torch.nn.functional import softplus

from sklearn_gradfeat.backbones._builtin import SLOPE

N_LATENT = 64
N_COMMON = 512  # features of the discriminator for an image, and for latent variables
PENALTY = 10.0
CRITIC_STEPS = 5  # steps of the discriminator for each step of encoder and generator [3]


class Discriminator(nn.Module):
    """Maps a pair to one logit.

    It has no batch norm, so that the gradient penalty is defined for each sample. It is half as
    wide as the encoder; at full width it would take most of the time of a step.
    """

    def __init__(self, dropout):
        super().__init__()
        self.image_branch = nn.Sequential(
            *self._convolutions(), *self._layer(2048, N_COMMON, dropout)
        )
        self.latent_branch = nn.Sequential(
            *self._layer(N_LATENT, N_COMMON, dropout), *self._layer(N_COMMON, N_COMMON, dropout)
        )
        self.joint = nn.Sequential(
            *self._layer(2 * N_COMMON, 1024, dropout),
            *self._layer(1024, 1024, dropout),
            nn.Linear(1024, 1),
        )

    @staticmethod
    def _convolutions():
        n_in = 3
        for n_out, size, stride in ((16, 5, 1), (32, 4, 2), (64, 4, 1), (128, 4, 2)):
            yield from (nn.Conv2d(n_in, n_out, size, stride), nn.LeakyReLU(0.2))
            n_in = n_out
        yield nn.Flatten()

    @staticmethod
    def _layer(n_in, n_out, dropout):
        return nn.Linear(n_in, n_out), nn.LeakyReLU(0.2), nn.Dropout(dropout)

    def forward(self, images, latent):
        pair = torch.cat([self.image_branch(images), self.latent_branch(latent)], dim=1)
        return self.joint(pair).squeeze(1)


class BiGAN(nn.Module):
    def __init__(self, wasserstein=False):
        super().__init__()
        self.wasserstein = wasserstein
        self.encoder = Encoder(0.2 if wasserstein else SLOPE)
        self.posterior = nn.Linear(N_FEATURES, 2 * N_LATENT)
        self.generator = nn.Sequential(decoder(N_LATENT), nn.Tanh())
        self.discriminator = Discriminator(dropout=0.0 if wasserstein else 0.2)
        self.register_buffer("n_steps", torch.tensor(0))
        players = nn.ModuleList([self.encoder, self.posterior, self.generator])
        adam = partial(torch.optim.Adam, lr=1e-4 if wasserstein else 2e-4, betas=(0.5, 0.999))
        self.optimizers = [adam(self.discriminator.parameters()), adam(players.parameters())]

    def step(self, pixels):
        images = to_network(augment(pixels, margin=0))  # reflected borders would be generated too
        latent = torch.randn(len(images), N_LATENT, device=images.device)
        with mixed_precision(images.device):
            encoded, generated = self.encode(images), self.generator(latent)
        real, fake = (images, encoded), (generated.float(), latent)
        losses = {"discriminator": self._discriminate(real, fake)}
        self.n_steps += 1
        if not self.wasserstein or self.n_steps % CRITIC_STEPS == 0:
            losses["players"] = self._play(real, fake)
        return losses

    def encode(self, images):
        """Draw latent variables for the images."""
        mean, log_variance = self.posterior(self.encoder(images)).float().chunk(2, dim=1)
        return mean + torch.randn_like(mean) * torch.exp(log_variance / 2)

    def _discriminate(self, real, fake):
        """Update the discriminator."""
        real, fake = ([part.detach() for part in pair] for pair in (real, fake))
        with mixed_precision(real[0].device):
            on_real, on_fake = self._logits(real, fake)
        if self.wasserstein:
            loss = on_fake.mean() - on_real.mean() + PENALTY * self._penalty(real, fake)
        else:
            loss = (softplus(-on_real) + softplus(on_fake)).mean()
        return self._update(self.optimizers[0], loss)

    def _play(self, real, fake):
        """Update encoder and generator."""
        with mixed_precision(real[0].device):
            on_real, on_fake = self._logits(real, fake)
        if self.wasserstein:
            loss = on_real.mean() - on_fake.mean()
        else:
            loss = (softplus(on_real) + softplus(-on_fake)).mean()
        return self._update(self.optimizers[1], loss)

    def _logits(self, real, fake):
        return self.discriminator(*real).float(), self.discriminator(*fake).float()

    def _penalty(self, real, fake):
        """Return the squared distance from 1 of the gradient norm between real and fake pairs."""
        share = torch.rand(len(real[1]), 1, device=real[1].device)
        shares = (share[:, :, None, None], share)
        between = [
            torch.lerp(a, b, t).requires_grad_() for a, b, t in zip(real, fake, shares, strict=True)
        ]
        logits = self.discriminator(*between)
        gradients = torch.autograd.grad(logits.sum(), between, create_graph=True)
        norm = torch.cat([part.flatten(1) for part in gradients], dim=1).norm(dim=1)
        return (norm - 1).square().mean()

    @staticmethod
    def _update(optimizer, loss):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        loss.backward(inputs=parameters)
        optimizer.step()
        return loss


def main(argv=None):
    options = parser(__doc__, epochs=200, batch_size=100)
    options.add_argument("--wasserstein", action="store_true")
    arguments = options.parse_args(argv)
    run(partial(BiGAN, arguments.wasserstein), arguments)


if __name__ == "__main__":
    main()
