"""The module for ``backbone=``: a name, a module, a callable or None."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import TypeAlias

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms

from sklearn_gradfeat.backbones._builtin import SHIPPED, load_shipped, random_mlp
from sklearn_gradfeat.backbones._huggingface import PREFIX, load_huggingface
from sklearn_gradfeat.backbones._images import ImagePreprocess, check_images
from sklearn_gradfeat.data import BoundedTokenizer

_SEEDED = threading.RLock()


@functools.lru_cache(maxsize=4)
def load_named(name: str) -> tuple[nn.Module, ImagePreprocess]:
    """Return a pretrained network without its classifier, and its input transform.

    Parameters
    ----------
    name : str
        A network of the package such as ``"convnet-rotation"``, one of torchvision such as
        ``"resnet18"`` or ``"torchvision/resnet18"``, or one of timm such as ``"timm/resnet18"``.

    Returns
    -------
    (nn.Module, ImagePreprocess)

    Raises
    ------
    ValueError
        If there is no network of that name.
    OSError
        If its weights cannot be downloaded.
    """
    if name in SHIPPED:
        return load_shipped(name)
    library, _, model = name.rpartition("/")
    if library in ("", "torchvision"):
        return _load_torchvision(name, model)
    if library == "timm":
        return _load_timm(name, model)
    raise ValueError(
        f"backbone={name!r}: named networks come from 'torchvision/', 'timm/' or 'hf/', not "
        f"{library!r}. Use one of these prefixes, or pass a torch module.{_folder_advice(name)}"
    )


def _load_torchvision(name: str, model: str) -> tuple[nn.Module, ImagePreprocess]:
    known = torchvision.models.list_models(module=torchvision.models)
    if model not in known:
        raise ValueError(_unknown(name, model, [*SHIPPED, *known]))
    weights = torchvision.models.get_model_weights(model).DEFAULT
    network = _download(name, lambda: torchvision.models.get_model(model, weights=weights))
    return without_classifier(network), ImagePreprocess(weights.transforms())


def _load_timm(name: str, model: str) -> tuple[nn.Module, ImagePreprocess]:
    try:
        import timm
        from timm.data.config import resolve_model_data_config
    except ImportError as error:
        raise ImportError(
            f"backbone={name!r} needs timm. Install it with pip install 'sklearn-gradfeat[timm]'."
        ) from error
    if model.partition(".")[0] not in timm.list_models():
        raise ValueError(_unknown(name, model, [f"timm/{m}" for m in timm.list_models()]))
    if "." in model and model not in timm.list_pretrained():
        raise ValueError(_unknown(name, model, [f"timm/{m}" for m in timm.list_pretrained()]))
    network = _download(name, lambda: timm.create_model(model, pretrained=True, num_classes=0))
    config = resolve_model_data_config(network)
    return network, ImagePreprocess(timm_transform(config))


def timm_transform(config: dict[str, object]) -> transforms.Compose:
    """Return timm's evaluation transform for batches of tensors."""
    size: Sequence[int] = config["input_size"][-2:]  # type: ignore[index]
    share = float(config["crop_pct"])  # type: ignore[arg-type]
    mode = transforms.InterpolationMode(config["interpolation"])
    return transforms.Compose(
        [
            _TimmResize(size, share, str(config.get("crop_mode", "center")), mode),
            transforms.CenterCrop(size),
            transforms.ConvertImageDtype(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )


class _TimmResize:
    """Resize as timm does: to the target, or in proportion to the smallest cover of the target."""

    def __init__(
        self,
        size: Sequence[int],
        share: float,
        crop_mode: str,
        mode: transforms.InterpolationMode,
    ) -> None:
        self.target = [int(side / share) for side in size]
        self.squash, self.mode = crop_mode == "squash", mode

    def __call__(self, images: Tensor) -> Tensor:
        """Resize images of shape (n_samples, channels, height, width)."""
        sides = self.target
        if not self.squash:
            ratio = max(t / s for t, s in zip(self.target, images.shape[-2:], strict=True))
            sides = [round(s * ratio) for s in images.shape[-2:]]
            if self.target[0] == self.target[1]:
                short = min(images.shape[-2:])
                sides = [int(self.target[0] * s / short) for s in images.shape[-2:]]
        resized: Tensor = transforms.functional.resize(images, sides, self.mode, antialias=True)
        return resized


def _download(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except (OSError, HTTPException, RuntimeError) as error:
        raise OSError(
            f"The weights of backbone={name!r} could not be downloaded ({error}). "
            "Connect to the internet, or build the module from a local file and pass it as "
            "backbone, with its input transform as preprocess."
        ) from error


def _unknown(name: str, model: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(model, known, n=5, cutoff=0.0)
    return (
        f"backbone={name!r} is not known. The closest names are "
        f"{', '.join(map(repr, nearest))}. Pass one of the names, or a torch module."
        f"{_folder_advice(name)}"
    )


def _folder_advice(name: str) -> str:
    """Return how to pass a folder, if there is one of this name."""
    if not os.path.isdir(name):
        return ""
    path = name if os.path.isabs(name) or name.startswith(".") else f"./{name}"
    return f" For a folder with a model of Hugging Face, pass backbone={PREFIX + path!r}."


def without_classifier(network: nn.Module) -> nn.Module:
    """Replace the last linear layer, or a classifier of convolutions, by the identity."""
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    path = linear[-1] if linear else "classifier"
    parent, _, leaf = path.rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())
    return network


BackboneLike: TypeAlias = str | nn.Module | Callable[[], nn.Module] | None


@dataclass(frozen=True)
class Resolved:
    """A module, the transform of its input, and the tokenizer of a network for texts."""

    module: nn.Module
    preprocess: Callable[[Tensor], Tensor] | None = None
    tokenizer: BoundedTokenizer | None = None

    @property
    def takes_indices(self) -> bool:
        """Whether integers are indices into an embedding, which must keep their dtype."""
        lookups = (nn.Embedding, nn.EmbeddingBag)
        return any(isinstance(layer, lookups) for layer in self.module.modules())


def default_name(sample_shape: tuple[int, ...]) -> str | None:
    """Return the name of the default network for images, None for other samples."""
    return SHIPPED[0] if len(sample_shape) in (2, 3) else None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators in a context, and restore their states afterwards.

    The threads of a process share the generators, so one thread after the other runs the body.
    """
    # Where CUDA was never used, a seed would wait there and replace a seed of the user.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with _SEEDED, torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def resolve_tokenizer(backbone: BackboneLike) -> BoundedTokenizer | None:
    """Return the tokenizer of a named network for texts, None for any other backbone."""
    if not isinstance(backbone, str) or not backbone.startswith(PREFIX):
        return None
    with seeded(0):
        return load_huggingface(backbone)[2]


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
        If the network is unknown, or does not take samples of this shape.
    OSError
        If the weights of a named network cannot be downloaded.
    """
    with seeded(seed):
        if backbone is None:
            backbone = default_name(sample_shape)
        if backbone is None:
            if len(sample_shape) != 1:
                raise ValueError(
                    "backbone=None takes tabular data, X of shape (n_samples, n_features), or "
                    f"images; the samples of X have shape {sample_shape}. Pass backbone, a torch "
                    "module for such samples or a callable that returns one."
                )
            return Resolved(random_mlp(sample_shape[0], seed))
        if isinstance(backbone, str) and backbone.startswith(PREFIX):
            resolved = Resolved(*load_huggingface(backbone))
            if resolved.tokenizer is not None and sample_shape[:-1] != (2,):
                raise ValueError(
                    f"backbone={backbone!r} takes texts: a list of strings, or the output of "
                    f"TextTokenizer. The samples of X have shape {sample_shape}."
                )
            return resolved
        if isinstance(backbone, str):
            try:
                check_images(sample_shape)
            except ValueError as error:
                raise ValueError(f"backbone={backbone!r}: {error}") from None
            return Resolved(*load_named(backbone))
        if isinstance(backbone, nn.Module):
            return Resolved(backbone)
        try:
            with suppress(ValueError):  # builtins have no signature
                inspect.signature(backbone).bind()
        except TypeError as error:
            raise TypeError(
                f"backbone={backbone!r} cannot be called without arguments: {error}. Pass a "
                "module, or a callable without arguments that returns one."
            ) from None
        module = backbone()
        if not isinstance(module, nn.Module):
            raise TypeError(
                "backbone: the factory must return a torch.nn.Module, it returned "
                f"{type(module).__name__}. Pass a module, or a callable without arguments that "
                "returns one."
            )
        return Resolved(module)
