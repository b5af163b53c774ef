"""Settings of torch around ``fit`` and ``predict``, which must not change a result."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

from sklearn_gradfeat.backbones._attention import shared_setting
from sklearn_gradfeat.backbones._threads import one_thread

Value = TypeVar("Value")

_AUTOCAST = ("cpu", "cuda", "mps")
# Settings that may trade the accuracy of float32 for speed; those of convolutions on CUDA do so by
# default.
_ON_CPU: tuple[Any, ...] = operator.attrgetter("mkldnn.conv", "mkldnn.rnn", "mkldnn.matmul")(
    torch.backends
)
_ON_CUDA: tuple[Any, ...] = operator.attrgetter("cudnn.conv", "cudnn.rnn", "cuda.matmul")(
    torch.backends
)


@contextmanager
def _single_precision() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    if dtype != torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        if dtype != torch.float32:
            torch.set_default_dtype(dtype)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Let products of float32 numbers have all digits, without TF32 or bfloat16.

    The switches for CUDA stay as they are without a device: once restored, those of cuDNN no longer
    follow ``torch.backends.fp32_precision``, as after torch's own ``torch.backends.cudnn.flags``.
    """
    cuda = torch.cuda.is_available()
    kinds = (*_ON_CPU, *_ON_CUDA) if cuda else _ON_CPU
    before = [kind.fp32_precision for kind in kinds]
    # torch refuses to read the older switches where the newer ones contradict them.
    with _older_switches():
        convolutions = cuda and _readable(lambda: torch.backends.cudnn.allow_tf32)
        matrices = _readable(torch.get_float32_matmul_precision)
        if convolutions:
            torch.backends.cudnn.allow_tf32 = False
        if matrices in ("high", "medium"):
            torch.set_float32_matmul_precision("highest")
    for kind in kinds:
        if kind.fp32_precision not in ("none", "ieee"):
            kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _older_switches():
            if convolutions:
                torch.backends.cudnn.allow_tf32 = True
            if matrices in ("high", "medium"):
                torch.set_float32_matmul_precision(matrices)
        for kind, value in zip(kinds, before, strict=True):
            if kind.fp32_precision != value:
                kind.fp32_precision = value


@contextmanager
def _older_switches() -> Iterator[None]:
    """Use the older switches without the warnings of torch 2.9: the user may have set them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")
        yield


def _readable(switch: Callable[[], Value]) -> Value | None:
    """Return the value of an older switch, None if the newer ones contradict it."""
    try:
        return switch()
    except RuntimeError:
        return None


_default_dtype = shared_setting(_single_precision)
_float32_products = shared_setting(_exact_products)


@contextmanager
def neutral_state() -> Iterator[None]:
    """Run the body in torch's initial state, as a context manager or a decorator.

    Gradients are enabled, outside of inference mode and autocast. New tensors are float32 on the
    CPU, and products of float32 numbers are not rounded to TF32, as those in convolutions on CUDA
    are by default. A network may depend on all of these, and its outputs are stored for later fits.
    Small matrix products run in one thread.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_default_dtype())
        stack.enter_context(_float32_products())
        stack.enter_context(one_thread())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
