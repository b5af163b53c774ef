"""How an estimator is printed: with the name of its backbone instead of a whole network."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from sklearn.base import BaseEstimator
from torch import nn

from sklearn_gradfeat.backbones import default_name

_PRINTER = "sklearn.utils._pprint"
_MOST_NAMES = 3


class _Text:
    """A value that is printed as a text without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class PrintedByName(BaseEstimator):
    """An estimator whose networks are printed by name and size, alone and in pipelines.

    A fitted one also names the layers θ₂ and counts their parameters.
    """

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters of the estimator.

        Parameters
        ----------
        deep : bool, default=True
            Whether to include the parameters of parameters that are estimators.

        Returns
        -------
        dict
            Values by name.
        """
        params = dict(super().get_params(deep))
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        # The printer asks every estimator in a pipeline or a search for its parameters and
        # offers no other way to say how one is printed. Nothing but text comes of the reply.
        if caller is not None and caller.f_globals.get("__name__") == _PRINTER:
            params["backbone"] = self._printed_backbone()
            if isinstance(self.gradient_backbone, nn.Module):
                params["gradient_backbone"] = _Text(f"<{_named(self.gradient_backbone)}>")
        return params

    def _get_params_html(self, deep: bool = True, doc_link: str = "") -> Any:
        """Return the table of parameters, which scikit-learn draws since 1.7."""
        table = super()._get_params_html(deep, doc_link)
        for parameter in ("backbone", "gradient_backbone"):
            if isinstance(getattr(self, parameter), nn.Module):
                # Cut to 30 characters there, so the layers are in the caption alone.
                table[parameter] = _Text(f"<{_named(getattr(self, parameter))}>")
        return table

    def _sk_visual_block_(self) -> Any:
        """Return what the HTML diagram shows; where that fails, it shows the class alone."""
        try:
            from sklearn.utils._repr_html.estimator import _VisualBlock
        except ImportError:  # scikit-learn 1.6
            from sklearn.utils._estimator_html_repr import _VisualBlock
        return _VisualBlock(
            "single",
            self,
            names=type(self).__name__,
            name_details=str(self),
            name_caption=self._caption(),
        )

    def _printed_backbone(self) -> Any:
        """Return what is printed for ``backbone``."""
        if isinstance(self.backbone, nn.Module) or hasattr(self, "gradient_coef_"):
            return _Text(f"<{self._caption()}>")
        return self.backbone

    def _caption(self) -> str:
        """Return the backbone and, once fitted, the layers θ₂ in one line."""
        name = _named(self.backbone)
        if self.backbone is None and hasattr(self, "sample_shape_"):
            name = default_name(self.sample_shape_) or "random MLP"
        layers = getattr(self, "gradient_layers_", None)
        if not layers:
            return name
        size = sum(value.size for value in self.gradient_coef_.values())
        return f"{name}; θ₂: {_count(size)} params in {_shortened(layer_names(layers))}"


def layer_names(parameters: Sequence[str]) -> list[str]:
    """Return the layers that parameters belong to, in order."""
    return list(dict.fromkeys(layer_of(name) for name in parameters))


def layer_of(parameter: str) -> str:
    """Return the layer of a parameter: its own name where it belongs to no submodule."""
    return parameter.rpartition(".")[0] or parameter


def _named(backbone: Any) -> str:
    """Return a name for what ``backbone`` may be, with the size of a network."""
    if backbone is None:
        return "default network"
    if isinstance(backbone, str):
        return backbone
    if isinstance(backbone, nn.Module):
        drawn = [p.numel() for p in backbone.parameters() if not nn.parameter.is_lazy(p)]
        return f"{type(backbone).__name__}: {_count(sum(drawn))} params"
    return f"{getattr(backbone, '__name__', type(backbone).__name__)}()"


def _shortened(names: Sequence[str]) -> str:
    """Return the names in one line, the middle ones left out where there are many."""
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
