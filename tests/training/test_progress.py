"""Callbacks and progress bars."""

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.utils.fixes import parse_version

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
)
from tests.tiny import NET, X, Y, estimator

has_callbacks = pytest.mark.skipif(
    parse_version(sklearn.__version__).release < (1, 9), reason="scikit-learn has no callbacks"
)
PENALTIES = "alpha", "gradient_alpha"
FAST = {"gradient_layers": ["2"], "tol": 1e-2}


class Recorder:
    """Note every hook; optionally ask to stop."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after
        self.begun, self.ended, self.stages = [], [], []
        self.predictions, self.probabilities, self.models = [], [], []

    def setup(self, estimator, context):
        self.stages.append("setup")

    def teardown(self, estimator, context):
        self.stages.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.begun.append(context.task_name)

    def on_fit_task_end(self, estimator, context, *, X=None, y=None, fitted_estimator=None):
        self.ended.append(context.task_name)
        if context.parent is not None:
            self.models.append(fitted_estimator)
        if fitted_estimator is not None and context.parent is not None:
            self.predictions.append(fitted_estimator.predict(X))
            if hasattr(fitted_estimator, "predict_proba"):
                self.probabilities.append(fitted_estimator.predict_proba(X))
        return self.stop_after is not None and len(self.models) >= self.stop_after


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
    model = GradientFeatureRegressor(NET, alpha=0.1, gradient_alpha=0.01, activation_layer=None)
    model.set_callbacks(recorder).fit(X, Y + 100.0)
    assert len(recorder.predictions) == model.n_iter_ >= 1
    np.testing.assert_array_equal(recorder.predictions[-1], model.predict(X))


@has_callbacks
def test_callback_sees_every_linearization():
    recorder = Recorder()
    model = estimator(n_linearizations=3, gradient_alpha=1e-3).set_callbacks(recorder).fit(X, Y)
    iterations = [name for name in recorder.ended if name != "fit"]
    assert len(iterations) == len(set(iterations)) == model.n_iter_
    numbers = {name.partition(",")[0] for name in iterations}
    assert numbers == {f"linearization {k}" for k in (1, 2, 3)}
    assert not np.array_equal(recorder.probabilities[-1], model.predict_proba(X))


@has_callbacks
@pytest.mark.parametrize("tol", [1e-4, 0.9])  # with the larger one, an iteration is enough
def test_callback_may_stop_between_linearizations(tol):
    recorder = Recorder(stop_after=1)
    model = estimator(n_linearizations=3, gradient_alpha=1e-3, tol=tol)
    model.set_callbacks(recorder).fit(X, Y)
    assert model.n_linearizations_ == model.n_iter_ == 1
    assert np.array_equal(recorder.probabilities[-1], model.predict_proba(X))


@has_callbacks
@pytest.mark.parametrize("features", ["full", "activation"])
def test_callback_sees_every_pair_of_penalties(features):
    recorder = Recorder()
    model = GradientFeatureClassifier(NET, features=features, **FAST, activation_layer=None)
    model.set_callbacks(recorder).fit(X, Y)
    tried = [name for name in recorder.ended if name.startswith("auto: alpha ")]
    assert len(tried) == len(model.validation_scores_["loss"])
    assert recorder.ended[: len(tried)] == tried
    pairs = zip(*(model.validation_scores_[name] for name in PENALTIES), strict=True)
    assert tried == [f"auto: alpha {pair[0]:.2g}, gradient_alpha {pair[1]:.2g}" for pair in pairs]
    assert recorder.models[0] is None
    assert recorder.models[-1] is not None


@has_callbacks
@pytest.mark.parametrize(
    ("features", "n_linearizations"), [("full", 1), ("full", "auto"), ("gradient", 1)]
)
@pytest.mark.parametrize("of_gradients", [False, True])
def test_callback_may_stop_the_search(features, n_linearizations, of_gradients):
    """The fit takes the best penalties so far, without a gradient term if none was tried."""

    class StopSearch(Recorder):
        def on_fit_task_end(self, estimator, context):
            self.ended.append(context.task_name)
            return (
                "auto: " in context.task_name and ("inf" not in context.task_name) == of_gradients
            )

    recorder = StopSearch()
    model = GradientFeatureClassifier(
        NET, features=features, n_linearizations=n_linearizations, **FAST, activation_layer=None
    )
    model.set_callbacks(recorder).fit(X, Y)
    tried = model.validation_scores_["gradient_alpha"]
    assert sum("auto: " in name for name in recorder.ended) == len(tried)
    assert np.isfinite(tried).sum() == of_gradients
    assert np.isfinite(tried[-1]) == of_gradients
    assert len(tried) == 1 or of_gradients
    assert model.n_iter_ > 1  # the fit itself goes on
    if features == "full" and not of_gradients:
        assert model.gradient_alpha_ == np.inf


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


def last_lines(text):
    """Return the last state of every line of a terminal."""
    lines = text.replace("\r\n", "\n").split("\n")
    return [line.rpartition("\r")[2].strip() for line in lines if line.strip()]


STAGE = r"iteration {} \[\d\d:\d\d\], objective [\d.]+, decrement \de-\d\d <= \de-\d\d"


def test_every_stage_has_a_line(capsys):
    model = estimator(feature_store=None, verbose=1, batch_size=10).fit(X, Y)
    out, err = capsys.readouterr()
    frozen, activation, full = last_lines(err)
    assert re.match(r"frozen layers: 100%.* 24/24 \[", frozen)
    assert re.fullmatch("activation: " + STAGE.format(r"\d+"), activation)
    assert re.fullmatch("full: " + STAGE.format(model.n_iter_), full)
    assert out == ""


def test_the_search_for_penalties_has_a_line(capsys):
    model = estimator(verbose=1, alpha="auto", gradient_alpha="auto").fit(X, Y)
    line = next(line for line in last_lines(capsys.readouterr().err) if line.startswith("auto"))
    scores = model.validation_scores_
    pattern = (
        r"auto: (\d+) \[\d\d:\d\d<\d\d:\d\d\], "
        r"best alpha (\S+), gradient_alpha (\S+), loss (\S+)"
    )
    n_tried, *best = re.fullmatch(pattern, line).groups()
    assert int(n_tried) == len(scores["loss"])
    start = np.isfinite(scores["gradient_alpha"]).argmax() - 1  # the model without a gradient term
    i = start + scores["loss"][start:].argmin()
    expected = [scores[name][i] for name in ("alpha", "gradient_alpha", "loss")]
    np.testing.assert_allclose([float(value) for value in best], expected, rtol=0.05)


def test_stored_samples_have_no_line(capsys):
    new = X + np.float32(0.125)
    model = estimator(verbose=1).fit(new[:18], Y[:18])
    assert "frozen layers" in capsys.readouterr().err
    model.fit(new[:18], Y[:18])
    stages = [line.partition(":")[0] for line in last_lines(capsys.readouterr().err)]
    assert stages == ["activation", "full"]
    model.predict(new[:18])
    assert capsys.readouterr().err == ""
    model.predict(new)
    assert "6/6" in capsys.readouterr().err


def test_without_verbose_nothing_is_printed(capsys):
    model = estimator(alpha="auto", features="activation", feature_store=None).fit(X, Y)
    model.predict(X)
    GradientFeatureClassifierCV(
        NET, alphas=[1.0], gradient_alphas=[1.0], cv=2, activation_layer=None
    ).fit(X, Y)
    assert capsys.readouterr() == ("", "")


def test_lines_fit_into_a_terminal(monkeypatch):
    """tqdm cuts a line at the last column, and rewrites it after a carriage return."""
    termios, pty = pytest.importorskip("termios"), pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with ThreadPoolExecutor(1) as thread, open(ours, "rb", 0) as screen:

        def read():
            """Return all output until the terminal is closed, which is an error on Linux."""
            found = b""
            with contextlib.suppress(OSError):
                while more := screen.read(4096):
                    found += more
            return found.decode()

        output = thread.submit(read)
        with open(theirs, "w") as terminal:
            monkeypatch.setattr("sys.stderr", terminal)
            auto = {"alpha": 0.1, "gradient_alpha": "auto", "activation_layer": None}
            estimator(verbose=1, feature_store=None, **auto).fit(X, Y)
            monkeypatch.undo()
        text = output.result()
    lines = last_lines(text)
    assert [re.match("[a-z ]*", line)[0] for line in lines] == ["frozen layers", "auto", "full"]
    assert max(map(len, re.split(r"[\r\n]+", text))) <= 80
    assert re.search(r"loss 0\.\d+$", lines[1])
    assert re.search(r"decrement \de-\d\d <= \de-\d\d$", lines[2])


def test_silent_fit_makes_no_bar(monkeypatch):
    def fail(*_arguments, **_options):
        raise AssertionError("a bar takes a lock that a killed fork may hold")

    monkeypatch.setattr("tqdm.std.tqdm.__new__", fail)
    search = GradientFeatureClassifierCV(
        NET, alphas=[0.1], gradient_alphas=[0.1], cv=2, tol=0.1, activation_layer=None
    )
    for model in (estimator(alpha="auto", tol=0.1, feature_store=None), search):
        model.fit(X, Y).predict(X + 1)
