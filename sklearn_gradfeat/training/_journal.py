"""The finished results of a fit, from which a fit in another process goes on.

Between the passes over the data, a fit is cheap and makes all its choices. What takes passes are
runs of the solver, and numbers such as held-out losses. A journal holds their results in the order
of the fit, and the state of the run that is not finished. A fit that goes on does the same as the
first one from the beginning, and takes every result from the journal until there is none. So it
makes the same choices, and ends with the same bits.

The unknowns of a finished run are kept for as long as the fit itself keeps them. In place of others
the journal returns NaN, which no later result depends on. So a choice that depends on unknowns
belongs into the journal as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sklearn_gradfeat.curvature import Inverses
from sklearn_gradfeat.data import n_ranks
from sklearn_gradfeat.linearized import TangentObjective
from sklearn_gradfeat.solvers import CurvaturePairs, Solution, State, Status

Array = npt.NDArray[np.float64]
Vectors = Sequence[Tensor]

_STATUS = get_args(Status)


@dataclass
class Entry:
    """A result, or the state of the run of the solver that is not finished.

    Attributes
    ----------
    name : str
        What the result is of.
    numbers : ndarray of shape (n,)
        The result, or the numbers that describe a run.
    vectors : dict of str to sequence of tensor
        The vectors of a run, of the length of its unknowns or of those of the coarse space.
    is_used : dict of str to callable
        Whether the fit may still need the vectors of this name.
    """

    name: str
    numbers: Array
    vectors: dict[str, Vectors] = field(default_factory=dict)
    is_used: dict[str, Callable[[], bool]] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop the vectors that the fit does not need any more."""
        for name, is_used in list(self.is_used.items()):
            if not is_used():
                del self.vectors[name], self.is_used[name]


class Journal:
    """The finished results of one fit, in their order.

    Parameters
    ----------
    entries : iterable of Entry
        The results of a former process; the last one may be the state of a run.
    write : callable or None
        Called with :meth:`contents` wherever a fit can go on. None keeps nothing.
    """

    def __init__(
        self,
        entries: Iterable[Entry] = (),
        write: Callable[[Callable[[], list[Entry]]], None] | None = None,
    ) -> None:
        self._entries, self._write = list(entries), write
        self._n_done = 0  # entries that this process has passed
        self._state: Entry | None = None

    @property
    def keeps(self) -> bool:
        """Whether anything is written."""
        return self._write is not None

    def number(self, name: str, compute: Callable[[], float]) -> float:
        """Return a number, from the journal or from ``compute()``."""
        return float(self.numbers(name, compute).item())

    def numbers(self, name: str, compute: Callable[[], float | Array]) -> Array:
        """Return an array of numbers, from the journal or from ``compute()``."""
        entry = self._next(name)
        if entry is None:
            entry = Entry(name, np.atleast_1d(np.array(compute(), dtype=np.float64)))
            self._append(entry)
        return entry.numbers

    def finished(
        self, name: str, objective: TangentObjective, inverses: Inverses
    ) -> Solution | None:
        """Return the result of a run of the solver, or None if it is not in the journal."""
        entry = self._next(f"{name} finished", f"{name} state")
        if entry is None:
            return None
        _recall(entry, objective, inverses)
        n_iter, n_passes, status, norm, *path = entry.numbers.tolist()
        (x,) = entry.vectors.get("x") or (objective.like.new_full((sum(objective.sizes),), np.nan),)
        solution = Solution(
            x, path, int(n_iter), int(n_passes), _STATUS[int(status)], norm,
            CurvaturePairs(_pairs(entry.vectors.get("pairs", ())), objective.penalties),
        )  # fmt: skip
        if self._write is None:
            entry.vectors = {}
        self._watch(entry, solution, inverses)
        return solution

    def state(self, objective: TangentObjective, inverses: Inverses) -> State | None:
        """Return where the run of the solver was when the former process ended, if it was in it."""
        if self._n_done == len(self._entries):
            return None
        entry = self._entries.pop()
        _recall(entry, objective, inverses)
        n_passes, scale, two_levels, *path = entry.numbers.tolist()
        vectors = entry.vectors
        coarse_pairs = _pairs(vectors.get("coarse_pairs", ())) if two_levels else None
        pairs = _pairs(vectors.get("pairs", ()))
        (x,), (gradient,), (built_at,) = (vectors[of] for of in ("x", "gradient", "built_at"))
        (logits,) = vectors.get("logits") or (None,)
        (products,) = vectors.get("products") or (None,)
        products = None if products is None else products.cpu()
        return State(
            x, gradient, logits, built_at, scale, path, int(n_passes), pairs, products, coarse_pairs
        )

    def keep(self, name: str, inverses: Inverses, state: State) -> None:
        """Take note of the state of the run."""
        if self._write is None:
            return
        assert state.built_at is not None
        inverses.curvature_pairs = None  # those of the state take their place
        coarse = state.coarse_pairs
        vectors: dict[str, Vectors] = {
            "x": [state.x],
            "gradient": [state.gradient],
            # Rank 0, which writes the file, has the logits of its own samples alone.
            "logits": [] if n_ranks() > 1 or state.logits is None else [state.logits],
            "built_at": [state.built_at],
            "pairs": _flat(state.pairs),
            "products": [state.products] if state.pairs and state.products is not None else [],
            "coarse_pairs": _flat(coarse or ()),
        }
        numbers = [state.n_passes, state.scale, coarse is not None, *state.objective_path]
        self._state = Entry(f"{name} state", np.array(numbers), vectors | _origins(inverses))
        self._write(self.contents)

    def finish(self, name: str, solution: Solution, inverses: Inverses) -> None:
        """Append the result of a run of the solver.

        Nothing is kept of a fit from an interruption on: it can go on from the state before.
        """
        self._state = None
        if solution.status == "interrupted":
            self._write = None
        if self._write is None:
            return
        numbers = [
            solution.n_iter, solution.n_passes, _STATUS.index(solution.status), solution.norm,
            *solution.objective_path,
        ]  # fmt: skip
        pairs = _flat(solution.curvature_pairs.pairs)
        vectors = {"x": [solution.x], "pairs": pairs, **_origins(inverses)}
        entry = Entry(f"{name} finished", np.array(numbers, dtype=np.float64), vectors)
        self._watch(entry, solution, inverses)
        for former in self._entries:
            former.forget()
        self._append(entry)

    def contents(self) -> list[Entry]:
        """Return copies of the entries and of the state, without the vectors that are not needed.

        They do not change when the fit goes on in another thread.
        """
        for entry in self._entries:
            entry.forget()
        entries = [*self._entries, *([self._state] if self._state else [])]
        return [replace(entry, vectors=dict(entry.vectors)) for entry in entries]

    def used_by(self, model: Any) -> None:
        """Keep the unknowns of the last run for as long as a model made from them exists."""
        if self._n_done and "x" in (last := self._entries[self._n_done - 1]).is_used:
            of_solution, of_model = last.is_used["x"], weakref.ref(model)
            last.is_used["x"] = lambda: of_solution() or of_model() is not None

    def used_to_the_end(self) -> None:
        """Keep the unknowns of the last run to the end of the fit."""
        if self._n_done:
            self._entries[self._n_done - 1].is_used.pop("x", None)

    def _next(self, *names: str) -> Entry | None:
        """Return the next entry of the former process, if it is the result of this name.

        The state of the run of the second name is left for :meth:`state`.
        """
        if self._n_done == len(self._entries):
            return None
        entry = self._entries[self._n_done]
        if entry.name not in names:
            raise ValueError(
                f"The checkpoint goes on with {entry.name!r} where this fit has {names[0]!r}: it "
                "was written by other code. Delete it, or pass another path as checkpoint."
            )
        if entry.name != names[0]:
            return None
        self._n_done += 1
        return entry

    def _append(self, entry: Entry) -> None:
        if self._write is not None:
            self._entries.append(entry)
            self._n_done += 1
            self._write(self.contents)

    @staticmethod
    def _watch(entry: Entry, solution: Solution, inverses: Inverses) -> None:
        """Keep the vectors of a run for as long as the fit does."""
        of_solution, of_inverses = weakref.ref(solution), weakref.ref(inverses)
        learned = inverses.curvature_pairs

        def last_of_inverses(name: str, value: object) -> Callable[[], bool]:
            return lambda: value is not None and getattr(of_inverses(), name, None) is value

        entry.is_used = {
            "x": lambda: of_solution() is not None,
            "pairs": last_of_inverses("curvature_pairs", learned),
            **{
                name: last_of_inverses(name, getattr(inverses, name))
                for name in ("curvature_at", "subspace_at")
            },
        }
        entry.is_used = {name: entry.is_used[name] for name in entry.vectors}


def _recall(entry: Entry, objective: TangentObjective, inverses: Inverses) -> None:
    """Tell inverses what they learned in a run of a former process."""
    pairs = entry.vectors.get("pairs")
    learned = CurvaturePairs(_pairs(pairs), objective.penalties) if pairs else None
    curvature_at, subspace_at = (
        next(iter(entry.vectors.get(name, ())), None) for name in ("curvature_at", "subspace_at")
    )
    inverses.recall(objective, learned, curvature_at, subspace_at)


def _origins(inverses: Inverses) -> dict[str, Vectors]:
    """Return the unknowns at which parts of the inverses were computed."""
    at = {"curvature_at": inverses.curvature_at, "subspace_at": inverses.subspace_at}
    return {name: [x] for name, x in at.items() if x is not None}


def _flat(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [vector for pair in pairs for vector in pair]


def _pairs(vectors: Vectors) -> list[tuple[Tensor, Tensor]]:
    return list(zip(vectors[::2], vectors[1::2], strict=True))
