"""What ``backbone=`` may be, turned into a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sklearn_gradfeat.backbones._images import check_images
from sklearn_gradfeat.backbones._mlp import random_mlp
from sklearn_gradfeat.backbones._named import load_named
from sklearn_gradfeat.backbones._shipped import SHIPPED

BackboneLike: TypeAlias = str | nn.Module | Callable[[], nn.Module] | None


@dataclass(frozen=True)
class Resolved:
    """A module, what prepares its input, and whether it looks integers up."""

    module: nn.Module
    preprocess: Callable[[Tensor], Tensor] | None = None

    @property
    def takes_indices(self) -> bool:
        """Whether integers must reach the module as they are."""
        lookups = (nn.Embedding, nn.EmbeddingBag)
        return any(isinstance(layer, lookups) for layer in self.module.modules())


def default_name(sample_shape: tuple[int, ...]) -> str | None:
    """Return the name of the network that None stands for, if it has one: for images."""
    return SHIPPED[0] if len(sample_shape) in (2, 3) else None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator for a while, and give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def resolve_backbone(backbone: BackboneLike, sample_shape: tuple[int, ...], seed: int) -> Resolved:
    """Turn ``backbone`` into a module.

    Parameters
    ----------
    backbone : None, str, nn.Module or callable
        As in :class:`GradientFeatureClassifier`.
    sample_shape : tuple of int
        The shape of one sample.
    seed : int
        Seeds random weights.

    Returns
    -------
    Resolved

    Raises
    ------
    ValueError, TypeError
        If there is no such network, or none for samples of this shape.
    OSError
        If the weights of a named network cannot be downloaded.
    """
    with seeded(seed):
        return _resolve(backbone, sample_shape, seed)


def _resolve(backbone: BackboneLike, sample_shape: tuple[int, ...], seed: int) -> Resolved:
    """Turn ``backbone`` into a module; what draws weights uses torch's global generator."""
    if backbone is None:
        backbone = default_name(sample_shape)
    if backbone is None:
        if len(sample_shape) != 1:
            raise ValueError(
                "backbone=None takes rows of numbers, X of shape (n_samples, n_features), or "
                f"images; the samples of X have shape {sample_shape}. Pass `backbone`, a torch "
                "module for such samples or a callable that returns one."
            )
        return Resolved(random_mlp(sample_shape[0], seed))
    if isinstance(backbone, str):
        check_images(sample_shape)
        return Resolved(*load_named(backbone))
    if isinstance(backbone, nn.Module):
        return Resolved(backbone)
    module = backbone()
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"The backbone factory must return a torch.nn.Module, it returned "
            f"{type(module).__name__}."
        )
    return Resolved(module)
