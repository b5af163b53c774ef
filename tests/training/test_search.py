"""The penalties that a fit chooses."""

import math

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris, load_wine
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureRegressor
from sklearn_gradfeat.training._search import _Path
from tests.counting import Counted
from tests.tiny import NET, X, Y


def iris(n=60):
    rows, y = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))[:n]
    return StandardScaler().fit_transform(rows)[order], y[order]


def automatic(**options):
    return GradientFeatureClassifier(random_state=0, **options)


# --- paths over given losses ------------------------------------------------------------------


class Given:
    """Held-out losses that are a function of the penalty."""

    def __init__(self, loss, noise=0.0, n=400):
        self.loss, self.tried = loss, []
        self.weights = np.full(n, 1 / 400)
        self.noise = noise

    def losses(self, alpha, _):
        self.tried.append(alpha)
        noise = self.noise * np.random.default_rng(len(self.tried)).normal(size=len(self.weights))
        return self.loss(alpha) + noise - noise.mean()


def path(loss, start=1.0, infinite=False, **options):
    given = Given(loss, **options)
    return _Path(given, lambda a: (a, 0.0), None).best_from(start, infinite), given.tried


@pytest.mark.parametrize("exponent", [-3.4, -1.0, 0.3, 2.6])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_minimum_is_found_wherever_it_lies(exponent, scale):
    """Also above the start of the path."""
    best, tried = path(lambda a: 1 + (math.log10(a / scale) - exponent) ** 2, scale)
    assert math.log10(best / scale) == pytest.approx(exponent, abs=1e-6)
    assert len(tried) <= abs(exponent) + 4


def test_loss_that_falls_for_ever():
    best, tried = path(lambda a: 1 + 0.5 * math.tanh(math.log10(a)))
    assert best <= 1e-3
    assert len(tried) < 12


def test_falls_of_a_negligible_loss_end_a_path():
    """The loss of separable classes falls for ever by the same factor."""
    given = Given(lambda a: a)
    _Path(given, lambda a: (a, 0.0), None, negligible=1e-3).best_from(1.0)
    assert min(given.tried) == pytest.approx(1e-5)


@pytest.mark.parametrize(("loss", "n_tried"), [(1e-4, 1), (1e-2, 5)])
def test_a_negligible_loss_needs_no_gradient_term(loss, n_tried):
    given = Given(lambda a: loss if math.isinf(a) else loss / 2)
    path = _Path(given, lambda a: (a, 0.0), None, negligible=1e-3)
    assert math.isinf(path.best_from(1.0, infinite=True)) == (n_tried == 1)
    assert len(given.tried) == n_tried


@pytest.mark.parametrize(("fall", "without"), [(5e-4, True), (5e-3, False)])
def test_a_negligible_fall_needs_no_gradient_term(fall, without):
    given = Given(lambda a: 1.0 if math.isinf(a) else 1.0 - fall)
    path = _Path(given, lambda a: (a, 0.0), None, negligible=1e-3)
    assert math.isinf(path.best_from(1.0, infinite=True)) == without


@pytest.mark.parametrize("better", [True, False])
def test_infinite_penalty_competes(better):
    best, tried = path(lambda a: 1.0 if math.isinf(a) else 1.1 - 0.2 * better, infinite=True)
    assert math.isinf(best) != better
    assert math.inf in tried


def test_strongest_penalty_within_half_a_standard_error():
    levels = {0: 1.3, 1: 1.0, 2: 0.99, 3: 1.2}
    loss = lambda a: levels.get(round(-math.log10(a)), 1.5)  # noqa: E731
    assert 1e-2 < path(loss)[0] < 0.1  # the minimum of the parabola
    assert path(loss, noise=1.0)[0] == pytest.approx(0.1)


@pytest.mark.parametrize(("with_gradients", "without"), [(0.5, False), (1.5, True)])
def test_more_samples_decide_before_a_gradient_term_is_left_out(with_gradients, without):
    """Of the first samples, the loss without one is worse by less than half a standard error."""
    given = Given(lambda a: 1.0 if math.isinf(a) else 0.99, noise=1.0)
    others = Given(lambda a: 1.0 if math.isinf(a) else with_gradients, n=2000)
    path = _Path(given, lambda a: (a, 0.0), None)
    assert math.isinf(path.best_from(1.0, infinite=True, others=others)) == without
    assert others.tried == given.tried
    loss = np.average([0.99, with_gradients], weights=[400, 2000])
    assert [row[2] for row in path.rows()] == pytest.approx([1.0] + [loss] * (len(given.tried) - 1))


def test_other_samples_are_not_needed_for_a_clear_choice():
    others = Given(lambda a: 1.0)
    for loss in (0.5, 1.5):
        given = Given(lambda a, loss=loss: 1.0 if math.isinf(a) else loss)
        path = _Path(given, lambda a: (a, 0.0), None)
        assert math.isinf(path.best_from(1.0, infinite=True, others=others)) == (loss > 1)
    assert not others.tried


def test_strongest_penalty_within_a_standard_error():
    levels = {0: 2.0, 1: 1.05, 2: 1.0, 3: 1.2}
    given = Given(lambda a: levels.get(round(-math.log10(a)), 1.5), noise=1.0)
    path = _Path(given, lambda a: (a, 0.0), None)
    path.best_from(1.0)
    assert [path.strongest(errors) for errors in (0.0, 1.0)] == pytest.approx([1e-2, 1e-1])


def test_number_of_pairs_that_are_left():
    """Two penalties without a fall end a path; four pairs of the next path follow."""
    left = []

    class Progress:
        def tried(self, pair, best, loss, n_left):
            left.append(n_left)
            return False

    levels = {0: 1.3, 1: 1.0, 2: 1.005, 3: 1.006}
    path = _Path(Given(lambda a: levels[round(-math.log10(a))]), lambda a: (a, 0.0), Progress())
    path.n_following = 4
    path.best_from(1.0)
    assert left == [6, 6, 5, 4]


def test_falls_by_less_than_half_a_standard_error_end_a_path():
    loss = lambda a: 1 + 0.001 * math.log10(a)  # noqa: E731
    assert len(path(loss, noise=1.0)[1]) == 3 < len(path(loss)[1])


def test_losses_that_are_not_finite():
    best, _ = path(lambda a: math.nan if a < 1e-2 else 1 + abs(math.log10(a) + 2))
    assert best == pytest.approx(1e-2)


@pytest.mark.filterwarnings("error")
def test_infinite_losses_of_samples_without_a_weight():
    """Leave-one-out losses are infinite where rounding errors dominate."""
    given = Given(lambda a: math.inf if a < 1 else 1.0)
    given.weights = np.arange(400) / 400
    assert _Path(given, lambda a: (a, 0.0), None).best_from(10.0) >= 1


def test_losses_that_differ_by_rounding_errors_are_equal():
    best, _ = path(lambda a: 1.0 if math.isinf(a) else 1 - 1e-15, infinite=True)
    assert math.isinf(best)


# --- estimators -------------------------------------------------------------------------------


def test_defaults_choose_both_penalties():
    rows, y = iris()
    model = automatic().fit(rows, y)
    tried = model.validation_scores_
    assert set(tried) == {"alpha", "gradient_alpha", "loss", "standard_error"}
    assert len({len(column) for column in tried.values()}) == 1
    first = np.isinf(tried["gradient_alpha"])
    assert first.sum() > 3 and (~first).sum() > 1
    assert model.alpha_ > 0 and model.gradient_alpha_ > 0
    same = automatic(alpha=model.alpha_, gradient_alpha=model.gradient_alpha_).fit(rows, y)
    np.testing.assert_array_equal(same.predict_proba(rows), model.predict_proba(rows))
    assert all(len(column) == 0 for column in same.validation_scores_.values())


def test_one_penalty_is_given():
    rows, y = iris()
    model = automatic(alpha=0.01).fit(rows, y)
    assert model.alpha_ == 0.01
    assert set(model.validation_scores_["alpha"]) == {0.01}
    model = automatic(gradient_alpha=0.5).fit(rows, y)
    assert model.gradient_alpha_ == 0.5
    assert np.isinf(model.validation_scores_["gradient_alpha"]).all()
    model = automatic(features="activation").fit(rows, y)
    assert model.gradient_alpha_ == math.inf


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("n_linearizations", [1, "auto"])
def test_no_penalty_on_the_output_weights_is_given(n_linearizations):
    rows, y = iris()
    model = automatic(alpha=0, n_linearizations=n_linearizations, tol=1e-2).fit(rows, y)
    assert model.alpha_ == 0
    assert set(model.validation_scores_["alpha"]) == {0}
    assert np.isfinite(model.predict_proba(rows)).all()


def test_model_of_gradients_chooses_a_finite_penalty():
    rows, y = iris()
    model = automatic(features="gradient").fit(rows, y)
    assert math.isfinite(model.gradient_alpha_)
    assert model.score(rows, y) > 0.9


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("labels", "robust", "images")]


@pytest.mark.parametrize("kind", ["classes", "targets", *SLOW])
def test_order_repetition_and_weights_do_not_matter(kind):
    rng = np.random.default_rng(0)
    rows, y = iris(40)
    model = automatic()
    if kind == "labels":
        y = np.stack([y == 0, rows[:, 0] > 0], 1).astype(int)
    if kind in ("targets", "robust"):
        y = rows[:, 0] + rng.normal(size=40)
        loss = "huber" if kind == "robust" else "squared_error"
        model = GradientFeatureRegressor(random_state=0, loss=loss)
    if kind == "images":
        rows, y, model = X, Y, GradientFeatureClassifier(NET)
    times = rng.integers(1, 4, len(y))
    order = rng.permutation(times.sum())
    weighted = clone(model).fit(rows, y, sample_weight=times)
    repeated = clone(model).fit(rows.repeat(times, 0)[order], y.repeat(times, 0)[order])
    assert repeated.alpha_ == pytest.approx(weighted.alpha_, rel=0.5)
    assert repeated.gradient_alpha_ == pytest.approx(weighted.gradient_alpha_, rel=0.5)
    found, wanted = (m.validation_scores_["loss"] for m in (repeated, weighted))
    np.testing.assert_allclose(found, wanted, rtol=0.02)


def test_penalties_follow_the_scale():
    rows, y = iris()
    identity = nn.Sequential(nn.Linear(4, 4, bias=False))
    model = GradientFeatureClassifier(identity, features="activation")
    one, other = (clone(model).fit(rows * scale, y) for scale in (1.0, 1000.0))
    starts = (m.validation_scores_["alpha"][0] for m in (one, other))
    np.testing.assert_allclose(1e6 * next(starts), next(starts), rtol=1e-6)


def test_one_sample_of_each_class():
    """Nothing can be held out: alpha follows the scale, without a gradient term."""
    rows = np.random.default_rng(0).normal(size=(3, 5)) * 10
    model = GradientFeatureClassifier(nn.Sequential(nn.Linear(5, 4)), random_state=0)
    model.fit(rows, ["a", "b", "c"])
    activation = model.transform(rows)
    assert model.alpha_ == pytest.approx(activation.var(axis=0).mean() / 3)
    assert model.gradient_alpha_ == math.inf
    assert (model.predict(rows) == ["a", "b", "c"]).all()
    assert not len(model.validation_scores_["loss"])
    weighted = clone(model).fit(rows, ["a", "b", "c"], sample_weight=[2, 1, 1])
    repeated = clone(model).fit(rows[[0, 0, 1, 2]], ["a", "a", "b", "c"])
    assert repeated.alpha_ == pytest.approx(weighted.alpha_)
    model.set_params(features="gradient").fit(rows, ["a", "b", "c"])
    assert 0 < model.gradient_alpha_ < math.inf


@pytest.mark.parametrize("feature_store", ["auto", None])
def test_frozen_layers_see_every_sample_once(tmp_path, feature_store):
    log = tmp_path / "passes"
    options = {"preprocess": Counted(str(log)), "gradient_layers": ["2"], "tol": 1e-2}
    model = GradientFeatureClassifier(NET, feature_store=feature_store, **options).fit(X, Y)
    assert len(model.validation_scores_["loss"]) > 5
    assert sum(map(int, log.read_text().split())) == len(X)


@pytest.mark.slow
def test_as_good_as_logistic_regression():
    losses = []
    for seed in range(3):
        rows, y = load_wine(return_X_y=True)
        rows, new, y, new_y = train_test_split(rows, y, stratify=y, random_state=seed)
        scaler = StandardScaler().fit(rows)
        rows, new = scaler.transform(rows), scaler.transform(new)
        model = automatic().fit(rows, y)
        probe = LogisticRegressionCV(
            scoring="neg_log_loss", max_iter=1000, use_legacy_attributes=False, l1_ratios=(0,)
        )
        probe.fit(model.transform(rows), y)
        found = log_loss(new_y, model.predict_proba(new))
        losses.append((found, log_loss(new_y, probe.predict_proba(model.transform(new)))))
    ours, theirs = np.mean(losses, axis=0)
    assert ours < 1.1 * theirs


def test_as_good_as_ridge():
    rows, y = load_diabetes(return_X_y=True)
    rows, new, y, new_y = train_test_split(rows, y, random_state=0)
    scaler = StandardScaler().fit(rows)
    rows, new = scaler.transform(rows), scaler.transform(new)
    ridge = RidgeCV(np.logspace(-3, 4, 15)).fit(rows, y)
    model = GradientFeatureRegressor(random_state=0).fit(rows, y)
    assert model.score(new, new_y) > ridge.score(new, new_y) - 0.05


def test_separable_classes_get_a_penalty():
    rows = np.random.default_rng(0).normal(size=(40, 3))
    y = (rows[:, 0] > 0).astype(int)
    rows[:, 0] += np.where(y, 1, -1)
    model = automatic().fit(rows, y)
    assert model.alpha_ > 0
    assert np.isfinite(model.coef_).all()


def test_targets_without_any_relation():
    rng = np.random.default_rng(0)
    model = automatic().fit(rng.normal(size=(60, 5)), rng.integers(0, 2, 60))
    assert model.validation_scores_["loss"].min() < 0.75
    assert np.abs(model.decision_function(rng.normal(size=(60, 5)))).max() < 1.5


def test_zero_gradients_fall_back_to_the_activations():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU())
    with np.errstate(all="ignore"):
        nn.init.constant_(network[1].bias, -1e3)
    model = GradientFeatureClassifier(network).fit(X, Y)
    assert model.gradient_alpha_ == math.inf


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [GradientFeatureClassifier, GradientFeatureRegressor])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_samples_that_are_all_equal(kind, dtype):
    """Their activations differ by rounding errors at most, which are no scale for a penalty."""
    rows = np.full((24, 6), 0.3, dtype)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())
    for backbone in (network, None):
        model = kind(backbone, random_state=0).fit(rows, np.arange(24) % 3)
        assert model.alpha_ == 1
        np.testing.assert_allclose(model.coef_, 0, atol=1e-6)
