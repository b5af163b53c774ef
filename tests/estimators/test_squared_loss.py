"""Classification by squared errors, and its probabilities."""

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn_gradfeat.training._calibration import _parts, best_scales
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    load,
)
from tests.networks import build
from tests.oracles import dense_jacobian, dense_regression, ntk_scales

N = 40
rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(N, 2, 5, 5))
TARGETS = {
    "binary": np.arange(N) % 2,
    "multiclass": np.arange(N) % 3,
    "multilabel": rng.integers(0, 2, (N, 3)),
}
WEIGHTS = rng.integers(1, 4, N).astype(float)
TIGHT = {"tol": 1e-22, "max_iter": 3000, "precision": "float64"}

DIGITS, CLASSES = load_digits(return_X_y=True)
DIGITS = DIGITS / 16
TRAIN, TEST = slice(0, 400), slice(400, None)


def coded(target):
    """Return plus and minus one, a column for each output."""
    y = TARGETS[target]
    columns = np.eye(3)[y] if target == "multiclass" else y.reshape(N, -1)
    return 2.0 * columns - 1


def model_of(target, **options):
    module, names = build("plain")
    options = {"alpha": 0.02, "gradient_alpha": 0.005, **TIGHT, **options}
    model = GradientFeatureClassifier(module, gradient_layers=names, loss="squared", **options)
    return model.fit(IMAGES, TARGETS[target], sample_weight=WEIGHTS), module


def rows(**options):
    return GradientFeatureClassifier(loss="squared", random_state=0, alpha=1e-3, **options)


# --- the optimum -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_optimum_is_that_of_a_dense_regression(target):
    """Up to the factors of the logits, one for all classes or one for each label."""
    model, module = model_of(target)
    names = model.gradient_layers_
    J = dense_jacobian(module, names, IMAGES) * ntk_scales(module, names)
    with torch.no_grad():
        f = module(torch.tensor(IMAGES)).flatten(2).mean(2).numpy()
    first = Ridge(alpha=0.02).fit(f, coded(target), WEIGHTS / WEIGHTS.sum())
    omega = first.coef_.reshape(model.omega_.shape)
    scale = (model.omega_ * omega).sum(1) / (omega**2).sum(1)
    assert (scale > 0).all()
    assert target == "multilabel" or np.ptp(scale) < 1e-6
    np.testing.assert_allclose(model.omega_, scale[:, None] * omega, atol=1e-5 * scale.max())
    g = np.einsum("cd,ndp->ncp", omega, J)
    expected = dense_regression(f, g, coded(target), WEIGHTS, 0.02, 0.005)
    found = model.decision_function(IMAGES).reshape(N, -1)
    np.testing.assert_allclose(found, scale * expected, atol=1e-5 * scale.max())


@pytest.mark.parametrize("features", ["activation", "gradient", "full"])
def test_decisions_are_those_of_a_regression(features):
    model = rows(features=features).fit(DIGITS[TRAIN], CLASSES[TRAIN])
    regressor = GradientFeatureRegressor(features=features, random_state=0, alpha=1e-3)
    regressor.fit(DIGITS[TRAIN], 2.0 * np.eye(10)[CLASSES[TRAIN]] - 1)
    expected = regressor.predict(DIGITS[TEST]).argmax(1)
    assert (model.predict(DIGITS[TEST]) == expected).mean() > 0.998


def test_activations_against_ridge():
    X, y = DIGITS[TRAIN], CLASSES[TRAIN] > 4
    model = GradientFeatureClassifier(
        nn.Identity(), features="activation", loss="squared", alpha=0.01, tol=1e-14
    ).fit(X, y)
    oracle = Ridge(alpha=0.01 * len(X)).fit(X, 2.0 * y - 1)
    scale = model.coef_[0] @ oracle.coef_ / (oracle.coef_ @ oracle.coef_)
    np.testing.assert_allclose(model.coef_[0], scale * oracle.coef_, atol=1e-5 * scale)
    np.testing.assert_allclose(model.intercept_[0], scale * oracle.intercept_, atol=1e-5 * scale)


def test_class_weights_count():
    y = CLASSES[TRAIN] == 3
    plain = rows().fit(DIGITS[TRAIN], y)
    balanced = rows(class_weight="balanced").fit(DIGITS[TRAIN], y)
    assert balanced.predict(DIGITS[TEST]).sum() > plain.predict(DIGITS[TEST]).sum()


# --- probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_probabilities_are_those_of_the_logits(target):
    model, _ = model_of(target, tol=1e-8)
    logits, p = model.decision_function(IMAGES), model.predict_proba(IMAGES)
    if target == "binary":
        expected = np.stack([expit(-logits), expit(logits)], 1)
    else:
        expected = softmax(logits, axis=1) if target == "multiclass" else expit(logits)
    np.testing.assert_allclose(p, expected, rtol=1e-6)
    np.testing.assert_allclose(model.predict_log_proba(IMAGES), np.log(p), rtol=1e-6)
    decided = (p > 0.5).astype(int) if target == "multilabel" else model.classes_[p.argmax(1)]
    assert np.array_equal(model.predict(IMAGES), decided)


@pytest.mark.parametrize("few", [2, 10])
def test_they_are_calibrated(few):
    """Close to the best that any factor on the logits reaches on test data."""
    y = CLASSES % few
    model = rows().fit(DIGITS[TRAIN], y[TRAIN])
    logits = model.decision_function(DIGITS[TEST]).reshape(-1, 1 if few == 2 else few)
    weights = np.full(len(logits), 1 / len(logits))
    best = best_scales(logits, y[TEST], weights)[0]
    assert 0.6 < best < 1.6
    p = model.predict_proba(DIGITS[TEST])
    assert log_loss(y[TEST], p) < 1.1 * log_loss(
        y[TEST], softmax(best * logits, 1) if few > 2 else expit(best * logits[:, 0])
    )
    confidence, right = p.max(1), p.argmax(1) == y[TEST]
    assert abs(confidence.mean() - right.mean()) < 0.03


def test_training_samples_would_be_too_sure():
    """Why some are left out: with many features every training sample is fitted."""
    X, y = rng.normal(size=(200, 100)), np.arange(200) % 2
    X[:, 0] += y
    options = {"features": "activation", "loss": "squared", "alpha": 1e-6}
    model = GradientFeatureClassifier(nn.Identity(), **options).fit(X[:150], y[:150])
    logits = model.decision_function(X[:150])[:, None]
    assert best_scales(logits, y[:150], np.full(150, 1 / 150)) > 3


def test_best_scale_of_two_classes_against_scikit_learn():
    """A logistic regression of one unknown, without a penalty."""
    y = rng.integers(0, 2, 4000)
    outputs = (2.0 * y - 1 + 2 * rng.normal(size=4000))[:, None]
    oracle = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(outputs, y)
    (found,) = best_scales(outputs, y, np.full(4000, 1 / 4000))
    assert found == pytest.approx(oracle.coef_[0, 0], rel=5e-3)


def test_best_scale_of_several_classes_is_stationary():
    y = rng.integers(0, 4, 4000)
    outputs = 2.0 * np.eye(4)[y] + 2 * rng.normal(size=(4000, 4))
    p = softmax(best_scales(outputs, y, np.full(4000, 1 / 4000)) * outputs, axis=1)
    assert abs(((p - np.eye(4)[y]) * outputs).sum(1).mean()) < 5e-3


def test_scale_is_finite_and_positive_whatever_the_outputs_say():
    y, weights = np.array([0, 1, 0, 1]), np.full(4, 0.25)
    perfect, wrong = 2.0 * y[:, None] - 1, 1 - 2.0 * y[:, None]
    assert 0.5 < best_scales(perfect, y, weights) < 100
    assert 0 < best_scales(wrong, y, weights) < 0.01
    assert np.isfinite(best_scales(np.zeros((4, 1)), y, weights))


def test_labels_have_their_own_scales():
    """Also the rare one is no worse than what always says how rare it is."""
    Y = (rng.random((2000, 3)) < [0.5, 0.02, 0.9]).astype(int)
    X = Y @ rng.normal(size=(3, 20)) + rng.normal(size=(2000, 20))
    model = GradientFeatureClassifier(nn.Identity(), features="activation", loss="squared")
    p = model.fit(X[:1000], Y[:1000]).predict_proba(X[1000:])
    base = np.tile(Y[:1000].mean(0), (1000, 1))
    for label, found, constant in zip(Y[1000:].T, p.T, base.T, strict=True):
        assert log_loss(label, found) < 0.95 * log_loss(label, constant)


def test_a_fifth_of_each_class_that_counts_is_left_out():
    y = np.array([0] * 1000 + [1] * 4 + [2] * 6 + [3])
    counted = np.ones(1011, bool)
    (only,) = _parts(y, counted)
    assert only.tolist() == [*range(4, 1000, 5), 1008]
    counted[0] = False
    (only,) = _parts(y, counted)
    assert only.tolist() == [*range(5, 1000, 5), 1008]
    (only,) = _parts(np.eye(500), np.ones(500, bool))
    assert only.tolist() == list(range(4, 500, 5))


def test_few_samples_are_all_left_out_once():
    y = np.array([0] * 10 + [1] * 2 + [2])
    parts = list(_parts(y, np.ones(13, bool)))
    assert [part.tolist() for part in parts] == [[4, 9], [3, 8], [2, 7], [1, 6, 11], [0, 5, 10]]


def test_few_samples_are_not_too_sure():
    """As with many: a few that are left out in turn say how sure the model may be."""
    X, y = DIGITS[:41], CLASSES[:41]
    p = rows().fit(X, y).predict_proba(DIGITS[TEST])
    confidence, right = p.max(1), p.argmax(1) == CLASSES[TEST]
    assert abs(confidence.mean() - right.mean()) < 0.1


def test_one_sample_of_every_class():
    model = rows().fit(DIGITS[:2], [0, 1])
    assert np.array_equal(model.predict(DIGITS[:2]), [0, 1])
    np.testing.assert_allclose(model.decision_function(DIGITS[:2]), [-1, 1], atol=0.2)


def test_fits_the_same_in_inference_mode():
    with torch.inference_mode():
        inside = rows().fit(DIGITS[:60], CLASSES[:60])
    assert np.array_equal(inside.coef_, rows().fit(DIGITS[:60], CLASSES[:60]).coef_)


# --- everything else -------------------------------------------------------------------------


def test_search_agrees_with_grid_search():
    X, y = DIGITS[:200], CLASSES[:200]
    alphas, gradient_alphas = [1e-1, 1e-3], [1e-1, 1e-2]
    own = GradientFeatureClassifierCV(
        loss="squared", random_state=0, alphas=alphas, gradient_alphas=gradient_alphas, cv=3
    ).fit(X, y)
    grid = {"alpha": alphas, "gradient_alpha": gradient_alphas}
    theirs = GridSearchCV(rows(), grid, cv=3).fit(X, y)
    assert own.best_score_ == pytest.approx(theirs.best_score_, abs=0.006)
    refitted = rows(gradient_alpha=own.gradient_alpha_).set_params(alpha=own.alpha_).fit(X, y)
    assert np.array_equal(own.predict_proba(X), refitted.predict_proba(X))


def test_search_has_no_probabilities():
    search = GradientFeatureClassifierCV(
        loss="squared", random_state=0, alphas=2, gradient_alphas=2, cv=3, scoring="neg_log_loss"
    )
    with pytest.raises(ValueError, match="scoring: with loss='squared'"):
        search.fit(DIGITS[:60], CLASSES[:60] % 2)
    search.set_params(scoring=lambda model, X, y: model.predict_log_proba(X).mean())
    with pytest.raises(ValueError, match="scoring: with loss='squared'"):
        search.fit(DIGITS[:60], np.eye(10)[CLASSES[:60]])
    search.set_params(scoring="roc_auc").fit(DIGITS[:60], CLASSES[:60] % 2)


def test_warm_start_changes_nothing():
    model = rows(tol=1e-10).fit(DIGITS[TRAIN], CLASSES[TRAIN])
    cold = model.decision_function(DIGITS[TEST])
    model.set_params(warm_start=True).fit(DIGITS[TRAIN], CLASSES[TRAIN])
    np.testing.assert_allclose(model.decision_function(DIGITS[TEST]), cold, atol=1e-3)
    assert len(model.objective_path_) < 4


def test_saved_and_exported(tmp_path):
    model = rows().fit(DIGITS[TRAIN], CLASSES[TRAIN])
    expected = model.predict_proba(DIGITS[TEST])
    model.save(tmp_path / "model.gf")
    assert np.array_equal(load(tmp_path / "model.gf").predict_proba(DIGITS[TEST]), expected)
    with torch.no_grad():
        exported = model.to_torch()(torch.tensor(DIGITS[TEST]))
    np.testing.assert_allclose(exported.numpy(), expected, atol=1e-6)


def test_same_bits_again():
    first = rows().fit(DIGITS[TRAIN], CLASSES[TRAIN])
    second = clone(first).fit(DIGITS[TRAIN], CLASSES[TRAIN])
    assert np.array_equal(first.coef_, second.coef_)
    assert np.array_equal(first.intercept_, second.intercept_)


def test_accuracy_of_cross_entropy():
    squared = cross_val_score(rows(), DIGITS[:600], CLASSES[:600], cv=3).mean()
    model = GradientFeatureClassifier(random_state=0, alpha=1e-3)
    assert squared > cross_val_score(model, DIGITS[:600], CLASSES[:600], cv=3).mean() - 0.03


def test_wrong_name():
    with pytest.raises(ValueError, match="loss"):
        GradientFeatureClassifier(loss="squared_error").fit(DIGITS[:20], CLASSES[:20])


@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
def test_default_tolerance_is_met():
    model = rows().fit(DIGITS[TRAIN], CLASSES[TRAIN])
    assert accuracy_score(CLASSES[TEST], model.predict(DIGITS[TEST])) > 0.85
