"""Fits with a checkpoint that are killed again and again, and go on each time.

One process forks all others, which saves their imports. In the slow test, this process only
imports: it fits nothing, and does not set the number of threads of torch. A fit is killed by itself
at one of several places, or by its parent at a random time.
"""

import os
import pickle
import random
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sklearn_gradfeat import config_context
from sklearn_gradfeat.cache._disk import DiskStore
from sklearn_gradfeat.cache._runner import Trunk
from sklearn_gradfeat.io import _archive
from sklearn_gradfeat.training import Journal, TwoStageFit
from tests.cache.stores import FORKS, fork
from tests.reliability.processes import NETWORK, run
from tests.reliability.test_kills import ended, forked
from tests.tiny import X, Y, estimator

pytestmark = fork

PLACES = {
    "trunk": (Trunk, "_pass"),
    "store": (DiskStore, "add"),
    "solver": (Journal, "keep"),
    "write": (_archive, "_verify"),
    "rename": (Path, "replace"),
    "round": (TwoStageFit, "moved"),
}
OPTIONS = {
    "gradient": {"gradient_alpha": "auto", "n_linearizations": 2, "gradient_layers": "top"},
    "activation": {"features": "activation", "alpha": "auto"},
    "fixed": {"gradient_layers": "top", "tol": 1e-8},
}


def model_of(folder, kind):
    """Return a model with a checkpoint and a feature store in a folder, or without any."""
    own = {"feature_store": None}
    if folder is not None:
        own = {"feature_store": folder / "store", "checkpoint": folder / "checkpoint"}
    return estimator(NETWORK, precision="float64", batch_size=8, **{**OPTIONS[kind], **own})


def watch(folder, place, number):
    """Note every place that is passed; be killed before or after the number-th time at one."""
    os.fsync = lambda _: None  # slow, and of no use where only the process dies
    log = os.open(folder / "log", os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    def watched(name, function):
        n_passed = 0

        def passed(*arguments, **options):
            nonlocal n_passed
            n_passed += 1
            if name == place and n_passed == number // 2 and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            found = function(*arguments, **options)
            os.write(log, f"{name}\n".encode())
            if name == place and n_passed == number // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return passed

    for name, (owner, attribute) in PLACES.items():
        setattr(owner, attribute, watched(name, getattr(owner, attribute)))


def fit(folder, kind, place=None, number=0):
    """Fit, and be killed at a place."""
    watch(folder, place, number)
    with config_context(checkpoint_seconds=0):
        model = model_of(folder, kind).fit(X, Y)
    write_result(folder, model)


def write_result(folder, model):
    penalties = [model.alpha_, model.gradient_alpha_]
    arrays = [model.coef_, model.intercept_, model.omega_, *model.gradient_coef_.values()]
    (folder / "model").write_bytes(pickle.dumps([penalties, *arrays]))


def passes(folder):
    """Return how often every place was passed."""
    return Counter((folder / "log").read_text().split())


def kills(folder, kind, seed, n_kills):
    """Kill fits, and let them go on; return how often they were killed at each place."""
    warnings.simplefilter("ignore")
    rng = random.Random(seed)
    whole = Path(folder) / "whole"
    whole.mkdir()
    start = time.monotonic()
    assert ended(forked(fit, whole, kind)) == 0
    seconds, expected, n_passed = time.monotonic() - start, result(whole), passes(whole)
    killed, n_fits = Counter(), 0
    while sum(killed.values()) < n_kills:
        own, n_own = Path(folder) / str(n_fits), 0
        own.mkdir()
        n_fits += 1
        places = [*PLACES, "any"] if n_kills > len(PLACES) else ["trunk", "solver", "rename"]
        for place in [*places, None]:
            if place is None or sum(killed.values()) == n_kills:
                assert ended(forked(fit, own, kind)) == 0
                break
            number = rng.randint(2, 2 * max(1, n_passed[place] // 4) + 1)
            child = forked(fit, own, kind, place, number)
            if place == "any":
                time.sleep(rng.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            status = ended(child)
            assert status in (0, -signal.SIGKILL), (place, number, status)
            killed[place] += status != 0
            n_own += status != 0
            if status == 0:
                break
        for found, array in zip(result(own), expected, strict=True):
            np.testing.assert_allclose(found, array, rtol=1e-6, atol=1e-9)
        assert not (own / "checkpoint").exists()
        # At most one iteration is lost, or the batch that was on its way to the store, and the
        # samples of the first batch that are computed again for comparison.
        assert passes(own)["solver"] <= n_passed["solver"] + n_own
        assert passes(own)["trunk"] <= n_passed["trunk"] + 2 * n_own
    return killed


def result(folder):
    return pickle.loads((folder / "model").read_bytes())


@FORKS
def test_kills(tmp_path):
    assert sum(kills(tmp_path, "activation", 0, 3).values()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_many_kills(tmp_path, seed):
    killed = run(kills, tmp_path, "gradient", seed, 20, timeout=600)
    assert sum(killed.values()) == 20
    assert set(killed) == {*PLACES, "any"}, killed
