"""Sums over the ranks of a process group of ``torch.distributed``, while they fit together.

Every rank has some of the samples, and computes its part of every sum over samples. The functions
of this module are called where such a sum is complete. Outside of :func:`fit_together`, and
without a process group of several ranks, they return their argument and communicate nothing.

All ranks must call them in the same order. So each call starts with a header of each rank: whether
it has failed, and which call this is. A rank that raises an error sends a header that says so, and
all others raise an error with its message. The process group can be used afterwards.

A rank that is killed sends nothing. While a rank is in a fit, a thread counts up a number in the
store of the process group, once a second. The other ranks see which number stands still: where a
collective fails, and while they wait for one, each for the next rank. Then the process group is of
no further use, as torch cannot leave out a rank.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from sklearn_gradfeat.data._batch_size import is_out_of_memory

Value = TypeVar("Value")
Summed = TypeVar("Summed", Tensor, npt.NDArray[Any])

# Seconds between the signs of life of a rank; without one until a rank counts as lost, after a
# collective has failed, and while one waits.
_BEAT, _SOON, _LATE = 1.0, 5.0, 60.0
# Longest pause between two looks at a collective that waits, in seconds.
_PAUSE = 0.002
_LEFT = "left"


class _Beats:
    """Signs of life of all ranks in the store of the process group, for one fit."""

    def __init__(self, rank: int) -> None:
        self._store: Any = dist.distributed_c10d._get_default_store()
        number_of_fit = self._store.add(f"sklearn_gradfeat/fits/{rank}", 1)
        self._rank, self._prefix = rank, f"sklearn_gradfeat/{number_of_fit}"
        self._stop, self.n_calls = threading.Event(), 0
        self._thread = threading.Thread(target=self._beat, name="signs-of-life", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # the process that holds the store has ended
            while True:
                count += 1
                self._store.set(f"{self._prefix}/{self._rank}", f"{count} {self.n_calls}")
                if self._stop.wait(_BEAT):
                    return

    def close(self) -> None:
        """End the signs of this rank."""
        self._stop.set()
        self._thread.join(_BEAT)

    def leave(self, message: str) -> None:
        """Tell ranks that still wait why this rank does not go on."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{self._prefix}/{_LEFT}", message)

    def why_left(self) -> str:
        """Return the message of a rank that has left, or nothing."""
        return self._read(_LEFT)

    def sign(self, rank: int) -> str:
        """Return the last sign of a rank, nothing if it is not in this fit yet."""
        return self._read(str(rank))

    def _read(self, key: str) -> str:
        key = f"{self._prefix}/{key}"
        return self._store.get(key).decode() if self._store.check([key]) else ""


class _Header(NamedTuple):
    """What a rank sends before a collective.

    Attributes
    ----------
    size_of_error : int
        Number of bytes in the message of a rank that has failed, 0 for all others.
    code : int
        Which collective this is.
    digest : int
        A hash of the content, below 2⁶³.
    number : float
        A number for all other ranks.
    """

    size_of_error: int
    code: int
    digest: int
    number: float

    def packed(self) -> Tensor:
        """Return the header as integers."""
        bits = int(np.float64(self.number).view(np.int64))
        return torch.tensor([*self[:3], bits], device="cpu")

    @classmethod
    def unpacked(cls, values: list[int]) -> _Header:
        """Return the header from these integers."""
        size_of_error, code, digest, bits = values
        return cls(size_of_error, code, digest, float(np.int64(bits).view(np.float64)))


class _Group:
    """The ranks of the default process group during one fit."""

    current: ClassVar[_Group | None] = None

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._devices = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]
        self._beats = _Beats(self.rank)
        self._in_collective = False
        self._told = False

    def close(self) -> None:
        self._beats.close()

    def tell(self, error: BaseException) -> None:
        """Tell the other ranks of the error that ends the fit of this one."""
        if self._in_collective:  # the others do not wait for a header
            self._beats.leave(f"Rank {self.rank} stopped: {_text(error)}")
        elif not self._told:
            message = _text(error)
            header = _Header(len(message.encode()), 0, 0, 0.0)
            with contextlib.suppress(RuntimeError):
                self._exchanged(header, message)

    def end(self) -> None:
        """Wait until no rank can fail any more."""
        with self._collective("end"):
            pass

    def sum(self, tensor: Tensor) -> Tensor:
        if tensor.numel() == 1:  # travels with the header
            with self._collective("number", number=float(tensor)) as headers:
                return tensor.new_full(tensor.shape, sum(header.number for header in headers))
        with self._collective("sum", tensor.dtype, tuple(tensor.shape)):
            total = tensor.detach().to(self._device(tensor))
            total = total.clone(memory_format=torch.contiguous_format)
            self._wait(lambda: dist.all_reduce(total, async_op=True))
            return total.to(tensor.device)

    def gather(self, value: Value) -> list[Value]:
        data = pickle.dumps(value)
        with self._collective("gather", number=len(data)) as headers:
            return [pickle.loads(part) for part in self._gathered(data, headers)]

    def first(self, tensor: Tensor) -> Tensor:
        """Return the tensor of rank 0, which is only sent if another rank has other bits."""
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        shape = pickle.dumps(tuple(tensor.shape))
        digest = xxhash.xxh3_64_intdigest(content.data) ^ xxhash.xxh3_64_intdigest(shape)
        with self._collective("first", digest=digest >> 1, number=len(shape)) as headers:
            if len({header.digest for header in headers}) == 1:
                return tensor
            shape_there = pickle.loads(self._gathered(shape, headers)[0])
            there = tensor if self.rank == 0 else tensor.new_empty(shape_there)
            sent = there.detach().to(self._device(tensor))
            sent = sent.clone(memory_format=torch.contiguous_format)
            self._wait(lambda: dist.broadcast(sent, 0, async_op=True))
            return sent.to(tensor.device)

    @contextmanager
    def _collective(
        self, name: str, *details: Any, digest: int = 0, number: float = 0.0
    ) -> Iterator[list[_Header]]:
        """Exchange headers before the block that communicates."""
        self._beats.n_calls += 1
        headers = self._exchanged(_Header(0, _code(name, details), digest, number))
        self._in_collective = True
        if len({header.code for header in headers}) > 1:
            self._told, self._in_collective = True, False
            raise RuntimeError(
                f"The ranks do different things: rank {self.rank} has come to {name!r} "
                f"{details or ''}. All ranks must fit the same estimator, one at a time, and "
                "callbacks must do the same on all ranks."
            )
        yield headers
        self._in_collective = False

    def _exchanged(self, own: _Header, message: str = "") -> list[_Header]:
        """Return the headers of all ranks; raise an error if one of them has failed."""
        self._in_collective = True
        parts = self._all_gather(own.packed()).tolist()
        headers = [_Header.unpacked(part) for part in parts]
        if any(header.size_of_error for header in headers):
            sizes = [header._replace(number=header.size_of_error) for header in headers]
            texts = [part.decode() for part in self._gathered(message.encode(), sizes)]
            self._told, self._in_collective = True, False
            found = [f"rank {i} failed: {text}" for i, text in enumerate(texts) if text]
            raise RuntimeError(f"No rank has a fitted estimator, as {'; '.join(found)}")
        self._in_collective = False
        return headers

    def _gathered(self, data: bytes, headers: list[_Header]) -> list[bytes]:
        """Return the bytes of all ranks, whose numbers are in the headers."""
        sizes = [int(header.number) for header in headers]
        padded = bytearray(data.ljust(max(sizes), b"\0"))
        parts = self._all_gather(torch.frombuffer(padded, dtype=torch.uint8))
        return [part.numpy().tobytes()[:n] for part, n in zip(parts, sizes, strict=True)]

    def _all_gather(self, own: Tensor) -> Tensor:
        """Return the tensors of all ranks, stacked, in host memory."""
        own = own.to(self._device(own))
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(parts, own, async_op=True))
        return torch.stack(parts).cpu()

    def _device(self, tensor: Tensor) -> torch.device:
        """Return the device of a tensor, or one on which the group communicates."""
        if tensor.device.type in self._devices:
            return tensor.device
        return torch.device(self._devices[0])

    def _wait(self, start: Callable[[], Any]) -> None:
        """Wait for a collective to end, and raise an error where a rank is lost."""
        try:
            work, pause, looked = start(), 5e-5, time.monotonic()
            sign, since = "", looked
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE)
                now = time.monotonic()
                if now - looked < _BEAT:
                    continue
                looked, former = now, sign
                sign = self._beats.sign((self.rank + 1) % self.size)
                since = since if sign == former else now
                if (sign and now - since > _LATE) or self._beats.why_left():
                    raise RuntimeError("A rank is lost.")
            work.wait()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise RuntimeError(self._diagnosis(error)) from error

    def _diagnosis(self, error: RuntimeError) -> str:
        """Return which rank is lost, after a collective has failed."""
        try:
            if left := self._beats.why_left():
                return left
            before = [self._beats.sign(rank) for rank in range(self.size)]
            time.sleep(_SOON)
            after = [self._beats.sign(rank) for rank in range(self.size)]
            left = self._beats.why_left()
        except RuntimeError:
            return (
                "The store of the process group does not answer: the process that holds it, rank 0 "
                f"or the launcher, has ended. {error}"
            )
        signs = list(zip(before, after, strict=True))
        if lost := _named(sign and sign == former for former, sign in signs):
            return (
                f"{lost} gives no sign of life: the process has ended, or its host is lost. {error}"
            )
        if left:
            return left
        if absent := _named(not sign for sign in after):
            return (
                f"{absent} did not call fit before the timeout of the process group or the end of "
                f"its process. {error}"
            )
        behind = _named(int(sign.split()[1]) < self._beats.n_calls for sign in after)
        return f"{behind or 'A rank'} did not answer. {error}"


def _code(name: str, details: tuple[Any, ...]) -> int:
    return zlib.crc32(repr((name, *details)).encode())


def _named(chosen: Iterable[object]) -> str:
    return ", ".join(f"rank {i}" for i, is_chosen in enumerate(chosen) if is_chosen).capitalize()


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


@contextmanager
def fit_together() -> Iterator[None]:
    """Fit on the samples of all ranks of the process group, as a context manager or a decorator.

    Raises
    ------
    RuntimeError
        If another rank fails or is lost; the message names it.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    if _Group.current is not None:
        if _Group.current.thread != threading.get_ident():
            raise RuntimeError(
                "Another thread of this process is fitting with the other ranks of the process "
                "group. Fit one estimator at a time, with n_jobs=1."
            )
        yield
        return
    group = _Group.current = _Group()
    try:
        try:
            yield
        except BaseException as error:
            group.tell(error)
            raise
        group.end()
    finally:
        group.close()
        _Group.current = None


class Ranks(NamedTuple):
    """The ranks of a group, for work that each of them does alone.

    Attributes
    ----------
    rank, size : int
        The number of this rank, and how many there are.
    gather : callable
        Maps a value of every rank to the values of all ranks, in the order of the ranks.
    """

    rank: int
    size: int
    gather: Callable[[Any], list[Any]]


@contextmanager
def alone() -> Iterator[Ranks]:
    """Compute without the samples of the other ranks during a fit."""
    group, _Group.current = _Group.current, None
    try:
        if group is None:
            yield Ranks(0, 1, lambda value: [value])
        else:
            yield Ranks(group.rank, group.size, group.gather)
    finally:
        _Group.current = group


def n_ranks() -> int:
    """Return the number of ranks that fit together, one outside of a fit or without a group."""
    group = _Group.current
    return 1 if group is None else group.size


def is_first_rank() -> bool:
    """Return whether this is rank 0, or a process that fits alone."""
    group = _Group.current
    return group is None or group.rank == 0


def sum_over_ranks(part: Summed) -> Summed:
    """Return the sum of the tensors or arrays of all ranks, the same bits on every rank."""
    group = _Group.current
    if group is None:
        return part
    if isinstance(part, Tensor):
        return group.sum(part)
    return np.asarray(group.sum(torch.from_numpy(np.asarray(part))).numpy())


def on_all_ranks(condition: bool) -> bool:
    """Return whether a condition holds on every rank."""
    return not int(sum_over_ranks(torch.tensor(int(not condition))))


def gather_over_ranks(value: Value) -> list[Value]:
    """Return the values of all ranks, in the order of the ranks."""
    group = _Group.current
    return [value] if group is None else group.gather(value)


def rows_of_all_ranks(rows: Summed) -> tuple[Summed, slice]:
    """Return the rows of all ranks, and which of them are those of this rank."""
    group = _Group.current
    if group is None:
        return rows, slice(None)
    parts = group.gather(rows.cpu() if isinstance(rows, Tensor) else rows)
    start = sum(map(len, parts[: group.rank]))
    own = slice(start, start + len(rows))
    if isinstance(rows, Tensor):
        return torch.cat(parts).to(rows.device), own
    return np.concatenate(parts), own


def of_first_rank(tensor: Tensor) -> Tensor:
    """Return the tensor of rank 0.

    It is for results that all ranks compute from the same numbers, and that have other bits on
    other processors.
    """
    group = _Group.current
    return tensor if group is None else group.first(tensor)


def number_of_first_rank(number: float) -> float:
    """Return the number of rank 0."""
    group = _Group.current
    if group is None:
        return number
    return float(group.first(torch.tensor(number, dtype=torch.float64)))
