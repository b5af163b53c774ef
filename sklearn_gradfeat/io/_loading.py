"""Fitted estimators from their files."""

from __future__ import annotations

import math
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
    seeded,
    stored_weights,
    with_weights,
)
from sklearn_gradfeat.cache import Extractor
from sklearn_gradfeat.data import Preprocess, is_out_of_memory
from sklearn_gradfeat.io._archive import Arrays, digest, read_archive, unpack
from sklearn_gradfeat.io._saving import LOCAL, WEIGHTS, probe, transformed
from sklearn_gradfeat.io._schema import (
    check_attributes,
    check_document,
    check_parameters,
    unpacked,
)

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
    feature_store: str | os.PathLike[str] | None = "auto",
) -> Any:
    """Read an estimator from a file; see :func:`sklearn_gradfeat.load`.

    ``kinds`` holds the classes of estimators by name.
    """
    saved = _Saved(str(path), *read_archive(path))
    kind = saved.kind(kinds)
    parameters, attributes = saved.contents(kind)
    resolved = saved.resolve(backbone, parameters, attributes)
    frozen, module = saved.freeze(resolved.module, parameters.get("activation_layer"))
    extractor = saved.extractor(frozen, resolved, preprocess, parameters)
    if saved.document["backbone"]["module"] or isinstance(backbone, nn.Module):
        backbone = module  # so that a later fit has the same weights
    given = {"backbone": backbone, "preprocess": preprocess, "device": device}
    parameters |= {name: value for name, value in given.items() if value is not None}
    estimator = kind(**parameters, feature_store=feature_store)
    estimator._validate_params()
    vars(estimator).update(attributes, _extractor=extractor)
    saved.check(estimator)
    return estimator


def _complete(parameters: dict[str, Any], attributes: dict[str, Any]) -> None:
    """Add what older files lack: penalties, which could be None, and the linearization point."""
    if "alpha" in parameters and parameters.get("gradient_alpha", 0.0) is None:
        parameters["gradient_alpha"] = parameters["alpha"]
    parameters.setdefault("activation_layer", None)
    attributes.setdefault("linearization_point_", {})
    infinite = parameters.get("features") == "activation"
    for name in ("alpha", "gradient_alpha"):
        attributes.setdefault(f"{name}_", parameters.get(name, 0.0))
    if infinite or attributes["gradient_alpha_"] is None:
        attributes["gradient_alpha_"] = math.inf
    if attributes.get("gradient_alphas_", 0.0) is None:
        attributes["gradient_alphas_"] = np.array([math.inf])


@dataclass(frozen=True)
class _Saved:
    """The contents of a file."""

    path: str
    document: dict[str, Any]
    arrays: Arrays

    def kind(self, kinds: Mapping[str, Any]) -> Any:
        """Return the class of the estimator."""
        if "checkpoint" in self.document:
            raise ValueError(
                f"{self.path} holds the checkpoint of a fit that is not finished, and no model. "
                "Call fit with this path as checkpoint, and save the fitted model."
            )
        name = self.document.get("estimator")
        if not isinstance(name, str) or name not in kinds:
            raise ValueError(
                f"{self.path} holds a {str(name)[:200]}, which this version of sklearn-gradfeat "
                f"does not have. It has {', '.join(kinds)}."
            )
        return kinds[name]

    def contents(self, kind: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return parameters, under their present names, and attributes, after all checks."""
        try:
            check_document(self.document, sum(array.nbytes for array in self.arrays.values()))
            stored = {
                _RENAMED.get(name, name): value
                for name, value in self.document["parameters"].items()
                if name not in _DROPPED.union(LOCAL)
            }
            check_parameters(stored, kind)
            parameters = unpacked(stored, self.arrays)
            attributes = unpacked(self.document["attributes"], self.arrays)
            _complete(parameters, attributes)
            kind(**parameters)._validate_params()
            check_attributes(attributes, kind)
            self.check_probe(attributes["coef_"].shape[0])
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.path} is damaged, or was not written by sklearn-gradfeat: "
                f"{str(error)[:500].rstrip('.')}."
            ) from error
        return parameters, attributes

    @property
    def _versions(self) -> str:
        """The versions that wrote the file, as text."""
        return ", ".join(" ".join(each) for each in self.document["versions"].items())

    def check_probe(self, n_outputs: int) -> None:
        """Raise an error unless the results to compare with have their shapes."""
        shape = self.document["backbone"]["example"]["shape"][0], n_outputs
        for name, expected in (("probe", shape), ("transformed", (2, 2))):
            if name in self.document:
                array = unpack(self.document[name], self.arrays)
                is_array = isinstance(array, np.ndarray) and array.dtype.kind == "f"
                if not is_array or array.shape != expected:
                    raise ValueError(f"its header has a wrong value of {name!r}")

    def resolve(
        self, backbone: BackboneLike, parameters: dict[str, Any], attributes: dict[str, Any]
    ) -> Resolved:
        """Return the architecture, for the given or for the stored ``backbone``."""
        code = self.document["code"].get("backbone")
        if backbone is None and code is not None:
            raise ValueError(
                f"{self.path} holds a model over {code}. The file has the weights and not the "
                "code: pass the module, or a callable that returns one, as `backbone`."
            )
        if backbone is None:
            backbone = self.document["backbone"].get("name") or parameters.get("backbone")
        shape = tuple(attributes["sample_shape_"])
        first = self.arrays.get(f"{WEIGHTS}0.weight", np.empty(0)).shape[1:]
        if backbone is None and len(shape) == 1 and first != shape:
            raise ValueError(
                f"{self.path} is damaged, or was not written by sklearn-gradfeat: it lacks the "
                f"weights of a network for samples of shape {shape}."
            )
        try:
            return resolve_backbone(backbone, shape, 0)
        except ImportError as error:
            raise ValueError(f"The network in {self.path} cannot be built: {error}") from error

    def freeze(self, module: nn.Module, layer: str | None) -> tuple[FrozenBackbone, nn.Module]:
        """Return the frozen network, and a module with its weights.

        ``layer`` is the activation layer, unless the file names several.
        """
        stored, extractor = self.document["backbone"], self.document["extractor"]
        layers, old = extractor.get("layers"), "layers" not in extractor
        shape, stride, dtype = (stored["example"][key] for key in ("shape", "stride", "dtype"))
        example = torch.empty_strided(shape, stride, dtype=getattr(torch, dtype)).zero_()
        dtype = getattr(torch, stored["dtype"])
        # Taken out, so that their memory is free once the module has them.
        weights = {
            name.removeprefix(WEIGHTS): self.arrays.pop(name)
            for name in list(self.arrays)
            if name.startswith(WEIGHTS)
        }
        by_name = not weights
        try:
            with seeded(0):
                if weights:
                    module = with_weights(module, weights, example, dtype)
                    weights.clear()
                chosen = tuple(layers) if layers else None if layer == "auto" else layer
                frozen = FrozenBackbone(module, example, dtype, chosen, channels_second=old)
        except (ValueError, TypeError) as error:
            raise ValueError(f"The backbone does not fit {self.path}: {error}") from error
        if by_name and digest(stored_weights(frozen.module.module)) != stored["digest"]:
            raise ValueError(
                f"The backbone does not fit {self.path}: its weights differ from those that the "
                f"model was fitted on, with {self._versions}."
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
        scales = stored.get("scales")
        return Extractor(
            frozen,
            preprocess,
            dtype,
            stored["half"],
            stored["takes_indices"],
            slope,
            resolved.tokenizer,
            None if scales is None else tuple(scales),
            stored.get("rounds", False),
        )

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
        except (RuntimeError, ValueError, KeyError) as error:
            if is_out_of_memory(error):
                raise
            same = False
        if not same:
            raise ValueError(
                f"The backbone does not fit {self.path}: it has the same weights as in the fit, "
                "but other results. Its code has changed since the file was written, with "
                f"{self._versions}."
            )
