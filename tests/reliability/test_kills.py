"""Processes that are killed while they fit with a feature store on disk, or save a model.

One process forks all others, which saves their imports. Forks of a process that has computed a
gradient cannot compute one, so these fits have no gradient term.
"""

import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from sklearn_gradfeat import load
from sklearn_gradfeat.io._archive import read_archive
from tests.cache.stores import FORKS, fork
from tests.reliability.processes import NETWORK, run
from tests.tiny import X, Y, estimator

pytestmark = fork


def fit(path, shift):
    """Return a model that is fitted to samples of their own for each ``shift``."""
    model = estimator(NETWORK, features="activation", feature_store=path, batch_size=8, max_iter=3)
    return model.fit(X + np.float32(shift), Y)


def same(one, other):
    return np.array_equal(one.coef_, other.coef_)


def forked(function, *arguments):
    """Call a function in a fork, which ends with status 0 if there is no error."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def ended(child):
    """Wait for a fork; return its exit status, or the negative number of the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(seconds, function, *arguments):
    """Call a function in a fork, and kill it after some time."""
    child = forked(function, *arguments)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL


def fit_for_ever(path, start):
    for shift in range(start, start + 10**6):
        fit(path, shift)


def create_for_ever(path):
    while True:
        shutil.rmtree(path, ignore_errors=True)
        fit(path, 0)


def fit_until(stop, path, start):
    """Fit and compare with fits without a store, while other processes are killed."""
    shift = start
    while not stop.exists():
        assert same(fit(path, shift), fit(None, shift)), shift
        shift += 1


def check_store(path, *shifts):
    """Fit with a store twice, so that the second time reads what the first has written."""
    for shift in shifts:
        expected = fit(None, shift)
        assert same(fit(path, shift), expected), shift
        assert same(fit(path, shift), expected), shift


def store(folder, seed, n_kills):
    """Kill processes that write to one store, which two others use at the same time."""
    warnings.simplefilter("ignore")
    path, stop, rng = Path(folder) / "store", Path(folder) / "stop", random.Random(seed)
    fit(None, 0)  # captures the network for all forks
    others = [forked(fit_until, stop, path, 10**6 * (i + 1)) for i in range(2)]
    for i in range(n_kills):
        killed(rng.uniform(0, 0.2), fit_for_ever, path, 100 * i)
        assert ended(forked(check_store, path, 100 * i, 100 * i + 1)) == 0, i
    stop.touch()
    assert [ended(other) for other in others] == [0, 0]
    return sorted(entry.name for entry in path.iterdir())


def creation(folder, seed, n_kills):
    """Kill processes that create a store."""
    warnings.simplefilter("ignore")
    path, rng, n_drafts = Path(folder) / "store", random.Random(seed), 0
    fit(None, 0)
    for i in range(n_kills):
        killed(rng.uniform(0, 0.1), create_for_ever, path)
        n_drafts += path.exists() and len(list(path.glob("features.mdb.*")))
        assert ended(forked(check_store, path, 0, i)) == 0, i
        assert not list(path.glob("features.mdb.*"))
    return n_drafts


def save_for_ever(path, models):
    while True:
        for model in models:
            model.save(path)


def saves(folder, seed, n_kills):
    """Kill processes that replace a model file."""
    warnings.simplefilter("ignore")
    path, rng = Path(folder) / "model", random.Random(seed)
    models = [fit(None, shift) for shift in (0, 1)]
    documents = []
    for model in models:
        model.save(path)
        documents.append(read_archive(path)[0])
    assert documents[0] != documents[1]
    for i in range(n_kills):
        killed(rng.uniform(0, 0.1), save_for_ever, path, models)
        assert read_archive(path)[0] in documents, i
    unfinished = [entry for entry in path.parent.iterdir() if entry != path]
    assert len(unfinished) <= n_kills
    for entry in unfinished:
        os.utime(entry, (0, 0))  # left long ago
    models[0].save(path)
    assert list(path.parent.iterdir()) == [path]
    torch.manual_seed(0)
    assert same(load(path, NETWORK), models[0])
    return len(unfinished)


def check_names(names):
    locks = {name for name in names if name.endswith(".lock")}
    assert len(locks) == 2  # one of the key, one of the writer
    assert set(names) - locks == {"features.mdb", "features.mdb-lock"}


@FORKS
def test_kills(tmp_path):
    for function, n_kills in ((store, 2), (creation, 2), (saves, 4)):
        folder = tmp_path / function.__name__
        folder.mkdir()
        found = function(folder, 0, n_kills)
        if function is store:
            check_names(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("function", "n_kills"), [(store, 25), (creation, 15), (saves, 15)])
def test_many_kills(tmp_path, seed, function, n_kills):
    found = run(function, tmp_path, seed, n_kills, timeout=100 + 10 * n_kills)
    if function is store:
        check_names(found)
