"""Fits of several processes, each with some of the samples, for the tests in test_ranks.py."""

import contextlib
import multiprocessing
import os
import pickle
import socket
import time
import warnings
from datetime import timedelta
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureRegressor
from sklearn_gradfeat.curvature import _coarse_space
from sklearn_gradfeat.training import TwoStageFit
from tests.tiny import estimator, tiny_net

_TIMEOUT = 600


def _images(n, n_classes=3, seed=0):
    y = np.arange(n) % n_classes
    noise = np.random.default_rng(seed).normal(size=(n, 1, 8, 8))
    return (noise + 0.5 * y[:, None, None, None]).astype(np.float32), y


def _table(n, n_outputs=1, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 5))
    y = np.sin(X[:, :n_outputs]) + 0.1 * rng.normal(size=(n, n_outputs)) + 3
    return X, y[:, 0] if n_outputs == 1 else y


def _few_weights():
    """A layer with few weights and many positions, whose gradients are cheap as explicit rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 40, 3), nn.AdaptiveAvgPool2d(1)
        )


def _two_layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh()
        )


def exact(model, **parameters):
    """Set the tolerance so that two routes to the optimum meet."""
    defaults = {"tol": 1e-9, "max_iter": 500, "random_state": 0}
    return model.set_params(**defaults, **parameters)


def _weights(n):
    weights = np.random.default_rng(1).uniform(size=n)
    weights[::7] = 0
    return weights


def _with_copies(X, y, *more):
    """Return samples of which every fourth is the copy of another, far away from it."""
    rows = np.arange(len(X))
    rows[::4] = (rows[::4] + len(X) // 2 + 1) % len(X)
    return X[rows], y[rows], *more


def _moved(n, n_classes=4):
    """Return images whose classes are how the activations change as the network moves."""
    X, _ = _images(n, 1)
    net, moved = tiny_net().double(), tiny_net().double()
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(0.3 * weight.abs().mean() * torch.randn_like(weight))
        change = (moved(torch.tensor(X).double()) - net(torch.tensor(X).double())).sum(1)
    return X, change.argsort().argsort().numpy() * n_classes // n


def _regressor(**parameters):
    given = {"alpha": 0.01, "gradient_alpha": 0.1, **parameters}
    return exact(GradientFeatureRegressor(_two_layers()), **given)


def _classifier(**parameters):
    given = {"alpha": 0.01, "gradient_alpha": 0.1, **parameters}
    return exact(GradientFeatureClassifier(_two_layers()), **given)


def _chosen(**parameters):
    return estimator(alpha="auto", gradient_alpha="auto", precision="float64", **parameters)


def _labels(n):
    X, y = _table(n, 3)
    return X, (y > 3).astype(int)


# name: (estimator, data); data are X, y and perhaps weights.
CASES = {
    "three classes": lambda: (exact(estimator()), _images(40)),
    "two classes": lambda: (exact(estimator()), _images(40, 2)),
    "strings": lambda: (
        exact(estimator(), class_weight={"a": 2, "bbb": 1, "c": 1}),
        (_images(40)[0], np.array(["a", "bbb", "c"])[_images(40)[1]]),
    ),
    "weights": lambda: (
        exact(estimator(), class_weight="balanced"),
        (*_images(40), _weights(40)),
    ),
    "no intercept": lambda: (exact(estimator(), fit_intercept=False), _images(40)),
    "activation": lambda: (exact(estimator(), features="activation"), _images(40)),
    "gradient": lambda: (exact(estimator(), features="gradient"), _images(40)),
    "labels": lambda: (_classifier(), _labels(50)),
    "labels, balanced": lambda: (_classifier(class_weight="balanced"), _labels(50)),
    "squared, classes": lambda: (exact(estimator(), loss="squared"), _images(40)),
    "squared": lambda: (_regressor(), (*_table(60), _weights(60))),
    "two outputs": lambda: (_regressor(), _table(60, 2)),
    "float32": lambda: (_regressor(precision="float32"), _table(60)),
    "huber": lambda: (_regressor(loss="huber", epsilon=0.1), (*_table(60), _weights(60))),
    "layers": lambda: (_classifier(activation_layer=["1", "5"]), _labels(50)),
    "small batches": lambda: (_regressor(batch_size=7), _table(60)),
    "two linearizations": lambda: (
        exact(estimator(), n_linearizations=2).set_params(tol=1e-12),
        _images(40),
    ),
    "coarse space": lambda: (
        exact(estimator(), n_linearizations=2, precision="float64").set_params(tol=1e-12),
        _images(40),
    ),
    "auto, coarse space": lambda: (
        estimator(alpha=0.01, gradient_alpha=1e-3, n_linearizations="auto", precision="float64"),
        _with_copies(*_images(40)),
    ),
    "all auto, coarse space": lambda: (
        estimator(
            alpha="auto", gradient_alpha="auto", n_linearizations="auto", precision="float64"
        ),
        _with_copies(*_images(100)),
    ),
    "wide": lambda: (
        exact(GradientFeatureClassifier(), alpha=0.01, gradient_alpha=0.1),
        (_table(12)[0], np.arange(12) % 2),
    ),
    "explicit rows": lambda: (
        exact(estimator(_few_weights()), gradient_layers="0"),
        _images(150),
    ),
    "rounded": lambda: (
        exact(estimator(), store_dtype="bfloat16", feature_store=None),
        _images(40),
    ),
    "copies": lambda: (exact(estimator()), _with_copies(*_images(40))),
    "auto, activation": lambda: (
        exact(estimator(activation_layer=None), alpha="auto", features="activation"),
        _with_copies(*_images(100, 2)),
    ),
    "auto": lambda: (
        exact(estimator(), alpha="auto", gradient_alpha="auto"),
        _with_copies(*_images(240)),
    ),
    "auto, squared": lambda: (
        _regressor(alpha="auto", gradient_alpha="auto", precision="float32"),
        _table(1100),
    ),
    "auto, gradient term": lambda: (_chosen(), _moved(128)),
    "auto, gradient term, coarse space": lambda: (_chosen(), _moved(128)),
    "auto, gradient term, two linearizations": lambda: (
        _chosen(n_linearizations=2),
        _moved(128),
    ),
    "all auto, gradient term, coarse space": lambda: (
        _chosen(n_linearizations="auto"),
        _moved(128),
    ),
    "merged": lambda: (exact(estimator(), precision="float64"), _images(40)),
    "warm start": lambda: (exact(estimator(), precision="float64"), _images(40)),
}
# What follows the fit.
AFTERWARDS = {
    "merged": lambda model, *data: model.merge(*data),
    "warm start": lambda model, *data: model.set_params(warm_start=True, alpha=0.03).fit(*data),
}


def shard(size, rank, n):
    """Return the samples of a rank: one for rank 0, and unequal numbers for the others."""
    ends = [0, 1, *(n * k // size + 3 for k in range(1, size - 1)), n]
    return slice(ends[rank], ends[rank + 1]) if size > 1 else slice(n)


@contextlib.contextmanager
def _fits_in_coarse_space(name, model):
    """Let the tiny networks of some cases have a coarse space.

    Several linearisations then have no other second stage.
    """
    with contextlib.ExitStack() as stack:
        if "coarse space" in name:
            stack.enter_context(mock.patch.object(_coarse_space, "_MIN_COST", 1))
        if "coarse space" in name and model.n_linearizations != 1:
            stack.enter_context(
                mock.patch.object(TwoStageFit, "fit_gradient", side_effect=AssertionError)
            )
        yield


def fit_case(name, rank=0, size=1):
    """Return the attributes of a fitted estimator, and its predictions for all samples."""
    model, data = CASES[name]()
    rows = shard(size, rank, len(data[0]))
    own = [part[rows] for part in data]
    with _fits_in_coarse_space(name, model):
        model.fit(*own)
        if name in AFTERWARDS:
            AFTERWARDS[name](model, *own)
    predict = getattr(model, "decision_function", model.predict)
    penalties = [] if isinstance(model.alpha, float) else [model.alpha_, model.gradient_alpha_]
    return {
        "predictions": predict(data[0]),
        "n_linearizations": model.n_linearizations_,
        "objective": model.objective_path_[-1],
        "penalties": penalties,
        "n_iter": model.n_iter_,
        "scores": model.validation_scores_,
        "bits": pickle.dumps([model.coef_, model.intercept_, model.gradient_coef_,
                              model.objective_path_, model.alpha_, model.gradient_alpha_,
                              model.omega_, model.linearization_point_]),
    }  # fmt: skip


def run(size, path, work, *args, tcp=False, timeout=_TIMEOUT):
    """Return ``work(rank, size, *args)`` of every rank of a new process group; None if killed.

    ``timeout`` is that of the group, in seconds.
    """
    context = multiprocessing.get_context("spawn")
    url = f"file://{path / 'store'}"
    if tcp:  # the store is a thread of rank 0
        with socket.socket() as free:
            free.bind(("localhost", 0))
            url = f"tcp://localhost:{free.getsockname()[1]}"
    processes = [
        context.Process(target=_rank, args=(rank, size, url, path, timeout, work, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(_TIMEOUT)
    finally:
        for process in processes:
            process.kill()
    found = [path / f"{rank}.pickle" for rank in range(size)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in found]


def _rank(rank, size, url, path, timeout, work, args):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=url, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    write(path, rank, work(rank, size, *args))
    if "tcp" in url:
        time.sleep(20)  # others may still ask the store
    os._exit(0)  # do not wait for ranks that were killed


def write(path, rank, found):
    """Keep what a rank has found, for :func:`run`."""
    (path / f"{rank}.pickle").write_bytes(pickle.dumps(found))
