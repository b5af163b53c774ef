"""Targets and sample weights."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_sample_weight

from sklearn_gradfeat.data import (
    encode_classes,
    normalized_weights,
    numeric_targets,
    weighted_mean,
    weighted_median,
)
from sklearn_gradfeat.data._targets import plain_targets

# --- classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([3, -1, 3], [-1, 3]),
        ([True, False, True], [False, True]),
        ([1.0, 0.0, 2.0], [0.0, 1.0, 2.0]),
    ],
)
def test_classes_are_sorted(y, classes):
    found, targets = encode_classes(np.array(y))
    assert found.tolist() == classes
    assert targets.ndim == 1
    assert found[targets].tolist() == y


@pytest.mark.parametrize("dtype", [int, bool, float])
def test_labels_have_the_numbers_of_their_columns(dtype):
    y = np.array([[0, 1, 1], [1, 0, 1]], dtype=dtype)
    classes, targets = encode_classes(y)
    assert classes.tolist() == [0, 1, 2]
    assert targets.dtype == np.float64
    assert np.array_equal(targets, y)


def test_one_column_of_classes_is_flattened():
    with pytest.warns(UserWarning, match="A column-vector y was passed"):
        classes, targets = encode_classes(np.array([["a"], ["b"]]))
    assert classes.tolist() == ["a", "b"]
    assert targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["a", "a"], "at least 2 classes, but y contains one class: a"),
        ([0.5, 1.5], "Unknown label type: continuous"),
        ([[0, 2], [1, 1], [2, 0]], r"several columns of classes\. Pass one column"),
        ([[2, 3], [3, 2]], "y: multilabel targets must be a matrix of zeros and ones"),
    ],
)
def test_classes_that_cannot_be_used(y, message):
    with pytest.raises(ValueError, match=message):
        encode_classes(np.array(y))


# --- dtypes of pandas ---


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        (pd.Series([3, 1], dtype="Int64"), np.array([3, 1])),
        (pd.Series([1, 0], dtype="boolean"), np.array([True, False])),
        (pd.Series([1.5, 0], dtype="Float64"), np.array([1.5, 0])),
        (pd.Series([3, 1], dtype="category"), np.array([3, 1])),
        (pd.Series(["b", "a"], dtype="category"), np.array(["b", "a"], object)),
        (pd.Series(["b", "a"], dtype="string"), np.array(["b", "a"], object)),
        (pd.Categorical(["b", "a"]), np.array(["b", "a"], object)),
        (pd.array([3, 1], dtype="Int64"), np.array([3, 1])),
        (pd.Series([3, 1], dtype=object), np.array([3, 1])),
        (np.array([True, False], object), np.array([True, False])),
        (pd.DataFrame({"a": pd.Series([1, 0], dtype="Int64"), "b": [True, False]}),
         np.array([[1, 1], [0, 0]])),
        ([1.5, 2], np.array([1.5, 2])),
        (np.array([], object), np.array([])),
    ],
)  # fmt: skip
def test_targets_of_pandas_have_a_dtype_of_numpy(y, expected):
    found = plain_targets(y)
    assert found.dtype == expected.dtype
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("y", "row"),
    [
        (pd.Series(["a", "b", None], dtype="category"), 2),
        (pd.Series(["a", pd.NA, "b"], dtype="string"), 1),
        (pd.Series([True, None], dtype="boolean"), 1),
        (pd.Series(["a", np.nan]), 1),
        (["a", None], 1),
        (np.array([1, np.nan, 2], object), 1),
        (np.array([[1, 0], [0, pd.NaT]], object), 1),
    ],
)
def test_missing_targets_are_found(y, row):
    with pytest.raises(ValueError, match=f"y has missing values, the first in row {row}: .*Leave"):
        plain_targets(y)


@pytest.mark.parametrize(
    "y",
    [
        [["a"], ["a", "b"]],
        [("a",), ("a", "b")],
        [{"a"}, {"a", "b"}],
        [{"a"}, None],
        pd.Series([["a"], ["b"]]),
        [np.zeros(1), np.zeros(2)],
    ],
)
def test_collections_of_labels_are_refused(y):
    with pytest.raises(ValueError, match=r"y must hold one target for each .*MultiLabelBinarizer"):
        plain_targets(y)


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("y", [[1, 2], [[1.0], [2.0]], np.array([1, 2], object)], ids=repr)
def test_numeric_targets_keep_their_shape(y):
    found = numeric_targets(np.asarray(y))
    assert found.dtype == np.float64
    assert np.array_equal(found, np.asarray(y, float))


@pytest.mark.parametrize("y", [["cold"], [np.nan], [np.inf], [1j]], ids=repr)
def test_numeric_targets_that_cannot_be_used(y):
    with pytest.raises(ValueError, match=r"y must hold finite real numbers\. "):
        numeric_targets(np.array(y))


@pytest.mark.parametrize("dtype", ["M8[D]", "m8[s]"])
def test_dates_are_no_numbers(dtype):
    with pytest.raises(ValueError, match="y must hold finite real numbers, not dates"):
        numeric_targets(np.zeros(3, dtype))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.integers(0, 1000))
def test_weighted_mean(column, seed):
    weights = np.random.default_rng(seed).random(len(column)) + 0.01
    weights /= weights.sum()
    targets = np.stack([column, np.full(len(column), 0.1)], 1)
    mean = weighted_mean(targets, weights)
    assert mean[0] == pytest.approx(np.average(column, weights=weights), rel=1e-9, abs=1e-6)
    assert mean[1] == 0.1  # to the last bit


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8), st.integers(0, 1000))
def test_weighted_median_is_that_of_repetitions(column, seed):
    times = np.random.default_rng(seed).integers(1, 4, len(column))
    targets = np.stack([column, -np.array(column)], 1).astype(float)
    median = weighted_median(targets, times / times.sum())
    repeated = np.sort(targets.repeat(times, axis=0), axis=0)
    assert np.array_equal(median, repeated[(len(repeated) - 1) // 2])


# --- weights ---------------------------------------------------------------------------------

CLASSES = np.array(["a", "a", "a", "b", "b", "c"])


def test_weights_add_up_to_one():
    assert np.array_equal(normalized_weights(CLASSES, None), np.full(6, 1 / 6))
    found = normalized_weights(CLASSES, [0, 1, 2, 3, 0, 4])
    np.testing.assert_allclose(found, np.array([0, 1, 2, 3, 0, 4]) / 10)


@pytest.mark.parametrize("class_weight", ["balanced", {"a": 2.0, "c": 5.0}], ids=str)
def test_class_weights_are_those_of_scikit_learn(class_weight):
    expected = compute_sample_weight(class_weight, CLASSES)
    found = normalized_weights(CLASSES, None, class_weight)
    np.testing.assert_allclose(found, expected / expected.sum())


@pytest.mark.parametrize("class_weight", ["balanced", [{0: 1, 1: 3}, {0: 2, 1: 1}]], ids=str)
def test_class_weights_of_labels_are_those_of_scikit_learn(class_weight):
    y = np.array([[0, 1], [1, 1], [0, 0]])
    expected = compute_sample_weight(class_weight, y)
    found = normalized_weights(y, None, class_weight)
    np.testing.assert_allclose(found, expected / expected.sum())


def test_balanced_classes_count_their_samples_by_weight():
    weights = np.array([1.0, 0.0, 2.0, 3.0, 1.0, 0.0])
    found = normalized_weights(CLASSES, weights, "balanced")
    totals = [found[name == CLASSES].sum() for name in "abc"]
    np.testing.assert_allclose(totals, [0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0, 0, 0, 0, 0, 0], r"weights add up to zero|at least one non-zero"),
        ([1, 1, 1, -1, 1, 1], "Negative values in data passed to `sample_weight`"),
        ([1, 1], r"sample_weight.shape == \(2,\), expected \(6,\)"),
        ([1, 1, 1, 1, 1, np.nan], "Input sample_weight contains NaN"),
    ],
)
def test_weights_that_cannot_be_used(weights, message):
    with pytest.raises(ValueError, match=message):
        normalized_weights(CLASSES, np.array(weights, float))


def test_masks_and_negative_factors_are_refused():
    masked = np.ma.masked_array(np.ones(6), mask=[1, 0, 0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"sample_weight has masked values.*replace the values"):
        normalized_weights(CLASSES, masked)
    with pytest.raises(ValueError, match="class_weight: a factor is negative"):
        normalized_weights(CLASSES, None, {"a": 1, "b": -1, "c": 1})


def test_weights_may_be_tensors_with_gradients():
    weights = torch.arange(1.0, 7.0, requires_grad=True)
    found = normalized_weights(CLASSES, weights)
    assert np.array_equal(found, normalized_weights(CLASSES, weights.tolist()))


def test_classes_without_weight_leave_nothing():
    with pytest.raises(ValueError, match="At least one weight must be positive"):
        normalized_weights(CLASSES, None, {"a": 0, "b": 0, "c": 0})
