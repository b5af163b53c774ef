"""Bits that flip in a feature store on disk: the same model as without a store, or an error."""

import os
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sklearn_gradfeat.cache import _disk
from tests.reliability.processes import fit, run


def flipped(content, rng):
    """Return bytes with one to three flipped bits: half of them where LMDB has its structure."""
    damaged = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(content)))
        if rng.random() < 0.5:
            place = place // 4096 * 4096 + int(rng.integers(64))
        damaged[place] ^= 1 << int(rng.integers(8))
    return damaged


def close():
    while _disk._stores:
        _disk._stores.popitem()[1]._environment.close()


def flips(folder, seed, n_flips):
    """Flip bits of a store before each of many fits; count how the fits end."""
    warnings.simplefilter("ignore")
    rng, found = np.random.default_rng(seed), Counter()
    path, whole = Path(folder) / "store", Path(folder) / "whole"
    expected = fit(None)
    assert fit(path) == expected
    fit(path, shift=1.0)  # other records
    close()
    path.rename(whole)
    for i in range(n_flips):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        file = path / ("features.mdb-lock" if i % 20 == 0 else "features.mdb")
        status = file.stat()
        file.write_bytes(flipped(file.read_bytes(), rng))
        if i % 2:
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        print(f"{seed=} {i=}", file=sys.stderr, flush=True)  # the last one, if the process ends
        try:
            outcome = "the same bits" if fit(path) == expected else "other bits"
        except ValueError as error:
            assert "Delete the file" in str(error)
            outcome = "an error"
        close()
        found[outcome] += 1
    return found


def test_flipped_bits(tmp_path):
    assert set(flips(tmp_path, 0, 20)) == {"the same bits", "an error"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_flipped_bits(tmp_path, seed):
    found = run(flips, tmp_path, seed, 500, timeout=600)  # a fault of memory ends the process
    assert set(found) == {"the same bits", "an error"}
    assert min(found.values()) > 50
