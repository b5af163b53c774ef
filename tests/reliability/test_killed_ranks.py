"""Joint fits with a checkpoint, of which one rank or both are killed, and which go on each time.

As in test_killed_fits, one process forks all others. A rank is killed by itself at one of several
places, or by its parent at a random time. Then the other rank must end with an error, soon.
"""

import os
import random
import signal
import time
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from sklearn_gradfeat import config_context
from sklearn_gradfeat.data import _ranks
from tests.cache.stores import fork
from tests.reliability.processes import run
from tests.reliability.test_killed_fits import PLACES, model_of, passes, result, watch, write_result
from tests.reliability.test_kills import forked
from tests.tiny import data

pytestmark = fork

X, Y = data(48)
RANKS = (0, 1)
# Seconds until a rank must have seen that the other one is lost. The timeout of the group is 30
# minutes.
BOUND = 60


def own(folder, rank):
    """Return the folder of a rank."""
    return folder / f"rank{rank}"


def fit(folder, rank, attempt, kind, place=None, number=0):
    """Fit with the other rank, and be killed at a place; keep the text of an error."""
    _ranks._BEAT, _ranks._SOON = 0.2, 2.0
    watch(own(folder, rank), place, number)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group{attempt}", rank=rank, world_size=2,
        timeout=timedelta(minutes=30),
    )  # fmt: skip
    (own(folder, rank) / f"ready{attempt}").touch()
    try:
        with config_context(checkpoint_seconds=0):
            model = model_of(folder, kind).fit(X[rank::2], Y[rank::2])
    except RuntimeError as error:
        (own(folder, rank) / "error").write_text(str(error))
        raise
    write_result(own(folder, rank), model)


def together(folder, attempt, kind, victims=(), place=None, number=0, seconds=None):
    """Fit on both ranks, and kill some; return their exit statuses.

    The victims are killed at a place, or after ``seconds`` of the fit.
    """
    for rank in RANKS:
        own(folder, rank).mkdir(parents=True, exist_ok=True)
        (own(folder, rank) / "error").unlink(missing_ok=True)
    children = [
        forked(fit, folder, rank, attempt, kind, place if rank in victims else None, number)
        for rank in RANKS
    ]
    if seconds is not None:
        while not all((own(folder, rank) / f"ready{attempt}").exists() for rank in RANKS):
            time.sleep(0.01)
        time.sleep(seconds)
        for rank in victims:
            os.kill(children[rank], signal.SIGKILL)
    statuses, first = {}, None
    while len(statuses) < len(RANKS):
        for rank in set(RANKS) - set(statuses):
            child, status = os.waitpid(children[rank], os.WNOHANG)
            if child:
                statuses[rank] = os.waitstatus_to_exitcode(status)
                first = first or time.monotonic()
        if first is not None and time.monotonic() - first > BOUND:
            (rank,) = set(RANKS) - set(statuses)
            os.kill(children[rank], signal.SIGKILL)
            raise AssertionError(f"rank {rank} goes on without the other: {place} {statuses}")
        time.sleep(0.01)
    return [statuses[rank] for rank in RANKS]


def check_survivor(folder, statuses):
    """Check that a rank whose partner was killed names it, unless its own fit was finished."""
    for rank in RANKS:
        if statuses[rank] == 1:
            assert statuses[1 - rank] == -signal.SIGKILL
            assert f"ank {1 - rank}" in (own(folder, rank) / "error").read_text()
        assert statuses[rank] in (0, 1, -signal.SIGKILL)


def check_results(folder, expected):
    found = [(own(folder, rank) / "model").read_bytes() for rank in RANKS]
    assert found[0] == found[1]
    for array, other in zip(result(own(folder, 0)), expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-6, atol=1e-9)
    assert not (folder / "checkpoint").exists()


def one_kill(folder):
    """Kill rank 1 in the solver, and fit again; return the passes of both ranks."""
    warnings.simplefilter("ignore")
    folder = Path(folder)
    assert together(folder / "whole", 0, "fixed") == [0, 0]
    fits = folder / "fits"
    statuses = together(fits, 0, "fixed", [1], "solver", 10)
    assert statuses == [1, -signal.SIGKILL]
    check_survivor(fits, statuses)
    assert (fits / "checkpoint").exists()
    before = [passes(own(fits, rank)) for rank in RANKS]
    assert together(fits, 1, "fixed") == [0, 0]
    check_results(fits, result(own(folder / "whole", 0)))
    after = [passes(own(fits, rank)) for rank in RANKS]
    whole = [passes(own(folder / "whole", rank)) for rank in RANKS]
    return before, after, whole


def many_kills(folder, seed, n_kills):
    """Kill ranks, and fit again; return how often ranks were killed at each place."""
    warnings.simplefilter("ignore")
    rng, folder = random.Random(seed), Path(folder)
    whole, start = folder / "whole", time.monotonic()
    assert together(whole, 0, "gradient") == [0, 0]
    seconds, expected = time.monotonic() - start, result(own(whole, 0))
    n_passed = [passes(own(whole, rank)) for rank in RANKS]
    killed, n_fits = Counter(), 0
    while sum(killed.values()) < n_kills:
        fits, n_own, is_lost = folder / str(n_fits), 0, False
        n_fits += 1
        for attempt in range(4):
            place = rng.choice([*PLACES, "any"])
            writes = place in ("write", "rename")  # only rank 0 does
            victims = (0,) if writes else rng.choice([(0,), (1,), RANKS])
            if attempt == 3 or sum(killed.values()) >= n_kills:
                assert together(fits, attempt, "gradient") == [0, 0]
                break
            if place == "any":
                statuses = together(
                    fits, attempt, "gradient", victims, seconds=rng.uniform(0, seconds)
                )
            else:
                number = rng.randint(2, 2 * max(1, n_passed[victims[0]][place] // 4) + 1)
                statuses = together(fits, attempt, "gradient", victims, place, number)
            check_survivor(fits, statuses)
            n_killed = statuses.count(-signal.SIGKILL)
            killed[place] += n_killed
            n_own += n_killed
            if statuses == [0, 0]:
                break
            # A rank may be killed when the file is removed, and the other one has not ended yet.
            is_lost |= not (fits / "checkpoint").exists() and passes(own(fits, 0))["solver"] > 0
        check_results(fits, expected)
        for rank in RANKS:
            n = passes(own(fits, rank))
            assert n["trunk"] <= n_passed[rank]["trunk"] + 2 * n_own
        if not is_lost:
            assert passes(own(fits, 0))["solver"] <= n_passed[0]["solver"] + n_own
    return killed


def test_a_killed_rank(tmp_path):
    before, after, whole = run(one_kill, tmp_path, timeout=300)
    for rank in RANKS:
        assert before[rank]["trunk"] == after[rank]["trunk"] == whole[rank]["trunk"]
        assert before[rank]["solver"] < whole[rank]["solver"]
    assert after[0]["solver"] <= whole[0]["solver"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_many_killed_ranks(tmp_path, seed):
    killed = run(many_kills, tmp_path, seed, 12, timeout=1800)
    assert sum(killed.values()) >= 12
