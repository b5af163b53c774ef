"""Searches in worker processes: what travels to them, and what they compute."""

import os
import pickle
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from joblib.externals.loky.backend import queues
from numpy.testing import assert_allclose
from sklearn.model_selection import GridSearchCV
from sklearn.utils.fixes import parse_version
from torch import nn
from torch.storage import TypedStorage

from sklearn_gradfeat import GradientFeatureClassifierCV
from sklearn_gradfeat.backbones import Pickled
from tests.counting import Counted, Logged
from tests.tiny import X, Y, estimator, tiny_net

ROOT = Path(__file__).parents[2]
GRID = {"alpha": [0.1, 1.0], "gradient_alpha": [1.0, 10.0, 100.0]}


@contextmanager
def loky():
    with joblib.parallel_config("loky", n_jobs=2, inner_max_num_threads=1):
        yield


@contextmanager
def dask():
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        yield


@contextmanager
def ray():
    ray = pytest.importorskip("ray")
    register = pytest.importorskip("ray.util.joblib").register_ray
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "site-packages")])
    variables = {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, runtime_env={"env_vars": variables})
    register()
    try:
        with joblib.parallel_config("ray", n_jobs=2, ray_remote_args={"num_gpus": 1}):
            yield
    finally:
        ray.shutdown()


slow_ray = pytest.param(ray, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[loky, dask, slow_ray])
def engine(request):
    """Run the tasks of joblib in two workers."""
    with request.param():
        yield


@pytest.fixture
def sent(monkeypatch):
    """Return the sizes of the tensors, and of the modules of estimators, that are pickled here."""
    sizes, of_storage, of_module = [], TypedStorage.__reduce__, Pickled.__reduce__

    def counted(storage):
        sizes.append(storage._untyped_storage.nbytes())
        return of_storage(storage)

    def counted_module(pickled):
        unpickled, (structure, kinds, numbers) = of_module(pickled)
        sizes.append(numbers.nbytes)
        return unpickled, (structure, kinds, numbers)

    monkeypatch.setattr(TypedStorage, "__reduce__", counted)
    monkeypatch.setattr(Pickled, "__reduce__", counted_module)
    return sizes


@pytest.fixture
def logged(tmp_path):
    network = Logged(*tiny_net())
    network.file = str(tmp_path / "calls")
    return network


def calls(network):
    """Return how often each process called the network."""
    return Counter(Path(network.file).read_text().split())


def test_a_pickled_module_is_counted(sent):
    network = tiny_net()
    size = sum(p.nbytes for p in network.parameters())
    for model in (network, estimator(network), estimator(network).fit(X, Y)):
        sent.clear()
        pickle.dumps(model)
        assert sum(sent) >= size


def test_a_network_in_a_file_does_not_travel(engine, sent, logged, tmp_path):
    """Each worker freezes it once, and the trunk sees every sample once on the machine."""
    counted, file = Counted(str(tmp_path / "passes")), tmp_path / "network.pt"
    torch.save(logged, file)
    sent.clear()
    model = estimator(
        partial(torch.load, file, weights_only=False),
        preprocess=counted,
        feature_store=tmp_path / "features",
    )
    search = GridSearchCV(model, GRID, cv=2, n_jobs=2, refit=False).fit(X, Y)
    assert sum(sent) == 0
    assert str(os.getpid()) not in calls(logged)
    with joblib.parallel_config("sequential"):
        alone = GridSearchCV(model, GRID, cv=2, refit=False).fit(X, Y)
    assert len(set(calls(logged).values())) == 1
    assert sum(map(int, Path(counted.file).read_text().split())) == len(X)
    for name in ("split0_test_score", "split1_test_score"):
        assert np.array_equal(search.cv_results_[name], alone.cv_results_[name])


@pytest.mark.parametrize("engine", [slow_ray], indirect=True)
def test_ray_gives_each_worker_a_device_of_its_own(engine):
    devices = joblib.Parallel()(joblib.delayed(os.getenv)("CUDA_VISIBLE_DEVICES") for _ in range(8))
    assert set(devices) == {"0", "1"}


def test_an_initializer_of_loky_gives_each_worker_a_device_of_its_own(tmp_path):
    """As in docs/howto.md: the names of the workers end in consecutive numbers."""
    if parse_version(joblib.__version__).release < (1, 5):
        pytest.skip("joblib has no initializers")

    def one_device():  # a local function travels by value, so workers import no tests
        import multiprocessing

        number = int(multiprocessing.current_process().name.rpartition("-")[2])
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % 2)

    def device():  # in two workers: the first waits for the second
        (tmp_path / str(os.getpid())).touch()
        start = time.monotonic()
        while len(os.listdir(tmp_path)) < 2 and time.monotonic() < start + 60:
            time.sleep(0.01)
        return os.getenv("CUDA_VISIBLE_DEVICES")

    with joblib.parallel_config("loky", n_jobs=2, initializer=one_device):
        devices = joblib.Parallel()(joblib.delayed(device)() for _ in range(2))
    assert set(devices) == {"0", "1"}


def test_a_module_is_one_file_for_all_workers_of_loky(monkeypatch):
    sent, dumps = [], queues.dumps

    def counted(*arguments, **options):
        message = dumps(*arguments, **options)
        sent.append(len(message))
        return message

    monkeypatch.setattr(queues, "dumps", counted)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6000), nn.ReLU(), nn.Linear(6000, 4))
    size = sum(p.nbytes for p in network.parameters())
    model = estimator(network, gradient_layers="3")
    with loky():
        search = GridSearchCV(model, {"alpha": [0.1, 1.0]}, cv=2, n_jobs=2, refit=False).fit(X, Y)
    assert 0 < sum(sent) < size / 4
    alone = GridSearchCV(model, {"alpha": [0.1, 1.0]}, cv=2, refit=False).fit(X, Y)
    assert_allclose(search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])


def test_folds_of_a_cv_estimator_stay_in_the_process(engine, sent):
    scores = [
        GradientFeatureClassifierCV(tiny_net(), alphas=[0.1, 1.0], gradient_alphas=[1.0], cv=2,
                                    tol=1e-2, n_jobs=n_jobs).fit(X, Y).scores_
        for n_jobs in (1, 2)
    ]  # fmt: skip
    assert sum(sent) == 0
    assert np.array_equal(*scores)
