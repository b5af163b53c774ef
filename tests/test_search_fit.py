"""Estimators that choose their penalties: work, input, metadata, serving."""

import pickle
import warnings

import numpy as np
import pytest
import sklearn
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import accuracy_score, make_scorer
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils import estimator_html_repr
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressorCV,
    ImageFiles,
    LayerContributionDisplay,
    ObjectiveDisplay,
    load,
)
from sklearn_gradfeat._arrays import Rows
from tests.test_freezing import Counting
from tests.tiny import NET, X, Y, tiny_net

PENALTIES = {"alphas": [0.5, 0.02], "gradient_alphas": [0.1]}
TARGETS = Y + np.random.default_rng(0).normal(size=len(Y))
WEIGHTS = np.random.default_rng(1).integers(0, 3, len(Y)).astype(float)


def classifier(backbone=NET, **options):
    return GradientFeatureClassifierCV(backbone, **{**PENALTIES, "cv": 2, **options})


def regressor(backbone=NET, **options):
    return GradientFeatureRegressorCV(backbone, **{**PENALTIES, "cv": 2, **options})


# --- how often samples are read and computed ---------------------------------------------------


@pytest.mark.parametrize("store", ["auto", None])
@pytest.mark.parametrize("kind", [classifier, regressor])
def test_trunk_sees_every_sample_once(kind, store):
    Counting.seen = 0
    grid = {"alphas": 3, "gradient_alphas": 2, "cv": 3}
    model = kind(tiny_net(), preprocess=Counting(), feature_store=store, batch_size=5, **grid)
    model.fit(X, Y if kind is classifier else TARGETS)
    assert Counting.seen == len(X) + 2  # two samples show the shape of a batch


def test_grid_search_without_store_passes_them_for_every_fit():
    Counting.seen = 0
    plain = GradientFeatureClassifier(tiny_net(), preprocess=Counting(), feature_store=None)
    GridSearchCV(plain, {"alpha": [0.1, 1.0]}, cv=2).fit(X, Y)
    assert Counting.seen >= 3 * len(X)


def test_first_stage_is_fitted_once_for_every_alpha(monkeypatch):
    from sklearn_gradfeat._stages import Stages

    fits = []
    fit_activation = Stages.fit_activation

    def counted(self, alpha, *rest):
        fits.append(alpha)
        return fit_activation(self, alpha, *rest)

    monkeypatch.setattr(Stages, "fit_activation", counted)
    classifier(gradient_alphas=[1.0, 0.1, 0.01], refit=False).fit(X, Y)
    assert fits == [0.5, 0.02] * 2


def test_path_takes_fewer_passes_than_a_grid_search(monkeypatch):
    from sklearn_gradfeat import _stages

    passes, minimize = [], _stages.minimize

    def counted(*args, **options):
        found = minimize(*args, **options)
        passes.append(found.n_passes)
        return found

    monkeypatch.setattr(_stages, "minimize", counted)
    rows, y = load_iris(return_X_y=True)
    rows, y = StandardScaler().fit_transform(rows)[::3], y[::3]
    grid = {"alpha": [0.1, 0.01], "gradient_alpha": [0.1, 0.01, 0.001]}
    plain = GradientFeatureClassifier(random_state=0)
    GridSearchCV(plain, grid, cv=2, refit=False).fit(rows, y)
    of_grid_search = sum(passes)
    passes.clear()
    model = GradientFeatureClassifierCV(cv=2, refit=False, random_state=0)
    model.set_params(alphas=grid["alpha"], gradient_alphas=grid["gradient_alpha"]).fit(rows, y)
    assert len(passes) == 2 * (2 + 6)
    assert sum(passes) < 0.6 * of_grid_search


def test_path_takes_fewer_passes_for_what_it_learned(monkeypatch):
    from sklearn_gradfeat import _stages

    noisy = X + np.random.default_rng(0).normal(size=X.shape)
    grid = {"alphas": [0.01], "gradient_alphas": [0.1, 0.05, 0.025, 0.0125]}
    model = classifier(**grid, tol=1e-8, precision="float64", refit=False)
    minimize = _stages.minimize

    def passes(**changed):
        found = []

        def counted(*args, **options):
            found.append(minimize(*args, **{**options, **changed}))
            return found[-1]

        monkeypatch.setattr(_stages, "minimize", counted)
        model.fit(noisy, Y)
        return sum(each.n_passes for each in found)

    assert passes() < 0.8 * passes(secants=None)


# --- default grids -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1000.0])
def test_default_grids_follow_the_scale_of_the_features(scale):
    rows, y = load_iris(return_X_y=True)
    rows = StandardScaler().fit_transform(rows)[::2] * scale
    torch.manual_seed(0)
    # Without bias in the rectifiers the activations are proportional to the rows.
    net = nn.Sequential(nn.Linear(4, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    model = GradientFeatureClassifierCV(net, gradient_layers=["2"], alphas=4, gradient_alphas=2)
    model.fit(rows, y[::2])
    assert model.best_score_ > 0.93
    reference = clone(model).fit(rows / scale, y[::2])
    np.testing.assert_allclose(model.alphas_, scale**2 * reference.alphas_, 1e-6)
    np.testing.assert_allclose(model.gradient_alphas_, reference.gradient_alphas_, 0.5)
    np.testing.assert_allclose(model.scores_, reference.scores_, atol=0.07)


def test_default_alphas_start_at_the_largest_curvature():
    rows = np.random.default_rng(0).normal(size=(60, 3)) * [5, 1, 0.1] + 40
    identity = nn.Sequential(nn.Flatten())
    model = GradientFeatureRegressorCV(identity, features="activation", alphas=5, refit=False)
    model.fit(rows, rows[:, 1])
    largest = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[-1]
    np.testing.assert_allclose(model.alphas_, largest * np.logspace(0, -4, 5), 1e-3)


def test_default_gradient_alphas_follow_the_targets():
    model = regressor(alphas=2, gradient_alphas=3).fit(X, TARGETS)
    larger = regressor(alphas=2, gradient_alphas=3).fit(X, 100 * TARGETS)
    np.testing.assert_allclose(larger.gradient_alphas_, 1e4 * model.gradient_alphas_, 1e-3)
    np.testing.assert_allclose(larger.scores_, model.scores_, 1e-2)


# The features are rounding errors, so it depends on the processor whether the solver stops at tol.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_features_without_any_variation():
    model = regressor(alphas=2, gradient_alphas=2).fit(0 * X, TARGETS)
    assert np.isfinite(model.alphas_).all() and (model.alphas_ > 0).all()


# --- weights, groups, metadata -----------------------------------------------------------------


def parts_without(rows, folds):
    """Folds over the rows that are left, renumbered."""
    number = np.cumsum(rows) - 1
    return [tuple(number[part[rows[part]]] for part in fold) for fold in folds]


@pytest.mark.parametrize("kind", [classifier, regressor])
def test_weight_zero_is_absence(kind):
    y = Y if kind is classifier else TARGETS
    folds = list(KFold(3, shuffle=True, random_state=0).split(X))
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
    plain = classifier().fit(X, Y, sample_weight=WEIGHTS)
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
    assert np.array_equal(default.scores_, plain.scores_)
    assert np.array_equal(pipeline[-1].coef_, plain.coef_)
    np.testing.assert_allclose(asking.scores_, 10 + plain.scores_)
    assert not np.allclose(declining.scores_, asking.scores_)
    assert np.array_equal(asking.coef_, declining.coef_)


def test_score_is_by_scoring():
    model = classifier(scoring=make_scorer(weighted_accuracy)).fit(X, Y)
    weights = np.where(model.predict(X) == Y, 1.0, 0.0)
    assert model.score(X, Y) == 10 + np.mean(model.predict(X) == Y)
    assert model.score(X, Y, sample_weight=weights) == 11
    assert classifier().fit(X, Y).score(X, Y) == np.mean(model.predict(X) == Y)


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


# --- input -------------------------------------------------------------------------------------


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


# --- the estimator -----------------------------------------------------------------------------


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
def test_penalties_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number of penalties, or a list"):
        classifier(**{name: value}).fit(X, Y)


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
def test_pickle_and_file(kind, tmp_path):
    model = kind().fit(X, Y)
    restored = pickle.loads(pickle.dumps(model))
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", tiny_net)
    for copy in (restored, loaded):
        assert type(copy) is type(model)
        assert np.array_equal(copy.predict(X), model.predict(X))
        for name in ("scores_", "alphas_", "gradient_alphas_", "alpha_", "gradient_alpha_"):
            assert np.array_equal(getattr(copy, name), getattr(model, name)), name
        assert copy.best_score_ == model.best_score_
    assert np.array_equal(loaded.fit(X, Y).scores_, model.scores_)


@pytest.mark.parametrize(
    "cv",
    [
        KFold(3, shuffle=True, random_state=4),
        StratifiedKFold(2),
        [(np.arange(12), np.arange(12, 24))],
    ],
    ids=["shuffled", "stratified", "list"],
)
def test_file_holds_the_folds(cv, tmp_path):
    model = classifier(cv=cv).fit(X, Y)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", tiny_net)
    assert np.array_equal(loaded.fit(X, Y).scores_, model.scores_)


def test_file_of_a_search_for_activations(tmp_path):
    model = classifier(features="activation").fit(X, Y)
    model.save(tmp_path / "model")
    assert load(tmp_path / "model", tiny_net).gradient_alpha_ is None


def test_scorer_that_only_pickle_can_hold(tmp_path):
    model = classifier(scoring=make_scorer(accuracy_score)).fit(X, Y)
    with pytest.raises(ValueError, match=r"pickle only: parameters.scoring is make_scorer"):
        model.save(tmp_path / "model")


def test_torch_module():
    model = classifier().fit(X, Y)
    module = model.to_torch()
    np.testing.assert_allclose(module(torch.tensor(X)).numpy(), model.predict_proba(X), 1e-4)
    module = regressor().fit(X, TARGETS).to_torch()
    assert module(torch.tensor(X)).shape == (24,)


def test_printed_by_name():
    model = classifier().fit(X, Y)
    assert "Conv2d" not in repr(model) and "Sequential: 262 params" in repr(model)
    html = estimator_html_repr(make_pipeline(FunctionTransformer(), model))
    assert "θ₂: 222 params" in html and "Conv2d" not in html


def test_displays():
    pytest.importorskip("matplotlib").use("Agg")
    model = classifier().fit(X, Y)
    ObjectiveDisplay.from_estimator(model)
    display = LayerContributionDisplay.from_estimator(
        make_pipeline(FunctionTransformer(), model), X
    )
    assert display.figure_ is not None


def test_model_is_that_of_the_plain_estimator():
    model = classifier().fit(X, Y, sample_weight=WEIGHTS)
    plain = GradientFeatureClassifier(
        NET, alpha=model.alpha_, gradient_alpha=model.gradient_alpha_
    ).fit(X, Y, sample_weight=WEIGHTS)
    assert np.array_equal(model.predict_proba(X), plain.predict_proba(X))
    assert np.array_equal(model.objective_path_, plain.objective_path_)
    assert (model.n_iter_, model.n_passes_) == (plain.n_iter_, plain.n_passes_)


def test_progress_bar(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier(verbose=1).fit(X, Y)
    assert "4/4" in capsys.readouterr().err
