"""The choice of penalties by leave-one-out predictions."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeCV
from torch import nn

from sklearn_gradfeat import GradientFeatureRegressor, GradientFeatureRegressorCV, load
from tests.oracles import dense_jacobian, ntk_scales

ROWS = np.random.default_rng(0).normal(size=(24, 3))
TARGETS = np.sin(ROWS[:, 0] * ROWS[:, 1]) + ROWS[:, 2]
GRID = {"alphas": [0.3, 0.003], "gradient_alphas": [0.1, 1e-3, 0.01], "cv": "loo"}
with torch.random.fork_rng():
    torch.manual_seed(0)
    NETWORK = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh()).double()


pytestmark = pytest.mark.filterwarnings("ignore:The best of .* at an end of the list:UserWarning")


def searching(backbone=NETWORK, **options):
    defaults = {"gradient_layers": "all", "scoring": "r2", **GRID}
    return GradientFeatureRegressorCV(backbone, **{**defaults, **options})


def mean_squared(model, X, y):
    return -np.square(model.predict(X) - y).mean()


def test_activations_against_ridge():
    y = np.column_stack([TARGETS, ROWS[:, 2] ** 2 + 100])
    model = searching(nn.Identity(), features="activation", scoring=mean_squared).fit(ROWS, y)
    ridge = RidgeCV(np.multiply(GRID["alphas"], len(y)), store_cv_results=True).fit(ROWS, y)
    np.testing.assert_allclose(
        model.scores_[0, :, 0], -ridge.cv_results_.mean(axis=(0, 1)), rtol=1e-9
    )
    assert model.alpha_ == ridge.alpha_ / len(y)
    np.testing.assert_allclose(model.predict(ROWS), ridge.predict(ROWS), rtol=1e-9)


@pytest.mark.parametrize("rows", [ROWS, ROWS.astype(np.float32)], ids=["float64", "float32"])
def test_scores_are_those_of_refits_at_the_same_omega(rows):
    y = TARGETS * 100 + 1000
    model = searching().fit(rows, y)
    assert model.scores_.shape == (1, 2, 3)
    for i, j in np.ndindex(2, 3):
        penalties = {"alpha": model.alphas_[i], "gradient_alpha": model.gradient_alphas_[j]}
        whole = GradientFeatureRegressor(NETWORK, gradient_layers="all", **penalties).fit(rows, y)
        names = whole.gradient_layers_
        J = dense_jacobian(NETWORK, names, rows) * ntk_scales(NETWORK, names)
        f = NETWORK(torch.as_tensor(rows, dtype=torch.float64)).detach().numpy()
        unit = np.sqrt(penalties["alpha"] / penalties["gradient_alpha"])
        columns = np.hstack([f, unit * np.einsum("d,ndp->np", whole.omega_[0], J)])
        predicted = np.empty_like(y)
        for k in range(len(y)):
            others = np.arange(len(y)) != k
            ridge = Ridge(penalties["alpha"] * len(y)).fit(columns[others], y[others])
            predicted[k] = ridge.predict(columns[[k]])[0]
        score = 1 - np.square(predicted - y).sum() / np.square(y - y.mean()).sum()
        np.testing.assert_allclose(model.scores_[0, i, j], score, rtol=1e-4)


def test_same_choice_as_folds_where_it_is_clear():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(90, 3))
    y = np.sin(2 * X[:, 0]) + 0.1 * rng.normal(size=90)
    grid = {"alphas": [1.0, 0.01], "gradient_alphas": [10.0, 1e-3]}
    by_folds, left_out = (searching(cv=cv, **grid).fit(X, y) for cv in (5, "loo"))
    assert (left_out.alpha_, left_out.gradient_alpha_) == (0.01, 1e-3)
    assert (by_folds.alpha_, by_folds.gradient_alpha_) == (0.01, 1e-3)
    np.testing.assert_array_equal(left_out.predict(X), by_folds.predict(X))


def test_weights_count_in_fits_and_scores():
    weights = np.arange(len(ROWS)) % 3.0
    model = searching().fit(ROWS, TARGETS, sample_weight=weights)
    other = np.where(weights > 0, TARGETS, 1e3)
    same = searching().fit(ROWS, other, sample_weight=weights)
    np.testing.assert_allclose(same.scores_, model.scores_, rtol=1e-9)
    assert not np.allclose(searching().fit(ROWS, TARGETS).scores_, model.scores_, rtol=1e-3)


def test_default_grids():
    model = searching(alphas=2, gradient_alphas=2).fit(ROWS, TARGETS)
    assert np.isfinite(model.best_score_)
    assert model.score(ROWS, TARGETS) > 0.8


def convolutional():
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "huber"}, "loss='squared_error'"),
        ({"alphas": [0.1, 0.0]}, "alphas contains 0"),
        ({"gradient_alphas": [0]}, "gradient_alphas contains 0"),
        ({"backbone": convolutional()}, "gradient_layers"),
        ({"cv": "leave-one-out"}, "'cv' parameter"),
    ],
)
def test_what_it_cannot_do_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        searching(**options).fit(ROWS, TARGETS)


class Tied(nn.Module):
    """A weight that a recorded layer and another operator use."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 5)

    def forward(self, x):
        return torch.tanh(self.layer(x)) @ self.layer.weight


def test_weights_with_another_use_have_no_gram():
    with pytest.raises(ValueError, match="gradient_layers"):
        searching(Tied()).fit(ROWS, TARGETS)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_common_offset_costs_no_digits(offset):
    rng = np.random.default_rng(1)
    X = rng.normal(size=(40, 3)) + offset
    y = X @ [1.0, 2.0, 3.0] + rng.normal(size=40)
    options = {"features": "activation", "scoring": mean_squared, "alphas": [1e-5, 1e-3]}
    model, centred = (
        searching(nn.Identity(), **options).fit(rows, y) for rows in (X, X - X.mean(0))
    )
    np.testing.assert_allclose(model.scores_, centred.scores_, rtol=1e-6)


def test_penalties_below_rounding():
    with pytest.raises(ValueError, match="penalties as small as 1e-20"):
        searching(alphas=[1e-20]).fit(ROWS, TARGETS)


def test_scorers_must_predict_what_they_are_given():
    with pytest.raises(ValueError, match="scoring"):
        searching(scoring=lambda model, X, y: model.score(X.copy(), y)).fit(ROWS, TARGETS)


def test_groups_are_refused():
    with pytest.raises(ValueError, match="groups"):
        searching().fit(ROWS, TARGETS, groups=np.arange(len(ROWS)) // 2)


def test_unused_penalties_may_be_zero():
    searching(features="activation", gradient_alphas=[0.0]).fit(ROWS, TARGETS)


def test_one_sample():
    weights = np.eye(1, len(ROWS))[0]
    with pytest.raises(ValueError, match="at least 2 samples"):
        searching().fit(ROWS, TARGETS, sample_weight=weights)


def test_file_holds_the_choice(tmp_path):
    model = searching().fit(ROWS, TARGETS)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", NETWORK)
    assert loaded.cv == "loo"
    assert np.array_equal(loaded.fit(ROWS, TARGETS).scores_, model.scores_)


def test_too_many_samples(monkeypatch):
    monkeypatch.setattr("sklearn_gradfeat.estimators._cross_validation.MAX_ROWS", 2 * len(ROWS) - 1)
    searching(nn.Identity(), features="activation").fit(ROWS, TARGETS)
    with pytest.raises(ValueError, match=r"\(24, 2\)\. Set cv"):
        searching().fit(ROWS, np.column_stack([TARGETS, TARGETS]))
