"""The classifier: its targets, its probabilities, and classification by squared errors."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.utils.class_weight import compute_sample_weight
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    load,
)
from tests.networks import build
from tests.oracles import dense_jacobian, dense_regression, ntk_scales
from tests.tiny import NET, X, Y, estimator

BINARY = (Y > 0).astype(int)
LABELS = np.stack([Y == 0, Y > 0, np.arange(24) % 2 == 0, Y != 1], 1).astype(int)
DIGITS, CLASSES = load_digits(n_class=5, return_X_y=True)
DIGITS = DIGITS / 16
TRAIN, TEST = slice(0, 100), slice(100, 400)


@pytest.fixture(scope="module")
def fitted():
    return estimator().fit(X, Y)


def accuracy(model):
    return np.mean(model.predict(X) == Y)


# --- targets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [np.asarray, sp.csr_array, sp.csr_matrix, sp.coo_array])
def test_multilabel(convert):
    target = convert(LABELS)
    model = estimator(activation_layer=None).fit(X, target)
    assert list(model.classes_) == [0, 1, 2, 3]
    assert model.coef_.shape == (4, 6)
    labels, proba = model.predict(X), model.predict_proba(X)
    assert labels.shape == proba.shape == model.decision_function(X).shape == (24, 4)
    assert set(np.unique(labels)) <= {0, 1}
    assert np.array_equal(labels, proba > 0.5)
    exact = np.mean((labels == LABELS).all(1))
    assert model.score(X, target) == pytest.approx(exact)
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(proba), rtol=1e-4)
    assert np.array_equal(model.coef_, estimator(activation_layer=None).fit(X, LABELS).coef_)


def test_multilabel_is_several_binary_problems_in_the_activations():
    tight = {"features": "activation", "precision": "float64", "tol": 1e-16, "max_iter": 500}
    together = estimator(**tight).fit(X, LABELS).decision_function(X)
    for column, labels in zip(together.T, LABELS.T, strict=True):
        alone = estimator(**tight).fit(X, labels).decision_function(X)
        np.testing.assert_allclose(alone, column, atol=1e-5)


def test_multilabel_with_a_constant_label():
    labels = LABELS.copy()
    labels[:, 1] = 1
    assert (estimator().fit(X, labels).predict(X)[:, 1] == 1).all()


@pytest.mark.parametrize("dtype", [str, object])
def test_string_labels(fitted, dtype):
    names = np.array(["bird", "cat", "dog"], dtype=dtype)
    model = estimator().fit(X, names[Y])
    assert list(model.classes_) == ["bird", "cat", "dog"]
    assert np.array_equal(model.predict(X), names[fitted.predict(X)])
    assert np.array_equal(model.predict_proba(X), fitted.predict_proba(X))
    assert model.score(X, names[Y]) == fitted.score(X, Y)


@pytest.mark.parametrize("values", [(False, True), (-1, 1), ("no", "yes"), (0.0, 1.0)])
def test_two_classes(values):
    y = np.array(values)[BINARY]
    model = estimator(activation_layer=None).fit(X, y)
    logits, proba = model.decision_function(X), model.predict_proba(X)
    assert logits.shape == (24,)
    assert model.coef_.shape == (1, 6)
    assert model.intercept_.shape == (1,)
    assert np.array_equal(model.predict(X), np.array(values)[(logits > 0).astype(int)])
    np.testing.assert_allclose(proba[:, 1], 1 / (1 + np.exp(-logits)), rtol=1e-5)
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-6)
    assert np.array_equal(model.coef_, estimator(activation_layer=None).fit(X, BINARY).coef_)


@pytest.mark.parametrize("y", [Y, BINARY])
def test_log_probabilities(y):
    model = estimator().fit(X, y)
    proba = model.predict_proba(X)
    assert model.predict_log_proba(X).shape == proba.shape
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(proba), rtol=1e-3, atol=1e-6)
    far = X * 1e4
    assert np.isfinite(model.predict_log_proba(far)).all()
    assert np.isfinite(model.predict_proba(far)).all()


def test_class_weight():
    unequal = np.r_[np.arange(24), np.flatnonzero(Y == 0), np.flatnonzero(Y == 0)]
    images, y = X[unequal], Y[unequal]
    counts = np.bincount(y)
    balanced = estimator(class_weight="balanced").fit(images, y)
    factors = len(y) / (3 * counts)
    by_dict = estimator(class_weight=dict(enumerate(factors))).fit(images, y)
    by_weight = estimator().fit(images, y, sample_weight=factors[y])
    plain = estimator().fit(images, y)
    np.testing.assert_allclose(balanced.coef_, by_dict.coef_, atol=1e-5)
    np.testing.assert_allclose(balanced.coef_, by_weight.coef_, atol=1e-5)
    assert not np.allclose(balanced.coef_, plain.coef_, atol=1e-3)
    # Every sample of class 0 is there three times, so balancing it undoes that.
    np.testing.assert_allclose(
        balanced.predict_proba(X), estimator().fit(X, Y).predict_proba(X), atol=0.02
    )


def test_class_weight_of_names():
    names = np.array(["bird", "cat", "dog"])
    model = estimator(class_weight={"bird": 1.0, "cat": 1.0, "dog": 1e-6}).fit(X, names[Y])
    assert "dog" not in model.predict(X)


def test_penalty_has_the_meaning_of_scikit_learn():
    activation = torch.no_grad()(NET)(torch.from_numpy(X)).double().numpy()
    model = estimator(
        features="activation", precision="float64", tol=1e-18, max_iter=500, activation_layer=None
    )
    model.set_params(alpha=1e-2).fit(X, Y)
    reference = LogisticRegression(C=1 / (1e-2 * 24), tol=1e-10, max_iter=5000).fit(activation, Y)
    np.testing.assert_allclose(
        model.predict_proba(X), reference.predict_proba(activation), atol=1e-5
    )


# --- inside other estimators ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
def test_calibration(method):
    model = CalibratedClassifierCV(estimator(), method=method, cv=2).fit(X, Y)
    proba = model.predict_proba(X)
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-5)
    assert accuracy(model) > 0.5


def test_voting():
    members = [("a", estimator()), ("b", estimator(features="activation"))]
    model = VotingClassifier(members, voting="soft").fit(X, Y)
    expected = np.mean([member.predict_proba(X) for member in model.estimators_], axis=0)
    np.testing.assert_allclose(model.predict_proba(X), expected, rtol=1e-5)
    assert accuracy(model) > 0.6


def test_stacking():
    members = [("a", estimator()), ("b", estimator(features="activation"))]
    model = StackingClassifier(members, LogisticRegression(), cv=2).fit(X, Y)
    assert model.predict(X).shape == (24,)
    assert accuracy(model) > 0.5


def test_bagging_of_tabular_data():
    rows = X.reshape(24, -1)[:, :6]
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    bag = BaggingClassifier(estimator(net), n_estimators=2, random_state=0).fit(rows, Y)
    assert bag.predict_proba(rows).shape == (24, 3)


def test_one_versus_rest():
    rows = X.reshape(24, -1)[:, :6]
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    model = OneVsRestClassifier(estimator(net)).fit(rows, Y)
    assert model.predict_proba(rows).shape == (24, 3)


# --- squared errors ---------------------------------------------------------------------------


def images():
    """Return images, targets of every kind, and weights."""
    rng = np.random.default_rng(0)
    samples, labels = rng.normal(size=(40, 2, 5, 5)), rng.integers(0, 2, (40, 3))
    targets = {"binary": np.arange(40) % 2, "multiclass": np.arange(40) % 3, "multilabel": labels}
    return samples, targets, rng.integers(1, 4, 40).astype(float)


def squared(**options):
    penalties = {"alpha": 1e-3, "gradient_alpha": 1e-3}
    return GradientFeatureClassifier(
        loss="squared", random_state=0, **{**penalties, **options}, activation_layer=None
    )


@pytest.mark.parametrize("target", ["binary", "multiclass", "multilabel"])
def test_optimum_is_that_of_a_dense_regression(target):
    samples, targets, weights = images()
    y = targets[target]
    coded = 2.0 * (np.eye(3)[y] if target == "multiclass" else y.reshape(40, -1)) - 1
    module, names = build("plain")
    options = {"tol": 1e-22, "max_iter": 3000, "precision": "float64"}
    model = GradientFeatureClassifier(
        module,
        gradient_layers=names,
        loss="squared",
        alpha=0.02,
        gradient_alpha=0.005,
        **options,
        activation_layer=None,
    ).fit(samples, y, sample_weight=weights)
    with torch.no_grad():
        f = module(torch.tensor(samples)).flatten(2).mean(2).numpy()
    first = Ridge(alpha=0.02).fit(f, coded, weights / weights.sum())
    np.testing.assert_allclose(model.omega_, first.coef_.reshape(model.omega_.shape), atol=1e-5)
    names = model.gradient_layers_
    J = dense_jacobian(module, names, samples) * ntk_scales(module, names)
    g = np.einsum("cd,ndp->ncp", model.omega_, J)
    expected = dense_regression(f, g, coded, weights, 0.02, 0.005)
    logits = model.decision_function(samples).reshape(40, -1)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    if target == "multilabel":
        assert np.array_equal(model.predict(samples), logits > 0)
    else:
        chosen = logits.argmax(1) if target == "multiclass" else (logits[:, 0] > 0).astype(int)
        assert np.array_equal(model.predict(samples), model.classes_[chosen])


@pytest.mark.parametrize("features", ["activation", "gradient", "full"])
def test_logits_are_those_of_a_regression(features):
    model = squared(features=features).fit(DIGITS[TRAIN], CLASSES[TRAIN])
    regressor = GradientFeatureRegressor(
        features=features, random_state=0, alpha=1e-3, gradient_alpha=0.001, activation_layer=None
    )
    regressor.fit(DIGITS[TRAIN], 2.0 * np.eye(5)[CLASSES[TRAIN]] - 1)
    expected = regressor.predict(DIGITS[TEST])
    np.testing.assert_allclose(model.decision_function(DIGITS[TEST]), expected, atol=1e-6)


def test_activations_against_ridge():
    samples, y = DIGITS[TRAIN], CLASSES[TRAIN] > 2
    model = GradientFeatureClassifier(
        nn.Identity(),
        features="activation",
        loss="squared",
        alpha=0.01,
        tol=1e-14,
        activation_layer=None,
    ).fit(samples, y)
    oracle = Ridge(alpha=0.01 * len(samples)).fit(samples, 2.0 * y - 1)
    np.testing.assert_allclose(model.coef_[0], oracle.coef_, atol=1e-5)
    np.testing.assert_allclose(model.intercept_[0], oracle.intercept_, atol=1e-5)


def test_class_weight_of_squared_errors():
    samples, y = DIGITS[TRAIN], CLASSES[TRAIN] == 3
    factors = compute_sample_weight("balanced", y)
    balanced = squared(class_weight="balanced").fit(samples, y).decision_function(samples)
    weighted = squared().fit(samples, y, sample_weight=factors).decision_function(samples)
    np.testing.assert_allclose(balanced, weighted, rtol=1e-6, atol=1e-9)
    assert np.abs(balanced - squared().fit(samples, y).decision_function(samples)).max() > 0.01


def test_squared_errors_have_no_probabilities():
    model = squared().fit(DIGITS[:60], CLASSES[:60])
    for name in ("predict_proba", "predict_log_proba"):
        assert not hasattr(model, name)
        assert hasattr(clone(model).set_params(loss="log_loss"), name)
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'") as caught:
            getattr(model, name)
        assert "Set loss='log_loss', or wrap the estimator in sklearn.calibration" in str(
            caught.value.__cause__
        )


def test_calibration_of_squared_errors():
    model = CalibratedClassifierCV(squared(), cv=3).fit(DIGITS[TRAIN], CLASSES[TRAIN])
    p = model.predict_proba(DIGITS[TEST])
    np.testing.assert_allclose(p.sum(1), 1)
    assert log_loss(CLASSES[TEST], p) < 0.5 * np.log(5)


def test_search_by_probabilities_of_squared_errors():
    samples, y = DIGITS[:60], CLASSES[:60] % 2
    options = {"cv": 3, "scoring": "neg_log_loss"}
    search = GridSearchCV(squared(), {"alpha": [0.1]}, error_score="raise", **options)
    with pytest.raises(AttributeError, match=r"GradientFeatureClassifier has none of .*_proba"):
        search.fit(samples, y)
    own = GradientFeatureClassifierCV(
        loss="squared", alphas=2, gradient_alphas=2, **options, activation_layer=None
    )
    message = r"scoring='neg_log_loss' needs probabilities.*loss='squared'. Set loss='log_loss'"
    with pytest.raises(ValueError, match=message):
        own.fit(samples, y)
    own.set_params(scoring=lambda model, X, y: model.predict_log_proba(X).mean())
    with pytest.raises(ValueError, match=r"scoring=.*lambda.* needs probabilities"):
        own.fit(samples, y)
    assert own.set_params(scoring="roc_auc").fit(samples, y).best_score_ > 0.5


def test_search_by_squared_errors_agrees_with_grid_search():
    samples, y = DIGITS[:100], CLASSES[:100]
    alphas, gradient_alphas = [1e-1, 1e-3], [1e-1, 1e-2]
    options = {"loss": "squared", "scoring": "accuracy", "random_state": 0, "cv": 3}
    own = GradientFeatureClassifierCV(
        alphas=alphas, gradient_alphas=gradient_alphas, **options, activation_layer=None
    ).fit(samples, y)
    grid = {"alpha": alphas, "gradient_alpha": gradient_alphas}
    theirs = GridSearchCV(squared(), grid, cv=3).fit(samples, y)
    assert own.best_score_ == pytest.approx(theirs.best_score_, abs=0.011)
    refitted = squared(gradient_alpha=own.gradient_alpha_).set_params(alpha=own.alpha_)
    refitted.fit(samples, y)
    assert np.array_equal(own.decision_function(samples), refitted.decision_function(samples))


def test_squared_errors_of_one_sample_of_every_class():
    model = squared().fit(DIGITS[:2], [0, 1])
    assert np.array_equal(model.predict(DIGITS[:2]), [0, 1])
    np.testing.assert_allclose(model.decision_function(DIGITS[:2]), [-1, 1], atol=0.2)


def test_warm_start_of_squared_errors():
    model = squared(tol=1e-10).fit(DIGITS[TRAIN], CLASSES[TRAIN])
    cold = model.decision_function(DIGITS[TEST])
    model.set_params(warm_start=True).fit(DIGITS[TRAIN], CLASSES[TRAIN])
    np.testing.assert_allclose(model.decision_function(DIGITS[TEST]), cold, atol=1e-3)
    assert len(model.objective_path_) < 4


def test_squared_errors_in_a_file_and_exported(tmp_path):
    for y in (CLASSES[TRAIN], CLASSES[TRAIN] > 2):
        model = squared().fit(DIGITS[TRAIN], y)
        expected = model.decision_function(DIGITS[TEST])
        model.save(tmp_path / "model.gf")
        loaded = load(tmp_path / "model.gf")
        assert np.array_equal(loaded.decision_function(DIGITS[TEST]), expected)
        with torch.no_grad():
            exported = model.to_torch()(torch.tensor(DIGITS[TEST]))
        np.testing.assert_allclose(exported.numpy(), expected, atol=1e-6)


def test_squared_errors_have_the_same_bits_again():
    first = squared().fit(DIGITS[TRAIN], CLASSES[TRAIN])
    second = clone(first).fit(DIGITS[TRAIN], CLASSES[TRAIN])
    assert np.array_equal(first.coef_, second.coef_)
    assert np.array_equal(first.intercept_, second.intercept_)


def test_accuracy_of_cross_entropy():
    found = cross_val_score(squared(), DIGITS[:200], CLASSES[:200], cv=2).mean()
    model = GradientFeatureClassifier(
        random_state=0, alpha=1e-3, gradient_alpha=0.001, activation_layer=None
    )
    assert found > cross_val_score(model, DIGITS[:200], CLASSES[:200], cv=2).mean() - 0.03


def test_loss_of_another_name():
    with pytest.raises(ValueError, match="The 'loss' parameter of GradientFeatureClassifier"):
        GradientFeatureClassifier(
            loss="squared_error", alpha=1e-4, gradient_alpha=1e-4, activation_layer=None
        ).fit(DIGITS[:20], CLASSES[:20])


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
def test_squared_errors_meet_the_default_tolerance():
    model = squared().fit(DIGITS[TRAIN], CLASSES[TRAIN])
    assert accuracy_score(CLASSES[TEST], model.predict(DIGITS[TEST])) > 0.75
