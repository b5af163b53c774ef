"""The way from samples to features, as a fitted estimator keeps it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sklearn_gradfeat.backbones import (
    FrozenBackbone,
    Network,
    UndigestibleError,
    apart,
    digest,
    freeze,
    gradients_elsewhere,
    resolve_backbone,
    seeded,
    sharing,
)
from sklearn_gradfeat.cache._runner import Features, Trunk, compute_features
from sklearn_gradfeat.cache._store import FeatureKey, Store
from sklearn_gradfeat.data import Preprocess, Samples, compute_dtypes, resolve_device

# Switches of torch that trade digits of float32 for speed.
_ROUNDING = operator.attrgetter(
    "cuda.matmul.fp32_precision", "cudnn.conv.fp32_precision",
    "mkldnn.matmul.fp32_precision", "mkldnn.conv.fp32_precision",
)  # fmt: skip


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
    leak : float or None
        The slope of the rectifiers above the gradient layers.
    """

    backbone: FrozenBackbone
    preprocess: Preprocess | None
    dtype: torch.dtype
    half: bool
    takes_indices: bool
    leak: float | None = None

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
        network = self.backbone.to(device, self.dtype).network(names, self.leak)
        if network.trunk is None:
            return network
        below = self.backbone.network(names, self.leak)
        return replace(network, trunk=below.trunk, cut=below.cut)

    def batches(
        self,
        X: Any,
        network: Network,
        batch_size: int,
        verbose: bool,
        store: Store | None = None,
    ) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Iterate over (rows, boundary tensors) of ``X``."""
        trunk = self._trunk(X, network, store)
        for batch in trunk.batches(batch_size, verbose=verbose, keep=False):
            yield batch.rows, batch.boundary

    def features(
        self,
        X: Any,
        network: Network,
        batch_size: int,
        verbose: bool,
        keep: bool,
        store: Store | None = None,
    ) -> Features:
        """Pass the samples through the network that are not in the store yet."""

        def activation(boundary: tuple[Tensor, ...]) -> Tensor:
            with torch.no_grad():
                return network.head(tuple(network.parameters.values()), boundary)

        trunk = self._trunk(X, network, store)
        inputs = None if network.trunk else trunk.samples
        batches = trunk.batches(batch_size, verbose=verbose, keep=keep and inputs is None)
        return compute_features(X.shape[0], batches, activation, batch_size, inputs, keep)

    def _trunk(self, X: Any, network: Network, store: Store | None) -> Trunk:
        """Return what takes ``X`` to the head; all there is to do may be to read it."""
        device = self.backbone.example.device
        if network.trunk is None:
            samples = Samples(X, self.preprocess, self.dtype, device, self.takes_indices)
            return Trunk(samples, lambda x: (x,), self.dtype, self.half)
        samples = Samples(X, self.preprocess, self.backbone.dtype, device, self.takes_indices)
        key = None if store is None else self._key(network)
        return Trunk(samples, network.trunk, self.dtype, self.half, store, key)

    def _key(self, network: Network) -> FeatureKey | None:
        """Return what the boundary depends on besides the sample, None if that is unknown."""
        backbone = self.backbone
        precision = (backbone.dtype, self.dtype, self.half, self.takes_indices)
        kernels = (backbone.example.device.type, _ROUNDING(torch.backends))
        try:
            value = digest(
                backbone.fingerprint.digest, network.cut, self.preprocess, precision, kernels
            )
        except UndigestibleError:
            return None
        return FeatureKey(value, backbone.fingerprint.portable, backbone)


def build_extractor(estimator: Any, X: Any, seed: int) -> tuple[Extractor, list[str]]:
    """Resolve the backbone of an estimator for the samples at hand.

    Parameters
    ----------
    estimator : estimator
        Its parameters are read.
    X : ndarray or lazy array-like of shape (n_samples, ...)
        Validated input.
    seed : int
        Seeds random weights.

    Returns
    -------
    (Extractor, list of str)
        The way to the features, and the names of the gradient parameters.
    """
    device = resolve_device(estimator.device)
    resolved = resolve_backbone(estimator.backbone, tuple(X.shape[1:]), seed)
    indices = resolved.takes_indices and X.dtype.kind in "iu"
    trunk_dtype, dtype = compute_dtypes(estimator.precision, X, device, indices)
    preprocess = resolved.preprocess if estimator.preprocess == "auto" else estimator.preprocess
    layer, names = estimator.activation_layer, []
    with seeded(seed):
        example = Samples(X, preprocess, trunk_dtype, device, indices).batch(slice(0, 2))
        frozen = freeze(resolved.module, example, trunk_dtype, layer, _owner(estimator.backbone))
        if estimator.features != "activation":
            if estimator.gradient_backbone is None:
                names = frozen.choose(estimator.gradient_layers)
            elif estimator.head_leak is not None:
                raise ValueError(
                    "head_leak changes the activation and the derivative, so it cannot be combined "
                    "with gradient_backbone. Set one of the two to None."
                )
            else:
                other = resolve_backbone(estimator.gradient_backbone, tuple(X.shape[1:]), seed + 1)
                owner = _owner(estimator.gradient_backbone)
                moved = freeze(other.module, example, trunk_dtype, layer, owner)
                frozen, names = gradients_elsewhere(frozen, moved, estimator.gradient_layers)
    # f - g + g cancels in one precision only.
    half = estimator.precision == "bfloat16" and estimator.gradient_backbone is None
    leak = None if estimator.head_leak is None else float(estimator.head_leak)
    return Extractor(frozen, preprocess, dtype, half, indices, leak), names


def _owner(backbone: Any) -> Any:
    """Return what the frozen copy of a backbone lives with: the module or callable itself."""
    return backbone if callable(backbone) else None
