"""The search for penalties: GridSearchCV as the oracle, metadata, lazy input, refits."""

import pickle
import re
import threading
import time
import warnings

import joblib
import numpy as np
import pytest
import sklearn
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import accuracy_score, make_scorer
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    ParameterGrid,
    StratifiedKFold,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils import estimator_html_repr

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
    ImageFiles,
)
from sklearn_gradfeat.data import Rows
from sklearn_gradfeat.estimators import _cross_validation
from tests.tiny import NET, X, Y, data

pytestmark = pytest.mark.filterwarnings("ignore:The best of .* at an end of the list:UserWarning")

PENALTIES = {"alphas": [0.5, 0.02], "gradient_alphas": [0.1]}
TARGETS = Y + np.random.default_rng(0).normal(size=len(Y))
WEIGHTS = np.random.default_rng(1).integers(0, 3, len(Y)).astype(float)


def classifier(backbone=NET, **options):
    return GradientFeatureClassifierCV(
        backbone, **{**PENALTIES, "cv": 2, **options}, activation_layer=None
    )


def regressor(backbone=NET, **options):
    return GradientFeatureRegressorCV(
        backbone, **{**PENALTIES, "cv": 2, **options}, activation_layer=None
    )


# --- GridSearchCV as the oracle ---------------------------------------------------------------

ALPHAS, GRADIENT_ALPHAS = [0.02, 0.5], [0.1, 1e-3]
GRID = {"alphas": ALPHAS, "gradient_alphas": GRADIENT_ALPHAS, "cv": 3}
TIGHT = {"tol": 1e-12, "max_iter": 500, "precision": "float64"}
IMAGES, CLASSES = data(45)
IMAGES = IMAGES + np.random.default_rng(1).normal(size=IMAGES.shape).astype(np.float32)
LABELS = np.stack([CLASSES == 0, CLASSES > 0, np.arange(45) % 2 == 0], 1).astype(int)
REAL = CLASSES + np.random.default_rng(2).normal(size=45)
SEVERAL = np.stack([REAL, np.random.default_rng(3).normal(size=45) - REAL], 1)


def log_likelihood(model, X, y):
    return np.log(np.abs(1 - y - model.predict_proba(X))).mean()


def grid_search(model, X, y, fit=(), **options):
    """The same search over plain estimators, one by one; scores in the shape of ours."""
    plain = GradientFeatureClassifier(NET, alpha=1e-4, gradient_alpha=1e-4, activation_layer=None)
    if isinstance(model, GradientFeatureRegressor):
        plain = GradientFeatureRegressor(
            NET, alpha=1e-4, gradient_alpha=1e-4, activation_layer=None
        )
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


@pytest.mark.parametrize(
    ("features", "y"),
    [
        ("full", CLASSES),
        ("full", LABELS),
        ("gradient", CLASSES > 0),
        pytest.param("full", CLASSES > 0, marks=pytest.mark.slow),
        pytest.param("gradient", CLASSES, marks=pytest.mark.slow),
        pytest.param("gradient", LABELS, marks=pytest.mark.slow),
    ],
    ids=[
        *("full-many", "full-labels", "gradient-two"),
        *("full-two", "gradient-many", "gradient-labels"),
    ],
)
def test_classifier_against_grid_search(features, y):
    scoring = "neg_log_loss" if y.ndim == 1 else log_likelihood
    model = classifier(**GRID, features=features, scoring=scoring, **TIGHT).fit(IMAGES, y)
    assert len(np.unique(model.scores_)) == model.scores_.size
    assert_same(model, *grid_search(model, IMAGES, y))


@pytest.mark.parametrize(
    ("features", "loss", "y"),
    [
        ("full", "squared_error", SEVERAL),
        ("gradient", "squared_error", REAL),
        ("full", "huber", REAL),
        pytest.param("full", "squared_error", REAL, marks=pytest.mark.slow),
        pytest.param("gradient", "squared_error", SEVERAL, marks=pytest.mark.slow),
        pytest.param("full", "huber", SEVERAL, marks=pytest.mark.slow),
        pytest.param("gradient", "huber", REAL, marks=pytest.mark.slow),
        pytest.param("gradient", "huber", SEVERAL, marks=pytest.mark.slow),
    ],
    ids=[
        *("full-squared-several", "gradient-squared-one", "full-huber-one", "full-squared-one"),
        *("gradient-squared-several", "full-huber-several"),
        *("gradient-huber-one", "gradient-huber-several"),
    ],
)
def test_regressor_against_grid_search(features, loss, y):
    # Huber's loss is flat in places, so small gradients say less of the distance.
    options = {**TIGHT, "tol": 1e-12 if loss == "squared_error" else 1e-20}
    options |= {"features": features, "loss": loss, "scoring": "r2"}
    model = regressor(**GRID, **options).fit(IMAGES, y)
    assert_same(model, *grid_search(model, IMAGES, y))


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_tabular_data_against_grid_search(fit_intercept):
    rows, y = load_diabetes(return_X_y=True)
    rows, y = StandardScaler().fit_transform(rows)[:90], (y - y.mean())[:90] / y.std()
    options = {"fit_intercept": fit_intercept, "tol": 1e-16, "random_state": 0, "scoring": "r2"}
    grid = {"alphas": [1.0, 1e-4], "gradient_alphas": [1.0, 1e-4]}
    model = GradientFeatureRegressorCV(**grid, **options, cv=3, activation_layer=None).fit(rows, y)
    plain = GradientFeatureRegressor(
        random_state=0,
        fit_intercept=fit_intercept,
        tol=1e-16,
        alpha=1e-4,
        gradient_alpha=1e-4,
        activation_layer=None,
    )
    grid = {"alpha": list(model.alphas_), "gradient_alpha": list(model.gradient_alphas_)}
    search = GridSearchCV(plain, grid, cv=3, scoring="r2").fit(rows, y)
    folds = [search.cv_results_[f"split{k}_test_score"] for k in range(3)]
    assert_same(model, search, np.reshape(folds, model.scores_.shape))


def test_scores_agree_to_the_default_tolerance():
    model = classifier(**GRID, scoring="neg_log_loss").fit(IMAGES, CLASSES)
    search, scores = grid_search(model, IMAGES, CLASSES)
    assert_same(model, search, scores, rtol=0.05)
    assert not np.allclose(model.scores_[:, 0], model.scores_[:, 1], 0.05)


def test_activations_alone():
    options = {"features": "activation", "scoring": "neg_log_loss", **TIGHT}
    model = classifier(**GRID, **options).fit(IMAGES, CLASSES)
    assert model.scores_.shape == (3, 2, 1)
    assert model.gradient_alphas_.tolist() == [np.inf] and model.gradient_alpha_ == np.inf
    plain = GradientFeatureClassifier(NET, features="activation", **TIGHT, activation_layer=None)
    search = GridSearchCV(plain, {"alpha": ALPHAS}, cv=3, scoring="neg_log_loss")
    search.fit(IMAGES, CLASSES)
    assert model.alpha_ == search.best_params_["alpha"]
    expected = search.cv_results_["mean_test_score"]
    np.testing.assert_allclose(model.scores_.mean(0)[:, 0], expected, 1e-4)
    assert np.array_equal(model.predict_proba(X), search.predict_proba(X))


def test_class_weight_counts_the_classes_of_each_fold():
    y = (np.arange(45) % 5 == 0).astype(int)
    options = {"class_weight": "balanced", "scoring": "neg_log_loss", **TIGHT}
    model = classifier(**{**GRID, **options, "cv": KFold(3)}).fit(IMAGES, y)
    assert_same(model, *grid_search(model, IMAGES, y))


def test_fold_without_a_class():
    folds = [(np.arange(45)[CLASSES < 2], np.arange(45)), (np.arange(30), np.arange(30, 45))]
    options = {**GRID, **TIGHT, "cv": folds}
    model = classifier(**options, scoring="accuracy").fit(IMAGES, CLASSES)
    assert model.scores_[0].max() <= 2 / 3
    assert_same(model, *grid_search(model, IMAGES, CLASSES))
    # The loss takes all classes: that which a fold lacks has a small probability.
    scores = classifier(**options, refit=False).fit(IMAGES, CLASSES).scores_
    assert np.isfinite(scores).all() and scores[0].max() < scores[1].max()


@pytest.mark.parametrize("y", [CLASSES, CLASSES > 0, LABELS], ids=["many", "two", "labels"])
def test_default_score_of_a_classifier_is_the_log_loss(y):
    model = classifier(**GRID, **TIGHT, refit=False).fit(IMAGES, y)
    scoring = "neg_log_loss" if y.ndim == 1 else log_likelihood
    expected = classifier(**GRID, **TIGHT, refit=False, scoring=scoring).fit(IMAGES, y).scores_
    # The loss of labels is a sum over the labels, that of the scorer a mean.
    np.testing.assert_allclose(model.scores_, expected * (1 if y.ndim == 1 else y.shape[1]), 1e-6)


def test_default_score_of_a_regressor_is_the_squared_error():
    options = {**GRID, **TIGHT, "refit": False}
    model = regressor(**options).fit(IMAGES, REAL)
    expected = regressor(**options, scoring="neg_mean_squared_error").fit(IMAGES, REAL)
    np.testing.assert_allclose(model.scores_, expected.scores_ / 2, 1e-6)


def test_fold_of_one_class_is_named():
    folds = [(np.arange(30), np.arange(30, 45)), (np.arange(0, 30, 3), np.arange(30, 45))]
    with pytest.raises(ValueError, match=r"Training samples of fold 1: .*at least 2 classes"):
        classifier(cv=folds).fit(IMAGES, CLASSES)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("weights", "scoring"), [((1.0, 0.0), None), ((1e200, 1e-200), None), ((1.0, 0.0), "accuracy")]
)
def test_fold_without_a_weight_is_named(weights, scoring):
    """Also if its weights are nothing beside the largest one."""
    folds = [(np.arange(12), np.arange(12, 24)), (np.arange(12, 24), np.arange(12))]
    model = classifier(scoring=scoring, cv=folds)
    with pytest.raises(ValueError, match=r"Held-out samples of fold 0: sample_weight adds up to z"):
        model.fit(X, Y, sample_weight=np.repeat(weights, 12))


def test_ties_go_to_the_first():
    model = classifier(**GRID, scoring=lambda *_: 1.0, refit=False).fit(IMAGES, CLASSES)
    assert (model.alpha_, model.gradient_alpha_) == (ALPHAS[0], GRADIENT_ALPHAS[0])


# --- samples pass through the frozen layers once ----------------------------------------------


class Counting:
    """A transform that counts the samples it sees, in all of its copies."""

    seen = 0

    def __call__(self, batch):
        Counting.seen += len(batch)
        return batch


@pytest.mark.parametrize(
    ("kind", "store"), [(classifier, "auto"), (classifier, None), (regressor, "auto")]
)
def test_trunk_sees_every_sample_once(kind, store):
    Counting.seen = 0
    grid = {"alphas": 3, "gradient_alphas": 2, "cv": 3, "tol": 0.1}
    model = kind(preprocess=Counting(), feature_store=store, batch_size=5, **grid)
    model.fit(X, Y if kind is classifier else TARGETS)
    # Two samples show the shape of a batch, and must be mapped alike together and alone. Three of
    # the first batch must be mapped alike without the others.
    assert Counting.seen == len(X) + 2 + 2 + 3 + 3 + 3


def test_grid_search_without_store_passes_them_for_every_fit():
    Counting.seen = 0
    plain = GradientFeatureClassifier(
        NET,
        preprocess=Counting(),
        feature_store=None,
        alpha=1e-4,
        gradient_alpha=1e-4,
        activation_layer=None,
    )
    GridSearchCV(plain, {"alpha": [0.1, 1.0]}, cv=2).fit(X, Y)
    assert Counting.seen >= 3 * len(X)


# --- weights, groups, metadata ----------------------------------------------------------------


def parts_without(rows, folds):
    """Folds over the rows that are left, renumbered."""
    number = np.cumsum(rows) - 1
    return [tuple(number[part[rows[part]]] for part in fold) for fold in folds]


@pytest.mark.parametrize("kind", [classifier, regressor])
def test_weight_zero_is_absence(kind):
    y = Y if kind is classifier else TARGETS
    folds = list(KFold(2, shuffle=True, random_state=0).split(X))
    kept = WEIGHTS > 0
    for penalties in ((1, 1), ([1.0, 0.1], [0.3, 0.03])):
        grid = {"alphas": penalties[0], "gradient_alphas": penalties[1]}
        options = {**grid, "precision": "float64", "tol": 1e-12, "max_iter": 1000}
        weighted = kind(cv=folds, **options).fit(X, y, sample_weight=WEIGHTS)
        absent = kind(cv=parts_without(kept, folds), **options)
        absent.fit(X[kept], y[kept], sample_weight=WEIGHTS[kept])
        np.testing.assert_allclose(weighted.alphas_, absent.alphas_, 1e-9)
        np.testing.assert_allclose(weighted.gradient_alphas_, absent.gradient_alphas_, 1e-5)
        np.testing.assert_allclose(weighted.scores_, absent.scores_, 1e-4, 1e-6)
    assert not np.allclose(weighted.scores_, clone(weighted).fit(X, y).scores_, 1e-3)


def test_groups_stay_together():
    groups = np.arange(len(Y)) // 6
    expected = [(train, test) for train, test in GroupKFold(2).split(X, Y, groups)]
    by_hand = classifier(cv=expected).fit(X, Y)
    assert np.array_equal(
        classifier(cv=GroupKFold(2)).fit(X, Y, groups=groups).scores_, by_hand.scores_
    )
    with sklearn.config_context(enable_metadata_routing=True):
        routed = classifier(cv=GroupKFold(2)).fit(X, Y, groups=groups)
        assert np.array_equal(routed.scores_, by_hand.scores_)
        with pytest.raises(TypeError, match="colour"):
            classifier().fit(X, Y, colour=groups)
    with pytest.raises(ValueError, match="groups"):
        classifier(cv=GroupKFold(2)).fit(X, Y)
    with pytest.raises(ValueError, match="colour"):
        classifier().fit(X, Y, colour=groups)


def weighted_accuracy(y, predicted, sample_weight=None):
    return 10.0 + accuracy_score(y, predicted, sample_weight=sample_weight)


def test_weights_are_routed_to_scorer_and_fit():
    plain = classifier(scoring="accuracy").fit(X, Y, sample_weight=WEIGHTS)
    by_loss = classifier().fit(X, Y, sample_weight=WEIGHTS)
    scorer = make_scorer(weighted_accuracy)
    with sklearn.config_context(enable_metadata_routing=True):
        default = classifier().fit(X, Y, sample_weight=WEIGHTS)
        asks = scorer.set_score_request(sample_weight=True)
        asking = classifier(scoring=asks).fit(X, Y, sample_weight=WEIGHTS)
        declines = make_scorer(weighted_accuracy).set_score_request(sample_weight=False)
        declining = classifier(scoring=declines).fit(X, Y, sample_weight=WEIGHTS)
        pipeline = make_pipeline(
            FunctionTransformer(), classifier().set_fit_request(sample_weight=True)
        ).fit(X, Y, sample_weight=WEIGHTS)
    assert np.array_equal(default.scores_, by_loss.scores_)
    assert np.array_equal(pipeline[-1].coef_, plain.coef_)
    np.testing.assert_allclose(asking.scores_, 10 + plain.scores_)
    assert not np.allclose(declining.scores_, asking.scores_)
    assert np.array_equal(asking.coef_, declining.coef_)


def test_score_is_by_scoring():
    model = classifier(scoring=make_scorer(weighted_accuracy)).fit(X, Y)
    weights = np.where(model.predict(X) == Y, 1.0, 0.0)
    assert model.score(X, Y) == 10 + np.mean(model.predict(X) == Y)
    assert model.score(X, Y, sample_weight=weights) == 11
    model = classifier().fit(X, Y)
    assert model.score(X, Y) == np.mean(model.predict(X) == Y)


def test_scorers_see_what_they_expect():
    seen = []

    def scoring(model, rows, y):
        seen.append((model.alpha, model.gradient_alpha))
        assert np.array_equal(rows, X[12:]) and np.array_equal(y, Y[12:])
        known, computed = model.predict_proba(rows), model.predict_proba(rows.copy())
        np.testing.assert_allclose(known, computed, 1e-5)
        assert isinstance(model, GradientFeatureClassifier)
        return 0.0

    classifier(scoring=scoring, cv=[(np.arange(12), np.arange(12, 24))]).fit(X, Y)
    assert seen == [(0.5, 0.1), (0.02, 0.1)]


# --- input ------------------------------------------------------------------------------------


def test_folds_may_be_masks():
    half = np.arange(len(Y)) < 12
    masks = classifier(cv=[(half, ~half)]).fit(X, Y)
    assert np.array_equal(
        masks.scores_, classifier(cv=[(np.arange(12), np.arange(12, 24))]).fit(X, Y).scores_
    )


class Lazy:
    """An array that knows slices alone, and how much of it was asked for at once."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.most = array, array.shape, array.dtype, 0

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        part = self.array[rows]
        self.most = max(self.most, len(part))
        return part


@pytest.mark.parametrize("layers", ["last", "all"])
def test_lazy_input_is_never_read_as_a_whole(layers):
    lazy = Lazy(X)
    options = {
        "gradient_layers": layers,
        "batch_size": 5,
        "cv": KFold(2, shuffle=True, random_state=0),
    }
    model = classifier(**options).fit(lazy, Y)
    assert lazy.most <= 5
    in_memory = classifier(**options).fit(X, Y)
    assert np.array_equal(model.scores_, in_memory.scores_)
    np.testing.assert_allclose(model.coef_, in_memory.coef_, 1e-4, 1e-6)


def test_some_rows_of_an_array():
    rows = np.array([3, 4, 5, 9, 2, 20])
    for array in (X, Lazy(X)):
        part = Rows(array, rows)
        assert part.shape == (6, 1, 8, 8) and len(part) == 6
        assert np.array_equal(part[1:5], X[rows[1:5]])
        assert np.array_equal(part[::2], X[rows[::2]])


@pytest.mark.filterwarnings("ignore:The images of X have values")
def test_image_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 99, (12, 8, 8)).astype(np.uint8)
    pixels += 60 * (np.arange(12) % 2).astype(np.uint8)[:, None, None]
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    files = ImageFiles(sorted(tmp_path.iterdir()), color="grey", channels="first")
    y = np.arange(12) % 2
    model = classifier(scoring="neg_log_loss").fit(files, y)
    expected = classifier(scoring="neg_log_loss").fit(pixels[:, None], y)
    np.testing.assert_allclose(model.scores_, expected.scores_, 1e-5)
    assert np.array_equal(model.predict(files), expected.predict(pixels[:, None]))


# --- the estimator ----------------------------------------------------------------------------


def test_without_refit_there_are_scores_and_no_model():
    model = classifier().fit(X, Y)
    scores = model.scores_
    model.set_params(refit=False).fit(X, Y)
    assert np.array_equal(model.scores_, scores)
    with pytest.raises(NotFittedError, match=r"fitted with refit=False.*Set refit=True"):
        model.predict(X)
    with pytest.raises(NotFittedError, match="refit=False"):
        model.save("nowhere")
    estimator_html_repr(model)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        classifier().predict(X)


@pytest.mark.parametrize("value", [[], [-1.0], [np.nan], [[0.1]], ["a"], [np.inf]])
@pytest.mark.parametrize("name", ["alphas", "gradient_alphas"])
def test_penalties_that_cannot_be_used(name, value):
    features = "gradient" if value == [np.inf] else "full"
    with pytest.raises(ValueError, match=f"{name} must be a number of penalties, or a list"):
        classifier(**{name: value}, features=features).fit(X, Y)


def test_one_warning_for_all_fits_that_did_not_converge():
    model = classifier(max_iter=1, tol=1e-12, refit=False)
    with pytest.warns(ConvergenceWarning, match=r"4 of 4 fits of the search .*max_iter=1") as found:
        model.fit(X, Y)
    assert len(found) == 1


def test_failure_leaves_the_former_model():
    model = classifier().fit(X, Y)
    before = dict(vars(model))
    with pytest.raises(ValueError, match="fold 0"):
        model.set_params(cv=[(np.arange(0, 24, 3), np.arange(5))]).fit(X, Y)
    model.cv = before["cv"]
    assert all(vars(model)[name] is value for name, value in before.items())


def test_inside_a_search_and_a_pipeline():
    pipeline = make_pipeline(FunctionTransformer(), classifier())
    grid = {"gradientfeatureclassifiercv__features": ["activation", "full"]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X, Y)
    assert search.predict(X).shape == (24,)
    assert search.best_estimator_[-1].backbone is NET


def test_clone_shares_the_backbone():
    model = classifier(cv=StratifiedKFold(2)).fit(X, Y)
    copy = clone(model)
    assert copy.backbone is NET and not hasattr(copy, "alpha_")
    assert np.array_equal(copy.fit(X, Y).scores_, model.scores_)


@pytest.mark.parametrize("kind", [classifier, regressor])
def test_pickle(kind):
    model = kind().fit(X, Y)
    copy = pickle.loads(pickle.dumps(model))
    assert type(copy) is type(model)
    assert np.array_equal(copy.predict(X), model.predict(X))
    for name in ("scores_", "alphas_", "gradient_alphas_", "alpha_", "gradient_alpha_"):
        assert np.array_equal(getattr(copy, name), getattr(model, name)), name
    assert copy.best_score_ == model.best_score_


def test_torch_module():
    model = classifier().fit(X, Y)
    module = model.to_torch()
    np.testing.assert_allclose(module(torch.tensor(X)).numpy(), model.predict_proba(X), 1e-4)
    module = regressor().fit(X, TARGETS).to_torch()
    assert module(torch.tensor(X)).shape == (24,)


def test_model_is_that_of_the_plain_estimator():
    model = classifier().fit(X, Y, sample_weight=WEIGHTS)
    plain = GradientFeatureClassifier(
        NET, alpha=model.alpha_, gradient_alpha=model.gradient_alpha_, activation_layer=None
    ).fit(X, Y, sample_weight=WEIGHTS)
    assert np.array_equal(model.predict_proba(X), plain.predict_proba(X))
    assert np.array_equal(model.objective_path_, plain.objective_path_)
    assert (model.n_iter_, model.n_passes_) == (plain.n_iter_, plain.n_passes_)


def test_progress_bar(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier(verbose=1).fit(X, Y)
    shown = capsys.readouterr().err
    assert re.search(r"search: +100%.* 4/4 \[\d\d:\d\d<\d\d:\d\d", shown)
    assert "full: iteration" in shown


def test_no_fold_outlives_a_search_that_fails(monkeypatch):
    original, scored, both = _cross_validation._negative_loss, [], threading.Barrier(2)

    def failing(*args):
        scored.append(threading.current_thread())
        if len(scored) <= 2 and both.wait(10) == 0:
            raise FloatingPointError("overflow")
        time.sleep(0.05)
        return original(*args)

    monkeypatch.setattr(_cross_validation, "_negative_loss", failing)
    model = classifier(gradient_alphas=np.geomspace(1, 1e-3, 40), n_jobs=2)
    with pytest.raises(FloatingPointError, match="overflow"):
        model.fit(X, Y)
    n_scored = len(scored)
    time.sleep(0.2)
    assert len(scored) == n_scored < 10


@pytest.mark.parametrize("verbose", [0, 1])
def test_folds_run_in_threads_under_other_backends(verbose):
    expected = classifier().fit(X, Y).scores_
    with joblib.parallel_config("loky", n_jobs=2):
        model = classifier(n_jobs=2, verbose=verbose).fit(X, Y)
    assert np.array_equal(model.scores_, expected)
