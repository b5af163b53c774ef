"""Rectifiers above the gradient layers with a slope below zero, as in LQF [1]_.

A rectifier passes no derivative where its input is negative; with a slope all of them pass some.

References
----------
.. [1] A. Achille et al., LQF: Linear Quadratic Fine-Tuning, CVPR 2021, arXiv:2012.11140.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_BOUNDED = _aten.hardtanh.default
_RECTIFIERS = {_aten.relu.default, _aten.relu6.default, _aten.leaky_relu.default}


def is_rectifier(node: fx.Node) -> bool:
    """Whether a node is its input above zero, and nothing or a multiple of it below."""
    return node.target in _RECTIFIERS or (node.target is _BOUNDED and node.args[1:2] == (0.0,))


def leaky(node: fx.Node, value: fx.Node, slope: float) -> fx.Node:
    """Return a rectifier of another slope, applied to ``value``, with the bound of ``node``."""
    result = value.graph.call_function(_aten.leaky_relu.default, (value, slope))
    if node.target is _BOUNDED:
        highest: Any = node.args[2] if len(node.args) > 2 else 1.0
    elif node.target is _aten.relu6.default:
        highest = 6.0
    else:
        return result
    return value.graph.call_function(_aten.clamp_max.default, (result, highest))
