"""Fitted estimators from their files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sklearn_gradfeat.backbones import (
    BackboneLike,
    FrozenBackbone,
    Resolved,
    resolve_backbone,
    stored_weights,
    with_weights,
)
from sklearn_gradfeat.cache import Extractor
from sklearn_gradfeat.data import Preprocess
from sklearn_gradfeat.io._archive import Arrays, digest, read_archive, unpack
from sklearn_gradfeat.io._saving import WEIGHTS, probe, transformed

_TOLERANCE = 1e-3
# Parameters of files of format 1 that have another name now, and those that are gone.
_RENAMED = {"head_leak": "negative_slope"}
_DROPPED = {"gradient_backbone", "omega"}


def load_estimator(
    path: str | os.PathLike[str],
    kinds: Mapping[str, Any],
    backbone: BackboneLike,
    preprocess: Preprocess | None,
    device: str | torch.device | None,
) -> Any:
    """Read an estimator from a file; see :func:`sklearn_gradfeat.load`.

    ``kinds`` holds the classes of estimators by name.
    """
    saved = _Saved(str(path), *read_archive(path))
    kind = saved.kind(kinds)
    parameters = saved.parameters()
    resolved = saved.resolve(backbone, parameters)
    frozen, module = saved.freeze(resolved.module, parameters["activation_layer"])
    extractor = saved.extractor(frozen, resolved, preprocess, parameters)
    if saved.document["backbone"]["module"] or isinstance(backbone, nn.Module):
        backbone = module  # so that a later fit has the same weights
    given = {"backbone": backbone, "preprocess": preprocess, "device": device}
    parameters |= {name: value for name, value in given.items() if value is not None}
    estimator = kind(**parameters)
    vars(estimator).update(saved.unpacked("attributes"), _extractor=extractor)
    saved.check(estimator)
    return estimator


@dataclass(frozen=True)
class _Saved:
    """The contents of a file."""

    path: str
    document: dict[str, Any]
    arrays: Arrays

    def kind(self, kinds: Mapping[str, Any]) -> Any:
        """Return the class of the estimator."""
        name = self.document["estimator"]
        if name not in kinds:
            raise ValueError(
                f"{self.path} holds a {name}, which this version of sklearn-gradfeat does not "
                f"have. It has {', '.join(kinds)}."
            )
        return kinds[name]

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of the constructor, under their present names."""
        stored = self.unpacked("parameters")
        return {_RENAMED.get(n, n): value for n, value in stored.items() if n not in _DROPPED}

    def unpacked(self, group: str) -> dict[str, Any]:
        """Return the parameters or the attributes."""
        packed = self.document[group]
        return {name: unpack(value, self.arrays) for name, value in packed.items()}

    def resolve(self, backbone: BackboneLike, parameters: dict[str, Any]) -> Resolved:
        """Return the architecture, for the given or for the stored ``backbone``."""
        code = self.document["code"].get("backbone")
        if backbone is None and code is not None:
            raise ValueError(
                f"{self.path} holds a model over {code}. The file has the weights and not the "
                "code: pass the module, or a callable that returns one, as `backbone`."
            )
        if backbone is None:
            backbone = self.document["backbone"].get("name") or parameters["backbone"]
        return resolve_backbone(backbone, self.unpacked("attributes")["sample_shape_"], 0)

    def freeze(self, module: nn.Module, layer: str | None) -> tuple[FrozenBackbone, nn.Module]:
        """Return the frozen network, and a module with its weights."""
        stored = self.document["backbone"]
        shape, stride, dtype = (stored["example"][key] for key in ("shape", "stride", "dtype"))
        example = torch.empty_strided(shape, stride, dtype=getattr(torch, dtype)).zero_()
        dtype = getattr(torch, stored["dtype"])
        weights = {
            name.removeprefix(WEIGHTS): array
            for name, array in self.arrays.items()
            if name.startswith(WEIGHTS)
        }
        try:
            if weights:
                module = with_weights(module, weights, example, dtype)
            frozen = FrozenBackbone(module, example, dtype, layer)
        except (ValueError, TypeError) as error:
            raise ValueError(f"The backbone does not fit {self.path}: {error}") from error
        if digest(stored_weights(frozen.module.module)) != stored["digest"]:
            raise ValueError(
                f"The backbone does not fit {self.path}: its weights differ from those that the "
                f"model was fitted on, with {self.document['versions']}."
            )
        return frozen, module

    def extractor(
        self,
        frozen: FrozenBackbone,
        resolved: Resolved,
        preprocess: Preprocess | None,
        parameters: dict[str, Any],
    ) -> Extractor:
        """Return the network with its transform and precision."""
        stored = self.document["extractor"]
        fitted = stored["preprocess"]
        if fitted is None and preprocess is not None:
            raise ValueError(f"The model in {self.path} was fitted without `preprocess`.")
        if fitted is not None and preprocess is None:
            if parameters.get("preprocess") == "auto":
                preprocess = resolved.preprocess
            if preprocess is None:
                raise ValueError(
                    f"The model in {self.path} was fitted with the transform {fitted}, which a "
                    "file cannot hold: pass it as `preprocess`."
                )
        dtype = getattr(torch, stored["dtype"])
        slope = stored.get("negative_slope", stored.get("leak"))
        return Extractor(frozen, preprocess, dtype, stored["half"], stored["takes_indices"], slope)

    def check(self, estimator: Any) -> None:
        """Raise an error unless network and transform give the same results as before saving."""
        if "transformed" in self.document:
            expected = unpack(self.document["transformed"], self.arrays)
            if not np.allclose(transformed(estimator), expected, 1e-2, 1e-3, equal_nan=True):
                raise ValueError(
                    f"`preprocess` does not fit {self.path}: for the same samples its results "
                    f"differ from those of {self.document['extractor']['preprocess']} in the fit."
                )
        expected = unpack(self.document["probe"], self.arrays)
        try:
            found = probe(estimator)
            scale = float(np.nanmax(np.abs(expected), initial=0))
            same = np.allclose(found, expected, _TOLERANCE, _TOLERANCE * scale, equal_nan=True)
        except (RuntimeError, ValueError, KeyError):
            same = False
        if not same:
            raise ValueError(
                f"The backbone does not fit {self.path}: it has the same weights as in the fit, "
                "but other results. Its code has changed since the file was written, with "
                f"{self.document['versions']}."
            )
