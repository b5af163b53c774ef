"""The frozen network: a copy of the backbone that is captured, folded and cut in two."""

from __future__ import annotations

import contextlib
import copy
import functools
import multiprocessing
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from sklearn_gradfeat.backbones._advice import classifier
from sklearn_gradfeat.backbones._attention import differentiable_attention, without_cudnn
from sklearn_gradfeat.backbones._blocks import (
    after_attention,
    blocks,
    choose_parameters,
    differentiable,
)
from sklearn_gradfeat.backbones._capture import Exported, capture
from sklearn_gradfeat.backbones._casts import first_cast, warn_of_cast
from sklearn_gradfeat.backbones._copies import (
    check_module,
    converted_copy,
    deep_copy,
    equal_tensors,
    frozen_copy,
    has_lazy_parameters,
    on_host,
    unwrapped,
)
from sklearn_gradfeat.backbones._eager import (
    EagerHead,
    module_blocks,
    module_out_channels,
    parameter_names,
)
from sklearn_gradfeat.backbones._fingerprint import (
    Fingerprint,
    cut_places,
    fingerprint,
    module_digest,
)
from sklearn_gradfeat.backbones._folding import fold_batch_norms, unfold
from sklearn_gradfeat.backbones._graph import (
    ActivationModule,
    Captured,
    CaptureError,
    Layer,
    is_recurrent,
    out_channels,
    run_once,
    tied_names,
)
from sklearn_gradfeat.backbones._independence import check_independence
from sklearn_gradfeat.backbones._layers import (
    AUTO,
    ActivationLayer,
    Outputs,
    check_layer,
    choose_layers,
    hashable,
    is_pattern,
)
from sklearn_gradfeat.backbones._padding import merge_padding
from sklearn_gradfeat.backbones._split import boundary, downstream, extract, is_relu
from sklearn_gradfeat.backbones._unread_tokens import without_unread_tokens
from sklearn_gradfeat.data import is_out_of_memory

_LOCK = threading.RLock()
# Outputs and gradients of graph and module agree if they differ by no more than this share.
_DIFFERENCE = 0.05
# Gradients below this share of the largest one count as if they had that size.
_ROUNDING = 1e-2
# So many units of rounding of the output are no gradient, for a parameter of this norm at least. A
# norm of one number, whose output is constant, divides them by the root of 1e-5 or less.
_NOISE, _SMALLEST = 1e5, 0.1


@dataclass(frozen=True)
class Network:
    """A network in two parts, with the differentiated parameters of the upper one.

    Attributes
    ----------
    trunk : callable or None
        Maps a batch to the tuple of boundary tensors, each of shape (n_samples, ...).
        None if the head is the whole network.
    parameters : dict of str to tensor
        The differentiated parameters at their values.
    cut : tuple of int
        Positions in the graph of the last nodes of the trunk.
    out_channels : dict of str to int
        The number of output channels of the parameters whose first axis is another one.
    scale : tensor of shape (n_activations,) or None
        Multiplies the output of the head; None leaves it as it is.
    """

    trunk: Callable[[Tensor], tuple[Tensor, ...]] | None
    parameters: dict[str, Tensor]
    _head: Callable[..., tuple[Tensor, ...]]
    cut: tuple[int, ...] = ()
    out_channels: Mapping[str, int] = field(default_factory=dict)
    scale: Tensor | None = None

    def boundary(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the input of the head for a batch."""
        return (x,) if self.trunk is None else self.trunk(x)

    def head(self, parameters: tuple[Tensor, ...], boundary: tuple[Tensor, ...]) -> Tensor:
        """Return the activation, of shape (n_samples, n_activations)."""
        with without_cudnn() if self._recurrent else contextlib.nullcontext():
            activation = self._head(*parameters, *boundary)[0]
        return activation if self.scale is None else activation * self.scale

    def moved(self, displacements: Mapping[str, Tensor]) -> Network:
        """Return the network with displaced parameters; without displacements, itself."""
        if not displacements:
            return self
        moved = {
            name: value + displacements[name].to(value) for name, value in self.parameters.items()
        }
        return replace(self, parameters=moved)

    @functools.cached_property
    def _recurrent(self) -> bool:
        head: object = self._head.module if isinstance(self._head, EagerHead) else self._head
        return is_recurrent(head)

    @property
    def graph(self) -> fx.GraphModule | None:
        """The head as a graph, None if the network could not be captured."""
        head = self._head
        if not isinstance(head, fx.GraphModule):
            return None
        return head if self.scale is None else _scaled(head, self.scale)


class FrozenBackbone:
    """A private copy of a backbone on one device, for samples of one shape.

    Its pickle holds the module in host memory and no graph, which is captured again when needed.

    Parameters
    ----------
    module : nn.Module
        The network. It is copied, never changed.
    example : tensor of shape (2 or more, ...)
        A batch that the network accepts.
    dtype : torch.dtype
        Floating dtype of the parameters.
    activation_layer : str, int, tuple of str or None
        The submodule whose output is the activation, or a choice of several layers: their names,
        or a number of blocks. ``"auto"`` is up to four blocks below ``gradient_layers``.
    gradient_layers : str, int or tuple of str
        The layers θ₂, for ``"auto"``.
    channels_second : bool, default=False
        Whether the channels of a single layer are on the second axis in any case, as in model
        files of earlier versions.
    """

    def __init__(
        self,
        module: nn.Module,
        example: Tensor,
        dtype: torch.dtype,
        activation_layer: str | int | tuple[str, ...] | None,
        gradient_layers: str | int | Sequence[str] = "last",
        *,
        channels_second: bool = False,
    ) -> None:
        module = unwrapped(module)
        chosen = activation_layer
        if isinstance(chosen, str) and is_pattern(chosen, module):
            chosen = (chosen,)
        if isinstance(chosen, str) and chosen != AUTO:
            check_layer(module, chosen)
        copied = frozen_copy(module, example.device, dtype)
        self._exported: Exported | None = None
        if isinstance(chosen, int) or chosen == AUTO:
            number = chosen if isinstance(chosen, int) else None
            self.module, self._exported = _on_blocks(
                copied, example, dtype, number, gradient_layers
            )
        elif isinstance(chosen, tuple):
            self.module = ActivationModule(copied, choose_layers(copied, chosen, example))
        elif chosen is None or channels_second:
            self.module = ActivationModule(copied, chosen)
        else:
            layers = choose_layers(copied, (chosen,), example)
            self.module = ActivationModule(copied, chosen if layers[0].axis == 1 else layers)
        check_independence(self.module, example)
        self.module.requires_grad_(False)  # not before lazy modules have their parameters
        self.example = torch.zeros_like(example)
        self._probe: Tensor | None = example.clone()
        self._compared: dict[tuple[str, ...], list[str]] = {}
        self.dtype = dtype
        # The first call that casts float64 numbers to lower precision.
        self.cast = first_cast(self.module, example) if dtype == torch.float64 else None
        self._networks: dict[tuple[tuple[str, ...], float | None], Network] = {}
        self._others: dict[tuple[torch.device, torch.dtype], FrozenBackbone] = {}

    @classmethod
    def _restored(cls, module: ActivationModule, example: Tensor, dtype: torch.dtype) -> Self:
        """Return a backbone around a module that is frozen already."""
        backbone = cls.__new__(cls)
        backbone.__setstate__({"module": module, "example": example, "dtype": dtype})
        return backbone

    def __getstate__(self) -> dict[str, Any]:
        """Return the module and the example, in host memory."""
        host = {"module": on_host(self.module), "example": self.example.cpu()}
        return {**host, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the module without a graph."""
        self.__dict__.update(state, _networks={}, _others={}, _probe=None, _compared={}, cast=None)
        self._exported = None

    def runs_in(self, dtype: torch.dtype) -> bool:
        """Whether the network runs in a dtype; it may not if it casts to another one inside."""
        other = self.to(self.example.device, dtype)
        try:
            run_once(other.module, other.example)
        except ValueError:
            return False
        return True

    @property
    def reads_output(self) -> bool:
        """Whether the output of the network is a part of the activation."""
        layer = self.module.layer
        return layer is None or any(part.path == "" for part in self.layers or ())

    @property
    def layers(self) -> tuple[Layer, ...] | None:
        """The layers whose averaged outputs are joined, None if there is no such choice."""
        layer = self.module.layer
        return layer if isinstance(layer, tuple) else None

    def to(self, device: torch.device, dtype: torch.dtype) -> FrozenBackbone:
        """Return the backbone on a device in a dtype: itself or a copy, which is kept."""
        if (self.example.device, self.dtype) == (device, dtype):
            return self
        with _LOCK:
            if (device, dtype) not in self._others:
                module = converted_copy(self.module, device, dtype)
                example = self.example.to(device)
                if example.is_floating_point():
                    example = example.to(dtype)
                self._others[device, dtype] = self._restored(module, example, dtype)
            return self._others[device, dtype]

    def sharing(self, module: nn.Module) -> FrozenBackbone:
        """Return the backbone in host memory, with tensors of ``module`` where they are equal.

        A pickle of the two holds such tensors once. See :meth:`apart`.
        """
        module, own = unwrapped(module), on_host(self.module)
        if not has_lazy_parameters(module):
            own = deep_copy(own, equal_tensors(own.module, module))
        return self._restored(own, self.example.cpu(), self.dtype)

    def apart(self) -> FrozenBackbone:
        """Return the backbone with tensors of its own."""
        module = deep_copy(self.module, {}).requires_grad_(False)
        return self._restored(module, self.example.cpu(), self.dtype)

    @functools.cached_property
    def _graphs(self) -> tuple[Captured, Captured] | tuple[CaptureError, CaptureError]:
        try:
            captured = capture(self.module, self.example, self._exported)
            fold_batch_norms(captured)
            merge_padding(captured)
        except CaptureError as refusal:
            return refusal, refusal
        computed = without_unread_tokens(captured)
        if not self._is_function_of_module(computed):
            error = CaptureError("the graph of torch.export has another output than the module")
            return error, error
        return captured, computed

    @property
    def captured(self) -> Captured | CaptureError:
        """The folded graph, or the error that says why there is none."""
        return self._graphs[0]

    @property
    def computed(self) -> Captured | CaptureError:
        """The graph that is computed: the folded one without the tokens that nobody reads."""
        return self._graphs[1]

    def _is_function_of_module(self, computed: Captured) -> bool:
        """Whether a graph has the outputs of the module, for samples that the module accepts."""
        graph = extract(computed, [computed.input], [computed.output])
        batches = [] if self._probe is None else [self._probe]
        if self.example.is_floating_point():  # a pickle has no other samples
            generator = torch.Generator().manual_seed(0)
            batches.append(torch.randn(self.example.shape, generator=generator).to(self.example))
        for x in batches:
            try:
                expected = run_once(self.module, x)
            except ValueError:  # outside of the domain of the module
                continue
            try:
                difference = run_once(graph, x)[0] - expected
            except ValueError:
                return False
            if float(difference.norm()) > _DIFFERENCE * float(expected.norm()):
                return False
        return True

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """The identity of the function of the network."""
        return fingerprint(self.computed)

    def network(self, names: Sequence[str], negative_slope: float | None = None) -> Network:
        """Return the network split below the parameters ``names``.

        Without names, the trunk is the whole network. ``negative_slope`` is the slope below
        zero of the ReLUs above the parameters; None leaves them as they are.
        """
        with _LOCK:
            key = (tuple(names), negative_slope if names else None)
            if key not in self._networks:
                captured, computed = self.captured, self.computed
                self._networks[key] = (
                    _eager_network(self.module, *key)
                    if isinstance(captured, CaptureError) or isinstance(computed, CaptureError)
                    else _split_network(captured, computed, *key)
                )
            return self._networks[key]

    def displaced_state(self, displacements: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of the module with displaced parameters, in host memory.

        The displacements are those of folded parameters. See :func:`unfold`.
        """
        with _LOCK:
            captured = self.captured
        folds = [] if isinstance(captured, CaptureError) else captured.folds
        module = self.module.module
        state = {
            name: value.detach().cpu() if isinstance(value, Tensor) else value
            for name, value in copy.deepcopy(module.state_dict()).items()
        }
        apart = {
            name: value.detach().cpu()
            for name, value in module.named_buffers()
            if name not in state
        }
        changed = unfold(folds, state | apart, displacements)
        if any(changed[name] is not value for name, value in apart.items()):
            raise ValueError(
                "A displaced bias moves the mean of a batch norm that is not persistent. Give the "
                "layer a bias, or choose other gradient_layers."
            )
        state = {name: changed[name] for name in state}
        return state | {alias: state[name] for alias, name in tied_names(module).items()}

    def choose(self, gradient_layers: str | int | Sequence[str]) -> list[str]:
        """Return the names of the parameters that ``gradient_layers`` chooses."""
        chosen = self._chosen(gradient_layers)
        differing = self._differing(tuple(chosen))
        if differing:
            warnings.warn(
                f"The derivative of the backbone in {differing[0]!r} is that of its forward "
                "operators, and not the one that autograd returns. The backbone calls a "
                "torch.autograd.Function with a backward of its own, such as a straight-through "
                "estimator, scales gradients, or works under torch.no_grad. A straight-through "
                "estimator of the form x + (f(x) - x).detach() keeps its derivative.",
                UserWarning,
                stacklevel=2,
            )
        return chosen

    def blocks(self) -> dict[str, list[str]]:
        """Return the parameter names of every block by its path, from bottom to top."""
        with _LOCK:
            captured = self.captured
        if isinstance(captured, CaptureError):
            example = self.example if self._probe is None else self._probe
            return module_blocks(self.module, example, parameter_names(self.module, example))
        return blocks(captured)

    def _chosen(self, gradient_layers: str | int | Sequence[str]) -> list[str]:
        """Return the chosen parameters, from the graph if there is one."""
        with _LOCK:
            captured = self.captured
        if isinstance(captured, CaptureError):
            warnings.warn(
                f"The backbone cannot be captured as a graph ({captured}). Every pass over the "
                "data runs the whole network instead of the layers from the gradient layers "
                "upwards, and batch norms are not folded, so the penalty applies to the weights "
                "before folding. To avoid this, make the backbone pass torch.export.",
                UserWarning,
                stacklevel=2,
            )
            module = self.module
            example = self.example if self._probe is None else self._probe
            names = parameter_names(module, example)
            gone = {
                name: "belongs to a batch norm, or the activation has no derivative in it"
                for name, _ in module.module.named_parameters()
            }
            return choose_parameters(
                gradient_layers,
                names,
                lambda: list(self.blocks().values()),
                _no_attention,
                gone,
                tied_names(module.module),
            )
        every = dict(self.module.module.named_parameters())
        gone = {
            name: "is not a floating point tensor"
            if not value.is_floating_point()
            else "lies above the activation (see activation_layer), does not change it, or is "
            "below a detach"
            for name, value in every.items()
        }
        gone |= dict.fromkeys(
            captured.frozen, "belongs to a batch norm that cannot be folded into a layer before it"
        )
        gone |= {n: f"was folded into {into!r}" for n, into in captured.absorbed.items()}
        names = differentiable(captured)
        return choose_parameters(
            gradient_layers,
            names,
            lambda: list(self.blocks().values()),
            lambda: after_attention(captured),
            gone,
            captured.aliases,
        )

    def _differing(self, names: tuple[str, ...]) -> list[str]:
        """Return the parameters in which the derivatives of head and module differ.

        Parameters that a batch norm was folded into are not compared. Gradients far below the
        largest one, or below the output divided by the parameter, are rounding errors, such as
        those of a bias of keys in attention, or of a bias below a norm that subtracts it.
        """
        probe = self._probe
        if probe is None or names in self._compared:
            return self._compared.get(names, [])
        network, held = self.network(names), dict(self.module.module.named_parameters())
        common = [name for name in names if name in held]
        values = tuple(held[name] for name in common)
        with torch.no_grad():
            boundary = (probe,) if network.trunk is None else network.trunk(probe)
            output = network.head(tuple(network.parameters.values()), boundary)
        noise = _NOISE * torch.finfo(output.dtype).eps * float(output.norm())
        whole = EagerHead(self.module, common, as_written=True)
        try:
            expected = _gradients(lambda leaves: whole(*leaves, probe)[0], values)
        except RuntimeError as error:  # autograd refuses, as in reentrant checkpoints
            if is_out_of_memory(error):
                raise
            return self._compared.setdefault(names, [])
        graph = tuple(network.parameters.values())
        found = _gradients(lambda leaves: network.head(leaves, boundary), graph)
        largest = max((float(gradient.norm()) for gradient in expected), default=0.0)
        self._compared[names] = [
            name
            for name, value, gradient in zip(common, values, expected, strict=True)
            if torch.equal(network.parameters[name], value)
            and float((found[names.index(name)] - gradient).norm())
            > max(
                _DIFFERENCE * max(float(gradient.norm()), _ROUNDING * largest),
                noise / max(float(value.detach().norm()), _SMALLEST),
            )
        ]
        return self._compared[names]


def _no_attention() -> list[str]:
    """Raise the error of a module that has no graph."""
    raise ValueError(
        "gradient_layers='after_attention' needs a backbone that torch.export can capture as a "
        "graph, which it cannot for this one. Pass 'last', or names of layers."
    )


def _on_blocks(
    module: nn.Module,
    example: Tensor,
    dtype: torch.dtype,
    number: int | None,
    gradient_layers: str | int | Sequence[str],
) -> tuple[ActivationModule, Exported | None]:
    """Return a network whose activation joins the outputs of blocks and its own, and its graph.

    ``number`` is that of the topmost blocks, None for those below ``gradient_layers``.
    """
    check_independence(ActivationModule(module, None), example)
    outputs = Outputs(module, example, None if number is not None else classifier(module))
    among, exported = outputs.candidates, None
    layers: tuple[Layer, ...] = (outputs.network,)
    for last in dict.fromkeys((outputs.last, outputs.network)):
        whole = FrozenBackbone._restored(ActivationModule(module, (last,), among), example, dtype)
        whole._exported = exported
        captured = whole.captured
        exported = None if isinstance(captured, CaptureError) else captured.exported
        if number is not None:
            layers = outputs.topmost(number, list(_with_parameters(whole)))
            break
        # There are no such layers below the classifier if they are the classifier itself. If there
        # are none at all, the error comes from the caller's own choice of gradient layers.
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = whole._chosen(gradient_layers)
            layers = outputs.below(_with_parameters(whole), names, last)
            break
    alone = number is None and layers == (outputs.network,) and outputs.network.axis == 1
    chosen = None if alone else layers
    if exported is None or not set(layers) <= set(among):
        return ActivationModule(module, chosen), None
    return ActivationModule(module, chosen, among), exported


def _with_parameters(backbone: FrozenBackbone) -> dict[str, list[str]]:
    return {path: names for path, names in backbone.blocks().items() if names}


def _scaled(head: fx.GraphModule, scale: Tensor) -> fx.GraphModule:
    """Return a head with its output multiplied by a constant."""
    graph = fx.Graph()
    outputs: Any = graph.graph_copy(head.graph, {})
    held = {n.target: getattr(head, n.target) for n in head.graph.nodes if n.op == "get_attr"}
    factor = graph.get_attr("activation_scale")
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (outputs[0], factor)),))
    return fx.GraphModule({**held, "activation_scale": scale}, graph)


def _gradients(
    function: Callable[[tuple[Tensor, ...]], Tensor], values: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return the gradients of a random combination of outputs; the same one in every call."""
    with torch.enable_grad(), differentiable_attention(), without_cudnn():
        leaves = tuple(value.detach().requires_grad_() for value in values)
        output = function(leaves)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(output.shape, generator=generator).to(output)
        if not output.requires_grad:
            return tuple(map(torch.zeros_like, values))
        gradients = torch.autograd.grad(output, leaves, v, materialize_grads=True)
        return tuple(gradient.detach() for gradient in gradients)


def _split_network(
    captured: Captured, computed: Captured, names: tuple[str, ...], negative_slope: float | None
) -> Network:
    """Cut the graph that is computed below the chosen parameters."""
    nodes = {n: computed.parameters[computed.aliases.get(n, n)] for n in names}
    chosen = list(nodes.values())
    negative_slopes = {}
    if negative_slope is not None:
        above = downstream(computed.used(), chosen)
        negative_slopes = {node: negative_slope for node in above if is_relu(node)}
        if not negative_slopes:
            raise ValueError(
                f"negative_slope={negative_slope:g} changes nothing: there is no ReLU, ReLU6, "
                "leaky ReLU or hardtanh from zero between the gradient layers and the activation. "
                "Set negative_slope=None, or choose lower gradient_layers."
            )
    cut = boundary(computed, chosen) if chosen else [computed.output]
    trunk = None if cut == [computed.input] else extract(computed, [computed.input], cut)
    head = extract(computed, cut, [computed.output], chosen, negative_slopes)
    values = {name: computed.tensors[node] for name, node in nodes.items()}
    return Network(trunk, values, head, cut_places(computed, cut), out_channels(captured, names))


def _eager_network(
    module: ActivationModule, names: tuple[str, ...], negative_slope: float | None
) -> Network:
    """Return the whole module as the head, or as the trunk if no parameters are chosen."""
    if negative_slope is not None:
        raise ValueError(
            f"negative_slope={negative_slope:g} needs a backbone that torch.export can capture as "
            "a graph, which it cannot for this one. Set negative_slope=None."
        )
    if not names:
        return Network(EagerHead(module, []), {}, lambda activation: (activation,))
    available = dict(module.module.named_parameters())
    values = {name: available[name].detach() for name in names}
    channels = module_out_channels(module.module)
    return Network(None, values, EagerHead(module, list(names)), out_channels=channels)


_CACHE: weakref.WeakKeyDictionary[Any, dict[Any, FrozenBackbone]]
_CACHE = weakref.WeakKeyDictionary()
# In a worker every task has its own copy of the module, which ends with the task.
_WORKER = type("Worker", (), {})()
_CACHE_LOCK = threading.RLock()


def freeze(
    module: nn.Module,
    example: Tensor,
    dtype: torch.dtype,
    activation_layer: ActivationLayer,
    gradient_layers: str | int | Sequence[str] = "last",
    owner: object = None,
) -> FrozenBackbone:
    """Return the frozen copy of a module, which is shared where modules are equal.

    Clones and folds share one copy; so do equal modules of one ``owner``, such as the factory
    that made them, and of the tasks of one worker. A module that has changed since gets a new copy,
    and a module with lazy parameters always does.
    """
    check_module(unwrapped(module))
    layer = hashable(activation_layer)
    if isinstance(gradient_layers, Sequence) and not isinstance(gradient_layers, str):
        gradient_layers = tuple(gradient_layers)
    if has_lazy_parameters(module):
        frozen = FrozenBackbone(module, example, dtype, layer, gradient_layers)
    else:
        below = gradient_layers if layer == AUTO else None
        kind = (tuple(example.shape[1:]), example.dtype, dtype, example.device, layer, below)
        with _CACHE_LOCK:
            stamp = module_digest(module)
            known = _CACHE.setdefault(_cache_owner(module, owner), {})
            for key in [key for key in known if key[-1] != stamp]:
                del known[key]
            if (*kind, stamp) not in known:
                known[*kind, stamp] = FrozenBackbone(module, example, dtype, layer, gradient_layers)
            frozen = known[*kind, stamp]
    if frozen.cast is not None:
        warn_of_cast(frozen.cast)
    return frozen


def _cache_owner(module: nn.Module, owner: object) -> object:
    """Return the object with which the frozen copy is freed."""
    if _in_worker():
        return _WORKER
    try:
        return module if owner is None else next(iter(weakref.WeakSet([owner])))
    except TypeError:  # the owner cannot be hashed or weakly referenced
        return module


def _in_worker() -> bool:
    """Whether this is a child process, or a task of Ray or Dask in any other process."""
    if multiprocessing.parent_process() is not None:
        return True
    ray, distributed = sys.modules.get("ray"), sys.modules.get("distributed")
    # Without a task, Dask raises a ValueError. Other modules may have these names, too.
    with contextlib.suppress(AttributeError):
        if ray is not None and ray.is_initialized():
            return bool(ray.get_runtime_context().worker.mode == ray.WORKER_MODE)
    with contextlib.suppress(AttributeError, ValueError):
        return distributed is not None and bool(distributed.get_worker())
    return False
