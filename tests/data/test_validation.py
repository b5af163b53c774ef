"""Invalid X and y raise an error, and a failed fit changes nothing."""

import copy
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from PIL import Image
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.data._targets import normalized_weights
from tests.data.arrays import Lazy, with_value
from tests.tiny import NET, X, Y, estimator, tiny_net


@pytest.fixture(scope="module")
def fitted():
    return estimator().fit(X, Y)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (with_value(np.nan), ValueError, "X contains NaN"),
        (with_value(np.inf), ValueError, "X contains infinity"),
        (with_value(-np.inf), ValueError, "X contains infinity"),
        (X.astype(complex), ValueError, "Complex data not supported"),
        (X[:, 0, 0, 0], ValueError, "Expected 2D array, got 1D array"),
        (np.float64(3), ValueError, "Expected 2D array, got scalar array"),
        (X[:0], ValueError, "0 sample"),
        (X[:, :0], ValueError, "0 feature"),
        (X[:, :, :0], ValueError, "0 feature"),
        (X[:, :, :, :0], ValueError, "0 feature"),
        (np.char.add(X.astype(str), "a"), ValueError, "numeric"),
        (np.char.add(X.astype(str), "a").astype(object), ValueError, "could not convert string"),
        (np.ma.masked_array(X, mask=X > 1), ValueError, "X has masked values"),
        (torch.empty(24, 1, 8, 8, device="meta"), ValueError, "meta device has no values"),
        (sp.csr_array(X.reshape(24, -1)), TypeError, "Sparse data was passed for X"),
        (sp.csc_matrix(X.reshape(24, -1)), TypeError, "Sparse data was passed for X"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "predict"])
def test_bad_X(fitted, bad, error, match, method):
    if method == "fit":
        with pytest.raises(error, match=match):
            estimator().fit(bad, Y)
    else:  # where the shape is wrong as well, that may be said instead
        with pytest.raises((error, ValueError), match=f"{match}|fitted with samples of shape"):
            fitted.predict(bad)


def test_sparse_array_of_four_dimensions():
    try:
        sparse = sp.coo_array(X)
    except ValueError:
        pytest.skip("this scipy has no sparse arrays of four dimensions")
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        estimator().fit(sparse, Y)


def test_extended_precision():
    # Either works, or the message has to name what to convert.
    try:
        wide = estimator().fit(X.astype(np.longdouble), Y)
    except (TypeError, ValueError) as error:
        assert "X" in str(error)
    else:
        assert np.array_equal(wide.predict(X), estimator().fit(X, Y).predict(X))


def test_not_fitted():
    with pytest.raises(NotFittedError, match="not fitted yet"):
        estimator().predict(X)


@pytest.mark.parametrize("wrap", [np.asarray, Lazy], ids=["array", "lazy"])
@pytest.mark.parametrize(
    "bad", [X[:, :, :7], X.transpose(0, 2, 3, 1), np.repeat(X, 2, 1)], ids=["H", "NHWC", "C"]
)
def test_wrong_sample_shape(fitted, bad, wrap):
    with pytest.raises(ValueError, match=r"samples of shape .* fitted with samples of shape"):
        fitted.predict(wrap(bad))


@pytest.mark.parametrize("bad", [X.reshape(24, -1), X[:, 0], X[..., None]])
def test_wrong_ndim(fitted, bad):
    with pytest.raises(ValueError, match=r"fitted with samples of shape \(1, 8, 8\)"):
        fitted.predict(bad)


def test_one_sample_without_its_axis(fitted):
    with pytest.raises(ValueError, match=r"samples of that shape; for one sample, X\[None\]\."):
        fitted.predict(X[0])
    assert fitted.predict(X[0][None]).shape == (1,)


def table(**columns):
    return pd.DataFrame({"a": np.arange(24.0), **columns})


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        (table(t=["some text"] * 24, u=["x", None] * 12), "'t', 'u'"),
        (table(t=pd.Series(["x"] * 24, dtype="string")), "'t'"),
        (table(t=pd.Categorical(["x", "y"] * 12)), "'t'"),
        (table(t=pd.date_range("2020", periods=24)), "'t'"),
        (pd.DataFrame({"t": pd.date_range("2020", periods=24)}), "'t'"),
        (table(t=[Path("1.png")] * 24), "'t'"),
        (table(t=[Image.new("L", (2, 2))] * 24), "'t'"),
        (table(t=["x"] * 24).to_numpy(), "1"),
        (pd.DataFrame({f"{i}": ["x"] * 24 for i in range(9)}), "'0', '1', '2', '3', '4', ..."),
    ],
    ids=["texts", "string", "category", "dates", "dates alone", "paths", "images", "objects",
         "many"],
)  # fmt: skip
def test_columns_that_are_not_numeric_are_named(bad, names):
    match = rf"Columns of X are not numeric: {re.escape(names)}\. .*OneHotEncoder.*TextTokenizer"
    with pytest.raises(ValueError, match=match):
        GradientFeatureClassifier(alpha=1e-4, gradient_alpha=1e-4).fit(bad, Y)
    numeric = GradientFeatureClassifier(nn.Identity(), features="activation", alpha=1.0)
    numeric.fit(np.random.default_rng(0).normal(size=bad.shape), Y)
    with pytest.raises(ValueError, match=match), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the names of the columns were not known in fit
        numeric.predict(bad)


def test_columns_of_numbers_in_any_dtype():
    ones = table(
        i=pd.Series([1, 2] * 12, dtype="Int64"),
        b=pd.Series([True] * 24, dtype="boolean"),
        c=pd.Categorical([1, 2] * 12),
        o=pd.Series([1.5, 2] * 12, dtype=object),
    )
    model = GradientFeatureClassifier(features="activation", alpha=1.0, random_state=0)
    for columns in (["a", "i", "b", "c", "o"], ["a", "c", "o"]):
        expected = model.fit(ones[columns].astype(float), Y).coef_
        assert np.array_equal(model.fit(ones[columns], Y).coef_, expected)


def test_wrong_number_of_columns():
    rows = X.reshape(24, -1)[:, :5]
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
    model = estimator(net).fit(rows, Y)
    with pytest.raises(ValueError, match=r"X has 4 features, but .* is expecting 5 features"):
        model.predict(rows[:, :4])
    with pytest.raises(ValueError, match=r"fitted with samples of shape \(5,\)"):
        model.predict(X)


@pytest.mark.parametrize("wrap", [np.asarray, Lazy], ids=["array", "lazy"])
@pytest.mark.parametrize(
    ("y", "match"),
    [
        (Y[:20], "inconsistent numbers of samples"),
        (np.zeros(24, int), "one class"),
        (np.full(24, "a"), "one class"),
        (np.where(Y == 1, np.nan, Y), "NaN"),
        (np.linspace(0, 1, 24), "Unknown label type"),
        (np.stack([Y, Y], 1), "several columns"),
        (None, "y"),
        (np.ma.masked_array(Y, mask=Y == 1), "y has masked values, and their mask"),
    ],
)
def test_bad_y(y, match, wrap):
    with pytest.raises(ValueError, match=match):
        estimator().fit(wrap(X), y)


def test_column_y():
    with pytest.warns(DataConversionWarning, match="column-vector y"):
        column = estimator().fit(X, Y[:, None])
    assert np.array_equal(column.predict(X), estimator().fit(X, Y).predict(X))


@pytest.mark.parametrize("wrap", [np.asarray, Lazy], ids=["array", "lazy"])
def test_one_sample(wrap):
    with pytest.raises(ValueError, match=r"1 sample|one class"):
        estimator().fit(wrap(X[:1]), Y[:1])


def test_lazy_without_samples(fitted):
    with pytest.raises(ValueError, match="0 sample"):
        fitted.predict(Lazy(X[:0]))


def test_lazy_of_strings():
    with pytest.raises((ValueError, TypeError), match="X"):
        estimator().fit(Lazy(X.astype(str)), Y)


def test_lazy_input_removes_feature_names_of_an_earlier_fit():
    rows = pd.DataFrame(X.reshape(24, -1)[:, :3], columns=["a", "b", "c"])
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model = estimator(net, features="activation").fit(rows, Y)
    model.set_params(backbone=NET).fit(Lazy(X), Y)
    assert not hasattr(model, "feature_names_in_")
    assert model.n_features_in_ == 1


def infinite_net():
    net = tiny_net()
    nn.init.constant_(net[2].bias, np.inf)
    return net


def interrupted(batch):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("error", "match", "parameters", "arguments"),
    [
        (ValueError, "X contains NaN", {}, (with_value(np.nan), Y)),
        (ValueError, "0 feature", {}, (X[:, :, :0], Y)),
        (ValueError, "failed on a batch", {}, (X.reshape(24, -1), Y)),
        (ValueError, "failed on a batch", {}, (np.repeat(X, 3, 1), Y)),
        (ValueError, "inconsistent numbers of samples", {}, (X, Y[:20])),
        (ValueError, "one class", {}, (X, np.zeros(24))),
        (ValueError, "(?i)sample.weight.*zero", {}, (X, Y, np.zeros(24))),
        (ValueError, "one class", {}, (Lazy(X[:, :, :5]), np.zeros(24))),
        (ValueError, "X contains NaN", {}, (Lazy(with_value(np.nan)), Y)),
        (ValueError, "alpha", {"alpha": -1}, (X, Y)),
        (ValueError, "gradient_layers", {"gradient_layers": "none"}, (X, Y)),
        (ValueError, "infinity", {"backbone": infinite_net()}, (X, Y)),
        (ConvergenceWarning, "max_iter", {"max_iter": 1, "tol": 1e-18}, (X, (Y > 0).astype(int))),
        (KeyboardInterrupt, None, {"preprocess": interrupted}, (X[:, :, :, :7], Y)),
    ],
)
def test_a_failing_fit_changes_nothing(fitted, error, match, parameters, arguments):
    model = copy.copy(fitted).set_params(**parameters)
    before = dict(model.__dict__)
    with pytest.raises(error, match=match):
        model.fit(*arguments)
    assert set(model.__dict__) == set(before)
    for name, value in before.items():
        assert model.__dict__[name] is value or model.__dict__[name] == value, name
    model.set_params(**{name: getattr(fitted, name) for name in parameters})
    assert np.array_equal(model.predict_proba(X), fitted.predict_proba(X))


def test_a_failing_first_fit_leaves_nothing():
    model = estimator()
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match="one class"):
        model.fit(X, np.zeros(24))
    assert model.__dict__ == before


def test_feature_names_survive_a_failing_fit():
    rows = pd.DataFrame(X.reshape(24, -1)[:, :3], columns=["a", "b", "c"])
    model = estimator(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), features="activation")
    model.fit(rows, Y)
    with pytest.raises(ValueError, match="one class"):
        model.fit(rows.rename(columns={"a": "z"})[["z", "b"]], np.zeros(24))
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    assert model.n_features_in_ == 3
    model.predict(rows)


@pytest.mark.parametrize("scale", [1e-300, 1e300, 1.7e308])
@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 1.0, 1: 3.0}])
def test_weights_near_overflow(scale, class_weight):
    y, weights = np.arange(12) % 2, np.linspace(0.5, 1, 12)
    expected = normalized_weights(y, weights, class_weight)
    np.testing.assert_allclose(normalized_weights(y, weights * scale, class_weight), expected)


def test_infinite_class_weights_are_refused():
    with pytest.raises(ValueError, match=r"class_weight: its product.* smaller factors"):
        normalized_weights(np.arange(4) % 2, None, {0: 1.0, 1: np.inf})
