"""The stages of a fit, one line each, and its iterations, reported to scikit-learn's callbacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from sklearn_gradfeat.data import on_all_ranks
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

Watch = Callable[[int, float, Tensor, float, float], bool]


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
        self._line: Any = None
        self._linearization = ""
        self._context = None
        if hasattr(estimator, "_init_callback_context"):
            searched = any(
                getattr(estimator, name, None) == "auto" for name in ("alpha", "gradient_alpha")
            )
            # A linearisation may take several fits.
            is_known = not searched and estimator.n_linearizations == 1
            n_subtasks = estimator.max_iter if is_known else None
            self._context = estimator._init_callback_context(max_subtasks=n_subtasks)
            self._context.call_on_fit_task_begin(estimator=estimator, **data)

    def watch(
        self,
        stage: str,
        to_model: Callable[[Tensor], LinearModel],
        to_attributes: Callable[[LinearModel], dict[str, Any]] | None,
    ) -> Watch:
        """Begin a stage, and return the function that the solver calls after every iteration.

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
            ``watch(iteration, objective, x, decrement, tolerance)`` returns whether a callback
            asks to stop.
        """
        self._begin(f"{self._linearization}{stage}: iteration {{n_fmt}}")
        return partial(self._iteration, to_model, to_attributes)

    def _iteration(
        self,
        to_model: Callable[[Tensor], LinearModel],
        to_attributes: Callable[[LinearModel], dict[str, Any]] | None,
        iteration: int,
        objective: float,
        x: Tensor,
        decrement: float,
        tolerance: float,
    ) -> bool:
        relation = "<=" if decrement <= tolerance else ">"
        self._show(
            f"objective {objective:.4g}, decrement {decrement:.0e} {relation} {tolerance:.0e}"
        )
        if to_attributes is None:
            return False
        name = f"{self._linearization}iteration {iteration}"
        return self._called_back(name, lambda: to_attributes(to_model(x)))

    def _called_back(self, name: str, attributes: Callable[[], dict[str, Any]] | None) -> bool:
        """Report a task to callbacks, and return whether one of them asks to stop, on any rank."""
        stops = False
        if self._context is not None:
            task = self._context.subcontext(task_name=name)
            task.call_on_fit_task_begin(estimator=self._estimator, **self._data)
            stops = task.call_on_fit_task_end(
                estimator=self._estimator, **self._data, reconstruction_attributes=attributes
            )
        return not on_all_ranks(not stops)

    def linearization(self, number: int) -> None:
        """Name the stages that follow by the number of their linearisation."""
        self._linearization = f"linearization {number}, "

    def search(self) -> None:
        """Begin the search for penalties."""
        self._begin("auto: {n_fmt}", "<{remaining}")

    def tried(
        self,
        pair: tuple[float, float],
        best: tuple[float, float],
        loss: float,
        n_left: int,
    ) -> bool:
        """Count a pair of penalties, and return whether a callback asks to stop.

        ``best`` is the best pair so far, and ``loss`` its held-out loss. ``n_left`` is the number
        of pairs that are left if the search ends as soon as it can.
        """
        if self._line is not None:
            self._line.total = self._line.n + 1 + n_left
        texts = [f"alpha {alpha:.2g}, gradient_alpha {other:.2g}" for alpha, other in (pair, best)]
        self._show(f"best {texts[1]}, loss {loss:.3g}")
        return self._called_back(f"auto: {texts[0]}", None)

    def _begin(self, text: str, left: str = "") -> None:
        """Begin a line; ``{n_fmt}`` in it is how often it was updated."""
        self._close()
        if self._estimator.verbose:  # a disabled line would take a lock that forks share
            self._line = tqdm(bar_format=f"{text} [{{elapsed}}{left}]{{postfix}}")

    def _show(self, text: str) -> None:
        """Update the line."""
        if self._line is not None:
            self._line.set_postfix_str(text, refresh=False)
            self._line.update()

    def _close(self) -> None:
        """End the line with its last update."""
        if self._line is not None:
            self._line.close()

    def end(self) -> None:
        """Report the end of the fit; the estimator must be fitted."""
        if self._context is not None:
            self._context.call_on_fit_task_end(
                estimator=self._estimator, **self._data, reconstruction_attributes={}
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exception: object) -> None:
        """End the last line, also after a fit that failed."""
        self._close()
