"""Many fits and predictions in one process, from several threads at once.

All results have the bits of a serial run, and the process grows neither in memory nor in open files
nor in threads.
"""

import gc
import hashlib
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
)
from tests.tiny import NET, data, tiny_net

PROCESS = Path("/proc/self")
pytestmark = pytest.mark.skipif(not PROCESS.exists(), reason="needs Linux's files of processes")
# Memory that the allocators of the threads may keep, in bytes.
GROWTH = 64 * 2**20

IMAGES, CLASSES = data(24)
NEW, _ = data(9)
ROWS = np.random.default_rng(0).normal(size=(30, 5))
NUMBERS = np.sin(ROWS[:, 0])
FIXED = {"alpha": 0.1, "gradient_alpha": 0.1}
GRID = {"alphas": [0.1, 0.01], "gradient_alphas": [0.1, np.inf], "cv": 2}


class Job(NamedTuple):
    """An estimator with its parameters, and what it is fitted to."""

    kind: Any
    backbone: Any
    options: dict[str, Any]
    X: Any
    y: Any
    new: Any

    def digest(self, n_predictions):
        """Fit a model, predict with it, and return a digest of all results."""
        model = self.kind(self.backbone, random_state=0, **self.options).fit(self.X, self.y)
        found = hashlib.sha256()
        for value in (model.coef_, model.intercept_, *model.gradient_coef_.values()):
            found.update(value.tobytes())
        methods = [model.predict, model.transform]
        if hasattr(model, "predict_proba"):
            methods.append(model.predict_proba)
        for predict in itertools.islice(itertools.cycle(methods), n_predictions):
            found.update(predict(self.new).tobytes())
        return found.hexdigest()


def jobs(store):
    """Return models of all kinds; some share a network and a store."""
    other = tiny_net()

    def images(kind, backbone=NET, y=CLASSES, **options):
        return Job(kind, backbone, options, IMAGES, y, NEW)

    def rows(kind, y, **options):
        return Job(kind, None, options, ROWS, y, ROWS[:7])

    labels = np.eye(3, dtype=int)[CLASSES]
    return [
        images(GradientFeatureClassifier, **FIXED),
        images(GradientFeatureClassifier, **FIXED, feature_store=store),
        images(GradientFeatureClassifier, other, **FIXED, feature_store=store, batch_size=7),
        images(GradientFeatureClassifier, tiny_net, **FIXED, gradient_layers="all"),
        images(GradientFeatureClassifier, other, y=labels, **FIXED, feature_store=None),
        images(GradientFeatureClassifier, **FIXED, activation_layer=2, n_linearizations=2),
        images(GradientFeatureRegressor, other, y=CLASSES * 1.0, **FIXED, loss="huber"),
        images(GradientFeatureClassifierCV, y=CLASSES > 0, **GRID, n_jobs=2),
        rows(GradientFeatureClassifier, NUMBERS > 0, **FIXED),
        rows(GradientFeatureClassifier, NUMBERS > 0.5),
        rows(GradientFeatureRegressor, np.stack([NUMBERS, ROWS[:, 1]], 1)),
        rows(GradientFeatureRegressorCV, NUMBERS, **GRID),
    ]


def resources():
    """Return the memory of the process, and the numbers of its files and threads."""
    gc.collect()
    memory = int((PROCESS / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return memory, len(os.listdir(PROCESS / "fd")), threading.active_count()


def soak(work, n_fits, n_predictions, n_threads):
    """Fit and predict serially, then in threads; return the resources after a tenth and after all.

    A tenth of the fits warms up the allocators and the pools of threads.
    """
    expected = [job.digest(n_predictions) for job in work]
    numbers = [i % len(work) for i in range(n_fits)]

    def check(i):
        assert work[i].digest(n_predictions) == expected[i], work[i]

    used = []
    with ThreadPoolExecutor(n_threads) as threads:
        for part in (numbers[: n_fits // 10], numbers[n_fits // 10 :]):
            list(threads.map(check, part))
            used.append(resources())
    return used


def test_threads_have_the_bits_of_a_serial_run(tmp_path):
    every = jobs(tmp_path)
    soak([every[i] for i in (0, 1, 8, 10)], n_fits=12, n_predictions=3, n_threads=4)


@pytest.mark.slow
def test_three_hundred_fits(tmp_path):
    warm, used = soak(jobs(tmp_path), n_fits=330, n_predictions=10, n_threads=8)
    assert used[0] - warm[0] < GROWTH
    assert used[1] <= warm[1]
    assert used[2] <= warm[2]
