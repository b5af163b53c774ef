"""The schema of the JSON document in a model file, checked before anything is built from it.

A file may come from a stranger. So a name is a short text, a shape is a list of integers with a
bounded product, and an attribute has its type. Only then do names choose classes, and shapes
allocate memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin

from sklearn_gradfeat.io._archive import Arrays, unpack

_MAX_TEXT = 1000
# The network runs on two samples to compare its results; torch counts their bytes.
_MAX_EXAMPLE_BYTES = 2**27
_MAX_SAMPLE_SIZE = 2**26
_ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2,
    "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
_PRECISIONS = ("float64", "float32")

Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_scale(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < math.inf


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= 64 and all(map(_is_integer, value))


def _is_floats(n_dimensions: int | None) -> Check:
    """Return the check for a floating array with this number of dimensions, None for any."""

    def check(value: Any) -> bool:
        is_floating = isinstance(value, np.ndarray) and value.dtype.kind == "f"
        return is_floating and n_dimensions in (None, value.ndim)

    return check


def _is_list(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _is_choice(value: Any) -> bool:
    """Whether a packed value is a name, a number, or a list or tuple of names."""
    names = value["tuple"] if isinstance(value, dict) and set(value) == {"tuple"} else value
    return _is_text(value) or _is_integer(value) or (_is_texts(names) and all(map(_is_text, names)))


def _is_mapping(key: Check, item: Check) -> Check:
    def check(value: Any) -> bool:
        return isinstance(value, dict) and all(key(k) and item(v) for k, v in value.items())

    return check


_DOCUMENT: dict[str, Check] = {
    "versions": _is_mapping(_is_text, _is_text),
    "parameters": _is_mapping(_is_text, lambda _: True),
    "code": _is_mapping(_is_text, _is_text),
    "attributes": _is_mapping(_is_text, lambda _: True),
    "extractor": lambda value: isinstance(value, dict),
    "backbone": lambda value: isinstance(value, dict),
    "probe": lambda value: isinstance(value, dict),
}
_EXTRACTOR: dict[str, Check] = {
    "dtype": lambda value: value in _PRECISIONS,
    "half": _is_flag,
    "takes_indices": _is_flag,
    "preprocess": _or_none(_is_text),
}
_BACKBONE: dict[str, Check] = {
    "module": _is_flag,
    "digest": _is_text,
    "dtype": lambda value: value in _PRECISIONS,
    "example": lambda value: isinstance(value, dict),
}
_EXAMPLE: dict[str, Check] = {
    "shape": _is_shape,
    "stride": _is_shape,
    "dtype": lambda value: isinstance(value, str) and value in _ITEM_BYTES,
}
_REQUIRED: dict[str, Check] = {
    "sample_shape_": _is_shape,
    "n_features_in_": _is_integer,
    "coef_": _is_floats(2),
    "intercept_": _is_floats(1),
    "omega_": _is_floats(2),
    "gradient_coef_": _is_mapping(lambda key: isinstance(key, str), _is_floats(None)),
    "linearization_point_": _is_mapping(lambda key: isinstance(key, str), _is_floats(None)),
}
_OPTIONAL: dict[str, Check] = {
    "feature_names_in_": _is_list,
    "classes_": _is_list,
    "_multilabel": _is_flag,
    "_single_output": _is_flag,
    "gradient_layers_": _is_texts,
    "n_iter_": _is_integer,
    "n_linearizations_": _is_integer,
    "n_passes_": _is_integer,
    "objective_path_": _is_floats(1),
    "alpha_": _is_number,
    "gradient_alpha_": _is_number,
    "validation_scores_": _is_mapping(_is_text, _is_floats(1)),
    "best_score_": _is_number,
    "alphas_": _is_list,
    "gradient_alphas_": _is_list,
    "scores_": _is_floats(3),
}
_PUBLIC = re.compile(r"[a-z]\w*_", re.ASCII)


def check_document(document: Mapping[str, Any], size: int) -> None:
    """Raise an error unless the parts of a document have their types and modest sizes.

    Parameters
    ----------
    document : dict
        The document of an archive.
    size : int
        Number of bytes of the arrays in the file.

    Raises
    ------
    ValueError
        With the part that is wrong.
    """
    _check("its header", document, _DOCUMENT)
    extractor, backbone = document["extractor"], document["backbone"]
    _check("extractor", extractor, _EXTRACTOR)
    slope = extractor.get("negative_slope", extractor.get("leak"))
    if slope is not None and not (_is_number(slope) and 0 <= slope < 1):
        raise ValueError("extractor has a wrong value of 'negative_slope'")
    if not _is_flag(extractor.get("rounds", False)):
        raise ValueError("extractor has a wrong value of 'rounds'")
    _check_layers(document["parameters"].get("activation_layer"), extractor)
    _check("backbone", backbone, _BACKBONE)
    if not _or_none(_is_text)(backbone.get("name")):
        raise ValueError("backbone has a wrong value of 'name'")
    example = backbone["example"]
    _check("backbone.example", example, _EXAMPLE)
    shape, stride = example["shape"], example["stride"]
    numel = math.prod(shape)
    if len(shape) != len(stride) or len(shape) < 2 or numel == 0:
        raise ValueError("backbone.example is no batch")
    if numel * _ITEM_BYTES[example["dtype"]] > max(_MAX_EXAMPLE_BYTES, size):
        raise ValueError(f"backbone.example of shape {tuple(shape)} is too large")
    if 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) > numel:
        raise ValueError("backbone.example has gaps in memory")


def _check_layers(chosen: Any, extractor: Mapping[str, Any]) -> None:
    """Raise an error unless several activation layers have names, and a scale each or none."""
    layers, scales = extractor.get("layers"), extractor.get("scales")
    if layers is None and _is_choice(chosen) and not _is_text(chosen):
        raise ValueError("extractor lacks 'layers'")
    named = isinstance(layers, list) and len(layers) > 0 and all(map(_is_text, layers))
    if layers is not None and not (named and len(set(layers)) == len(layers)):
        raise ValueError("extractor has a wrong value of 'layers'")
    fitting = isinstance(scales, list) and len(scales) == len(layers or ())
    if scales is not None and not (fitting and all(map(_is_scale, scales))):
        raise ValueError("extractor has a wrong value of 'scales'")


def check_attributes(attributes: Mapping[str, Any], kind: Any) -> None:
    """Raise an error unless fitted attributes have their names, types and shapes."""
    _check("attributes", attributes, _REQUIRED)
    for name, value in attributes.items():
        known = _REQUIRED | _OPTIONAL
        if name not in known and (not _PUBLIC.fullmatch(name) or hasattr(kind, name)):
            raise ValueError(f"attributes has {name!r}, which is no fitted attribute")
        if name in known and not known[name](value):
            raise ValueError(f"attributes has a wrong value of {name!r}")
    if math.prod(attributes["sample_shape_"]) > _MAX_SAMPLE_SIZE:
        raise ValueError(f"sample_shape_={attributes['sample_shape_']} is too large")
    n_outputs, n_activations = attributes["coef_"].shape
    shapes = attributes["intercept_"].shape, attributes["omega_"].shape
    if shapes != ((n_outputs,), (n_outputs, n_activations)) or not n_outputs:
        raise ValueError("coef_, intercept_ and omega_ have shapes that do not fit")
    moved, point = attributes["gradient_coef_"], attributes["linearization_point_"]
    if point and {k: v.shape for k, v in moved.items()} != {k: v.shape for k, v in point.items()}:
        raise ValueError("gradient_coef_ and linearization_point_ do not fit")
    role = "_multilabel" if issubclass(kind, ClassifierMixin) else "_single_output"
    if role not in attributes:
        raise ValueError(f"attributes lacks {role!r}")
    if role == "_multilabel":
        classes = attributes.get("classes_", np.empty(0))
        if len(classes) != n_outputs and (n_outputs, len(classes)) != (1, 2):
            raise ValueError("classes_ and coef_ have shapes that do not fit")
        finite = classes.dtype.kind != "f" or np.isfinite(classes).all()
        if len(set(classes.tolist())) < len(classes) or not finite:
            raise ValueError("classes_ are not distinct numbers or texts")


def check_parameters(parameters: Mapping[str, Any], kind: Any) -> None:
    """Raise an error unless the constructor has all the parameters."""
    unknown = sorted(set(parameters) - set(kind._get_param_names()))
    if unknown:
        raise ValueError(f"{kind.__name__} has no parameter {unknown[0]!r}")
    for name, check in (("backbone", _is_text), ("activation_layer", _is_choice)):
        if not _or_none(check)(parameters.get(name)):
            raise ValueError(f"parameters has a wrong value of {name!r}")


def unpacked(group: Mapping[str, Any], arrays: Arrays) -> dict[str, Any]:
    """Return parameters or attributes as they were packed."""
    return {name: unpack(value, arrays) for name, value in group.items()}


def _check(where: str, values: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Raise an error unless all keys are there and have their types."""
    for name, check in checks.items():
        if name not in values:
            raise ValueError(f"{where} lacks {name!r}")
        if not check(values[name]):
            raise ValueError(f"{where} has a wrong value of {name!r}")
