"""One frozen copy of a module for all of its users."""

from __future__ import annotations

import copy
import difflib
import functools
import multiprocessing
import pickle
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor, fx, nn

from sklearn_gradfeat.backbones._blocks import blocks, choose_parameters, differentiable
from sklearn_gradfeat.backbones._copies import frozen_copy, has_lazy_parameters, unwrapped
from sklearn_gradfeat.backbones._eager import EagerHead, module_blocks, parameter_names
from sklearn_gradfeat.backbones._fingerprint import Fingerprint, cut_places, fingerprint
from sklearn_gradfeat.backbones._folding import fold_batch_norms
from sklearn_gradfeat.backbones._graph import (
    ActivationModule,
    Captured,
    CaptureError,
    capture,
    check_activation,
    run_once,
)
from sklearn_gradfeat.backbones._split import boundary, downstream, extract, is_relu

Module = TypeVar("Module", bound=nn.Module)

_LOCK = threading.RLock()


@dataclass(frozen=True)
class Network:
    """A network in two parts, with the parameters of the upper one that vary.

    Attributes
    ----------
    trunk : callable or None
        Maps a batch to the tuple of boundary tensors, each of shape (n_samples, ...).
        None where the head is the whole network.
    parameters : dict of str to tensor
        The differentiated parameters at their pretrained values.
    cut : tuple of int
        Where in the graph the trunk ends.
    """

    trunk: Callable[[Tensor], tuple[Tensor, ...]] | None
    parameters: dict[str, Tensor]
    _head: Callable[..., tuple[Tensor, ...]]
    cut: tuple[int, ...] = ()

    def head(self, parameters: tuple[Tensor, ...], boundary: tuple[Tensor, ...]) -> Tensor:
        """Return the activation, of shape (n_samples, n_features)."""
        return self._head(*parameters, *boundary)[0]

    @property
    def graph(self) -> fx.GraphModule | None:
        """The head as a graph, if the network could be captured."""
        return self._head if isinstance(self._head, fx.GraphModule) else None


class FrozenBackbone:
    """A private copy of a backbone on one device, for samples of one shape.

    It pickles as a module in host memory, whatever device it is on; the graph is captured
    again when it is needed.

    Parameters
    ----------
    module : nn.Module
        The network. It is copied, never changed.
    example : tensor of shape (2 or more, ...)
        A batch as the network receives it.
    dtype : torch.dtype
        Floating dtype of the parameters.
    activation_layer : str or None
        The submodule whose output is the activation.
    """

    def __init__(
        self, module: nn.Module, example: Tensor, dtype: torch.dtype, activation_layer: str | None
    ) -> None:
        module = unwrapped(module)
        if activation_layer is not None:
            _check_layer(module, activation_layer)
        copied = frozen_copy(module, example.device, dtype)
        self.module = ActivationModule(copied, activation_layer)
        check_activation(run_once(self.module, example), len(example))
        self.module.requires_grad_(False)  # not before lazy modules have their parameters
        self.example = torch.zeros_like(example)
        self.dtype = dtype
        self._networks: dict[tuple[tuple[str, ...], float | None], Network] = {}
        self._others: dict[tuple[torch.device, torch.dtype], FrozenBackbone] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the module and the example, in host memory."""
        host = {"module": on_host(self.module), "example": self.example.cpu()}
        return {**host, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the module; nothing is captured yet."""
        self.__dict__.update(state, _networks={}, _others={})

    def to(self, device: torch.device, dtype: torch.dtype) -> FrozenBackbone:
        """Return the backbone on a device in a dtype: itself, or a copy that is made once."""
        if (self.example.device, self.dtype) == (device, dtype):
            return self
        with _LOCK:
            if (device, dtype) not in self._others:
                moved = FrozenBackbone.__new__(FrozenBackbone)
                module = copy.deepcopy(self.module).to(device, dtype)
                example = self.example.to(device)
                if example.is_floating_point():
                    example = example.to(dtype)
                moved.__setstate__({"module": module, "example": example, "dtype": dtype})
                self._others[device, dtype] = moved
            return self._others[device, dtype]

    @functools.cached_property
    def captured(self) -> Captured | CaptureError:
        """The folded graph, or why there is none."""
        try:
            captured = capture(self.module, self.example)
            fold_batch_norms(captured)
        except CaptureError as refusal:
            return refusal
        return captured

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """What tells this network from others."""
        return fingerprint(self.captured)

    def network(self, names: Sequence[str], negative_slope: float | None = None) -> Network:
        """Return the network split below the parameters ``names``.

        Without any, the trunk is the whole network. ``negative_slope`` is the slope below zero of
        the ReLUs above the parameters; None leaves them as they are.
        """
        with _LOCK:
            key = (tuple(names), negative_slope if names else None)
            if key not in self._networks:
                captured = self.captured
                self._networks[key] = (
                    _eager_network(self.module, *key)
                    if isinstance(captured, CaptureError)
                    else _split_network(captured, *key)
                )
            return self._networks[key]

    def choose(self, gradient_layers: str | int | Sequence[str]) -> list[str]:
        """Return the names of the parameters that ``gradient_layers`` chooses."""
        with _LOCK:
            captured = self.captured
        if isinstance(captured, CaptureError):
            warnings.warn(
                f"The backbone cannot be captured as a graph ({captured}). It works all the "
                "same, but every pass over the data runs the whole network instead of the "
                "layers above the gradient layers alone, and batch norms are not folded, so the "
                "penalty is on other weights.",
                UserWarning,
                stacklevel=2,
            )
            module, example = self.module.module, self.example
            names = parameter_names(module)
            return choose_parameters(
                gradient_layers, names, lambda: module_blocks(module, example), {}
            )
        every = [name for name, _ in self.module.module.named_parameters()]
        gone = dict.fromkeys(every, "lies above the activation, or does not change it")
        gone |= dict.fromkeys(
            captured.frozen, "belongs to a batch norm after no layer that it could be folded into"
        )
        gone |= {n: f"was folded into {into!r}" for n, into in captured.absorbed.items()}
        names = differentiable(captured)
        return choose_parameters(gradient_layers, names, lambda: blocks(captured), gone)


def _check_layer(module: nn.Module, layer: str) -> None:
    """Raise an error unless a module has a submodule of that name."""
    names = [name for name, _ in module.named_modules() if name]
    if layer not in names:
        nearest = difflib.get_close_matches(layer, names, n=5, cutoff=0.0)
        raise ValueError(
            f"activation_layer={layer!r} is no submodule of the backbone. "
            f"The nearest names are {', '.join(map(repr, nearest))}."
        )


def _split_network(
    captured: Captured, names: tuple[str, ...], negative_slope: float | None
) -> Network:
    """Cut a graph below the chosen parameters."""
    chosen = [captured.parameters[name] for name in names]
    slopes = {}
    if negative_slope is not None:
        above = downstream(captured.used(), chosen)
        slopes = {node: negative_slope for node in above if is_relu(node)}
        if not slopes:
            raise ValueError(
                "negative_slope: the network has no ReLU, ReLU6 or leaky ReLU between the gradient "
                "layers and the activation. Set negative_slope=None."
            )
    cut = boundary(captured, chosen) if chosen else [captured.output]
    trunk = None if cut == [captured.input] else extract(captured, [captured.input], cut)
    head = extract(captured, cut, [captured.output], chosen, slopes)
    values = {name: captured.tensors[captured.parameters[name]] for name in names}
    return Network(trunk, values, head, cut_places(captured, cut))


def _eager_network(
    module: ActivationModule, names: tuple[str, ...], negative_slope: float | None
) -> Network:
    """Take the whole module as the head, or as the trunk where nothing is chosen."""
    if negative_slope is not None:
        raise ValueError(
            "negative_slope needs a backbone that can be captured as a graph; set it to None."
        )
    if not names:
        return Network(EagerHead(module, []), {}, lambda activation: (activation,))
    available = dict(module.module.named_parameters())
    values = {name: available[name].detach() for name in names}
    return Network(None, values, EagerHead(module, list(names)))


def on_host(module: Module) -> Module:
    """Return a module with its tensors in host memory: itself if they are there already."""
    tensors = [*module.parameters(), *module.buffers()]
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return module
    copies = {id(t): t.detach().cpu() for t in tensors}
    for tensor in tensors:
        if isinstance(tensor, nn.Parameter):
            copies[id(tensor)] = nn.Parameter(copies[id(tensor)], tensor.requires_grad)
    return copy.deepcopy(module, copies)


_CACHE: weakref.WeakKeyDictionary[Any, dict[Any, FrozenBackbone]]
_CACHE = weakref.WeakKeyDictionary()
# Every task of a worker process brings a copy of the module that ends with the task.
_WORKER = type("Worker", (), {})()
_CACHE_LOCK = threading.RLock()
_HASHED_APART = {"training", "_parameters", "_buffers", "_modules"}


def freeze(
    module: nn.Module,
    example: Tensor,
    dtype: torch.dtype,
    activation_layer: str | None,
    owner: object = None,
) -> FrozenBackbone:
    """Return the frozen copy of a module; clones and folds share one.

    So do equal modules of one ``owner``, such as the factory that made them, and those of one
    worker process. A module that was changed since, in place or not, gets a new copy; so does
    one whose parameters are yet to be drawn.
    """
    if has_lazy_parameters(module):
        return FrozenBackbone(module, example, dtype, activation_layer)
    kind = (tuple(example.shape[1:]), example.dtype, dtype, example.device, activation_layer)
    with _CACHE_LOCK:
        stamp = module_digest(module)
        known = _CACHE.setdefault(_cache_owner(module, owner), {})
        for key in [key for key in known if key[-1] != stamp]:
            del known[key]
        if (*kind, stamp) not in known:
            known[*kind, stamp] = FrozenBackbone(module, example, dtype, activation_layer)
        return known[*kind, stamp]


def _cache_owner(module: nn.Module, owner: object) -> object:
    """Return what the frozen copy lives with."""
    if multiprocessing.parent_process() is not None:
        return _WORKER
    try:
        return module if owner is None else next(iter(weakref.WeakSet([owner])))
    except TypeError:  # the owner has no hash or no weak references
        return module


def module_digest(module: nn.Module) -> str:
    """Return a hash of everything that the function of a module depends on.

    Parameters, buffers, and the attributes of every submodule, hooks among them; not the
    mode. A module with an attribute that cannot be pickled never has the same hash twice.
    """
    state = xxhash.xxh3_128()
    for name, layer in module.named_modules():
        held = sorted((k, v) for k, v in vars(layer).items() if k not in _HASHED_APART)
        try:
            state.update(pickle.dumps((name, id(type(layer)), held)))
        except Exception:  # whatever an attribute's own pickling may raise
            return uuid.uuid4().hex
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()
