"""Images in unusual containers."""

import numpy as np
import torch

from tests.tiny import X


class Lazy:
    """No more than what it takes to be read batch by batch."""

    def __init__(self, array):
        self._array = array
        self.shape = array.shape
        self.dtype = array.dtype

    def __len__(self):
        return len(self._array)

    def __getitem__(self, rows):
        return self._array[rows]


class Items(torch.utils.data.Dataset):
    """A map-style dataset, which need not say where it ends."""

    def __init__(self, item, length=24):
        self._item, self._length = item, length

    def __len__(self):
        return self._length

    def __getitem__(self, row):
        return self._item(row % 24)


def memory_map(folder, array):
    np.save(folder / "X.npy", array)
    return np.load(folder / "X.npy", mmap_mode="r")


def with_value(value):
    changed = X.copy()
    changed[3, 0, 2, 1] = value
    return changed
