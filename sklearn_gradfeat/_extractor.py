"""The way from samples to features, as a fitted estimator keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sklearn_gradfeat._arrays import Preprocess, Samples
from sklearn_gradfeat.backbones import FrozenBackbone, Network
from sklearn_gradfeat.features import Features, compute_features


@dataclass(frozen=True)
class Extractor:
    """The fitted way from samples to features: what a fitted estimator keeps of a backbone.

    Parameters
    ----------
    backbone : FrozenBackbone
        The network.
    preprocess : callable or None
        Applied to every batch.
    dtype : torch.dtype
        Dtype of the head and of the results.
    half : bool
        Whether the trunk runs in bfloat16.
    takes_indices : bool
        Whether integers reach the network as they are.
    """

    backbone: FrozenBackbone
    preprocess: Preprocess | None
    dtype: torch.dtype
    half: bool
    takes_indices: bool

    def samples(self, X: Any) -> Samples:
        """Return ``X`` as batches."""
        device = self.backbone.example.device
        return Samples(X, self.preprocess, self.dtype, device, self.takes_indices)

    def features(
        self, X: Any, network: Network, batch_size: int, verbose: bool, keep: bool
    ) -> Features:
        """Pass all samples through the network once."""

        def activation(boundary: tuple[Tensor, ...]) -> Tensor:
            with torch.no_grad():
                return network.head(tuple(network.parameters.values()), boundary)

        return compute_features(
            self.samples(X),
            network.trunk,
            activation,
            batch_size,
            half=self.half,
            verbose=verbose,
            keep_boundary=keep,
        )
