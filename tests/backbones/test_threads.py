"""The number of threads inside of fits and predictions, and after them."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.backbones import neutral_state, threads_for, threads_for_head
from sklearn_gradfeat.backbones._threads import LARGE, one_thread
from tests.tiny import NET, X, Y, estimator


@contextmanager
def caller_with(number):
    """Set the number of threads, after torch has set its own as it does in a new thread."""
    torch.get_num_threads()
    with threadpool_limits(number, user_api="openmp"):
        yield


@pytest.fixture(autouse=True)
def _three_threads():
    with caller_with(3):
        yield


@one_thread()
def numbers():
    """Return the number of threads for small and for large products."""
    found = [torch.get_num_threads()]
    for n_products in (LARGE - 1, LARGE):
        with threads_for(n_products):
            found.append(torch.get_num_threads())
            with neutral_state():  # another fit inside, as in a preprocess of the user
                found.append(torch.get_num_threads())
    return [*found, torch.get_num_threads()]


def test_small_and_large():
    assert numbers() == [1, 1, 1, 3, 3, 1]
    assert torch.get_num_threads() == 3


def test_never_more_threads_than_the_caller():
    with caller_with(1):
        assert numbers() == [1] * 6
        with threads_for(LARGE):
            assert torch.get_num_threads() == 1


def test_outside_of_fits():
    with threads_for(LARGE):
        assert torch.get_num_threads() == 3
    with threads_for(0):
        assert torch.get_num_threads() == 3


def test_restored_after_an_error():
    with pytest.raises(KeyError), one_thread(), threads_for(LARGE):
        raise KeyError
    assert torch.get_num_threads() == 3
    assert numbers() == [1, 1, 1, 3, 3, 1]


def test_threads_do_not_change_each_other():
    """Eight at once, all inside before any leaves; each finds its own number afterwards."""
    barrier = Barrier(8)

    def run(number):
        with caller_with(number):
            with one_thread():
                barrier.wait()
                inside = torch.get_num_threads()
                with threads_for(LARGE):
                    large = torch.get_num_threads()
                barrier.wait()
            return inside, large, torch.get_num_threads()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, range(1, 9)))
        default = list(pool.map(lambda _: torch.get_num_threads(), range(8)))
    assert found == [(1, n, n) for n in range(1, 9)]
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as pool:
        assert set(default) == {pool.submit(torch.get_num_threads).result()}


@pytest.mark.parametrize(
    ("shape", "number"),
    [((256, 128), 1), ((256, 64, 4, 4), 3), ((256, 16, 64), 3), ((0, 64, 4, 4), 1)],
)
def test_products_of_a_pass(shape, number):
    """A vector per sample, an image of 64 channels, a sequence of vectors."""
    parameters = [torch.empty(64, 64, 3, 3)]
    with one_thread(), threads_for_head(parameters, (torch.empty(shape),)):
        assert torch.get_num_threads() == number


@pytest.mark.filterwarnings("ignore:preprocess cannot be pickled:UserWarning")
def test_number_in_fits_and_predictions():
    """The frozen layers have the threads of the caller; targets are encoded in one thread."""
    seen, passes = [], []

    class Recording(GradientFeatureClassifier):
        def _problem(self, y, sample_weight):
            seen.append(torch.get_num_threads())
            return super()._problem(y, sample_weight)

    def preprocess(x):
        passes.append((len(x), torch.get_num_threads()))
        return x

    model = Recording(NET, preprocess=preprocess, feature_store=None).fit(X, Y)
    assert seen == [1]
    assert {number for n, number in passes if n == len(X)} == {3}
    assert torch.get_num_threads() == 3
    passes.clear()
    model.predict(X)
    assert set(passes) == {(len(X), 3)}
    assert torch.get_num_threads() == 3


@pytest.mark.filterwarnings("ignore:preprocess cannot be pickled:UserWarning")
def test_number_after_a_fit_that_fails():
    def failing(x):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        estimator(preprocess=failing, feature_store=None).fit(X, Y)
    assert torch.get_num_threads() == 3


def test_predictions_in_threads():
    model = estimator().fit(X, Y)
    expected = model.predict_proba(X)

    def predict(_):
        found = model.predict_proba(X)
        return found, torch.get_num_threads()

    with ThreadPoolExecutor(8) as pool:
        before = list(pool.map(lambda _: torch.get_num_threads(), range(8)))
        results = list(pool.map(predict, range(32)))
    assert {number for _, number in results} <= set(before)
    assert all(np.array_equal(found, expected) for found, _ in results)
    assert torch.get_num_threads() == 3
