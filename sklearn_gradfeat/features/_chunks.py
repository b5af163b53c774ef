"""Boundary tensors in chunks: what one pass of the trunk returned, wherever it is held."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]


class Chunk(Protocol):
    """The boundary tensors of some samples, to be read and never written."""

    def opened(self) -> AbstractContextManager[Tensors]:
        """Return the tensors, for the duration of a context."""

    @property
    def lasting(self) -> bool:
        """Whether the tensors outlive that context."""


class Place(NamedTuple):
    """Where the boundary of one sample is."""

    chunk: Chunk
    row: int


@dataclass(frozen=True, eq=False)
class HeldChunk:
    """A chunk in host memory."""

    tensors: Tensors
    lasting = True

    def opened(self) -> AbstractContextManager[Tensors]:
        """Return the tensors."""
        return nullcontext(self.tensors)


def held(tensors: Tensors) -> HeldChunk:
    """Return tensors as a chunk in host memory that holds no more than they need."""

    def own(tensor: Tensor) -> Tensor:
        host = tensor.detach().to("cpu").contiguous()
        return host if host.untyped_storage().nbytes() == host.nbytes else host.clone()

    return HeldChunk(tuple(own(tensor) for tensor in tensors))


class Boundary:
    """The boundary tensors of many samples; it refers to chunks and holds no copy of them.

    Parameters
    ----------
    places : sequence of Place
        Where each sample is, in the order of the samples.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.chunks = list(dict.fromkeys(place.chunk for place in places))
        number = {chunk: i for i, chunk in enumerate(self.chunks)}
        self._numbers = np.array([number[place.chunk] for place in places])
        self._rows = np.array([place.row for place in places])

    def subset(self, samples: npt.NDArray[np.intp]) -> Boundary:
        """Return the boundary of some of the samples, if any is kept."""
        part = copy.copy(self)
        if self.chunks:
            part._numbers, part._rows = self._numbers[samples], self._rows[samples]
        return part

    def take(self, samples: slice) -> Tensors:
        """Return the tensors of some samples: views where a chunk holds them in a row."""
        runs = list(_runs(self._numbers[samples], self._rows[samples]))
        with ExitStack() as stack:
            opened = {
                number: stack.enter_context(self.chunks[number].opened())
                for number in dict.fromkeys(number for number, _ in runs)
            }
            if len(runs) == 1 and self.chunks[runs[0][0]].lasting:
                return tuple(z[runs[0][1]] for z in opened[runs[0][0]])
            parts = [[z[run] for z in opened[number]] for number, run in runs]
            return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _runs(numbers: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]) -> Iterator[tuple[int, slice]]:
    """Iterate over (chunk, rows) of the longest stretches of neighbours."""
    breaks = np.flatnonzero((np.diff(numbers) != 0) | (np.diff(rows) != 1)) + 1
    starts = [0, *breaks.tolist()]
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        first = int(rows[start])
        yield int(numbers[start]), slice(first, first + stop - start)
