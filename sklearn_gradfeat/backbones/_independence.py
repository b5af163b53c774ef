"""The check that the activation of a sample depends on that sample alone.

A frozen network must be a function of one sample: the outputs of its trunk are stored, and a
prediction must not depend on the other samples of its batch. Evaluation mode does not ensure this.
``F.dropout`` is random by default, masked autoencoders draw a mask, some layers normalise over the
batch. Two runs on two rows ``a, b`` show it, where the second run is on the rows ``b, b, a``: the
batch has another size, order and mean. Where the first run drew random numbers, a third run must
agree in all bits. In case of an error, two runs are compared call by call, and the error names the
first call that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from sklearn_gradfeat.backbones._graph import check_activation, run_once

# Two activations agree if they differ by no more than this power of the machine epsilon.
_ROUNDING = 0.4


def check_independence(module: nn.Module, example: Tensor) -> None:
    """Raise an error unless an activation is a function of its sample alone.

    Parameters
    ----------
    module : nn.Module
        The network, in evaluation mode.
    example : tensor of shape (n_samples, ...)
        A batch that the network accepts.

    Raises
    ------
    ValueError
        If the network is random, keeps state between calls, or depends on the batch; or if it
        fails.
    """
    before = _generator_state(example.device)
    output = run_once(module, example)
    check_activation(output, len(example))
    drew = not torch.equal(_generator_state(example.device), before)
    if drew and not torch.allclose(run_once(module, example), output, 0, 0, equal_nan=True):
        raise _random(module, example)
    rows = [-1, -1, 0]
    if not _agree(run_once(module, example[rows]), output[rows]):
        _explain(module, example, rows)
    if example.is_floating_point() and torch.equal(example[0], example[-1]):
        _check_with_noise(module, example, rows)


def _check_with_noise(module: nn.Module, example: Tensor, rows: list[int]) -> None:
    """Repeat the check for two samples that are equal, which cannot show an influence."""
    noise = torch.rand(example.shape, generator=torch.Generator().manual_seed(0))
    noisy = example + noise.to(example)
    try:
        output, found = run_once(module, noisy), run_once(module, noisy[rows])
    except ValueError:  # outside the domain of the network
        return
    if not _agree(found, output[rows]):
        _explain(module, noisy, rows)


def _generator_state(device: torch.device) -> Tensor:
    """Return the states of the generators that a network on a device may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _agree(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors are equal up to rounding; NaN and infinity are no disagreement."""
    if found.shape != expected.shape:
        return False
    if not (found.is_floating_point() or found.is_complex()):
        return torch.equal(found, expected)
    if not (torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return True
    bound = torch.finfo(dtype or found.dtype).eps ** _ROUNDING * float(expected.norm())
    return bool((found - expected).norm() <= bound)


def _explain(module: nn.Module, example: Tensor, rows: list[int]) -> None:
    """Raise the error of a network whose runs disagree, unless it computes in low precision."""
    one, other = _recorded(module, example), _recorded(module, example[rows])
    dtypes = [result.dtype for _, _, result in one if result.is_floating_point()]
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    first, output = one[-1][2], run_once(module, example)
    if not _agree(output, first) or not _agree(run_once(module, example), output):
        raise _random(module, example)
    if _agree(run_once(module, example[rows]), output[rows], coarsest):
        return
    raise ValueError(
        "backbone is no function of single samples: the activation of a sample depends on the "
        f"rest of its batch, although the network is in evaluation mode{_place(one, other, rows)}. "
        "Replace that operation by one on single samples, such as a normalisation with running "
        "statistics, or set activation_layer to a submodule below it."
    )


def _random(module: nn.Module, example: Tensor) -> ValueError:
    """Return the error of a network that gives the same batch two activations."""
    one, other = _recorded(module, example), _recorded(module, example)
    return ValueError(
        "backbone gives the same samples another activation in every run, although it is in "
        f"evaluation mode{_place(one, other, None)}. It draws random numbers or keeps state "
        "between calls. Switch that off in evaluation mode, as with "
        "F.dropout(x, p, training=self.training), or set activation_layer to a submodule below it."
    )


_Calls = list[tuple[Callable[..., Any], str, Tensor]]


def _place(one: _Calls, other: _Calls, rows: list[int] | None) -> str:
    """Return a phrase that names the first call whose results in two runs disagree."""
    for (function, path, first), (same, _, second) in zip(one, other, strict=False):
        if function is not same:
            break
        expected = first if first.shape == second.shape else _selected(first, second, rows)
        if expected is not None and not _agree(second, expected):
            return f". The cause is {call_name(function, path)}"
    return ""


def call_name(function: Callable[..., Any], path: str) -> str:
    """Return the name of a torch function with the layer that calls it."""
    name: str = resolve_name(function) or getattr(function, "__name__", str(function))
    return name + (f" in the layer {path!r}" if path else "")


def _selected(first: Tensor, second: Tensor, rows: list[int] | None) -> Tensor | None:
    """Return some rows of the first axis, which may run over samples and positions."""
    if rows is None or not first.ndim or len(first) * len(rows) != len(second) * 2:
        return None
    return first.reshape(2, -1)[rows].reshape(second.shape) if second.shape else None


def _recorded(module: nn.Module, example: Tensor) -> _Calls:
    """Return the torch functions that a run calls, with the layer and the result of each."""
    recorder = _Recorder()
    with layer_paths(module, recorder.path), recorder:
        run_once(module, example)
    return recorder.calls


class _Recorder(TorchFunctionMode):
    """Keeps the results of all calls of torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: _Calls = []
        self.path: list[str] = [""]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function and keep its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_sparse:
                self.calls.append((func, self.path[-1], tensor.detach().clone()))
        return result


@contextmanager
def layer_paths(module: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep the path of the layer that runs at the end of a list."""

    def enter(name: str) -> Any:
        return lambda _layer, _inputs: path.append(name.removeprefix("module").removeprefix("."))

    hooks: list[Any] = []
    for name, layer in module.named_modules():
        hooks.append(layer.register_forward_pre_hook(enter(name)))
        hooks.append(layer.register_forward_hook(lambda *_: path.__delitem__(-1)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
