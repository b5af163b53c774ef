"""Fitted estimators from their files."""

from __future__ import annotations

import os
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
from sklearn_gradfeat.data import Preprocess, resolve_device
from sklearn_gradfeat.estimators._classifier import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
)
from sklearn_gradfeat.estimators._regressor import (
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
)
from sklearn_gradfeat.io import WEIGHTS, Arrays, digest, probe, read_archive, transformed, unpack

_ESTIMATORS = {
    kind.__name__: kind
    for kind in (
        GradientFeatureClassifier,
        GradientFeatureClassifierCV,
        GradientFeatureRegressor,
        GradientFeatureRegressorCV,
    )
}
_TOLERANCE = 1e-3


def load(
    path: str | os.PathLike[str],
    backbone: BackboneLike = None,
    *,
    preprocess: Preprocess | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """Load an estimator that its method ``save`` wrote.

    Nothing in the file is executed. It holds numbers and names, but no code, so a model over
    your own network needs the code of that network again.

    Parameters
    ----------
    path : str or path-like
        The file.
    backbone : torch.nn.Module, callable or str, default=None
        The architecture, for a model over a module or a callable. A copy of it receives the
        weights in the file. For a model over a named network this is needed only in place of
        a download, with the right weights and with ``preprocess``.
    preprocess : callable, default=None
        The transform, if the model was fitted with one of your own.
    device : str or torch.device, default=None
        Replaces the parameter ``device`` of the model.

    Returns
    -------
    estimator
        Fitted. On the same machine with the same versions its predictions are those of the
        saved one to the last bit.

    Raises
    ------
    ValueError
        If the file is damaged, not of a model, or of a newer format; or if the backbone is not
        the one that the model was fitted on.
    OSError
        If the file cannot be read, or the weights of a named network cannot be downloaded.

    Examples
    --------
    >>> import os, tempfile
    >>> import sklearn_gradfeat
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> model = sklearn_gradfeat.GradientFeatureClassifier(alpha=1.0).fit(X, y)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "iris.safetensors")
    ...     model.save(path)
    ...     loaded = sklearn_gradfeat.load(path)
    >>> bool((loaded.predict_proba(X) == model.predict_proba(X)).all())
    True
    """
    if device is not None:
        resolve_device(device)
    saved = _Saved(str(path), *read_archive(path))
    parameters = saved.unpacked("parameters")
    resolved = saved.resolve(backbone, parameters)
    frozen, module = saved.freeze(resolved.module, parameters["activation_layer"])
    extractor = saved.extractor(frozen, resolved, preprocess, parameters)
    if saved.document["backbone"]["module"] or isinstance(backbone, nn.Module):
        backbone = module  # so that a later fit has the same weights
    given = {"backbone": backbone, "preprocess": preprocess, "device": device}
    parameters |= {name: value for name, value in given.items() if value is not None}
    estimator = saved.kind(**parameters)
    vars(estimator).update(saved.unpacked("attributes"), _extractor=extractor)
    saved.check(estimator)
    return estimator


@dataclass(frozen=True)
class _Saved:
    """The contents of a file."""

    path: str
    document: dict[str, Any]
    arrays: Arrays

    @property
    def kind(self) -> Any:
        """The class of the estimator."""
        name = self.document["estimator"]
        if name not in _ESTIMATORS:
            raise ValueError(
                f"{self.path} holds a {name}, which this version of sklearn-gradfeat does not "
                f"have. It has {', '.join(_ESTIMATORS)}."
            )
        return _ESTIMATORS[name]

    def unpacked(self, group: str) -> dict[str, Any]:
        """Return the parameters or the attributes."""
        packed = self.document[group]
        return {name: unpack(value, self.arrays) for name, value in packed.items()}

    def resolve(self, backbone: BackboneLike, parameters: dict[str, Any]) -> Resolved:
        """Return the architecture, for the given or for the stored ``backbone``."""
        code = self.document["code"].get("backbone")
        if backbone is None and code is not None:
            raise ValueError(
                f"{self.path} holds a model over {code}. Its weights are in the file, its code is "
                "not: pass the module, or a callable that returns one, as `backbone`."
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
                f"The backbone does not fit {self.path}: its weights are not those that the model "
                f"was fitted on, with {self.document['versions']}."
            )
        return frozen, module

    def extractor(
        self,
        frozen: FrozenBackbone,
        resolved: Resolved,
        preprocess: Preprocess | None,
        parameters: dict[str, Any],
    ) -> Extractor:
        """Return the way to the features."""
        stored = self.document["extractor"]
        fitted = stored["preprocess"]
        if fitted is None and preprocess is not None:
            raise ValueError(f"The model in {self.path} was fitted without `preprocess`.")
        if fitted is not None and preprocess is None:
            if parameters.get("preprocess") == "auto":
                preprocess = resolved.preprocess
            if preprocess is None:
                raise ValueError(
                    f"The model in {self.path} was fitted with the transform {fitted}. No file "
                    "can hold that: pass it as `preprocess`."
                )
        dtype = getattr(torch, stored["dtype"])
        known = (stored["half"], stored["takes_indices"], stored.get("leak"))
        return Extractor(frozen, preprocess, dtype, *known)

    def check(self, estimator: Any) -> None:
        """Raise an error unless network and transform compute what they did when it was saved."""
        if "transformed" in self.document:
            expected = unpack(self.document["transformed"], self.arrays)
            if not np.allclose(transformed(estimator), expected, 1e-2, 1e-3, equal_nan=True):
                raise ValueError(
                    f"`preprocess` does not fit {self.path}: it makes something else of the same "
                    f"samples than {self.document['extractor']['preprocess']} did in the fit."
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
                f"The backbone does not fit {self.path}: it has the weights that the model was "
                "fitted on, but computes something else with them. Its code has changed since "
                f"the file was written, with {self.document['versions']}."
            )
