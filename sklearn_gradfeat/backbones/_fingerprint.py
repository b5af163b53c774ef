"""What the function of a network depends on, as a digest."""

from __future__ import annotations

import dis
import functools
import importlib.metadata
import sys
import sysconfig
import types
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, fx

from sklearn_gradfeat.backbones._graph import Captured, CaptureError

_ATOMS = (
    bool, int, float, complex, str, bytes, type(None), type(...), range,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_BUILTINS = (types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodDescriptorType)
_NO_CODE = (types.GetSetDescriptorType, types.MemberDescriptorType)
_NOT_BEHAVIOUR = {
    "__annotate_func__", "__annotations__", "__annotations_cache__", "__dataclass_fields__",
    "__dataclass_params__", "__dict__", "__doc__", "__firstlineno__", "__module__",
    "__slotnames__", "__static_attributes__", "__weakref__", "_abc_impl",
}  # fmt: skip
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_READS = {"LOAD_GLOBAL", "LOAD_NAME"}
_MISSING = object()


class UndigestibleError(TypeError):
    """An object has no digest, since its value cannot be read off."""


def digest(*values: Any) -> bytes:
    """Return 16 bytes that depend on the values and on nothing else.

    Parameters
    ----------
    *values : objects
        Plain values, arrays, tensors, functions, or whatever can be pickled.

    Returns
    -------
    bytes

    Raises
    ------
    UndigestibleError
        If some part cannot be pickled, such as a lock or an open file.
    """
    encoder = _Encoder()
    try:
        encoder.add(values)
    except UndigestibleError:
        raise
    except Exception as error:  # whatever an object's own pickling may raise
        raise UndigestibleError(f"no digest of {values!r}: {error}") from error
    return encoder.state.digest()


class _Encoder:
    """Feeds a hash with objects, depth first."""

    def __init__(self) -> None:
        self.state = xxhash.xxh3_128()
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no identity is used twice

    def note(self, *words: object) -> None:
        """Feed words, apart from one another."""
        for word in words:
            data = word if isinstance(word, bytes) else str(word).encode("utf-8", "surrogatepass")
            self.state.update(f"{len(data)}:".encode() + data)

    def add(self, value: Any) -> None:
        """Feed one object."""
        if type(value) in _ATOMS:
            self.note(type(value).__name__, repr(value))
        elif type(value) is tuple:
            self.sequence("tuple", value)
        elif type(value) in (set, frozenset):
            self.note(type(value).__name__, *sorted(digest(item) for item in value))
        elif id(value) in self.seen:
            self.note("again", self.seen[id(value)])
        else:
            self.seen[id(value)] = len(self.seen)
            self.kept.append(value)
            self.compound(value)

    def sequence(self, kind: str, values: Sequence[Any]) -> None:
        self.note(kind, len(values))
        for value in values:
            self.add(value)

    def compound(self, value: Any) -> None:
        """Feed an object that may be met again."""
        if type(value) is list:
            self.sequence("list", value)
        elif type(value) is dict:
            self.sequence("dict", [*value, *value.values()])
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self.note("array", value.dtype.str, value.shape, value.tobytes())
        elif type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided:
            self.note("tensor", value.dtype, value.shape)
            flat = value.detach().cpu().contiguous().reshape(-1)
            self.state.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, types.ModuleType):
            self.note("module", value.__name__, _version(value.__name__))
        elif isinstance(value, types.CodeType):
            self.code(value)
        elif isinstance(value, _NO_CODE):
            self.note("descriptor", value.__name__)
        elif isinstance(value, (type, types.FunctionType, *_BUILTINS)):
            self.definition(value)
        else:
            self.instance(value)

    def definition(self, value: Any) -> None:
        """Feed a function or class: the name, and the code unless it is a package's."""
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType):
            self.add(owner)
        module = getattr(value, "__module__", None) or ""
        self.note("definition", value.__qualname__)
        if _installed(module) or not isinstance(value, (type, types.FunctionType)):
            self.note(module, _version(module))
        elif isinstance(value, type):
            behaviour = {k: v for k, v in vars(value).items() if k not in _NOT_BEHAVIOUR}
            self.add((value.__bases__, dict(sorted(behaviour.items()))))
        else:
            cells = [_content(cell) for cell in value.__closure__ or ()]
            self.add((value.__code__, value.__defaults__, value.__kwdefaults__, cells))
            self.add(_globals(value))

    def code(self, value: types.CodeType) -> None:
        """Feed what a code object does; not where it was written."""
        self.note("code", sys.version_info[:2], value.co_code, value.co_exceptiontable)
        self.note(value.co_argcount, value.co_kwonlyargcount, value.co_flags)
        names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
        self.add((names, value.co_consts))

    def instance(self, value: Any) -> None:
        """Feed an object through what it gives to pickle."""
        if isinstance(value, (staticmethod, classmethod)):
            return self.add((type(value).__name__, value.__func__))
        if isinstance(value, (property, functools.cached_property)):
            parts = [getattr(value, name, None) for name in ("func", "fget", "fset", "fdel")]
            return self.add((type(value).__name__, *parts))
        if isinstance(value, types.MethodType):
            return self.add(("method", value.__func__, value.__self__))
        if isinstance(value, types.MappingProxyType):
            return self.add(("mapping", dict(value)))
        if isinstance(getattr(value, "__wrapped__", None), types.FunctionType):
            return self.add((type(value), value.__wrapped__))
        reduced: str | tuple[Any, ...] = value.__reduce_ex__(4)
        if isinstance(reduced, str):
            raise UndigestibleError(f"no digest of {value!r}: it is known by its name alone")
        build, arguments, *rest = reduced
        state, items, pairs, *_ = (*rest, None, None, None)
        self.add((type(value), build, tuple(arguments), state))
        self.add((list(items or ()), list(pairs or ())))
        return None


def _content(cell: types.CellType) -> Any:
    """Return what a closure holds; it may yet be empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """Return the globals that a function names, and what it names in the user's own modules."""
    codes = list(_codes(function.__code__))
    read = {i.argval for code in codes for i in dis.get_instructions(code) if i.opname in _READS}
    found = {n: v for n, v in sorted(function.__globals__.items()) if n in read}
    names = sorted({name for code in codes for name in code.co_names})
    own = [m for m in found.values() if isinstance(m, types.ModuleType) and not _installed(m)]
    for module in own:
        inside = {n: getattr(module, n, _MISSING) for n in names}
        found |= {f"{module.__name__}.{n}": v for n, v in inside.items() if v is not _MISSING}
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Iterate over a code object and those that it defines."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _installed(module: str | types.ModuleType) -> bool:
    """Whether a module belongs to the standard library or to an installed package."""
    if isinstance(module, str):
        found = sys.modules.get(module)
        if found is None:
            return False
        module = found
    if module.__name__ == "__main__":
        return False
    file: str | None = getattr(module, "__file__", None)
    if file is None:
        return module.__name__.partition(".")[0] in sys.stdlib_module_names
    if "site-packages" in file or "dist-packages" in file:
        return True
    return file.startswith(_STANDARD_LIBRARY)


@functools.cache
def _version(module: str) -> str:
    """Return the version of the package that a module belongs to."""
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names:
        return sys.version
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is not None:
        return str(version)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


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
