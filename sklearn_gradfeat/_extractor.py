"""The way from samples to features, as a fitted estimator keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sklearn_gradfeat._arrays import Preprocess, Samples
from sklearn_gradfeat.backbones import FrozenBackbone, Network, apart, sharing
from sklearn_gradfeat.features import Features, compute_features, trunk_batches


@dataclass(frozen=True)
class Extractor:
    """The fitted way from samples to features: what a fitted estimator keeps of a backbone.

    Parameters
    ----------
    backbone : FrozenBackbone
        The network, in the dtype of its trunk.
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

    def on(self, device: torch.device) -> Extractor:
        """Return the extractor on a device; one without float64 computes in float32."""
        if device.type != "mps":
            return replace(self, backbone=self.backbone.to(device, self.backbone.dtype))
        backbone = self.backbone.to(device, torch.float32)
        return replace(self, backbone=backbone, dtype=torch.float32)

    def sharing(self, module: nn.Module) -> Extractor:
        """Return the extractor with tensors of ``module`` where they are equal, for pickles."""
        return replace(self, backbone=sharing(self.backbone, module))

    def apart(self) -> Extractor:
        """Return the extractor with tensors of its own."""
        return replace(self, backbone=apart(self.backbone))

    def network(self, names: Sequence[str]) -> Network:
        """Return the network split below the parameters ``names``, each part in its dtype."""
        device = self.backbone.example.device
        network = self.backbone.to(device, self.dtype).network(names)
        if network.trunk is None:
            return network
        return replace(network, trunk=self.backbone.network(names).trunk)

    def batches(
        self, X: Any, network: Network, batch_size: int, verbose: bool
    ) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Iterate over (rows, boundary tensors) of ``X``."""
        return trunk_batches(
            self._samples(X, network),
            network.trunk,
            batch_size,
            dtype=self.dtype,
            half=self.half,
            verbose=verbose,
        )

    def features(
        self, X: Any, network: Network, batch_size: int, verbose: bool, keep: bool
    ) -> Features:
        """Pass all samples through the network once."""

        def activation(boundary: tuple[Tensor, ...]) -> Tensor:
            with torch.no_grad():
                return network.head(tuple(network.parameters.values()), boundary)

        batches = self.batches(X, network, batch_size, verbose)
        inputs = None if network.trunk else self._samples(X, network)
        return compute_features(X.shape[0], batches, activation, batch_size, inputs, keep)

    def _samples(self, X: Any, network: Network) -> Samples:
        """Return ``X`` as batches for the trunk, or for the head where that is all there is."""
        dtype = self.backbone.dtype if network.trunk else self.dtype
        device = self.backbone.example.device
        return Samples(X, self.preprocess, dtype, device, self.takes_indices)
