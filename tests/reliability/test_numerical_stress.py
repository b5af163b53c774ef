"""Data, targets, weights and penalties at the ends of what users pass.

Every fit must end with a finite model whose objective never increased, or with an error that says
what to change.
"""

import itertools
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
)


def network(scale=1.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())
    layers = layers.double()
    layers[2].weight.data *= scale
    return layers


NETWORK = network()
LINEAR = nn.Identity()


def rows(n=24, d=6):
    return np.random.default_rng(0).normal(size=(n, d))


def with_constants(X):
    X[:, ::2] = 7.5
    return X


def separable(X):
    X[:, 0] = 20.0 * (np.arange(len(X)) % 3)
    return X


SAMPLES = {
    "plain": rows,
    "tiny": lambda: rows() * 1e-12,
    "huge": lambda: rows() * 1e12,
    "of all sizes": lambda: rows() * 10.0 ** np.linspace(-12, 12, 6),
    "far from zero": lambda: rows() + 1e12,
    "constant columns": lambda: with_constants(rows()),
    "all equal": lambda: np.ones((24, 6)),
    "zeros": lambda: np.zeros((24, 6)),
    "copies": lambda: np.repeat(rows(4), 6, axis=0),
    "separable": lambda: separable(rows()),
    "float32": lambda: rows().astype(np.float32),
}
PENALTIES = [1e-12, 1e-4, 1.0, 1e12, "auto"]
CLASSES = np.arange(24) % 3
NUMBERS = np.random.default_rng(1).normal(size=24)
TARGETS = {
    "plain": NUMBERS,
    "tiny": NUMBERS * 1e-12,
    "huge": NUMBERS * 1e12,
    "offset": NUMBERS + 1e12,
    "constant": np.full(24, 3.5),
    "two of other sizes": np.stack([NUMBERS * 1e-12, NUMBERS[::-1] * 1e12], 1),
    "outlier": np.where(np.arange(24) == 3, 1e12, NUMBERS),
}
WEIGHTS = {
    "huge": np.full(24, 1e300),
    "tiny": np.full(24, 1e-300),
    "of all sizes": 10.0 ** np.linspace(-300, 300, 24),
    "one": np.arange(24) < 3,
}
ADVICE = "Scale|Increase|increase|too large|too far|Pass|larger"


def fitted(model, X, y, weights=None):
    """Fit, and check that the model is finite; return it with the warnings, None after an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("error", category=RuntimeWarning)
        model.fit(X, y, sample_weight=weights)
        assert (np.diff(model.objective_path_) <= 0).all()
        assert np.isfinite(model.objective_path_).all()
        for value in (model.coef_, model.intercept_, *model.gradient_coef_.values()):
            assert np.isfinite(value).all()
        assert model.predict(X).shape == np.shape(y)
        if hasattr(model, "predict_proba"):
            assert np.isfinite(model.predict_proba(X)).all()
            assert not np.isnan(model.predict_log_proba(X)).any()
    allowed = ConvergenceWarning, UserWarning
    assert all(issubclass(w.category, allowed) for w in caught), [str(w.message) for w in caught]
    return [str(w.message) for w in caught]
