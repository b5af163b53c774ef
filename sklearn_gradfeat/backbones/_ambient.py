"""Settings of torch around ``fit`` and ``predict``, which must not change a result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from sklearn_gradfeat.backbones._attention import shared_setting
from sklearn_gradfeat.backbones._threads import one_thread

_AUTOCAST = ("cpu", "cuda", "mps")


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


_default_dtype = shared_setting(_single_precision)


@contextmanager
def neutral_state() -> Iterator[None]:
    """Run the body in torch's initial state, as a context manager or a decorator.

    Gradients are enabled, outside of inference mode and autocast. New tensors are float32 on the
    CPU. A network may depend on all of these, and its outputs are stored for later fits. Small
    matrix products run in one thread.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_default_dtype())
        stack.enter_context(one_thread())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
