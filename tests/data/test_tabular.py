"""Unscaled columns and flat images are pointed out, and nothing else is."""

import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureRegressorCV
from sklearn_gradfeat.data import warn_of_tabular


def normal(n=60, n_features=4):
    return np.random.default_rng(0).normal(size=(n, n_features))


def images(n, n_features):
    X = np.random.default_rng(0).integers(0, 256, (n, n_features))
    X[0, 0] = 255
    return X


@pytest.mark.parametrize("n_features", [2, 4, 30])
def test_a_dominant_column_is_named(n_features):
    X = normal(n_features=n_features) * np.append(np.ones(n_features - 1), 1e4)
    with pytest.warns(UserWarning, match=f"column {n_features - 1} dominates.*StandardScaler"):
        warn_of_tabular(X)


def test_estimators_name_the_column_once():
    X = pd.DataFrame(normal() * [1, 1e4, 1, 1], columns=["a", "income", "b", "c"])
    y = np.arange(60) % 2
    classifier = GradientFeatureClassifier(features="activation", alpha=1.0)
    search = GradientFeatureRegressorCV(alphas=[1.0], features="activation", cv=2)
    for model in (classifier, search):
        with pytest.warns(UserWarning, match="column 'income' dominates") as found:
            model.fit(X, y)
        assert len(found) == 1
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()  # it may scale by itself
    classifier.set_params(backbone=network).fit(X.to_numpy(), y)


@pytest.mark.parametrize("data", [load_wine, load_breast_cancer])
def test_real_data_before_and_after_scaling(data):
    X, _ = data(return_X_y=True)
    with pytest.warns(UserWarning, match="very different scales"):
        warn_of_tabular(X)
    warn_of_tabular(StandardScaler().fit_transform(X))


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float64"])
@pytest.mark.parametrize(("n_features", "shape"), [(784, "-1, 28, 28"), (3072, "-1, 3, 32, 32")])
def test_flat_images(n_features, shape, dtype):
    with pytest.warns(UserWarning, match=rf"flat images.*X\.reshape\({shape}\), as uint8 or"):
        warn_of_tabular(images(9, n_features).astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_flat_images_divided_by_255(dtype):
    with pytest.warns(UserWarning, match=r"flat images.*X\.reshape\(-1, 28, 28\).*in \[0, 1\]"):
        warn_of_tabular(images(9, 784).astype(dtype) / 255)


@pytest.mark.parametrize(
    "X",
    [
        load_iris().data,
        load_diabetes().data,
        load_digits().data,
        normal(),
        normal() * 1e300,
        normal() * 1e-300,
        np.ones((5, 3)),
        normal() * [0, 1, 1, 1],
        normal() * [1e-12, 1, 1, 1],  # rounding errors of a constant
        np.hstack([normal(), normal() > 2]),
        normal(n_features=1) * 1e5,
        normal(9, 784),
        images(9, 785),
        images(9, 64),
        images(9, 784) - 1,
        images(9, 784) / 256,
        np.random.default_rng(0).random((9, 784)).clip(0, 0.9) / 0.9,
        np.minimum(images(9, 784), 1) * 255,  # ink or none
        (normal(9, 256) > 0).astype(np.uint8),
    ],
)
def test_other_data_is_not_mentioned(X):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_tabular(X)
