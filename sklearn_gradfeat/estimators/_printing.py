"""Estimators as text, with a name in place of a whole network."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from sklearn_gradfeat.backbones import default_name

_MOST_NAMES = 3
_LINE = 80


def text_of(estimator: Any) -> str:
    """Return the class and the parameters that differ from their defaults.

    A network is shown by its name and size. A fitted estimator also shows the gradient layers.
    """
    defaults = inspect.signature(type(estimator)).parameters
    shown = []
    for name, value in estimator.get_params(deep=False).items():
        if name == "backbone" and (isinstance(value, nn.Module) or _is_fitted(estimator)):
            shown.append(f"backbone=<{caption(estimator)}>")
        elif repr(value) != repr(defaults[name].default):
            shown.append(f"{name}={value!r}")
    start = f"{type(estimator).__name__}("
    lines = [start]
    for i, parameter in enumerate(shown):
        text = parameter + (")" if i == len(shown) - 1 else ",")
        if i and len(lines[-1]) + 1 + len(text) > _LINE:
            lines.append(" " * len(start) + text)
        else:
            lines[-1] += f" {text}" if i else text
    return "\n".join(lines) if shown else f"{start})"


def caption(estimator: Any) -> str:
    """Return the backbone and, for a fitted estimator, the gradient layers in one line."""
    name = named(estimator.backbone)
    if estimator.backbone is None and hasattr(estimator, "sample_shape_"):
        name = default_name(estimator.sample_shape_) or "random MLP"
    if not getattr(estimator, "gradient_layers_", None):
        return name
    size = sum(value.size for value in estimator.gradient_coef_.values())
    layers = _shortened(layer_names(estimator.gradient_layers_))
    return f"{name}; θ₂: {_count(size)} params in {layers}"


def named(backbone: Any) -> str:
    """Return a name for a value of ``backbone``, with the size of a network."""
    if backbone is None:
        return "default network"
    if isinstance(backbone, str):
        return backbone
    if isinstance(backbone, nn.Module):
        sizes = [p.numel() for p in backbone.parameters() if not nn.parameter.is_lazy(p)]
        return f"{type(backbone).__name__}: {_count(sum(sizes))} params"
    return f"{getattr(backbone, '__name__', type(backbone).__name__)}()"


def layer_names(parameters: Sequence[str]) -> list[str]:
    """Return the layers of parameters, in order."""
    return list(dict.fromkeys(layer_of(name) for name in parameters))


def layer_of(parameter: str) -> str:
    """Return the layer of a parameter; its own name where it belongs to no submodule."""
    return parameter.rpartition(".")[0] or parameter


def _is_fitted(estimator: Any) -> bool:
    return hasattr(estimator, "gradient_coef_")


def _shortened(names: Sequence[str]) -> str:
    """Return names in one line, without the middle of a long list."""
    if len(names) <= _MOST_NAMES:
        return ", ".join(names)
    return f"{names[0]}, …, {names[-1]} ({len(names)} layers)"


def _count(number: float) -> str:
    """Return a number with three digits and a unit."""
    for unit in ("", "k", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"
