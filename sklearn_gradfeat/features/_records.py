"""A chunk as bytes that say what they are and whether they are whole."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from sklearn_gradfeat.features._chunks import Tensors

# Checksum of all that follows, length of the layout, number of samples.
_HEAD = struct.Struct("<16sII")
_ALIGNMENT = 64
NAME_BYTES = 16


class Layout(NamedTuple):
    """What a record holds and where.

    Attributes
    ----------
    names : bytes
        The names of the samples, one after the other.
    tensors : list of (str, list of int, int)
        Dtype, shape and offset of every tensor.
    """

    names: bytes
    tensors: list[tuple[str, list[int], int]]

    def name(self, row: int) -> bytes:
        """Return the name of a sample, nothing for rows that there are not."""
        return self.names[NAME_BYTES * row : NAME_BYTES * (row + 1)]


def encode(names: Sequence[bytes], tensors: Tensors) -> bytearray:
    """Return the record of a chunk."""
    kinds = [(str(z.dtype).removeprefix("torch."), list(z.shape)) for z in tensors]
    layout = json.dumps(kinds).encode()
    head = _HEAD.size + len(layout) + NAME_BYTES * len(names)
    offsets = []
    for tensor in tensors:
        offsets.append(_ALIGNMENT * math.ceil(head / _ALIGNMENT))
        head = offsets[-1] + tensor.nbytes
    record = bytearray(head)
    body = layout + b"".join(names)
    record[_HEAD.size : _HEAD.size + len(body)] = body
    for tensor, offset in zip(tensors, offsets, strict=True):
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        record[offset : offset + tensor.nbytes] = flat.data
    _HEAD.pack_into(record, 0, bytes(16), len(layout), len(names))
    record[:16] = _checksum(record)
    return record


def read_layout(record: memoryview) -> Layout | None:
    """Return the layout of a record, None if the record is damaged."""
    if len(record) < _HEAD.size or bytes(record[:16]) != _checksum(record):
        return None
    _, length, n_names = _HEAD.unpack_from(record)
    start = _HEAD.size + length
    head = start + NAME_BYTES * n_names
    tensors = []
    for dtype, shape in json.loads(bytes(record[_HEAD.size : start])):
        tensors.append((dtype, shape, _ALIGNMENT * math.ceil(head / _ALIGNMENT)))
        head = tensors[-1][2] + math.prod(shape) * getattr(torch, dtype).itemsize
    return Layout(bytes(record[start : start + NAME_BYTES * n_names]), tensors)


def decode(record: memoryview, layout: Layout) -> Tensors:
    """Return views of the tensors of a record; nobody may write to them."""
    data = torch.from_numpy(np.asarray(_Borrowed(record)))
    if data.data_ptr() % 8:  # a short record, which may lie anywhere
        data = data.clone()
    tensors = []
    for dtype, shape, offset in layout.tensors:
        kind = getattr(torch, dtype)
        part = data[offset : offset + math.prod(shape) * kind.itemsize]
        tensors.append(part.view(kind).reshape(shape))
    return tuple(tensors)


class _Borrowed:
    """Memory that cannot be written to, as an array that torch takes without a warning."""

    def __init__(self, record: memoryview) -> None:
        self.array = np.frombuffer(record, np.uint8)
        interface = self.array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _checksum(record: memoryview | bytearray) -> bytes:
    """Return the checksum of a record after its place for one."""
    return xxhash.xxh3_128_digest(memoryview(record)[16:])
