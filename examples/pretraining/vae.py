"""Pretrain the ConvNet as the encoder of a variational autoencoder [1].

The decoder has Gaussian noise with one variance for all pixels, at its maximum-likelihood value
[2]. This balances reconstruction and prior without a weight to tune.

    python examples/pretraining/vae.py --data cifar10.zip --output runs/vae --export vae.safetensors

[1] D. Kingma, M. Welling, Auto-Encoding Variational Bayes, ICLR 2014, arXiv:1312.6114.
[2] O. Rybkin, K. Daniilidis, S. Levine, Simple and Effective VAE Training with Calibrated
    Decoders, ICML 2021, arXiv:2006.13202.
"""

from __future__ import annotations

import torch
from _common import mixed_precision, parser, run
from _images import augment, to_network
from _networks import N_FEATURES, Encoder, decoder
from torch import nn

N_LATENT = 128
# Half of the encoder's. A wider decoder would take most of a step, and it is thrown away.
DECODER_WIDTH = 16


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.posterior = nn.Linear(N_FEATURES, 2 * N_LATENT)
        self.decoder = decoder(N_LATENT, DECODER_WIDTH)
        self.optimizers = [torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-2)]

    def step(self, pixels):
        images = to_network(augment(pixels))
        with mixed_precision(images.device):
            mean, log_variance = self.posterior(self.encoder(images)).chunk(2, dim=1)
            noise = torch.randn_like(mean)
            decoded = self.decoder(mean + noise * torch.exp(log_variance / 2))
        error = (decoded.float() - images).square().mean()
        distortion = images[0].numel() / 2 * error.log()
        mean, log_variance = mean.float(), log_variance.float()
        rate = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        (optimizer,) = self.optimizers
        optimizer.zero_grad()
        (distortion + rate).backward()
        optimizer.step()
        return {"loss": distortion + rate, "squared_error": error, "rate": rate}


def main(argv=None):
    run(VAE, parser(__doc__, epochs=20, batch_size=128).parse_args(argv))


if __name__ == "__main__":
    main()
