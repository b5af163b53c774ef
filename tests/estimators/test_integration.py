"""The estimator inside scikit-learn: pipelines, searches, ensembles, clones, pickles."""

import io
import pickle

import joblib
import numpy as np
import pytest
import scipy.sparse as sp
import sklearn
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_iris
from sklearn.ensemble import BaggingClassifier, StackingClassifier, VotingClassifier
from sklearn.exceptions import UnsetMetadataPassedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.fixes import parse_version
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier
from tests.tiny import NET, X, Y, estimator, tiny_net

BINARY = (Y > 0).astype(int)
LABELS = np.stack([Y == 0, Y > 0, np.arange(24) % 2 == 0, Y != 1], 1).astype(int)
has_callbacks = pytest.mark.skipif(
    parse_version(sklearn.__version__).release < (1, 9), reason="scikit-learn has no callbacks"
)


@pytest.fixture(scope="module")
def fitted():
    return estimator().fit(X, Y)


def accuracy(model, X=X, y=Y):
    return np.mean(model.predict(X) == y)


# --- meta-estimators -------------------------------------------------------------------------


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
    grid = [
        {"alpha": [0.1, 10.0], "gradient_alpha": [None, 1.0]},
        {"gradient_layers": [2]},
    ]
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


def test_bagging_of_rows():
    rows = X.reshape(24, -1)[:, :6]
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    bag = BaggingClassifier(estimator(net), n_estimators=2, random_state=0).fit(rows, Y)
    assert bag.predict_proba(rows).shape == (24, 3)


def test_one_versus_rest():
    rows = X.reshape(24, -1)[:, :6]
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    model = OneVsRestClassifier(estimator(net)).fit(rows, Y)
    assert model.predict_proba(rows).shape == (24, 3)


# --- metadata, clones ------------------------------------------------------------------------


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


@pytest.mark.parametrize("value", ["1e-4", None, 3])
def test_parameters_are_kept_as_given(value):
    assert estimator(alpha=value).get_params()["alpha"] is value


def test_repr(fitted):
    for model in (estimator(), fitted, make_pipeline(StandardScaler(), fitted)):
        assert "GradientFeatureClassifier" in repr(model)
        html = model._repr_html_()
        assert "GradientFeatureClassifier" in html
        assert "alpha" in html


# --- pickles ---------------------------------------------------------------------------------


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_joblib(model):
    stream = io.BytesIO()
    joblib.dump(model, stream)
    stream.seek(0)
    return joblib.load(stream)


@pytest.mark.parametrize("trip", [through_pickle, through_joblib])
@pytest.mark.parametrize("features", ["full", "activation", "gradient"])
def test_pickle(trip, features):
    model = estimator(features=features).fit(X, Y)
    expected = model.predict_proba(X)
    back = trip(model)
    assert np.array_equal(back.predict_proba(X), expected)
    assert np.array_equal(model.predict_proba(X), expected)
    assert np.array_equal(back.fit(X, Y).coef_, model.coef_)


def test_pickle_of_rows():
    rows, y = load_iris(return_X_y=True)
    model = GradientFeatureClassifier(features="activation", tol=1e-4, alpha=0.1, random_state=0)
    model.fit(rows, y)
    assert np.array_equal(through_pickle(model).predict_proba(rows), model.predict_proba(rows))


def test_pickle_before_fit():
    model = through_pickle(estimator())
    assert np.array_equal(model.fit(X, Y).coef_, estimator().fit(X, Y).coef_)


# --- targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [np.asarray, sp.csr_array, sp.csr_matrix, sp.coo_array])
def test_multi_label(convert):
    target = convert(LABELS)
    model = estimator().fit(X, target)
    assert list(model.classes_) == [0, 1, 2, 3]
    assert model.coef_.shape == (4, 6)
    labels, proba = model.predict(X), model.predict_proba(X)
    assert labels.shape == proba.shape == model.decision_function(X).shape == (24, 4)
    assert set(np.unique(labels)) <= {0, 1}
    assert np.array_equal(labels, proba > 0.5)
    exact = np.mean((labels == LABELS).all(1))
    assert model.score(X, target) == pytest.approx(exact)
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(proba), rtol=1e-4)
    assert np.array_equal(model.coef_, estimator().fit(X, LABELS).coef_)


def test_multi_label_is_several_binary_problems_in_the_activations():
    tight = {"features": "activation", "precision": "float64", "tol": 1e-16, "max_iter": 500}
    together = estimator(**tight).fit(X, LABELS).decision_function(X)
    for column, labels in zip(together.T, LABELS.T, strict=True):
        alone = estimator(**tight).fit(X, labels).decision_function(X)
        np.testing.assert_allclose(alone, column, atol=1e-5)


def test_multi_label_with_a_constant_label():
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
    model = estimator().fit(X, y)
    logits, proba = model.decision_function(X), model.predict_proba(X)
    assert logits.shape == (24,)
    assert model.coef_.shape == (1, 6)
    assert model.intercept_.shape == (1,)
    assert np.array_equal(model.predict(X), np.array(values)[(logits > 0).astype(int)])
    np.testing.assert_allclose(proba[:, 1], 1 / (1 + np.exp(-logits)), rtol=1e-5)
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-6)
    assert np.array_equal(model.coef_, estimator().fit(X, BINARY).coef_)


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


# --- callbacks and progress ------------------------------------------------------------------


class Recorder:
    """Note every hook; optionally ask to stop."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after
        self.begun, self.ended, self.scores, self.stages = [], [], [], []

    def setup(self, estimator, context):
        self.stages.append("setup")

    def teardown(self, estimator, context):
        self.stages.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.begun.append(context.task_name)

    def on_fit_task_end(self, estimator, context, *, X=None, y=None, fitted_estimator=None):
        self.ended.append(context.task_name)
        if context.parent is not None:
            self.scores.append(fitted_estimator.predict_proba(X))
        return self.stop_after is not None and len(self.scores) >= self.stop_after


@has_callbacks
@pytest.mark.parametrize("features", ["full", "activation", "gradient"])
def test_callback_sees_every_iteration(features):
    recorder = Recorder()
    model = estimator(features=features, tol=1e-6).set_callbacks(recorder).fit(X, Y)
    iterations = [name for name in recorder.ended if name != "fit"]
    assert model.n_iter_ > 1
    assert len(iterations) == len(set(iterations)) == model.n_iter_
    assert recorder.begun.count("fit") == recorder.ended.count("fit") == 1
    assert recorder.stages == ["setup", "teardown"]
    assert np.array_equal(recorder.scores[-1], model.predict_proba(X))
    assert not np.array_equal(recorder.scores[0], recorder.scores[-1])
    assert len(model.objective_path_) == model.n_iter_ + 1
    silent = estimator(features=features, tol=1e-6).fit(X, Y)
    assert np.array_equal(model.coef_, silent.coef_)


@has_callbacks
def test_callback_may_stop():
    recorder = Recorder(stop_after=2)
    model = estimator(tol=1e-8).set_callbacks(recorder).fit(X, Y)
    assert model.n_iter_ == 2
    assert np.array_equal(recorder.scores[-1], model.predict_proba(X))


@has_callbacks
def test_callbacks_survive_a_clone():
    recorder = Recorder()
    model = estimator().set_callbacks(recorder)
    copy = clone(model).fit(X, Y)
    assert len(recorder.scores) == copy.n_iter_


@has_callbacks
def test_failing_callback_leaves_the_estimator_usable():
    class Failing(Recorder):
        def on_fit_task_end(self, estimator, context):
            raise RuntimeError("out of patience")

    recorder = Failing()
    model = estimator().fit(X, Y)
    proba = model.predict_proba(X)
    model.set_callbacks(recorder)
    with pytest.raises(RuntimeError, match="out of patience"):
        model.fit(X, BINARY)
    assert recorder.stages == ["setup", "teardown"]
    assert np.array_equal(model.predict_proba(X), proba)
    assert list(model.classes_) == [0, 1, 2]


@has_callbacks
def test_progress_bar(capsys):
    pytest.importorskip("rich")
    from sklearn.callback import ProgressBar

    model = estimator().set_callbacks(ProgressBar()).fit(X, Y)
    assert "GradientFeatureClassifier" in capsys.readouterr().out
    assert np.array_equal(model.coef_, estimator().fit(X, Y).coef_)


def test_verbose(capsys):
    model = estimator(verbose=1).fit(X, Y)
    out, err = capsys.readouterr()
    assert out == ""
    assert "objective" in err
    assert "trunk" in err
    model.predict(X)
    assert "sample" in capsys.readouterr().err
    estimator().fit(X, Y).predict(X)
    assert capsys.readouterr().err == ""


# --- the optimum is one ----------------------------------------------------------------------


def test_warm_start():
    tight = {"alpha": 1e-2, "precision": "float64", "tol": 1e-14, "max_iter": 500}
    warm = estimator(warm_start=True, **tight).fit(X, Y)
    first = warm.n_iter_
    warm.fit(X, Y)
    assert warm.n_iter_ < first / 2
    tight["alpha"] = 1.02e-2
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


@pytest.mark.parametrize("batch_size", [1, 2, 7, 24])
def test_batch_size(batch_size):
    tight = {"precision": "float64", "tol": 1e-12, "max_iter": 500}
    whole = estimator(**tight).fit(X, Y)
    parts = estimator(batch_size=batch_size, **tight).fit(X, Y)
    np.testing.assert_allclose(parts.predict_proba(X), whole.predict_proba(X), atol=1e-5)
    whole_proba = whole.predict_proba(X)
    whole_in_parts = clone(whole).set_params(batch_size=batch_size)
    whole_in_parts.__dict__.update({n: v for n, v in whole.__dict__.items() if n.endswith("_")})
    for name in ("_extractor", "_multilabel"):
        setattr(whole_in_parts, name, getattr(whole, name))
    np.testing.assert_allclose(whole_in_parts.predict_proba(X), whole_proba, atol=1e-12)


def test_one_sample_to_predict(fitted):
    expected = fitted.predict_proba(X)
    for i in (0, 5):
        np.testing.assert_allclose(fitted.predict_proba(X[i : i + 1]), expected[[i]], atol=1e-5)


def test_penalty_has_the_meaning_of_scikit_learn():
    activation = torch.no_grad()(NET)(torch.from_numpy(X)).double().numpy()
    model = estimator(features="activation", precision="float64", tol=1e-18, max_iter=500)
    model.set_params(alpha=1e-2).fit(X, Y)
    reference = LogisticRegression(C=1 / (1e-2 * 24), tol=1e-10, max_iter=5000).fit(activation, Y)
    np.testing.assert_allclose(
        model.predict_proba(X), reference.predict_proba(activation), atol=1e-5
    )


def test_clones_share_the_captured_network():
    model = estimator(tiny_net(), features="activation").fit(X, Y)
    assert clone(model).fit(X, Y)._extractor.backbone is model._extractor.backbone
