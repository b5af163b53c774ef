"""The record of a chunk in a store on disk.

A record is a sequence of bytes, in the byte order of the machine for the tensors:

    checksum (16) | length of kinds (4) | number of samples (4) | kinds, as JSON | names (16 each)
    | padding | tensor 0 | padding | tensor 1 | ...

The *kinds* are the dtype and shape of each tensor; padding aligns each tensor to 64 bytes, so the
tensors of a memory-mapped record are views of the file. The checksum covers all bytes after it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from sklearn_gradfeat.backbones import tensor_bytes
from sklearn_gradfeat.cache._store import Tensors

_HEAD = struct.Struct("<16sII")
_ALIGNMENT = 64
_NAME_BYTES = 16


class Layout(NamedTuple):
    """The samples and tensors of a record.

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
        """Return the name of a sample, or no bytes if there is no such row."""
        return self.names[_NAME_BYTES * row : _NAME_BYTES * (row + 1)]


def encode(names: Sequence[bytes], tensors: Tensors) -> bytearray:
    """Return the record of a chunk."""
    kinds = [(str(z.dtype).removeprefix("torch."), list(z.shape)) for z in tensors]
    kinds_json = json.dumps(kinds).encode()
    body = kinds_json + b"".join(names)
    end = _HEAD.size + len(body)
    offsets = []
    for tensor in tensors:
        offsets.append(_aligned(end))
        end = offsets[-1] + tensor.nbytes
    record = bytearray(end)
    _HEAD.pack_into(record, 0, bytes(16), len(kinds_json), len(names))
    record[_HEAD.size : _HEAD.size + len(body)] = body
    for tensor, offset in zip(tensors, offsets, strict=True):
        record[offset : offset + tensor.nbytes] = tensor_bytes(tensor)
    record[:16] = _checksum(record)
    return record


def read_layout(record: memoryview) -> Layout | None:
    """Return the layout of a record, or None if the record is damaged."""
    if len(record) < _HEAD.size or bytes(record[:16]) != _checksum(record):
        return None
    _, length, n_names = _HEAD.unpack_from(record)
    start = _HEAD.size + length
    end = start + _NAME_BYTES * n_names
    names = bytes(record[start:end])
    tensors = []
    for dtype, shape in json.loads(bytes(record[_HEAD.size : start])):
        tensors.append((dtype, shape, _aligned(end)))
        end = _aligned(end) + math.prod(shape) * getattr(torch, dtype).itemsize
    return Layout(names, tensors)


def decode(record: memoryview, layout: Layout) -> Tensors:
    """Return the tensors of a record as views. Nobody may write to them."""
    data = torch.from_numpy(np.asarray(_Borrowed(record)))
    if data.data_ptr() % 8:  # LMDB aligns long records only
        data = data.clone()
    tensors = []
    for dtype, shape, offset in layout.tensors:
        kind = getattr(torch, dtype)
        part = data[offset : offset + math.prod(shape) * kind.itemsize]
        tensors.append(part.view(kind).reshape(shape))
    return tuple(tensors)


class _Borrowed:
    """Read-only memory as an array that claims to be writable, since torch warns otherwise."""

    def __init__(self, record: memoryview) -> None:
        self.array = np.frombuffer(record, np.uint8)
        interface = self.array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _aligned(offset: int) -> int:
    return _ALIGNMENT * math.ceil(offset / _ALIGNMENT)


def _checksum(record: memoryview | bytearray) -> bytes:
    return xxhash.xxh3_128_digest(memoryview(record)[16:])
