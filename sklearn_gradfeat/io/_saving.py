"""The contents of a model file.

The JSON document of the archive holds

- ``estimator``, ``versions``: the class, and the versions of this package, torch, scikit-learn
  and numpy that wrote the file;
- ``parameters``, ``attributes``: the constructor's parameters, except ``device``,
  ``feature_store`` and ``checkpoint``, and the fitted attributes; their arrays are tensors of the
  archive;
- ``code``: the names of ``backbone`` and ``preprocess``, if they are code;
- ``extractor``: the precision, ``negative_slope``, the name of the transform, and the paths and
  scales of several activation layers;
- ``backbone``: the name or the weights of the network, and a digest of the weights;
- ``probe``, ``transformed``: logits and transformed values of synthetic samples. ``load`` compares
  them with the results of the loaded network and transform.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from sklearn_gradfeat.backbones import default_name, stored_weights
from sklearn_gradfeat.cache import Extractor
from sklearn_gradfeat.data import BatchSize, is_out_of_memory
from sklearn_gradfeat.io._archive import Arrays, NotStorableError, digest, pack, write_archive
from sklearn_gradfeat.linearized import LinearModel, predict_logits

WEIGHTS = "backbone."
_PACKAGE = __name__.partition(".")[0]
_NOTED = (_PACKAGE, "torch", "sklearn", "numpy")
_CODE = ("backbone", "preprocess")
# Choices of this machine, which no other takes from a file.
LOCAL = ("device", "feature_store", "checkpoint")
_NOT_STORED = {"_extractor", "_metadata_request", "_skl_callbacks", "_sklearn_output_config"}


def save_estimator(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator to a file.

    Parameters
    ----------
    estimator : estimator
        A fitted estimator of this package.
    path : str or path-like
        The file. An existing file is replaced once the new one is complete.

    Raises
    ------
    TypeError
        If the class of the estimator is not from this package.
    ValueError
        If only pickle can store a parameter or an attribute.
    """
    check_is_fitted(estimator)
    kind = type(estimator)
    if kind.__module__.partition(".")[0] != _PACKAGE:
        raise TypeError(
            f"save() stores estimators of {_PACKAGE} alone; {kind.__qualname__} is not one of "
            "them. Use joblib or pickle."
        )
    arrays: Arrays = {}
    parameters = estimator.get_params(deep=False)
    attributes = {
        name: value
        for name, value in vars(estimator).items()
        if name not in parameters and name not in _NOT_STORED
    }
    for name in LOCAL:
        parameters.pop(name)
    code = {name: describe(parameters.pop(name)) for name in _CODE if callable(parameters[name])}
    document = {
        "estimator": kind.__name__,
        "versions": {name: import_module(name).__version__ for name in _NOTED},
        "parameters": _packed(parameters, "parameters", arrays),
        "code": code,
        "attributes": _packed(attributes, "attributes", arrays),
        "extractor": _extractor(estimator._extractor),
        "backbone": _backbone(estimator, arrays),
        "probe": pack(probe(estimator), "probe", arrays),
        "transformed": pack(transformed(estimator), "transformed", arrays),
    }
    write_archive(path, document, arrays)


def probe(estimator: Any) -> npt.NDArray[Any]:
    """Return the logits of two synthetic samples, to compare networks.

    They are computed on the CPU without ``preprocess``, in the precision of the trunk. They are
    NaN if the network does not accept such samples.
    """
    device = torch.device("cpu")
    extractor: Extractor = estimator._extractor.on(device)
    extractor = replace(extractor, preprocess=None, half=False, rounds=False)
    model = LinearModel.from_estimator(estimator, device, extractor.dtype)
    example = extractor.backbone.example
    for samples in _made_up(example):
        try:
            return predict_logits(extractor, model, samples.numpy(), BatchSize(len(samples)))
        except (RuntimeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            continue  # outside the domain of the network, such as an empty mask
    return np.full((len(example), len(model.intercept)), np.nan)


def transformed(estimator: Any) -> npt.NDArray[np.float64]:
    """Return two means of transformed synthetic samples, to compare transforms.

    The first row is for uint8 samples, the second for floats in [0, 1]. It is NaN if
    ``preprocess`` does not accept such samples.
    """
    means = np.full((2, 2), np.nan)
    preprocess, shape = estimator._extractor.preprocess, (2, *estimator.sample_shape_)
    if preprocess is None:
        return means
    wave = _wave(torch.Size(shape))
    for row, samples in enumerate(((255 * wave).to(torch.uint8), wave.float())):
        try:
            values = preprocess(samples).cpu().double().flatten()
        except Exception:  # the transform may raise anything
            continue
        weights = torch.linspace(0, 1, len(values), dtype=torch.float64)
        means[row] = float(values.mean()), float((weights * values).mean())
    return means


def _made_up(example: Tensor) -> list[Tensor]:
    """Return batches to try in turn, each like the example in shape, layout and dtype."""
    if not example.is_floating_point():
        return [torch.zeros_like(example), torch.ones_like(example)]
    return [_wave(example.shape).to(example.dtype)]


def _wave(shape: torch.Size) -> Tensor:
    """Return numbers from 0 to 1 that are the same on all machines."""
    return (0.5 + 0.5 * torch.arange(shape.numel(), dtype=torch.float64).sin()).view(shape)


def describe(code: Any) -> str:
    """Return the name of a module's class, or of a callable or its class."""
    named = code if hasattr(code, "__qualname__") else type(code)
    return f"{named.__module__}.{named.__qualname__}"


def _packed(values: dict[str, Any], kind: str, arrays: Arrays) -> dict[str, Any]:
    """Return parameters or attributes in a form for JSON."""
    try:
        return {name: pack(value, f"{kind}.{name}", arrays) for name, value in values.items()}
    except NotStorableError as error:
        raise ValueError(
            f"The model can be stored by pickle only: {error}. Set the parameter to a plain value "
            "before saving, as in set_params(random_state=None)."
        ) from error


def _extractor(extractor: Extractor) -> dict[str, Any]:
    """Return the description of an extractor, without its backbone."""
    preprocess, layers = extractor.preprocess, extractor.backbone.layers
    return {
        "dtype": _name(extractor.dtype),
        "half": extractor.half,
        "rounds": extractor.rounds,
        "takes_indices": extractor.takes_indices,
        "negative_slope": extractor.negative_slope,
        "layers": None if layers is None else [layer.path for layer in layers],
        "scales": None if extractor.scales is None else list(extractor.scales),
        "preprocess": None if preprocess is None else describe(preprocess),
    }


def _backbone(estimator: Any, arrays: Arrays) -> dict[str, Any]:
    """Return the description of the backbone, and store its weights unless it has a name."""
    backbone = estimator._extractor.backbone
    weights = stored_weights(backbone.module.module)
    name = estimator.backbone if isinstance(estimator.backbone, str) else None
    if estimator.backbone is None:
        name = default_name(estimator.sample_shape_)
    if name is None:
        arrays.update({f"{WEIGHTS}{key}": array for key, array in weights.items()})
    example: Tensor = backbone.example
    return {
        "module": isinstance(estimator.backbone, nn.Module),
        "name": name,
        "digest": digest(weights),
        "dtype": _name(backbone.dtype),
        "example": {
            "shape": list(example.shape),
            "stride": list(example.stride()),
            "dtype": _name(example.dtype),
        },
    }


def _name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as ``"float32"``."""
    return str(dtype).removeprefix("torch.")
