"""The frozen network with its transform and precision, as a fitted estimator keeps it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sklearn_gradfeat.backbones import (
    ActivationLayer,
    BackboneLike,
    FrozenBackbone,
    Network,
    UndigestibleError,
    check_batch,
    check_transform,
    digest,
    freeze,
    resolve_backbone,
    seeded,
    threads_for_head,
    warn_of_class_scores,
    warn_of_unscaled_images,
)
from sklearn_gradfeat.cache._rounding import unrounded
from sklearn_gradfeat.cache._runner import CachedSamples, Trunk, cache_samples
from sklearn_gradfeat.cache._store import Store, TrunkKey
from sklearn_gradfeat.data import (
    BatchSize,
    BoundedTokenizer,
    Preprocess,
    Samples,
    compute_dtypes,
    resolve_device,
    rows_at,
    rows_of_all_ranks,
    sum_over_ranks,
)

# Switches that choose between kernels, which round differently.
_KERNELS = operator.attrgetter("cudnn.enabled", "cudnn.deterministic", "cudnn.benchmark")


@dataclass(frozen=True)
class Extractor:
    """A frozen network with its transform and precision, as a fitted estimator keeps it.

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
    negative_slope : float or None
        The slope below zero of the ReLUs above the gradient layers; None leaves them as they are.
    tokenizer : BoundedTokenizer or None
        Turns texts into the samples of a network for texts.
    scales : tuple of float or None
        A factor for the output of each activation layer, one before :meth:`balanced`. None for
        an activation that is the output of one layer, as it is.
    rounds : bool
        Whether the inputs of the head are rounded to bfloat16, and stored so.
    """

    backbone: FrozenBackbone
    preprocess: Preprocess | None
    dtype: torch.dtype
    half: bool
    takes_indices: bool
    negative_slope: float | None = None
    tokenizer: BoundedTokenizer | None = None
    scales: tuple[float, ...] | None = None
    rounds: bool = False

    @property
    def activation_layers(self) -> dict[str, float]:
        """The layers of the activation, and the number that multiplies the output of each."""
        layer = self.backbone.module.layer
        names = [part.path for part in layer] if isinstance(layer, tuple) else [layer or ""]
        return dict(zip(names, self.scales or (1.0,) * len(names), strict=True))

    def on(self, device: torch.device) -> Extractor:
        """Return the extractor on a device; in float32 on mps, which has no float64."""
        if device.type != "mps":
            return replace(self, backbone=self.backbone.to(device, self.backbone.dtype))
        backbone = self.backbone.to(device, torch.float32)
        return replace(self, backbone=backbone, dtype=torch.float32)

    def sharing(self, module: nn.Module) -> Extractor:
        """Return the extractor with tensors of ``module`` where they are equal, for pickles."""
        return replace(self, backbone=self.backbone.sharing(module))

    def apart(self) -> Extractor:
        """Return the extractor with tensors of its own."""
        return replace(self, backbone=self.backbone.apart())

    def network(self, names: Sequence[str]) -> Network:
        """Return the network split below the parameters ``names``, each part in its dtype."""
        device = self.backbone.example.device
        network = self.backbone.to(device, self.dtype).network(names, self.negative_slope)
        if self.scales is not None:
            network = replace(network, scale=self._by_column(self.scales, device))
        if network.trunk is None:
            return network
        below = self.backbone.network(names, self.negative_slope)
        return replace(network, trunk=below.trunk, cut=below.cut)

    def _by_column(self, scales: tuple[float, ...], device: torch.device) -> Tensor:
        """Return the factor of every column of the activation."""
        widths = torch.tensor([layer.width for layer in self.backbone.layers or ()])
        return torch.tensor(scales, dtype=self.dtype).repeat_interleave(widths).to(device)

    def balanced(
        self, samples: CachedSamples, weights: npt.NDArray[np.float64]
    ) -> tuple[Extractor, CachedSamples]:
        """Return extractor and samples with activation layers of unit mean square.

        Parameters
        ----------
        samples : CachedSamples
            The training samples, from this extractor.
        weights : ndarray of shape (n_samples,)
            Weights of the samples, which add up to one.
        """
        if self.scales is None:
            return self, samples
        activation, w = samples.activation, torch.from_numpy(weights)
        scales: tuple[float, ...] = ()
        widths = [layer.width for layer in self.backbone.layers or ()]
        for part in activation.split(widths, 1):
            squares = part.norm(dim=1).cpu().double() ** 2 / part.shape[1]
            size = float(sum_over_ranks(w @ squares).sqrt())
            scales += (1 / size if size > torch.finfo(self.dtype).tiny else 1.0,)
        scale = self._by_column(scales, activation.device)
        balanced = torch.mul(activation, scale, out=samples.empty(*activation.shape))
        return replace(self, scales=scales), replace(samples, activation=balanced)

    def batches(
        self, X: Any, network: Network, batch_size: BatchSize, verbose: bool, store: Store | None
    ) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Iterate over (rows, boundary tensors) of ``X``, some of them in host memory."""
        trunk = self._trunk(X, network, batch_size, store)
        for batch in trunk.batches(verbose=verbose, keep=False):
            yield batch.rows, unrounded(batch.boundary, self.dtype)

    def cache(
        self, X: Any, network: Network, batch_size: BatchSize, verbose: bool, store: Store | None
    ) -> CachedSamples:
        """Pass the samples that the store lacks through the network, and keep the results."""

        def activation(boundary: tuple[Tensor, ...]) -> Tensor:
            parameters = tuple(network.parameters.values())
            boundary = unrounded(boundary, self.dtype)
            with torch.no_grad(), threads_for_head(parameters, boundary):
                return network.head(parameters, boundary)

        trunk = self._trunk(X, network, batch_size, store)
        return cache_samples(
            replace(trunk, check=functools.partial(self._check, trunk)),
            activation,
            verbose=verbose,
            keep_boundary=bool(network.parameters),
        )

    def _check(self, trunk: Trunk, raw: Tensor, rows: list[int]) -> None:
        """Raise an error if some samples of a batch depend on the others.

        Where memory runs out, they are checked among fewer others.
        """
        samples, batch_size = trunk.samples, trunk.batch_size

        def check() -> None:
            others = [i for i in range(len(raw)) if i not in rows]
            chosen = sorted(rows + others[: max(batch_size.size - len(rows), 0)])
            if len(chosen) == len(rows):
                return
            some, places = rows_at(raw, chosen), [chosen.index(i) for i in rows]
            prepared = samples.prepare(some)
            if samples.preprocess is not None:
                check_transform(samples.prepare, some, samples.device, [places])
            check_batch(self.backbone.to(prepared.device, samples.dtype).module, prepared, places)

        batch_size.retry(check)

    def _trunk(self, X: Any, network: Network, batch_size: BatchSize, store: Store | None) -> Trunk:
        """Return the frozen layers below the head, applied to ``X``."""
        device = self.backbone.example.device
        dtype = self.dtype if network.trunk is None else self.backbone.dtype
        samples = Samples(X, self.preprocess, dtype, device, self.takes_indices)
        cached = store is not None and network.trunk is not None
        # Without parameters, the trunk is the whole network: its output is the activation.
        rounds = self.rounds and network.trunk is not None and bool(network.parameters)
        key = self._key(network, rounds) if cached else None
        return Trunk(
            samples,
            network.trunk,
            self.dtype,
            self.half,
            batch_size,
            store,
            key,
            rounds=rounds,
        )

    def _key(self, network: Network, rounds: bool) -> TrunkKey | None:
        """Return the key for the store, or None if network or transform cannot be hashed."""
        backbone = self.backbone
        precision = (backbone.dtype, self.dtype, self.half, self.takes_indices)
        stored = (torch.bfloat16,) if rounds else ()
        deterministic = torch.are_deterministic_algorithms_enabled(), _KERNELS(torch.backends)
        kernels = (backbone.example.device.type, deterministic)
        try:
            value = digest(
                backbone.fingerprint.digest,
                network.cut,
                self.preprocess,
                precision,
                kernels,
                *stored,
            )
        except UndigestibleError:
            return None
        return TrunkKey(value, backbone.fingerprint.portable, backbone)


def build_extractor(
    X: Any,
    *,
    backbone: BackboneLike,
    gradient_layers: str | int | Sequence[str],
    has_gradient: bool,
    activation_layer: ActivationLayer,
    preprocess: Preprocess | str | None,
    negative_slope: float | None,
    device: str | torch.device,
    precision: str,
    store_dtype: str,
    seed: int,
) -> tuple[Extractor, list[str]]:
    """Resolve and freeze a backbone for the given samples.

    Parameters
    ----------
    X : ndarray or lazy array-like of shape (n_samples, ...)
        Validated input.
    backbone, gradient_layers, activation_layer, preprocess, negative_slope, device
        As in :class:`~sklearn_gradfeat.GradientFeatureClassifier`.
    precision, store_dtype
        Likewise.
    has_gradient : bool
        Whether the model has a gradient term.
    seed : int
        Seeds random weights.

    Returns
    -------
    extractor : Extractor
        The network, ready to compute activations.
    names : list of str
        The parameters θ₂.
    """
    resolved_device = resolve_device(device)
    resolved = resolve_backbone(backbone, tuple(X.shape[1:]), seed)
    indices = resolved.takes_indices and X.dtype.kind in "iu"
    raw = indices or resolved.preprocess is not None
    trunk_dtype, dtype = compute_dtypes(precision, X, resolved_device, raw)
    transform = resolved.preprocess if isinstance(preprocess, str) else preprocess
    # The frozen copy lives as long as the module or the factory that the user holds.
    owner = backbone if callable(backbone) else None
    with seeded(seed):
        samples = Samples(X, transform, trunk_dtype, resolved_device, indices)
        first = samples.read(slice(0, 2))
        if transform is not resolved.preprocess:
            check_transform(samples.prepare, first, samples.device)
        example = rows_of_all_ranks(samples.prepare(first))[0][:2]
        frozen = freeze(
            resolved.module, example, trunk_dtype, activation_layer, gradient_layers, owner
        )
        if frozen.reads_output and not isinstance(activation_layer, (list, tuple)):
            warn_of_class_scores(resolved.module)
        if transform is None:
            warn_of_unscaled_images(frozen.module, example)
        names = frozen.choose(gradient_layers) if has_gradient else []
    if names and dtype != trunk_dtype and not frozen.runs_in(dtype):
        dtype = trunk_dtype
    half, rounds = precision == "bfloat16", store_dtype == "bfloat16"
    slope = None if negative_slope is None else float(negative_slope)
    tokenizer, layers = resolved.tokenizer, frozen.layers
    as_it_is = layers is None or [layer.path for layer in layers] == [activation_layer]
    scales = None if as_it_is else (1.0,) * len(layers or ())
    extractor = Extractor(frozen, transform, dtype, half, indices, slope, tokenizer, scales, rounds)
    return extractor, names
