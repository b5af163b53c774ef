"""The check that the activation of a sample depends on that sample alone.

A frozen network must be a function of one sample: the outputs of its trunk are stored, and a
prediction must not depend on the other samples of its batch. Evaluation mode does not ensure this.
``F.dropout`` is random by default, masked autoencoders draw a mask, some layers normalise over the
batch. A run on two rows ``a, b`` must agree with runs on ``a, a, a`` and on ``b, b, b``: a batch of
another size, order, mean and maximum, where each sample has only itself for company. Layers that
are initialised by their first batch must not depend on it: copies for which ``b, b, b`` or
``a, a, a`` is the first batch must agree. Where the first run drew random numbers from torch,
numpy or Python, another run must agree in all bits, and so must runs in which all these numbers
are zero or one: a drop of one activation in a thousand hardly ever happens in two runs. In case of
an error, two runs are compared call by call, and the error names the first call that differs.

Some layers depend on the others only in large batches, such as a mixture of experts of limited
capacity. So three samples of the first whole batch of a fit are computed again without the others.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sklearn_gradfeat.backbones._copies import converted_copy, deep_copy, has_lazy_parameters
from sklearn_gradfeat.backbones._graph import check_activation, run_once
from sklearn_gradfeat.data import rows_at

# Two activations agree if they differ by no more than this power of the machine epsilon.
_ROUNDING = 0.4
_CPU = torch.device("cpu")
# The second of two samples alone, and the first one.
_ALONE = ([-1, -1, -1], [0, 0, 0])
# The size of the state of a Mersenne twister, and the words in it that are returned as words of
# zeros and of ones: as zero, and as the largest number below one.
_N_WORDS = 624
_WORDS = 0, 0x12DD9BB3


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
        If the network is random, keeps state between calls, depends on the batch, or changes its
        parameters; or if it fails.
    """
    sums = _sums(module)
    drawn, torch_states = _states(example.device), _torch_states(example.device)
    unused = None if has_lazy_parameters(module) else _with_own_state(module)
    output = run_once(module, example)
    check_activation(output, len(example))
    for name, total in _sums(module).items():
        if name in sums and not _equal(total, sums[name]):
            raise ValueError(
                f"backbone changes its parameter {name.removeprefix('module.')!r} in a forward "
                "pass, although it is in evaluation mode, as layers do that are initialised by "
                "their first batch. Call it on a batch of data before fit."
            )
    if _states(example.device) != drawn or _has_generator(module):
        _check_random_numbers(module, example, output)
    alone = _check_alone(module, example, output)
    if unused is not None:
        _check_first_batch(unused, example, alone, torch_states)
    if torch.equal(example[0], example[-1]):  # equal samples cannot show an influence
        other = _changed(example)
        try:
            output = run_once(module, other)
            _check_alone(module, other, output)
        except ValueError as error:
            if error.__cause__ is None:  # not one from outside of the domain of the network
                raise


def check_transform(
    transform: Callable[[Tensor], Tensor],
    samples: Tensor,
    device: torch.device,
    alone: Sequence[list[int]] = _ALONE,
) -> None:
    """Raise an error unless ``preprocess`` maps every sample on its own, always in the same way.

    Parameters
    ----------
    transform : callable
        Maps a batch to the input of the network.
    samples : tensor of shape (n_samples, ...)
        One or more samples.
    device : torch.device
        Where random numbers would be drawn.
    alone : sequence of list of int
        The samples that are transformed without the others.

    Raises
    ------
    ValueError
        If the results are random, or depend on the other samples of a batch.
    """
    drawn = _states(device)
    prepared = transform(samples.clone())
    same = True
    if _states(device) != drawn:
        for run in _other_draws():
            with run:
                found = transform(samples.clone())
            same = same and _equal(found, prepared)
    if not (
        same and all(agree(transform(rows_at(samples, rows)), prepared[rows]) for rows in alone)
    ):
        raise ValueError(
            "preprocess must map every sample on its own, and always in the same way. It is "
            "random, or depends on the other samples of a batch. Take random augmentation out of "
            "it, and statistics of the batch: scale X before fit."
        )


def _sums(module: nn.Module) -> dict[str, Tensor]:
    """Return the sum of every floating parameter by name, of those that have a shape already."""
    return {
        name: value.detach().sum()
        for name, value in module.named_parameters()
        if value.is_floating_point() and not is_lazy(value)
    }


def check_batch(module: nn.Module, batch: Tensor, rows: list[int]) -> None:
    """Raise an error unless three samples of a batch have the same activations without the others.

    Parameters
    ----------
    module : nn.Module
        The network, which has passed :func:`check_independence`.
    batch : tensor of shape (n_samples, ...)
        The samples.
    rows : list of int
        The three samples.

    Raises
    ------
    ValueError
        If they have not, for another reason than rounding.
    """
    if not agree(run_once(module, batch[rows]), run_once(module, batch)[rows]):
        _explain(module, batch, rows)


def _check_alone(module: nn.Module, example: Tensor, output: Tensor) -> list[Tensor]:
    """Raise an error unless each of two samples alone has the output that it has among both.

    Returns
    -------
    list of tensor
        The outputs of the samples alone.
    """
    alone = [run_once(module, example[rows]) for rows in _ALONE]
    for rows, found in zip(_ALONE, alone, strict=True):
        if not agree(found, output[rows]):
            _explain(module, example, rows)
    return alone


def _with_own_state(module: nn.Module) -> nn.Module:
    """Return a copy of a module, buffers and attributes included, around the same parameters."""
    return deep_copy(module, {id(value): value for value in module.parameters()})


def _check_first_batch(
    unused: nn.Module, example: Tensor, alone: list[Tensor], states: list[Tensor]
) -> None:
    """Raise an error if an output depends on the first batch that the module was given.

    Parameters
    ----------
    unused : nn.Module
        A copy of the module from before its first batch.
    example : tensor of shape (2 or more, ...)
        The first batch of the module.
    alone : list of tensor
        The outputs of the module for the samples alone, after that batch.
    states : list of tensor
        The states of torch's generators before that batch, for layers that are made in it.
    """

    def after(first: Tensor, batch: Tensor) -> Tensor:
        """Return the output of a copy for a batch, after its first one."""
        cuda = batch.device.type == "cuda"
        with torch.random.fork_rng([batch.device] if cuda else []):
            torch.set_rng_state(states[0])
            if cuda:
                torch.cuda.set_rng_state(states[1], batch.device)
            copied = _with_own_state(unused)
            output = run_once(copied, first)
            return output if batch is first else run_once(copied, batch)

    for rows, expected in zip(_ALONE, alone, strict=True):
        x = example[rows]
        if not agree(after(x, x), expected) and agree(after(example, x), expected):
            raise ValueError(
                "backbone keeps state of the first batch that it is given, although it is in "
                "evaluation mode: after another first batch, the same samples have another "
                "activation. Call it on a batch of data before fit, so that this state is set."
            )


def _changed(example: Tensor) -> Tensor:
    """Return other samples: with noise, or, of indices, the last one in reverse order."""
    if example.is_floating_point():
        noise = torch.rand(example.shape, generator=torch.Generator().manual_seed(0))
        return example + noise.to(example)
    return torch.cat([example[:-1], example[-1:].flip(-1)])


def _check_random_numbers(module: nn.Module, example: Tensor, output: Tensor) -> None:
    """Raise an error if random numbers change the output."""
    runs = _other_draws()
    for run in runs:
        try:
            with run:
                found = run_once(module, example)
        except ValueError:  # outside the domain of the network
            continue
        if not _equal(found, output):
            raise _random(module, example, runs[1:])


def _other_draws() -> tuple[AbstractContextManager[Any], ...]:
    """Return contexts of runs that draw new random numbers, zeros, and ones."""
    return nullcontext(), _Replaced(0), _Replaced(1)


class _Replaced(TorchDispatchMode):
    """Replaces random numbers by a constant: all of torch, the next ones of Python and numpy."""

    def __init__(self, constant: int) -> None:
        super().__init__()
        self.constant = constant

    def __enter__(self) -> Self:
        """Set the generators of Python and numpy, whose other words make them random again.

        All threads draw from them, as from those of torch.
        """
        self.states = random.getstate(), np.random.get_state(legacy=False)
        words = np.random.default_rng(0).integers(2**32, size=_N_WORDS, dtype=np.uint32)
        words[_N_WORDS // 2 :] = _WORDS[self.constant]
        random.setstate((3, (*words.tolist(), _N_WORDS // 2), None))
        if self.states[1]["bit_generator"] == "MT19937":
            np.random.set_state(("MT19937", words, _N_WORDS // 2, 0, 0.0))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Restore these generators."""
        super().__exit__(*exception)
        random.setstate(self.states[0])
        np.random.set_state(self.states[1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator, and overwrite its results if it drew random numbers."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        device = (kwargs or {}).get("device") or _CPU
        device = next((t.device for t in leaves if isinstance(t, Tensor)), torch.device(device))
        before = _states(device)
        results = func(*args, **(kwargs or {}))
        own = any(isinstance(leaf, torch.Generator) for leaf in leaves)
        if own or _states(device) != before:
            for result in tree_leaves(results):
                if isinstance(result, Tensor):
                    result.fill_(self.constant)
        return results


def _torch_states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators of torch that a network on a device may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _states(device: torch.device) -> list[bytes]:
    """Return the states of the generators of torch, Python and numpy, to be compared."""
    others = random.getstate(), np.random.get_state(legacy=False)
    return [*(state.numpy().tobytes() for state in _torch_states(device)), pickle.dumps(others)]


def _has_generator(module: nn.Module) -> bool:
    """Whether a layer has a generator of torch of its own."""
    held = (value for layer in module.modules() for value in vars(layer).values())
    return any(isinstance(value, torch.Generator) for value in held)


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have the same numbers; NaN equals NaN."""
    return torch.allclose(found, expected, 0, 0, equal_nan=True)


def influenced(
    results: Sequence[Tensor], again: Callable[[list[int]], Sequence[Tensor]]
) -> list[int]:
    """Return three samples of a batch if they have other results without the others, else none.

    Parameters
    ----------
    results : sequence of tensor of shape (n_samples, ...)
        The results of the batch.
    again : callable
        Computes the results of some of its samples.
    """
    n_samples = len(results[0])
    rows = [0, n_samples // 2, n_samples - 1]
    if n_samples <= len(rows) or all(map(agree, again(rows), [z[rows] for z in results])):
        return []
    return rows


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors are equal up to rounding; NaN and infinity are no disagreement."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    if not (found.is_floating_point() or found.is_complex()):
        return torch.equal(found, expected)
    if not (torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return True
    bound = torch.finfo(dtype or found.dtype).eps ** _ROUNDING * float(expected.norm())
    return bool((found - expected).norm() <= bound)


def _explain(module: nn.Module, example: Tensor, rows: list[int]) -> None:
    """Raise the error of a network whose runs disagree, unless it computes in low precision."""
    other = _recorded(module, example[rows])
    first, output = run_once(module, example), run_once(module, example)
    dtypes = {result.dtype for _, _, result in other if result.is_floating_point()} | {output.dtype}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    if not agree(output, first):
        raise _random(module, example)
    if agree(run_once(module, example[rows]), output[rows], coarsest):
        return
    if output.dtype == torch.float32 and _agree_in_double_precision(module, example, rows):
        return
    if len(example) > len(rows):  # all results of a large batch may take too much memory
        place = f". It does so in a batch of {len(example)} samples, and not in one of {len(rows)}"
    else:
        place = _place(_recorded(module, example), other, rows)
    raise ValueError(
        "backbone is no function of single samples: the activation of a sample depends on the "
        f"rest of its batch, although the network is in evaluation mode{place}. "
        "Replace that operation by one on single samples, such as a normalisation with running "
        "statistics, or set activation_layer to a submodule below it."
    )


def _agree_in_double_precision(module: nn.Module, example: Tensor, rows: list[int]) -> bool:
    """Whether two runs agree in float64, so that their difference was one of rounding errors."""
    if example.device.type == "mps":
        return False
    double = converted_copy(module, example.device, torch.float64)
    example = example.double() if example.is_floating_point() else example
    try:
        return agree(run_once(double, example[rows]), run_once(double, example)[rows])
    except ValueError:  # it casts to single precision inside
        return False


def _random(
    module: nn.Module,
    example: Tensor,
    runs: Sequence[AbstractContextManager[Any]] = (nullcontext(), nullcontext()),
) -> ValueError:
    """Return the error of a network that gives the same batch two activations.

    ``runs`` are the contexts of two runs in which these activations differ.
    """
    recorded = []
    for run in runs:
        with run:
            recorded.append(_recorded(module, example))
    one, other = recorded
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
        if expected is not None and not agree(second, expected):
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
        if "empty" in getattr(func, "__name__", ""):  # memory that is not yet written to
            return result
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
