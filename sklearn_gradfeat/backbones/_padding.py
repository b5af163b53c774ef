"""Zeros around the input of a convolution, as its own padding.

Networks that were ported from TensorFlow pad in an operator of their own. Without it, no pass
writes or reads the padded copy, and backward passes take no gradients at the zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sklearn_gradfeat.backbones._graph import Captured

_CONVOLUTIONS = {getattr(torch.ops.aten, f"conv{n}d").default: n for n in (1, 2, 3)}
_PADS = {torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default}
# Bias, stride, padding, dilation and groups, where a call leaves them out.
_DEFAULTS = (None, [1], [0], [1], 1)


def merge_padding(captured: Captured) -> None:
    """Let every convolution pad its input where an operator before it adds zeros.

    The function of the network does not change. Zeros stay where their number differs between the
    two ends of an axis.
    """
    for node in captured.graph.nodes:
        source, n_axes = node.args[0] if node.args else None, _CONVOLUTIONS.get(node.target)
        if n_axes is None or not isinstance(source, fx.Node):
            continue
        zeros = _zeros(source, n_axes)
        if zeros is None:
            continue
        arguments = [*node.args, *_DEFAULTS[len(node.args) - 2 :]]
        own = arguments[4] if len(arguments[4]) == n_axes else [*arguments[4]] * n_axes
        arguments[4] = [p + z for p, z in zip(own, zeros, strict=True)]
        node.args = (source.args[0], *arguments[1:])


def _zeros(node: fx.Node, n_axes: int) -> list[int] | None:
    """Return the zeros that a node adds to both ends of each of the last axes, if it does so."""
    if node.target not in _PADS:
        return None
    arguments: tuple[Any, ...] = node.args
    _, sides, *how = arguments
    if any(value not in ("constant", None, 0) for value in how):
        return None
    if len(sides) > 2 * n_axes or not all(isinstance(n, int) and n >= 0 for n in sides):
        return None
    before, after = sides[::2], sides[1::2]
    missing = [0] * (n_axes - len(before))
    return [*missing, *reversed(before)] if before == after else None
