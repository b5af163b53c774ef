"""Copies of modules: frozen ones with plain parameters, and copies with other tensors."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import pickle
import types
import weakref
from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

from sklearn_gradfeat.backbones._graph import run_once
from sklearn_gradfeat.data import is_out_of_memory

Module = TypeVar("Module", bound=nn.Module)

_SHOWN = 3


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped, or the module itself."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def has_lazy_parameters(module: nn.Module) -> bool:
    """Whether some parameters have no shape until the module is first called."""
    return any(map(nn.parameter.is_lazy, chain(module.parameters(), module.buffers())))


def frozen_copy(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a copy in evaluation mode; the original stays as it is in every respect.

    Reparametrized weights become plain ones, so that a layer's weight is a parameter. Complex
    tensors become complex numbers of the precision of ``dtype``.
    """
    check_module(module)
    _check_signature(module)
    copied = _copy(module).eval()
    for name, layer in copied.named_modules():
        _remove_reparametrizations(layer)
        layer._backward_hooks.clear()  # these change gradients, not the function
        layer._backward_pre_hooks.clear()
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            # These change the gradient, which is then no derivative, or its layout.
            layer.scale_grad_by_freq = layer.sparse = False
        if isinstance(layer, _NormBase) and layer.running_mean is None:
            if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
                continue
            raise ValueError(
                f"Layer {name!r} of backbone normalises over the batch without running statistics, "
                "so the activation of a sample would depend on the rest of its batch. Build the "
                "layer with track_running_stats=True, or use another normalisation."
            )
    copied._apply(lambda tensor: converted(tensor, device, dtype))
    return copied


def converted(
    tensor: Tensor, device: torch.device, dtype: torch.dtype | None, copy: bool = False
) -> Tensor:
    """Return a tensor on a device and, if it has one, in a floating dtype or its complex one."""
    kind = None
    if dtype is not None and tensor.is_complex():
        kind = dtype.to_complex()
    elif dtype is not None and tensor.is_floating_point():
        kind = dtype
    moved = tensor.to(device, kind, copy=copy)
    if nn.parameter.is_lazy(moved):
        return moved
    # Bytes and arrays refuse tensors that are only marked as conjugated or negated.
    plain = moved.resolve_conj().resolve_neg()
    return plain.contiguous() if _may_overlap(plain) else plain


def converted_copy(
    module: Module, device: torch.device, dtype: torch.dtype | None = None
) -> Module:
    """Return a copy of a module on a device and in a floating dtype, None for those it has.

    Each tensor is converted on its way, so no other copy takes memory.
    """
    copies: dict[int, Any] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        moved = converted(tensor.detach(), device, dtype, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
    return deep_copy(module, copies)


def _may_overlap(tensor: Tensor) -> bool:
    """Whether elements may share memory, as in an expanded tensor, which cannot be written to."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += step * (size - 1)
    return False


_PLAIN = (
    Tensor, nn.Parameter, nn.UninitializedParameter, nn.parameter.UninitializedBuffer,
)  # fmt: skip


def _check_signature(module: nn.Module) -> None:
    """Raise an error unless ``forward`` takes the batch as its one positional argument."""
    try:
        signature = inspect.signature(module.forward)
    except ValueError:  # a builtin without a signature
        return
    try:
        signature.bind(None)
    except TypeError as error:
        parameters = signature.parameters.values()
        names = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        only = f"; it takes {', '.join(map(repr, names))} by keyword only" if names else ""
        call = f"returns module({names[0]}=x)" if names else "calls it"
        raise TypeError(
            "backbone.forward must take the batch as its only required argument, by position: "
            f"{error}{only}. Wrap the module in one whose forward(self, x) {call}."
        ) from error


def check_module(module: nn.Module) -> None:
    """Raise an error for a layer or a tensor that a copy, a cast or a file would change."""
    for path, layer in module.named_modules():
        where = f"Layer {path!r} of backbone" if path else "backbone"
        if isinstance(layer, torch.jit.ScriptModule):
            raise TypeError(
                f"{where} is a TorchScript module, which cannot be linearised. Pass the "
                "torch.nn.Module that it was made from."
            )
        packed = [n for n, v in vars(layer).items() if isinstance(v, torch._C.ScriptObject)]
        if packed:
            raise TypeError(
                f"{where}, of class {type(layer).__name__}, holds packed weights in {packed[0]!r}, "
                "as quantised layers do. They cannot be linearised or saved. Pass the network as "
                "it was before quantisation."
            )
        for name, tensor in chain(layer._parameters.items(), layer._buffers.items()):
            reason = None if tensor is None else _refusal(tensor)
            if reason is not None:
                raise ValueError(
                    f"{'.'.join(filter(None, [path, name]))!r} of backbone {reason}. Pass a "
                    "network whose parameters and buffers are dense tensors with values."
                )


def _refusal(tensor: Tensor) -> str | None:
    """Return why a parameter or buffer cannot be copied faithfully, None if it can be."""
    if type(tensor) not in _PLAIN:
        return f"is a tensor of the class {type(tensor).__name__}, whose state would be lost"
    if tensor.is_nested:
        return "is a nested tensor"
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}"
    if tensor.is_quantized or not _is_number(tensor.dtype):
        return f"is quantised ({tensor.dtype})"
    if tensor.is_meta and not nn.parameter.is_lazy(tensor):
        return "is on the meta device, so it has no values"
    return None


@functools.cache
def _is_number(dtype: torch.dtype) -> bool:
    """Whether tensors of a dtype can be copied and read as numbers; packed bits cannot."""
    try:
        torch.empty(1, dtype=dtype).to(torch.complex128)
    except RuntimeError:
        return False
    return True


def _copy(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module, also of one with lazy parameters."""
    held = chain(module.buffers(), *(vars(layer).values() for layer in module.modules()))
    # Autograd refuses to copy tensors that are not leaves, such as weights that a hook computes.
    computed = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    try:
        if has_lazy_parameters(module):
            copied: nn.Module = pickle.loads(pickle.dumps(module))
        else:
            copied = deep_copy(module, computed)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"backbone cannot be copied ({error}). Store tensors in it as parameters or buffers, "
            "and no object that copy.deepcopy refuses."
        ) from error
    _check_apart(copied, module)
    return copied


def deep_copy(module: Module, memo: dict[int, Any]) -> Module:
    """Return a deep copy of a module, whose functions refer to its own layers.

    ``memo`` has the copies of some objects by their ``id``, as in ``copy.deepcopy``.
    """
    copied = copy.deepcopy(module, memo)
    for layer in copied.modules():
        vars(layer).update({k: _in_copy(v, memo) for k, v in vars(layer).items()})
    return copied


def _check_apart(copied: nn.Module, module: nn.Module) -> None:
    """Raise an error if a module shares layers or tensors with its copy, which would change it."""
    originals = {id(part) for part in _parts_of_module(module).values()}
    for name, part in _parts_of_module(copied).items():
        if id(part) in originals:
            raise ValueError(
                f"backbone cannot be copied: its copy shares {name or 'the whole module'!r} with "
                "it. Take __deepcopy__ out of the class of that layer or tensor, or let it return "
                "a new object."
            )


def _parts_of_module(module: nn.Module) -> dict[str, Any]:
    """Return the layers and tensors of a module by name."""
    return {**dict(module.named_modules()), **_named_tensors(module)}


def _in_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return a value with the copies in ``memo`` in place of the originals that it refers to.

    A deep copy shares functions, such as hooks and a replaced ``forward``, and weak references. If
    one refers to a layer of the original, the copy would run that layer, in its own mode and with
    its own weights.
    """
    if id(value) in memo:
        return memo[id(value)]
    if not refers(value, memo):
        return value
    if isinstance(value, types.FunctionType):
        return _rebound(value, memo)
    inner = [_in_copy(part, memo) for part in _parts(value)]
    made: Any
    if isinstance(value, dict):
        made = copy.copy(value)
        made.update(zip(value, inner, strict=True))
    elif isinstance(value, weakref.ref):
        made = weakref.ref(inner[0])
    elif isinstance(value, types.MethodType):
        made = types.MethodType(inner[1], inner[0])
    elif isinstance(value, functools.partial):
        function, *rest = inner
        n = len(value.args)
        named = dict(zip(value.keywords, rest[n:], strict=True))
        made = functools.partial(function, *rest[:n], **named)
    else:
        made = value.__class__(inner)
    memo[id(value)] = made
    return made


def refers(value: Any, memo: dict[int, Any], seen: set[int] | None = None) -> bool:
    """Whether a value refers to an original of a copy; ``seen`` are values that do not."""
    seen = set() if seen is None else seen
    if id(value) in memo:
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    return any(refers(part, memo, seen) for part in _parts(value))


def _parts(value: Any) -> list[Any]:
    """Return the objects to which a function, a container or a reference refers."""
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if _is_set(c)]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*cells, *defaults, *_global_parts(value).values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, weakref.ref):
        return [value()]
    return list(value) if type(value) in (list, tuple, set) else []


def _global_parts(function: types.FunctionType) -> dict[str, Any]:
    """Return the modules and tensors among the global variables that a function reads."""
    names: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    found = {name: function.__globals__.get(name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, (nn.Module, Tensor))}


def _rebound(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """Return a function whose closure, defaults and global variables refer to copies."""
    shared = {name: _in_copy(value, memo) for name, value in _global_parts(function).items()}
    cells = function.__closure__ or ()
    closure = tuple(types.CellType() for _ in cells)
    variables = {**function.__globals__, **shared} if shared else function.__globals__
    made = types.FunctionType(function.__code__, variables, function.__name__, closure=closure)
    memo[id(function)] = made  # before its closure, which may hold the function itself
    for cell, new in zip(cells, closure, strict=True):
        if _is_set(cell):
            new.cell_contents = _in_copy(cell.cell_contents, memo)
    made.__defaults__ = _in_copy(function.__defaults__, memo)
    made.__kwdefaults__ = _in_copy(function.__kwdefaults__, memo)
    made.__dict__.update(function.__dict__)
    return made


def _is_set(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _remove_reparametrizations(layer: nn.Module) -> None:
    """Make the result of weight or spectral normalisation a plain parameter."""
    if parametrize.is_parametrized(layer):
        _remove_parametrizations(layer)
    hooks: list[Any] = list(layer._forward_pre_hooks.values())
    for hook in hooks:
        kind = type(hook).__name__
        if kind == "WeightNorm":
            remove_weight_norm(layer, hook.name)
        elif kind == "SpectralNorm":
            remove_spectral_norm(layer, hook.name)


def _remove_parametrizations(layer: nn.Module) -> None:
    """Make parametrized tensors plain ones.

    The class of a parametrized layer is its own, and shared by its deep copies. So torch's
    ``remove_parametrizations``, which takes the tensors off that class, would take them off the
    layer of the user too.
    """
    lists: Any = layer.parametrizations
    found = {name: (getattr(layer, name).detach(), held) for name, held in lists.items()}
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer.parametrizations
    layer._load_state_dict_pre_hooks.clear()  # weight_norm's has no pickle, and is for the former
    for name, (value, held) in found.items():
        if next(held.parameters(recurse=False), None) is None:
            layer.register_buffer(name, value)
        else:
            layer.register_parameter(name, nn.Parameter(value, requires_grad=False))


def on_host(module: Module) -> Module:
    """Return a module with its tensors in host memory: itself if they are there already."""
    tensors = chain(module.parameters(), module.buffers())
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return module
    return converted_copy(module, torch.device("cpu"))


def equal_tensors(module: nn.Module, other: nn.Module) -> dict[int, Any]:
    """Return the tensors of ``other`` that equal those of a module, as a memo of deepcopy."""
    others = _named_tensors(other)
    return {
        id(tensor): others[name]
        for name, tensor in _named_tensors(module).items()
        if name in others and _equal(tensor, others[name])
    }


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in class, dtype, device and value."""
    alike = type(a) is type(b) and (a.dtype, a.device) == (b.dtype, b.device)
    return alike and torch.equal(a, b)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by name."""
    return dict(chain(module.named_parameters(), module.named_buffers()))


def stored_weights(module: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Return the parameters and buffers of a module by name, as arrays of real numbers."""
    return {name: _real(t).cpu().numpy() for name, t in _named_tensors(module).items()}


def _real(tensor: Tensor) -> Tensor:
    """Return a view of a tensor in which a complex number is a last axis of two real ones."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def with_weights(
    module: nn.Module, weights: dict[str, npt.NDArray[Any]], example: Tensor, dtype: torch.dtype
) -> nn.Module:
    """Return a copy of a module with other weights, for inference in host memory.

    Parameters
    ----------
    module : nn.Module
        The architecture.
    weights : dict of str to ndarray
        Parameters and buffers by name, from :func:`stored_weights`.
    example : tensor of shape (2 or more, ...)
        A batch as the network receives it, which gives lazy parameters their shape, and which
        lets the network build its layers and tables if it does so in its first pass.
    dtype : torch.dtype
        Floating dtype of the copy.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If names or shapes differ.
    """
    copied = frozen_copy(unwrapped(module), example.device, dtype)
    if has_lazy_parameters(copied):
        run_once(copied, example)
    elif _differences(copied, weights):
        with contextlib.suppress(ValueError):
            run_once(copied, example)
    differences = _differences(copied, weights)
    if differences:
        raise ValueError(f"the module {'; it '.join(differences)}")
    tensors = {name: _real(tensor) for name, tensor in _named_tensors(copied).items()}
    for name, array in weights.items():
        tensors[name].copy_(torch.from_numpy(array))
    return copied


def _differences(module: nn.Module, weights: dict[str, npt.NDArray[Any]]) -> list[str]:
    """Return phrases about the differences of a module and weights in names, shapes, dtypes."""
    tensors = {name: _real(tensor) for name, tensor in _named_tensors(module).items()}
    other = []
    for name, tensor in tensors.items():
        array = weights.get(name)
        if array is None:
            continue
        if tuple(tensor.shape) != array.shape:
            other.append(f"{name!r} has shape {tuple(tensor.shape)} instead of {array.shape}")
        elif str(tensor.dtype) != f"torch.{array.dtype}":
            other.append(f"{name!r} has dtype {tensor.dtype} instead of torch.{array.dtype}")
    return [
        *_listed("lacks", [repr(name) for name in weights if name not in tensors]),
        *_listed("has, beyond those weights,", [repr(n) for n in tensors if n not in weights]),
        *_listed("", other),
    ]


def _listed(verb: str, items: list[str]) -> Iterable[str]:
    """Yield a phrase about the first items, if there are any."""
    if items:
        more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
        yield f"{verb} {', '.join(items[:_SHOWN])}{more}".lstrip()
