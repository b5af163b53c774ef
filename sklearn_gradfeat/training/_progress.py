"""The iterations of a fit, shown in a bar and reported to scikit-learn's callbacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from sklearn_gradfeat.linearized import LinearModel

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # scikit-learn < 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """An estimator without callbacks."""

    def with_callbacks(method: Callable[..., Any]) -> Callable[..., Any]:
        """Return the method as it is."""
        return method


__all__ = ["CallbackSupportMixin", "Progress", "with_callbacks"]

Watch = Callable[[int, float, Tensor], bool]


class Progress:
    """Follows one fit of an estimator.

    Parameters
    ----------
    estimator : estimator
        The estimator, with or without callbacks.
    **data : dict
        ``X``, ``y`` and ``metadata`` as the hooks of callbacks receive them.
    """

    def __init__(self, estimator: Any, **data: Any) -> None:
        self._estimator, self._data = estimator, data
        self._bar: Any = None
        self._context = None
        if hasattr(estimator, "_init_callback_context"):
            self._context = estimator._init_callback_context(max_subtasks=estimator.max_iter)
            self._context.call_on_fit_task_begin(estimator=estimator, **data)

    def watch(
        self,
        stage: str,
        to_model: Callable[[Tensor], LinearModel],
        to_attributes: Callable[[LinearModel], dict[str, Any]] | None,
    ) -> Watch:
        """Return the function that the solver calls after every iteration of a stage.

        Parameters
        ----------
        stage : str
            The name of the stage.
        to_model : callable
            Maps the unknowns of the solver to the model.
        to_attributes : callable or None
            Maps the model to the attributes of a fitted estimator, for callbacks. None reports
            nothing to callbacks, as for a stage that is not the last.

        Returns
        -------
        callable
            ``watch(iteration, objective, x)`` returns whether a callback asks to stop.
        """
        return partial(self._iteration, stage, to_model, to_attributes)

    def _iteration(
        self,
        stage: str,
        to_model: Callable[[Tensor], LinearModel],
        to_attributes: Callable[[LinearModel], dict[str, Any]] | None,
        iteration: int,
        objective: float,
        x: Tensor,
    ) -> bool:
        self._show(f"{stage}, objective {objective:.6g}")
        if self._context is None or to_attributes is None:
            return False
        task = self._context.subcontext(task_name=f"iteration {iteration}")
        task.call_on_fit_task_begin(estimator=self._estimator, **self._data)
        return bool(
            task.call_on_fit_task_end(
                estimator=self._estimator,
                **self._data,
                reconstruction_attributes=lambda: to_attributes(to_model(x)),
            )
        )

    def tried(self, alpha: float, gradient_alpha: float, loss: float) -> None:
        """Show the held-out loss of a pair of penalties."""
        self._show(
            f"search, alpha {alpha:.3g}, gradient_alpha {gradient_alpha:.3g}, loss {loss:.6g}"
        )

    def _show(self, text: str) -> None:
        if self._bar is None:
            self._bar = tqdm(unit="iteration", disable=not self._estimator.verbose)
        self._bar.set_description(text)
        self._bar.update()

    def end(self) -> None:
        """Report the end of the fit; the estimator must be fitted."""
        if self._context is not None:
            self._context.call_on_fit_task_end(
                estimator=self._estimator, **self._data, reconstruction_attributes={}
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close the bar, also after a fit that failed."""
        if self._bar is not None:
            self._bar.close()
