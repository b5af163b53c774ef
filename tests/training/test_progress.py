"""Callbacks and progress bars."""

import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.utils.fixes import parse_version

from sklearn_gradfeat import GradientFeatureRegressor
from tests.tiny import NET, X, Y, estimator

has_callbacks = pytest.mark.skipif(
    parse_version(sklearn.__version__).release < (1, 9), reason="scikit-learn has no callbacks"
)


class Recorder:
    """Note every hook; optionally ask to stop."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after
        self.begun, self.ended, self.stages = [], [], []
        self.predictions, self.probabilities = [], []

    def setup(self, estimator, context):
        self.stages.append("setup")

    def teardown(self, estimator, context):
        self.stages.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.begun.append(context.task_name)

    def on_fit_task_end(self, estimator, context, *, X=None, y=None, fitted_estimator=None):
        self.ended.append(context.task_name)
        if context.parent is not None:
            self.predictions.append(fitted_estimator.predict(X))
            if hasattr(fitted_estimator, "predict_proba"):
                self.probabilities.append(fitted_estimator.predict_proba(X))
        return self.stop_after is not None and len(self.predictions) >= self.stop_after


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
    assert np.array_equal(recorder.probabilities[-1], model.predict_proba(X))
    assert not np.array_equal(recorder.probabilities[0], recorder.probabilities[-1])
    assert len(model.objective_path_) == model.n_iter_ + 1
    silent = estimator(features=features, tol=1e-6).fit(X, Y)
    assert np.array_equal(model.coef_, silent.coef_)


@has_callbacks
def test_callback_sees_the_predictions_of_a_regressor():
    """The constant that the targets were shifted by is part of the intercept."""
    recorder = Recorder()
    model = GradientFeatureRegressor(NET, alpha=0.1, gradient_alpha=0.01)
    model.set_callbacks(recorder).fit(X, Y + 100.0)
    assert len(recorder.predictions) == model.n_iter_ > 1
    np.testing.assert_array_equal(recorder.predictions[-1], model.predict(X))


@has_callbacks
def test_callback_may_stop():
    recorder = Recorder(stop_after=2)
    model = estimator(tol=1e-8).set_callbacks(recorder).fit(X, Y)
    assert model.n_iter_ == 2
    assert np.array_equal(recorder.probabilities[-1], model.predict_proba(X))


@has_callbacks
def test_callbacks_survive_a_clone():
    recorder = Recorder()
    model = estimator().set_callbacks(recorder)
    copy = clone(model).fit(X, Y)
    assert len(recorder.predictions) == copy.n_iter_


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
        model.fit(X, Y > 0)
    assert recorder.stages == ["setup", "teardown"]
    assert np.array_equal(model.predict_proba(X), proba)
    assert list(model.classes_) == [0, 1, 2]


@has_callbacks
def test_progress_bar_of_scikit_learn(capsys):
    pytest.importorskip("rich")
    from sklearn.callback import ProgressBar

    model = estimator().set_callbacks(ProgressBar()).fit(X, Y)
    assert "GradientFeatureClassifier" in capsys.readouterr().out
    assert np.array_equal(model.coef_, estimator().fit(X, Y).coef_)


def test_verbose_shows_bars(capsys):
    model = estimator(verbose=1).fit(X, Y)
    out, err = capsys.readouterr()
    assert out == ""
    assert "objective" in err
    assert "trunk" in err
    model.predict(X)
    assert "sample" in capsys.readouterr().err
    estimator().fit(X, Y).predict(X)
    assert capsys.readouterr().err == ""
