"""The activation of one network with the derivatives of another, to check the method."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from sklearn_gradfeat.backbones._frozen import FrozenBackbone, freeze
from sklearn_gradfeat.backbones._graph import activation

_PREFIX = "gradient."


class GradientsElsewhere(nn.Module):
    """``f(x) - g(x) + g(x)``: the value of ``f``, and the Jacobian of the last ``g``.

    Its parameters are those of the submodule ``gradient``. Whatever takes a network takes this
    one too.

    Parameters
    ----------
    activation : nn.Module
        ``f``, in evaluation mode.
    gradient : nn.Module
        ``g``, in evaluation mode, with activations of the same length. It is copied.
    layer : str or None
        The submodule of both whose output is the activation.
    """

    def __init__(self, activation: nn.Module, gradient: nn.Module, layer: str | None) -> None:
        super().__init__()
        self.activation = activation
        self.gradient = copy.deepcopy(gradient)
        self.fixed = copy.deepcopy(gradient)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations, of shape (n_samples, n_features)."""
        f = activation(self.activation, self.layer, x)
        g = activation(self.gradient, self.layer, x)
        if f.shape[1] != g.shape[1]:
            raise ValueError(
                f"gradient_backbone has {g.shape[1]} activations and backbone has {f.shape[1]}. "
                "Pass a gradient_backbone of the same architecture, at other parameters."
            )
        return (f - activation(self.fixed, self.layer, x)) + g


def gradients_elsewhere(
    backbone: FrozenBackbone, other: FrozenBackbone, gradient_layers: str | int | list[str]
) -> tuple[FrozenBackbone, list[str]]:
    """Return ``backbone`` with the derivatives of another network.

    Parameters
    ----------
    backbone, other : FrozenBackbone
        For samples of one shape, with the same activation layer.
    gradient_layers : str, int or list of str
        Which parameters of ``other`` vary.

    Returns
    -------
    (FrozenBackbone, list of str)
        The network, one for all clones and folds, and the names of the parameters in it.
    """
    layer = backbone.module.layer
    module = GradientsElsewhere(backbone.module.module, other.module.module, layer)
    frozen = freeze(module, backbone.example, backbone.dtype, None, other)
    return frozen, [_PREFIX + name for name in other.choose(gradient_layers)]
