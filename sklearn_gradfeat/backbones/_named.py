"""Networks by name: torchvision's and timm's pretrained weights and transforms."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence
from http.client import HTTPException

import torchvision
from torch import nn
from torchvision.transforms import v2 as transforms

from sklearn_gradfeat.backbones._images import ImagePreprocess


@functools.lru_cache(maxsize=4)
def load_named(name: str) -> tuple[nn.Module, ImagePreprocess]:
    """Return a pretrained network without its classifier, and its input transform.

    Parameters
    ----------
    name : str
        ``"resnet18"`` or ``"torchvision/resnet18"``, or ``"timm/NAME"``.

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
    library, _, model = name.rpartition("/")
    if library in ("", "torchvision"):
        return _load_torchvision(name, model)
    if library == "timm":
        return _load_timm(name, model)
    raise ValueError(
        f"backbone={name!r}: networks come from 'torchvision/' or 'timm/', not {library!r}."
    )


def _load_torchvision(name: str, model: str) -> tuple[nn.Module, ImagePreprocess]:
    known = torchvision.models.list_models(module=torchvision.models)
    if model not in known:
        raise ValueError(_unknown(name, model, known))
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
            transforms.Resize([int(side / share) for side in size], mode, antialias=True),
            transforms.CenterCrop(size),
            transforms.ConvertImageDtype(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )


def _download(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except (OSError, HTTPException, RuntimeError) as error:
        raise OSError(
            f"The weights of backbone={name!r} could not be downloaded ({error}). "
            "Connect to the network, or build the module from a local file and pass it as "
            "`backbone`, with its input transform as `preprocess`."
        ) from error


def _unknown(name: str, model: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(model, known, n=5, cutoff=0.3)
    return (
        f"backbone={name!r} is not known. The closest names are "
        f"{', '.join(map(repr, nearest))}. Any torch module can be passed as well."
    )


def without_classifier(network: nn.Module) -> nn.Module:
    """Replace the last linear layer, or a classifier of convolutions, by the identity."""
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    path = linear[-1] if linear else "classifier"
    parent, _, leaf = path.rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())
    return network
