"""Estimators that choose their penalties, against GridSearchCV over the plain ones."""

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.model_selection import GridSearchCV, KFold, ParameterGrid
from sklearn.preprocessing import StandardScaler

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
)
from tests.tiny import NET, X, data

ALPHAS, GRADIENT_ALPHAS = [0.02, 0.5], [0.1, 1e-3]
TIGHT = {"tol": 1e-12, "max_iter": 500, "precision": "float64"}
IMAGES, CLASSES = data(45)
IMAGES = IMAGES + np.random.default_rng(1).normal(size=IMAGES.shape).astype(np.float32)
LABELS = np.stack([CLASSES == 0, CLASSES > 0, np.arange(45) % 2 == 0], 1).astype(int)
TARGETS = CLASSES + np.random.default_rng(2).normal(size=45)
SEVERAL = np.stack([TARGETS, np.random.default_rng(3).normal(size=45) - TARGETS], 1)


def classifier(**options):
    defaults = {"alphas": ALPHAS, "gradient_alphas": GRADIENT_ALPHAS, "cv": 3}
    return GradientFeatureClassifierCV(NET, **{**defaults, **options})


def regressor(**options):
    defaults = {"alphas": ALPHAS, "gradient_alphas": GRADIENT_ALPHAS, "cv": 3}
    return GradientFeatureRegressorCV(NET, **{**defaults, **options})


def log_likelihood(model, X, y):
    return np.log(np.abs(1 - y - model.predict_proba(X))).mean()


def grid_search(model, X, y, fit=(), **options):
    """The same search over plain estimators, one by one; scores in the shape of ours."""
    plain = GradientFeatureClassifier(NET)
    if isinstance(model, GradientFeatureRegressor):
        plain = GradientFeatureRegressor(NET)
    known = plain.get_params(deep=False)
    plain.set_params(**{n: v for n, v in model.get_params(deep=False).items() if n in known})
    options = {"cv": model.cv, "scoring": model.scoring, **options}
    grid = {"alpha": list(model.alphas_), "gradient_alpha": list(model.gradient_alphas_)}
    search = GridSearchCV(plain, grid, **options).fit(X, y, **dict(fit))
    assert search.cv_results_["params"] == list(ParameterGrid(grid))
    folds = [search.cv_results_[f"split{k}_test_score"] for k in range(search.n_splits_)]
    return search, np.reshape(folds, model.scores_.shape)


def assert_same(model, search, scores, rtol=1e-4):
    np.testing.assert_allclose(model.scores_, scores, rtol, 1e-9)
    assert model.alpha_ == search.best_params_["alpha"]
    assert model.gradient_alpha_ == search.best_params_["gradient_alpha"]
    assert model.best_score_ == pytest.approx(search.best_score_, rel=rtol)
    best = search.best_estimator_
    assert np.array_equal(model.coef_, best.coef_)
    assert np.array_equal(model.intercept_, best.intercept_)
    for name, value in best.gradient_coef_.items():
        assert np.array_equal(model.gradient_coef_[name], value), name


# --- GridSearchCV as the oracle ----------------------------------------------------------------


@pytest.mark.parametrize("features", ["full", "gradient"])
@pytest.mark.parametrize("y", [CLASSES, CLASSES > 0, LABELS], ids=["many", "two", "labels"])
def test_classifier_against_grid_search(features, y):
    scoring = "neg_log_loss" if y.ndim == 1 else log_likelihood
    model = classifier(features=features, scoring=scoring, **TIGHT).fit(IMAGES, y)
    assert len(np.unique(model.scores_)) == model.scores_.size
    assert_same(model, *grid_search(model, IMAGES, y))


@pytest.mark.parametrize("features", ["full", "gradient"])
@pytest.mark.parametrize("loss", ["squared_error", "huber"])
@pytest.mark.parametrize("y", [TARGETS, SEVERAL], ids=["one", "several"])
def test_regressor_against_grid_search(features, loss, y):
    # Huber's loss is flat in places, so small gradients say less of the distance.
    options = {**TIGHT, "tol": 1e-12 if loss == "squared_error" else 1e-20}
    model = regressor(features=features, loss=loss, **options).fit(IMAGES, y)
    assert_same(model, *grid_search(model, IMAGES, y))


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_rows_against_grid_search(fit_intercept):
    rows, y = load_diabetes(return_X_y=True)
    rows, y = StandardScaler().fit_transform(rows)[:90], (y - y.mean())[:90] / y.std()
    model = GradientFeatureRegressorCV(
        alphas=2, gradient_alphas=2, cv=3, fit_intercept=fit_intercept, tol=1e-16, random_state=0
    ).fit(rows, y)
    plain = GradientFeatureRegressor(random_state=0, fit_intercept=fit_intercept, tol=1e-16)
    grid = {"alpha": list(model.alphas_), "gradient_alpha": list(model.gradient_alphas_)}
    search = GridSearchCV(plain, grid, cv=3).fit(rows, y)
    folds = [search.cv_results_[f"split{k}_test_score"] for k in range(3)]
    assert_same(model, search, np.reshape(folds, model.scores_.shape))


def test_scores_agree_to_the_default_tolerance():
    model = classifier(scoring="neg_log_loss").fit(IMAGES, CLASSES)
    search, scores = grid_search(model, IMAGES, CLASSES)
    assert_same(model, search, scores, rtol=0.05)
    assert not np.allclose(model.scores_[:, 0], model.scores_[:, 1], 0.05)


def test_activations_alone():
    options = {"features": "activation", "scoring": "neg_log_loss", **TIGHT}
    model = classifier(**options).fit(IMAGES, CLASSES)
    assert model.scores_.shape == (3, 2, 1)
    assert model.gradient_alphas_ is None and model.gradient_alpha_ is None
    plain = GradientFeatureClassifier(NET, features="activation", **TIGHT)
    search = GridSearchCV(plain, {"alpha": ALPHAS}, cv=3, scoring="neg_log_loss")
    search.fit(IMAGES, CLASSES)
    assert model.alpha_ == search.best_params_["alpha"]
    expected = search.cv_results_["mean_test_score"]
    np.testing.assert_allclose(model.scores_.mean(0)[:, 0], expected, 1e-4)
    assert np.array_equal(model.predict_proba(X), search.predict_proba(X))


def test_class_weight_counts_the_classes_of_each_fold():
    y = (np.arange(45) % 5 == 0).astype(int)
    options = {"class_weight": "balanced", "scoring": "neg_log_loss", **TIGHT}
    model = classifier(**options, cv=KFold(3)).fit(IMAGES, y)
    assert_same(model, *grid_search(model, IMAGES, y))


def test_fold_without_a_class():
    folds = [(np.arange(45)[CLASSES < 2], np.arange(45)), (np.arange(30), np.arange(30, 45))]
    model = classifier(cv=folds, **TIGHT).fit(IMAGES, CLASSES)
    assert model.scores_[0].max() <= 2 / 3
    assert_same(model, *grid_search(model, IMAGES, CLASSES))


def test_fold_of_one_class_is_named():
    folds = [(np.arange(30), np.arange(30, 45)), (np.arange(0, 30, 3), np.arange(30, 45))]
    with pytest.raises(ValueError, match=r"Training samples of fold 1: .*at least 2 classes"):
        classifier(cv=folds).fit(IMAGES, CLASSES)


def test_ties_go_to_the_first():
    model = classifier(scoring=lambda *_: 1.0, refit=False).fit(IMAGES, CLASSES)
    assert (model.alpha_, model.gradient_alpha_) == (ALPHAS[0], GRADIENT_ALPHAS[0])
