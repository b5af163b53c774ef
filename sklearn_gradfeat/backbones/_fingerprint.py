"""What the function of a network depends on, as a digest."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sklearn_gradfeat._digest import UndigestibleError, digest
from sklearn_gradfeat.backbones._capture import Captured, CaptureError

_WELL_KNOWN = ("aten.", "prims.")


@dataclass(frozen=True)
class Fingerprint:
    """What tells a frozen network from others.

    Attributes
    ----------
    digest : bytes
        The same for networks of the same function.
    portable : bool
        Whether it means the same in other processes.
    """

    digest: bytes
    portable: bool


def fingerprint(captured: Captured | CaptureError) -> Fingerprint:
    """Return the fingerprint of a graph: its operators, constants and tensors, not its names.

    The kernels of another version of torch round in another way, so that counts too. Without
    a graph, or with an operator whose code is unknown, it holds for this process alone.
    """
    if isinstance(captured, CaptureError):
        return Fingerprint(uuid.uuid4().bytes, portable=False)
    used = captured.used()
    number = {node: i for i, node in enumerate(used)}

    def described(value: Any) -> Any:
        return ("node", number[value]) if isinstance(value, fx.Node) else value

    graph: list[Any] = [torch.__version__, number[captured.input], number[captured.output]]
    for node in used:
        arguments = fx.node.map_aggregate((node.args, node.kwargs), described)
        graph.append((node.op, _operator(node), _plain(arguments), captured.tensors.get(node)))
    known = all(not node.op.startswith("call") or _is_known(node) for node in used)
    try:
        return Fingerprint(digest(graph), portable=known)
    except UndigestibleError:
        return Fingerprint(uuid.uuid4().bytes, portable=False)


def cut_places(captured: Captured, cut: list[fx.Node]) -> tuple[int, ...]:
    """Return where in the graph a cut runs, in a way that does not depend on names."""
    used = captured.used()
    return tuple(used.index(node) for node in cut)


def _operator(node: fx.Node) -> str:
    """Return the name of what a node calls; placeholders have none that matters."""
    if not node.op.startswith("call"):
        return ""
    target: str | Callable[..., Any] = node.target
    name = getattr(target, "__qualname__", None)
    return f"{getattr(target, '__module__', '')}.{name}" if name else str(target)


def _is_known(node: fx.Node) -> bool:
    """Whether an operator is torch's or Python's own, so that its name says what it does."""
    module = getattr(node.target, "__module__", None) or ""
    return str(node.target).startswith(_WELL_KNOWN) or module in ("_operator", "math", "builtins")


def _plain(value: Any) -> Any:
    """Turn the containers of a graph into Python's own."""
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
