"""scikit-learn's callbacks where they exist, and nothing where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # scikit-learn < 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """An estimator without callbacks."""

    def with_callbacks(method: Callable[..., Any]) -> Callable[..., Any]:
        """Return the method as it is."""
        return method


__all__ = ["CallbackSupportMixin", "FitCallbacks", "with_callbacks"]


class FitCallbacks:
    """Reports the iterations of a fit to the callbacks of an estimator.

    Parameters
    ----------
    estimator : estimator
        The estimator, with or without callbacks.
    max_iter : int
        The largest number of iterations.
    **data : dict
        ``X``, ``y`` and ``metadata`` as the hooks receive them.
    """

    def __init__(self, estimator: Any, max_iter: int, **data: Any) -> None:
        self.estimator, self.data = estimator, data
        self.context = None
        if hasattr(estimator, "_init_callback_context"):
            self.context = estimator._init_callback_context(max_subtasks=max_iter)
            self.context.call_on_fit_task_begin(estimator=estimator, **data)

    def iteration(self, number: int, attributes: Callable[[], dict[str, Any]]) -> bool:
        """Report one iteration; return whether a callback asks to stop."""
        if self.context is None:
            return False
        task = self.context.subcontext(task_name=f"iteration {number}")
        task.call_on_fit_task_begin(estimator=self.estimator, **self.data)
        return bool(
            task.call_on_fit_task_end(
                estimator=self.estimator, **self.data, reconstruction_attributes=attributes
            )
        )

    def end(self) -> None:
        """Report the end of the fit; the estimator must be fitted by then."""
        if self.context is not None:
            self.context.call_on_fit_task_end(
                estimator=self.estimator, **self.data, reconstruction_attributes={}
            )
