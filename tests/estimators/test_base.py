"""Steps that all estimators share, and their life inside scikit-learn."""

import configparser
import copy
import io
import itertools
import pickle
import signal
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris
from sklearn.ensemble import StackingClassifier
from sklearn.exceptions import NotFittedError, UnsetMetadataPassedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import nn

import sklearn_gradfeat
from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
)
from sklearn_gradfeat.cache._runner import Trunk
from sklearn_gradfeat.estimators import _cross_validation
from sklearn_gradfeat.training import _held_out, _two_stage_fit
from tests.tiny import NET, X, Y, data, estimator, tiny_net

BINARY = (Y > 0).astype(int)
PACKAGE = Path(sklearn_gradfeat.__file__).parent


@pytest.fixture(scope="module")
def fitted():
    return estimator().fit(X, Y)


# --- the way from fit to the solver ----------------------------------------------------------


def own_frames(frame):
    """Return file and function of the frames of this package, from the outermost one."""
    calls = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            calls.append((path.relative_to(PACKAGE), frame.f_code.co_name))
        frame = frame.f_back
    return calls[::-1]


def rooms():
    """Return the rooms of the package, the highest first."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    return config["importlinter:contract:layers"]["layers"].split()


def test_few_frames_from_fit_to_the_solver_and_none_goes_up(monkeypatch):
    stacks, minimize = [], _two_stage_fit.minimize

    def traced(*args, **options):
        solver = (Path("solvers/_lbfgs.py"), "minimize")
        stacks.append([*own_frames(sys._getframe(1)), solver])
        return minimize(*args, **options)

    monkeypatch.setattr(_two_stage_fit, "minimize", traced)
    estimator().fit(X, Y)
    assert minimize.__module__ == "sklearn_gradfeat.solvers._lbfgs"
    assert len(stacks) == 2
    for calls in stacks:
        assert calls[0] == (Path("estimators/_classifier.py"), "fit")
        assert len(calls) <= 6, calls
        visited = [path.parts[0] for path, _ in calls]
        assert list(dict.fromkeys(visited)) == ["estimators", "training", "solvers"]
        depths = [rooms().index(room) for room in visited]
        assert depths == sorted(depths), calls


# --- pipelines and searches -------------------------------------------------------------------


def test_pipeline():
    rows, y = load_iris(return_X_y=True)
    model = make_pipeline(
        StandardScaler(),
        GradientFeatureClassifier(features="activation", alpha=1e-2, tol=1e-4, random_state=0),
    )
    assert model.fit(rows[::2], y[::2]).score(rows[1::2], y[1::2]) > 0.9
    model.set_params(gradientfeatureclassifier__features="full")
    assert model.fit(rows[::2], y[::2]).score(rows[1::2], y[1::2]) > 0.9


def test_grid_search():
    grid = [{"alpha": [0.1, 10.0], "gradient_alpha": [1.0]}, {"gradient_layers": [2]}]
    search = GridSearchCV(estimator(), grid, cv=2, scoring="neg_log_loss").fit(X, Y)
    assert len(set(search.cv_results_["mean_test_score"])) > 1
    alone = estimator(**search.best_params_).fit(X, Y)
    assert search.best_estimator_.backbone is NET
    assert np.array_equal(search.predict_proba(X), alone.predict_proba(X))


@pytest.mark.slow
def test_grid_search_in_processes():
    grid = [{"alpha": [0.1, 10.0], "gradient_alpha": ["auto", 1.0]}, {"gradient_layers": [2]}]
    searches = [GridSearchCV(estimator(), grid, cv=2, n_jobs=n_jobs).fit(X, Y) for n_jobs in (1, 2)]
    alone, parallel = searches
    assert alone.best_params_ == parallel.best_params_
    for split in ("split0_test_score", "split1_test_score", "mean_test_score"):
        assert np.array_equal(alone.cv_results_[split], parallel.cv_results_[split])
    assert alone.best_estimator_.backbone is NET
    assert np.array_equal(alone.predict_proba(X), parallel.predict_proba(X))


def test_cross_validation():
    model = estimator()
    assert cross_val_predict(model, X, Y, cv=2).shape == (24,)
    proba = cross_val_predict(model, X, Y, cv=2, method="predict_proba")
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-5)
    assert np.isfinite(cross_val_score(model, X, Y, cv=2, scoring="neg_log_loss")).all()
    assert not hasattr(model, "coef_")


def test_metadata_routing():
    weights = np.where(Y == 2, 1e-6, 1.0)
    with sklearn.config_context(enable_metadata_routing=True):
        requested = estimator().set_fit_request(sample_weight=True)
        requested.set_score_request(sample_weight=False)
        search = GridSearchCV(requested, {"alpha": [0.1]}, cv=2)
        weighted = search.fit(X, Y, sample_weight=weights).best_estimator_
        undecided = GridSearchCV(estimator(), {"alpha": [0.1]}, cv=2)
        with pytest.raises(UnsetMetadataPassedError, match="sample_weight"):
            undecided.fit(X, Y, sample_weight=weights)
        ignoring = clone(requested).set_fit_request(sample_weight=False)
        pipeline = make_pipeline(FunctionTransformer(), ignoring)
        with pytest.raises(TypeError, match="sample_weight"):
            pipeline.fit(X, Y, sample_weight=weights)
    direct = estimator().fit(X, Y, sample_weight=weights)
    assert np.array_equal(weighted.coef_, direct.coef_)
    assert not np.array_equal(weighted.coef_, estimator().fit(X, Y).coef_)


def test_sample_weight_through_a_pipeline():
    rows = X.reshape(24, -1)[:, :6]
    weights = np.where(Y == 2, 1e-6, 1.0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    model = make_pipeline(StandardScaler(), estimator(net))
    model.fit(rows, Y, gradientfeatureclassifier__sample_weight=weights)
    assert not (model.predict(rows) == 2).any()


# --- clones and parameters --------------------------------------------------------------------


def test_clone_shares_the_backbone(fitted):
    copy = clone(fitted)
    assert copy.backbone is fitted.backbone
    assert not hasattr(copy, "coef_")
    assert not hasattr(copy, "_extractor")
    assert copy.get_params() == fitted.get_params()
    searched = clone(make_pipeline(StandardScaler(), fitted))
    assert searched[-1].backbone is fitted.backbone


def test_clone_copies_what_is_not_a_parameter():
    with sklearn.config_context(enable_metadata_routing=True):
        model = estimator().set_fit_request(sample_weight=True)
        copy = clone(model)
        assert copy._metadata_request is not model._metadata_request
        model.set_fit_request(sample_weight=False)
        assert copy.get_metadata_routing().fit.requests == {"sample_weight": True}


def test_clone_copies_mutable_parameters():
    layers, weight = ["2.weight"], {0: 1.0, 1: 2.0, 2: 1.0}
    model = estimator(gradient_layers=layers, class_weight=weight)
    copy = clone(model)
    layers.append("0.weight")
    weight[0] = 5.0
    assert copy.gradient_layers == ["2.weight"]
    assert copy.class_weight == {0: 1.0, 1: 2.0, 2: 1.0}


def test_clone_of_a_factory_and_of_a_name():
    assert clone(estimator(tiny_net)).backbone is tiny_net
    assert clone(estimator("resnet18")).backbone == "resnet18"
    assert clone(estimator(None)).backbone is None


def test_clones_share_the_captured_network():
    model = estimator(features="activation").fit(X, Y)
    assert clone(model).fit(X, Y)._extractor.backbone is model._extractor.backbone


@pytest.mark.parametrize("value", ["1e-4", None, 3])
def test_parameters_are_kept_as_given(value):
    assert estimator(alpha=value).get_params()["alpha"] is value


# --- pickles ----------------------------------------------------------------------------------


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_joblib(model):
    stream = io.BytesIO()
    joblib.dump(model, stream)
    stream.seek(0)
    return joblib.load(stream)


@pytest.mark.parametrize(
    ("trip", "features"),
    [
        (through_pickle, "full"),
        (through_pickle, "activation"),
        (through_pickle, "gradient"),
        (through_joblib, "full"),
    ],
)
def test_pickle(trip, features):
    model = estimator(features=features).fit(X, Y)
    expected = model.predict_proba(X)
    back = trip(model)
    assert np.array_equal(back.predict_proba(X), expected)
    assert np.array_equal(model.predict_proba(X), expected)
    assert np.array_equal(back.fit(X, Y).coef_, model.coef_)


def test_pickle_of_tabular_data():
    rows, y = load_iris(return_X_y=True)
    model = GradientFeatureClassifier(features="activation", tol=1e-4, alpha=0.1, random_state=0)
    model.fit(rows, y)
    assert np.array_equal(through_pickle(model).predict_proba(rows), model.predict_proba(rows))


def test_pickle_before_fit():
    model = through_pickle(estimator())
    assert np.array_equal(model.fit(X, Y).coef_, estimator().fit(X, Y).coef_)


def size(model):
    stream = io.BytesIO()
    joblib.dump(model, stream)
    assert len(pickle.dumps(model)) < 1.1 * len(stream.getvalue())
    return len(stream.getvalue())


def test_pickles_hold_nothing_of_the_samples():
    sizes = [size(estimator().fit(*data(n))) for n in (24, 96)]
    assert abs(sizes[1] - sizes[0]) < 500


def test_pickle_holds_the_network_once():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
        nn.Linear(4, 20000), nn.Linear(20000, 4),
    )  # fmt: skip
    model = estimator(network, gradient_layers="0").fit(X, Y)
    weights = 4 * sum(p.numel() for p in network.parameters())
    assert weights < size(model) < 1.2 * weights


def test_unpickled_backbone_is_independent_of_the_frozen_one(fitted):
    back = through_pickle(through_pickle(fitted))
    with torch.no_grad():
        back.backbone[0].weight.zero_()
    assert np.array_equal(back.predict_proba(X), fitted.predict_proba(X))
    assert back.backbone[0].weight.requires_grad


def test_pickle_after_a_change_of_the_module():
    network = tiny_net()
    model = estimator(network).fit(X, Y)
    with torch.no_grad():
        network[0].weight.add_(1)
    back = through_pickle(model)
    assert np.array_equal(back.predict_proba(X), model.predict_proba(X))
    assert torch.equal(back.backbone[0].weight, network[0].weight)


# --- refits -----------------------------------------------------------------------------------


def test_warm_start():
    tight = {"alpha": 1e-2, "precision": "float64", "tol": 1e-14, "max_iter": 500}
    warm = estimator(warm_start=True, **tight).fit(X, Y)
    first = warm.n_iter_
    warm.fit(X, Y)
    assert warm.n_iter_ < first / 2
    tight |= {"alpha": 1.02e-2, "gradient_alpha": 1.02e-2}
    cold = estimator(**tight).fit(X, Y)
    warm.set_params(**tight).fit(X, Y)
    assert warm.n_iter_ < cold.n_iter_
    np.testing.assert_allclose(warm.predict_proba(X), cold.predict_proba(X), atol=1e-5)
    # The last stage starts from an Ω that is known to within tol.
    assert warm.objective_path_[-1] == pytest.approx(cold.objective_path_[-1], rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_layers": 2},
        {"features": "activation"},
        {"features": "gradient"},
        {"parametrization": "standard"},
        {"fit_intercept": False},
        {"activation_layer": "1"},
    ],
    ids=str,
)
def test_warm_start_after_a_change_of_the_model(change):
    tight = {"precision": "float64", "tol": 1e-12, "max_iter": 500}
    warm = estimator(warm_start=True, **tight).fit(X, Y).set_params(**change).fit(X, Y)
    cold = estimator(**tight, **change).fit(X, Y)
    np.testing.assert_allclose(warm.predict_proba(X), cold.predict_proba(X), atol=1e-4)


def test_warm_start_with_other_classes():
    warm = estimator(warm_start=True).fit(X, Y).fit(X, BINARY)
    assert np.array_equal(warm.coef_, estimator().fit(X, BINARY).coef_)


def test_fit_is_deterministic(fitted):
    again = estimator().fit(X, Y)
    assert np.array_equal(again.coef_, fitted.coef_)
    assert np.array_equal(again.intercept_, fitted.intercept_)
    assert list(again.gradient_coef_) == list(fitted.gradient_coef_)
    for name, value in fitted.gradient_coef_.items():
        assert np.array_equal(again.gradient_coef_[name], value)
    assert np.array_equal(again.predict_proba(X), fitted.predict_proba(X))
    refitted = clone(fitted).fit(X, BINARY).fit(X, Y)
    assert np.array_equal(refitted.coef_, fitted.coef_)


def test_fit_in_inference_mode(fitted):
    with torch.inference_mode():
        inside = estimator().fit(X, Y)
    assert np.array_equal(inside.coef_, fitted.coef_)


# --- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 7, 24])
def test_batch_size(batch_size):
    tight = {"precision": "float64", "tol": 1e-12, "max_iter": 500}
    model = estimator(**tight).fit(X, Y)
    expected = model.predict_proba(X)
    parts = estimator(batch_size=batch_size, **tight).fit(X, Y)
    np.testing.assert_allclose(parts.predict_proba(X), expected, atol=1e-5)
    model.set_params(batch_size=batch_size)
    np.testing.assert_allclose(model.predict_proba(X), expected, atol=1e-12)


def test_one_sample_to_predict(fitted):
    expected = fitted.predict_proba(X)
    for i in (0, 5):
        np.testing.assert_allclose(fitted.predict_proba(X[i : i + 1]), expected[[i]], atol=1e-5)


# --- transform -------------------------------------------------------------------------------

TABLE = load_iris()
ESTIMATORS = [
    GradientFeatureClassifier(random_state=0),
    GradientFeatureClassifierCV(alphas=2, gradient_alphas=2, cv=2, random_state=0),
    GradientFeatureRegressor(random_state=0),
    GradientFeatureRegressorCV(alphas=2, gradient_alphas=2, cv=2, random_state=0),
]
NAMES = [type(model).__name__ for model in ESTIMATORS]
with torch.random.fork_rng():
    torch.manual_seed(0)
    TANH = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())


def table(n=40):
    return TABLE.data[::2][:n] / 2, TABLE.target[::2][:n]


@pytest.mark.parametrize("model", ESTIMATORS, ids=NAMES)
@pytest.mark.parametrize("features", ["full", "activation", "gradient"])
def test_activations_are_those_of_the_network(model, features):
    X, y = table()
    model = clone(model).set_params(
        backbone=TANH, features=features, batch_size=16, activation_layer=None
    )
    model.fit(X, y)
    with torch.no_grad():
        expected = copy.deepcopy(TANH).double()(torch.from_numpy(X)).numpy()
    found = model.transform(X)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.array_equal(model.transform(X[:3]), found[:3])
    names = model.get_feature_names_out()
    assert list(names) == [f"{type(model).__name__.lower()}{i}" for i in range(5)]


def test_predictions_without_gradients_are_linear_in_the_activations():
    model = estimator(features="activation").fit(X, Y)
    logits = model.transform(X) @ model.coef_.T + model.intercept_
    np.testing.assert_allclose(model.decision_function(X), logits, atol=1e-6)


def test_activations_are_averaged_over_places():
    net = NET[:4]
    with torch.no_grad():
        expected = net(torch.from_numpy(X)).mean((2, 3)).numpy()
    found = estimator(net, activation_layer=None).fit(X, Y).transform(X)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("features", ["full", "activation", "gradient"])
def test_activations_take_no_second_pass_over_the_frozen_layers(monkeypatch, features):
    model = estimator(features=features)
    new = X + np.float32(0.25)  # which no other test has stored
    found = model.fit_transform(new, Y)
    monkeypatch.setattr(Trunk, "_pass", None)
    assert np.array_equal(model.transform(new), found)


def test_activations_in_pipelines_and_stacks():
    X, y = table(75)
    model = make_pipeline(
        StandardScaler(), GradientFeatureClassifier(random_state=0), LogisticRegression()
    )
    assert model.fit(X, y).score(X, y) > 0.9
    columns = ColumnTransformer(
        [("first", clone(ESTIMATORS[0]), [0, 1]), ("all", "passthrough", [3])]
    )
    width = len(columns.fit(X, y).named_transformers_["first"].get_feature_names_out())
    assert columns.transform(X).shape == (75, width + 1)
    assert columns.get_feature_names_out()[0] == "first__gradientfeatureclassifier0"
    stack = StackingClassifier([("model", FrozenEstimator(model))], cv="prefit")
    assert stack.fit(X, y).score(X, y) > 0.9


def test_activations_in_a_data_frame():
    X, y = table()
    frame = pd.DataFrame(X, index=np.arange(40) + 7, columns=TABLE.feature_names)
    model = GradientFeatureClassifier(random_state=0).set_output(transform="pandas")
    found = model.fit_transform(frame, y)
    assert list(found.columns) == list(model.get_feature_names_out())
    assert list(found.index) == list(frame.index)
    assert clone(model).fit(frame, y).transform(frame).equals(found)


def test_activations_need_a_fit():
    with pytest.raises(NotFittedError):
        estimator().transform(X)
    with pytest.raises(NotFittedError):
        estimator().get_feature_names_out()
    searched = clone(ESTIMATORS[1]).set_params(refit=False).fit(*table())
    with pytest.raises(NotFittedError, match="refit=False"):
        searched.transform(table()[0])


def test_activations_that_are_not_finite():
    model = estimator().fit(X, Y)
    with pytest.raises(ValueError, match="returned NaN or infinity"):
        model.transform(np.full_like(X, 3e38))


# --- Ctrl-C -----------------------------------------------------------------------------------


def interrupt_in(monkeypatch, owner, name, n_calls):
    """Send the signal of Ctrl-C from the ``n_calls``-th call of a function."""
    original, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*args, **options):
        if next(calls) == n_calls:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)


AUTO = {"alpha": "auto", "gradient_alpha": "auto"}
PLACES = {
    "frozen layers": (estimator(feature_store=None, batch_size=6), Trunk, "_pass", 3),
    "penalties": (estimator(**AUTO), _held_out, "cached_logits", 7),
    "first stage": (estimator(), _two_stage_fit, "minimize", 1),
    "second stage": (estimator(), _two_stage_fit.TwoStageFit, "_second_model", 1),
    "cross-validation": (
        GradientFeatureClassifierCV(NET, alphas=2, gradient_alphas=[1.0], cv=3, n_jobs=2),
        _cross_validation,
        "_negative_loss",
        4,
    ),
}


@pytest.mark.parametrize(
    ("place", "is_fitted"), [("second stage", False), *((place, True) for place in PLACES)]
)
def test_an_interrupt_leaves_the_estimator_as_it_was(monkeypatch, place, is_fitted):
    model, *call = PLACES[place]
    model = clone(model)
    if is_fitted:
        model.fit(X[:18], Y[:18])
        proba = model.predict_proba(X)
    before = dict(vars(model))
    with monkeypatch.context() as patched:
        interrupt_in(patched, *call)
        with pytest.raises(KeyboardInterrupt):
            model.fit(X, Y + 1)
    assert vars(model).keys() == before.keys()
    assert all(vars(model)[name] is value for name, value in before.items())
    if is_fitted:
        assert np.array_equal(model.predict_proba(X), proba)
