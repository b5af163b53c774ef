"""Digests of values and of the function that a network computes: the keys of cached outputs."""

from __future__ import annotations

import functools
import importlib.metadata
import io
import pickle
import platform
import sys
import sysconfig
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, fx, nn

from sklearn_gradfeat.backbones._graph import Captured, CaptureError

_OWN = __name__.partition(".")[0]
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_KNOWN_BY_REPR = (torch.dtype, torch.layout, torch.memory_format)
_WELL_KNOWN = ("aten.", "prims.")
_HASHED_APART = {"training", "_parameters", "_buffers", "_modules"}


class UndigestibleError(TypeError):
    """An object has no digest that is the same in every process and run."""


def digest(*values: Any) -> bytes:
    """Return 16 bytes that are the same in every process for equal values.

    Plain values, arrays and tensors count by value. Classes and functions count by name and
    by the version of the package that they come from, instances by their class and their
    state. The order of a dictionary does not count, except in an ``OrderedDict`` and among
    the submodules of a module, which may be called in that order.

    Parameters
    ----------
    *values : objects
        Plain values, arrays, tensors, and objects of installed packages that can be pickled,
        such as a module of ``torch.nn`` or a ``functools.partial`` of a torch function.

    Returns
    -------
    bytes

    Raises
    ------
    UndigestibleError
        If a part cannot be pickled, or if its class or function is defined outside of the
        standard library and the installed packages: its code may change under the same name.
    """
    stream = io.BytesIO()
    pickler = _ValuePickler(stream, protocol=4)
    pickler.fast = True  # without the memo, equal parts need not be identical
    try:
        pickler.dump(values)
    except UndigestibleError:
        raise
    except Exception as error:  # whatever an object's own pickling may raise
        raise UndigestibleError(f"no digest of {values!r}: {error}") from error
    return xxhash.xxh3_128_digest(stream.getbuffer())


def _described_tensor(tensor: Tensor) -> tuple[Any, ...]:
    """Return class, dtype and shape of a dense tensor, and a digest of its values."""
    kind = (type(tensor).__qualname__, str(tensor.dtype), tuple(tensor.shape))
    return ("tensor", *kind, xxhash.xxh3_128_digest(tensor_bytes(tensor)))


class _TensorPickler(pickle.Pickler):
    """Writes the same bytes for equal tensors, which torch's own pickles do not."""

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        """Return a description of a dense tensor."""
        dense = isinstance(value, Tensor) and value.layout is torch.strided
        return _described_tensor(value) if dense else None


class _InstalledPickler(_TensorPickler):
    """Refuses classes and functions that belong to no installed package."""

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        """Return a description of a dense tensor."""
        named = value if isinstance(value, (type, FunctionType, BuiltinFunctionType)) else None
        _version(type(value).__module__ if named is None else named.__module__ or "builtins")
        return super().persistent_id(value)


class _ValuePickler(_TensorPickler):
    """Writes the same bytes for equal values, and refuses code of the user."""

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        """Return a description of a value whose pickle would depend on more than the value."""
        _version(type(value).__module__)
        tensor = super().persistent_id(value)
        if tensor is not None:
            return tensor
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            content = xxhash.xxh3_128_digest(value.tobytes())
            return ("array", repr(value.dtype), value.shape, content)
        if type(value) in (dict, OrderedDict, set, frozenset):
            return _unordered(value)
        if isinstance(value, _KNOWN_BY_REPR):
            return ("repr", repr(value))
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if isinstance(module, str) and name and _found(module, name) is value:
            return ("name", module, name, _version(module))
        return None

    def reducer_override(self, value: Any) -> Any:
        """Refuse an object that pickles as a name: the value behind it is unknown."""
        if isinstance(value.__reduce_ex__(4), str):
            raise UndigestibleError(f"no digest of {value!r}: it is pickled by its name alone")
        return NotImplemented


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of the elements of a dense tensor, in order."""
    # A tensor may only be marked as conjugated or negated, and then has no bytes of its own.
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _unordered(value: Any) -> tuple[Any, ...]:
    """Return the digests of the items of a dictionary or set, sorted unless their order counts."""
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, sorted(digest(item) for item in value))
    items = [(digest(key), digest(item)) for key, item in value.items()]
    # nn.Sequential calls its submodules in the order of the dictionary that holds them.
    modules = any(isinstance(item, nn.Module) for item in value.values())
    ordered = modules or isinstance(value, OrderedDict)
    return ("dict", ordered, items if ordered else sorted(items))


def _found(module: str, name: str) -> Any:
    """Return the object of a name in a module, None if there is none."""
    try:
        return functools.reduce(getattr, name.split("."), sys.modules[module])
    except (KeyError, AttributeError):
        return None


@functools.cache
def _version(module: str) -> str:
    """Return the version of the package that a module belongs to, if it is installed."""
    name = module.partition(".")[0]
    package = sys.modules.get(name)
    path = Path(getattr(package, "__file__", None) or "")
    installed = name == _OWN or {"site-packages", "dist-packages"}.intersection(path.parts)
    if installed and name != "__main__":
        return str(getattr(package, "__version__", None) or importlib.metadata.version(name))
    if name in sys.stdlib_module_names and (
        path == Path() or path.is_relative_to(_STANDARD_LIBRARY)
    ):
        return platform.python_version()
    raise UndigestibleError(f"{module} does not belong to an installed package")


@dataclass(frozen=True)
class Fingerprint:
    """The identity of the function of a frozen network.

    Attributes
    ----------
    digest : bytes
        The same for networks of the same function.
    portable : bool
        Whether the digest has the same meaning in other processes.
    """

    digest: bytes
    portable: bool


def fingerprint(captured: Captured | CaptureError) -> Fingerprint:
    """Return the fingerprint of a graph: its operators, constants and tensors, not its names.

    The version of torch counts too, since its kernels may round differently. Without a graph,
    or with an operator whose code is unknown, the fingerprint holds in this process only.
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
        graph.append((node.op, _operator(node), arguments, captured.tensors.get(node)))
    known = all(not node.op.startswith("call") or _is_known(node) for node in used)
    try:
        return Fingerprint(digest(graph), portable=known)
    except UndigestibleError:
        return Fingerprint(uuid.uuid4().bytes, portable=False)


def cut_places(captured: Captured, cut: list[fx.Node]) -> tuple[int, ...]:
    """Return the positions of the nodes of a cut, which do not depend on names."""
    used = captured.used()
    return tuple(used.index(node) for node in cut)


def _operator(node: fx.Node) -> str:
    """Return the name of the operator that a node calls; placeholders have none."""
    if not node.op.startswith("call"):
        return ""
    target: str | Callable[..., Any] = node.target
    name = getattr(target, "__qualname__", None)
    return f"{getattr(target, '__module__', '')}.{name}" if name else str(target)


def _is_known(node: fx.Node) -> bool:
    """Whether an operator belongs to torch or Python, so that its name determines its code."""
    module = getattr(node.target, "__module__", None) or ""
    return str(node.target).startswith(_WELL_KNOWN) or module in ("_operator", "math", "builtins")


def module_digest(module: nn.Module) -> str:
    """Return a hash of everything that the function of a module depends on, in this process.

    It covers parameters, buffers, and the attributes of every submodule, hooks included, but
    not the training mode. If an attribute cannot be pickled, the hash is a new one every time.
    """
    state = _hashed_structure(module, _TensorPickler)
    for value in chain(module.parameters(), module.buffers()):
        state.update(tensor_bytes(value))
    return str(state.hexdigest())


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers of a module under all of their names."""
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def architecture_digest(module: nn.Module, example: Tensor) -> str:
    """Return a hash of a module and the kind of its input, but not of the values of its tensors.

    It holds in this process only, as :func:`module_digest` does. If code of the module is not that
    of an installed package, the hash is a new one every time: such code may change under its name.
    """
    state = _hashed_structure(module, _InstalledPickler)
    first: dict[int, str] = {}
    tied = [(name, first.setdefault(id(value), name)) for name, value in named_tensors(module)]
    kind = (tuple(example.shape), example.dtype, example.device)
    state.update(repr((kind, [pair for pair in tied if pair[0] != pair[1]])).encode())
    return str(state.hexdigest())


def _hashed_structure(module: nn.Module, pickler: type[_TensorPickler]) -> Any:
    """Return a hash of the attributes of every submodule, and of the kinds of all tensors."""
    state = xxhash.xxh3_128()
    for name, layer in module.named_modules(remove_duplicate=False):
        held = sorted((k, v) for k, v in vars(layer).items() if k not in _HASHED_APART)
        try:
            stream = io.BytesIO()
            writer = pickler(stream, protocol=4)
            writer.persistent_id(type(layer))  # may refuse the class, which counts by its id
            writer.dump((name, id(type(layer)), held))
            state.update(stream.getbuffer())
        except Exception:  # whatever an attribute's own pickling may raise
            state.update(uuid.uuid4().bytes)
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        state.update(f"{name} {value.dtype} {value.device} {tuple(value.shape)}".encode())
    return state
