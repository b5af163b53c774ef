"""Fits that go on where another process was killed, and checkpoints of other fits."""

import os

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
    config_context,
    load,
)
from sklearn_gradfeat.curvature import _coarse_space as coarse_space
from sklearn_gradfeat.estimators import _checkpointing
from sklearn_gradfeat.io import Checkpoint, _checkpoint
from sklearn_gradfeat.linearized import LinearizedHead
from sklearn_gradfeat.training import _held_out as held_out
from sklearn_gradfeat.training import _two_stage_fit as two_stage_fit
from tests.counting import Counted
from tests.tiny import NET, X, Y, data, estimator, tiny_net

WRITE = _checkpoint.write_archive


class KilledError(BaseException):
    """Takes the place of SIGKILL."""


def table(n=40, n_outputs=1):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, 5))
    y = np.sin(rows[:, :n_outputs]) + 0.1 * rng.normal(size=(n, n_outputs))
    return rows, y[:, 0] if n_outputs == 1 else y


@pytest.fixture(autouse=True)
def always_due():
    with config_context(checkpoint_seconds=0):
        yield


@pytest.fixture
def kill(monkeypatch):
    """Return the function that fits a model, and kills the fit after some checkpoints."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and of no use without a power cut

    def fit(model, after, *samples, **weights):
        n_written = 0

        def write(*arguments):
            nonlocal n_written
            n_written += 1
            if n_written == after:
                WRITE(*arguments)
                raise KilledError

        monkeypatch.setattr(_checkpoint, "write_archive", write)
        try:
            model.fit(*samples, **weights)
        except KilledError:
            return True
        finally:
            monkeypatch.setattr(_checkpoint, "write_archive", WRITE)
        return False

    return fit


ATTRIBUTES = [
    "coef_", "intercept_", "omega_", "alpha_", "gradient_alpha_", "objective_path_", "n_iter_",
    "n_passes_", "n_linearizations_",
]  # fmt: skip


def assert_same(found, expected):
    """Compare the bits of models."""
    for name in ATTRIBUTES:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    for name in ("gradient_coef_", "linearization_point_", "validation_scores_"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.keys() == other.keys()
        for key, values in other.items():
            np.testing.assert_array_equal(one[key], values, key)


IMAGES = {"precision": "float64", "tol": 1e-6}
CASES = {
    "given penalties": (estimator(**IMAGES), (X, Y), 3),
    "activation": (estimator(features="activation", alpha="auto", **IMAGES), (X, Y), 20),
    "gradient": (estimator(features="gradient", **IMAGES), (X, Y), 3),
    "squared": (estimator(loss="squared", precision="float64"), (X, Y), 2),
    "layers": (estimator(activation_layer=["1", "5"], **IMAGES), (X, Y), 4),
    "auto": (estimator(gradient_alpha="auto", precision="float64"), data(30), 60),
    "float32": (estimator(alpha="auto", gradient_alpha="auto"), data(150), 40),
    "linearizations": (estimator(n_linearizations=3, precision="float64"), (X, Y), 13),
    "huber": (GradientFeatureRegressor(loss="huber", random_state=0), table(), 30),
    "labels": (GradientFeatureClassifier(alpha=0.01, random_state=0), None, 25),
}


@pytest.mark.parametrize("name", CASES)
def test_a_killed_fit_ends_with_the_same_model(name, kill, tmp_path):
    model, samples, after = CASES[name]
    if samples is None:
        rows, y = table(n_outputs=2)
        samples = rows, (y > 0).astype(int)
    whole = clone(model).fit(*samples)
    path = tmp_path / "checkpoint"
    assert kill(clone(model).set_params(checkpoint=path), after, *samples)
    assert path.exists()
    assert kill(clone(model).set_params(checkpoint=path), max(2, after // 2), *samples)
    found = clone(model).set_params(checkpoint=path)
    assert not kill(found, -1, *samples)
    assert_same(found, whole)
    assert list(tmp_path.iterdir()) == []  # the fit is finished


LOGITS = X.mean((1, 2, 3)) + 0.2 * np.random.default_rng(1).normal(size=len(Y))
LABELS = np.stack([Y == 0, LOGITS > 0.5], axis=1).astype(int)
WEAK = {"alpha": 1e-3, "gradient_alpha": 1e-3, "gradient_layers": 2, "random_state": 0}
FLOAT32 = {
    "classes": (GradientFeatureClassifier(NET, tol=1e-3, **WEAK), np.roll(Y, 3)),
    "labels": (GradientFeatureClassifier(NET, gradient_layers=2, alpha=0.1), LABELS),
    "targets": (GradientFeatureRegressor(NET, gradient_layers=2, tol=0.01), LOGITS),
}


@pytest.mark.parametrize(
    ("name", "in_coarse_space"),
    [*((name, False) for name in FLOAT32), ("classes", True), ("labels", True)],
)
def test_the_bits_in_float32(name, in_coarse_space, monkeypatch, tmp_path):
    """Sums over the iterations, such as the logits, have last digits of their own."""
    if in_coarse_space:
        monkeypatch.setattr(coarse_space, "_MIN_COST", 1)
        monkeypatch.setattr(held_out, "_MAX_DENSE", 0)
        monkeypatch.setattr(two_stage_fit, "with_rows_if_cheap", lambda term, *_: term)
    model, y = FLOAT32[name]
    whole, model = clone(model).fit(X, y), model.set_params(checkpoint=tmp_path / "checkpoint")
    found = clone(model)
    files = files_of(found, X, y)
    assert_same(found, whole)
    for after in (len(files) // 2, len(files) - 2):
        WRITE(*files[after])
        with config_context(checkpoint_seconds=600):
            assert_same(clone(model).fit(X, y), whole)


def files_of(model, *samples):
    """Return the arguments of each call that writes the checkpoint of a fit."""
    files = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_checkpoint, "write_archive", lambda *file: files.append(file))
        model.fit(*samples)
    return files


def test_kills_between_linearizations(monkeypatch, tmp_path):
    """Before and after each move, and in each fit of the output weights of a moved network."""
    model = GradientFeatureClassifier(NET, n_linearizations=2, **WEAK | {"tol": 1e-3})
    whole, model = clone(model).fit(X, Y), model.set_params(checkpoint=tmp_path / "checkpoint")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    files = files_of(clone(model), X, Y)
    numbers = [file[1]["entries"][0].count("\n") for file in files]
    chosen = [
        file
        for file, number, next_one in zip(files, numbers, [*numbers[1:], 0], strict=True)
        if number != next_one and number > 5
    ]
    assert len(chosen) > 10
    for file in chosen:
        WRITE(*file)
        with config_context(checkpoint_seconds=600):
            assert_same(clone(model).fit(X, Y), whole)


def test_merge_after_a_kill(monkeypatch, tmp_path):
    """A merge that is killed changes nothing, and one of the saved model gives the same bits."""
    model = GradientFeatureClassifier(NET, **WEAK).fit(X, Y)
    model.save(tmp_path / "model")
    minimize, loaded = two_stage_fit.minimize, load(tmp_path / "model", NET)

    def killed(*arguments, **options):
        minimize(*arguments, **options)
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(two_stage_fit, "minimize", killed)
        with pytest.raises(KilledError):
            model.merge(X, Y)
    assert_same(model, loaded)
    assert_same(loaded.merge(X, Y), model.merge(X, Y))
    assert model.linearization_point_


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto", "linearizations, auto"])
def test_many_kills(name, kill, tmp_path):
    n_linearizations = 1 if name == "auto" else "auto"
    model = GradientFeatureClassifier(NET, n_linearizations=n_linearizations, **IMAGES)
    samples, n_kills = data(60), 0
    whole = clone(model).fit(*samples)
    model.set_params(checkpoint=tmp_path / "checkpoint")
    while kill(clone(model), 47, *samples):
        n_kills += 1
    assert n_kills > 4
    assert kill(clone(model), 47, *samples)
    assert_same(clone(model).fit(*samples), whole)


@pytest.mark.parametrize(
    ("after", "n_linearizations"),
    [(13, 1), (31, 1), pytest.param(23, "auto", marks=pytest.mark.slow)],
)
def test_losses_from_the_coarse_space(after, n_linearizations, kill, monkeypatch, tmp_path):
    """Each minimum over the space starts from the former one, also after a kill."""
    monkeypatch.setattr(coarse_space, "_MIN_COST", 1)
    monkeypatch.setattr(held_out, "_MAX_DENSE", 0)
    model = estimator(gradient_alpha="auto", n_linearizations=n_linearizations, **IMAGES)
    whole = clone(model).fit(*data(30))
    model.set_params(checkpoint=tmp_path / "checkpoint")
    assert kill(clone(model), after, *data(30))
    while kill(clone(model), after, *data(30)):
        pass
    assert_same(clone(model).fit(*data(30)), whole)


def test_kill_in_a_fit_to_a_moved_network(monkeypatch, tmp_path):
    """The search fits output weights at a point that the journal must still have."""
    refitted = held_out._Fold.refitted
    rows, y = table(20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
    model = GradientFeatureRegressor(net, n_linearizations=2, precision="float64")
    whole = clone(model).fit(rows, y)
    model.set_params(checkpoint=tmp_path / "checkpoint")

    def write(*arguments):
        WRITE(*arguments)
        raise KilledError

    def killed(fold, alpha):
        monkeypatch.setattr(_checkpoint, "write_archive", write)
        return refitted(fold, alpha)

    with monkeypatch.context() as patched:
        patched.setattr(held_out._Fold, "refitted", killed)
        with pytest.raises(KilledError):
            clone(model).fit(rows, y)
    monkeypatch.setattr(_checkpoint, "write_archive", WRITE)
    with config_context(checkpoint_seconds=600):
        assert_same(clone(model).fit(rows, y), whole)


def test_weights_and_a_warm_start(kill, tmp_path):
    weights = np.random.default_rng(0).uniform(size=len(Y))
    path, former = tmp_path / "checkpoint", estimator(**IMAGES).fit(X, Y)

    def warm():
        model = clone(former)
        vars(model).update({k: v for k, v in vars(former).items() if k.endswith("_")})
        return model.set_params(warm_start=True, alpha=0.01, checkpoint=path)

    whole = warm().set_params(checkpoint=None).fit(X, Y, weights)
    assert kill(warm(), 3, X, Y, sample_weight=weights)
    with pytest.raises(ValueError, match="differ in the fitted model, from which warm_start"):
        clone(warm()).fit(X, Y, weights)
    assert_same(warm().fit(X, Y, weights), whole)


def test_what_is_finished_is_not_computed_again(kill, monkeypatch, tmp_path):
    counts, log = {"pass": 0, "checkpoint": 0}, tmp_path / "log"

    def counted(name, function):
        def count(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return count

    for name in ("jvp", "vjp", "jvp_then_vjp"):
        product = counted("pass", getattr(LinearizedHead, name))
        monkeypatch.setattr(LinearizedHead, name, product)
    monkeypatch.setattr(Checkpoint, "_write", counted("checkpoint", Checkpoint._write))
    model = estimator(
        n_linearizations=2, preprocess=Counted(log), feature_store=tmp_path / "store",
        checkpoint=tmp_path / "checkpoint", **IMAGES,
    )  # fmt: skip
    whole = clone(model).fit(X, Y)
    n_passes, n_seen = counts["pass"], log.read_text()
    assert kill(clone(model), counts["checkpoint"], X, Y)  # it lacks nothing
    counts["pass"] = 0
    found = clone(model).fit(X, Y)
    assert log.read_text() == n_seen
    assert counts["pass"] == 3 < n_passes  # the check of the derivatives
    assert_same(found, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.2}, r"differ in alpha \(0.2 here, 0.1 there\)\."),
        ({"features": "activation", "max_iter": 9}, r"features .*, max_iter \(9 here, 40 there\)"),
        ({"backbone": None}, "differ in the network, the parameters of gradient_layers"),
        ({"gradient_layers": "0"}, "gradient_layers"),
        ({"precision": "float32"}, "precision"),
        ({"store_dtype": "bfloat16"}, r"store_dtype \('bfloat16' here, 'auto' there\)"),
        ({"y": Y[::-1]}, "differ in y, sample_weight or class_weight|differ in y"),
        ({"X": X + 1}, "differ in X"),
        ({"X": X.astype(np.float64)}, "differ in X"),
        ({"sample_weight": np.arange(1, 25)}, "differ in sample_weight or class_weight"),
    ],
)
def test_checkpoints_of_other_fits_are_refused(changes, message, kill, tmp_path):
    path = tmp_path / "checkpoint"
    model = estimator(**IMAGES, checkpoint=path)
    assert kill(clone(model), 2, X, Y)
    content = path.read_bytes()
    if changes.get("backbone", 0) is None:
        changes = {"backbone": tiny_net()}
        with torch.no_grad():
            changes["backbone"][0].bias += 1
        message = "differ in the network"
    samples = {"X": X, "y": Y, "sample_weight": None}
    samples |= {name: changes[name] for name in changes if name in samples}
    model.set_params(**{name: value for name, value in changes.items() if name not in samples})
    with pytest.raises(ValueError, match=message) as error:
        model.fit(**samples)
    assert "Delete the file, or pass another path" in str(error.value)
    assert path.read_bytes() == content
    assert_same(estimator(**IMAGES, checkpoint=path).fit(X, Y), estimator(**IMAGES).fit(X, Y))


def test_another_number_of_processes_is_refused(kill, monkeypatch, tmp_path):
    model = estimator(**IMAGES, checkpoint=tmp_path / "checkpoint")
    assert kill(clone(model), 2, X, Y)
    monkeypatch.setattr(_checkpointing, "n_ranks", lambda: 2)
    with pytest.raises(ValueError, match=r"the number of processes \(2 here, 1 there\)"):
        model.fit(X, Y)


def test_choices_of_the_machine_do_not_count(kill, tmp_path):
    model = estimator(**IMAGES, checkpoint=tmp_path / "checkpoint")
    assert kill(clone(model), 3, X, Y)
    other = clone(model).set_params(batch_size=7, feature_store=None, random_state=3, device="cpu")
    expected = estimator(**IMAGES).fit(X, Y).coef_
    np.testing.assert_allclose(other.fit(X, Y).coef_, expected, rtol=0, atol=1e-5)


GIVEN = {"alphas": [0.1, 1e-2], "gradient_alphas": [np.inf, 0.1, 1e-2], "cv": 3}
SEARCHES = {
    "lists": (GradientFeatureClassifierCV(NET, **GIVEN), Y),
    "numbers": (
        GradientFeatureClassifierCV(NET, cv=2, alphas=[0.1], gradient_alphas=1, tol=0.1),
        Y,
    ),
    "accuracy": (
        GradientFeatureClassifierCV(
            NET, **GIVEN, scoring="accuracy", refit=False, precision="float64"
        ),
        Y,
    ),
    "labels": (
        GradientFeatureClassifierCV(NET, **GIVEN | {"alphas": [0.01]}, gradient_layers=2),
        LABELS,
    ),
    "threads": (GradientFeatureRegressorCV(NET, **GIVEN, n_jobs=2), LOGITS),
    "moved": (
        GradientFeatureRegressorCV(NET, **GIVEN | {"alphas": [0.1]}, n_linearizations=2),
        LOGITS,
    ),
    "loo": (
        GradientFeatureRegressorCV(
            None,
            **GIVEN | {"cv": "loo"},
            random_state=0,
        ),
        LOGITS,
    ),
}


def assert_same_search(found, expected):
    for name in ("scores_", "alphas_", "gradient_alphas_", "best_score_", "alpha_"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    assert found.gradient_alpha_ == expected.gradient_alpha_
    assert hasattr(found, "coef_") == hasattr(expected, "coef_")
    for name in ATTRIBUTES if hasattr(expected, "coef_") else []:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)


@pytest.mark.filterwarnings("ignore:The best of")
@pytest.mark.parametrize("name", SEARCHES)
def test_a_killed_search_ends_with_the_same_scores(name, kill, monkeypatch, tmp_path):
    model, y = SEARCHES[name]
    rows = table(len(y))[0] if name == "loo" else X
    whole, path, counts = clone(model).fit(rows, y), tmp_path / "checkpoint", []

    def counted(*arguments, **options):
        counts.append(1)
        return minimize(*arguments, **options)

    minimize = two_stage_fit.minimize
    monkeypatch.setattr(two_stage_fit, "minimize", counted)
    model = clone(model).set_params(checkpoint=path)
    found = clone(model)
    n_files = len(files_of(found, rows, y))
    assert_same_search(found, whole)
    n_fits = len(counts)
    counts.clear()
    n_kills = 0
    while kill(found := clone(model), n_files // 3, rows, y):
        n_kills += 1
    assert n_kills >= 2
    assert_same_search(found, whole)
    if name != "threads":  # the other thread goes on for a while
        assert n_fits <= len(counts) <= n_fits + n_kills  # a kill loses the rest of one fit
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:The best of")
def test_checkpoints_of_other_searches_are_refused(kill, tmp_path):
    model = GradientFeatureClassifierCV(NET, **GIVEN, checkpoint=tmp_path / "checkpoint")
    assert kill(clone(model), 5, X, Y)
    for changes, message in (
        ({"alphas": [0.1]}, r"differ in alphas \("),
        ({"cv": 2}, r"differ in cv or groups\."),
        ({"scoring": "accuracy"}, r"differ in scoring \('accuracy' here, None there\)"),
        ({"backbone": tiny_net()[:4]}, "differ in the network"),
    ):
        with pytest.raises(ValueError, match=message):
            clone(model).set_params(**changes).fit(X, Y)
    with pytest.raises(ValueError, match="differ in X"):
        clone(model).fit(X + 1, Y)
    with pytest.raises(ValueError, match=r"differ in the class"):
        GradientFeatureClassifier(NET, checkpoint=model.checkpoint).fit(X, Y)
    clone(model).set_params(n_jobs=2, verbose=0).fit(X, Y)
    assert list(tmp_path.iterdir()) == []


def test_a_random_network_needs_a_seed(tmp_path):
    model = GradientFeatureRegressor(checkpoint=tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint needs random_state: .*Set random_state=0"):
        model.fit(*table())


def test_clones_have_the_path_and_model_files_do_not(tmp_path):
    path = tmp_path / "checkpoint"
    model = estimator(features="activation", checkpoint=path).fit(X, Y)
    assert clone(model).checkpoint == path
    model.save(tmp_path / "model")
    assert load(tmp_path / "model", tiny_net()).checkpoint is None
