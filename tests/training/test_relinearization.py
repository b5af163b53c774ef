"""Several linearisations: the objective of the network, its descent, and the model at the end."""

import copy
import gc
import itertools
import math
import weakref
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.datasets import make_classification
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureRegressor,
)
from sklearn_gradfeat.cache._runner import CachedSamples, Trunk
from sklearn_gradfeat.curvature import _coarse_space as coarse_space
from sklearn_gradfeat.curvature._inverses import Inverses
from sklearn_gradfeat.training import Journal, TwoStageFit, _relinearization, _two_stage_fit
from sklearn_gradfeat.training._held_out import Relinearized, Runs
from sklearn_gradfeat.training._relinearization import (
    Relinearization,
    fit_in_turn,
)
from tests import tiny


def network(seed=0):
    """Return a smooth network in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh()
        return nn.Sequential(*layers).double()


NET = network()
X, Y = make_classification(60, 6, n_informative=4, n_classes=3, random_state=0)


def classifier(backbone=NET, **parameters):
    default = {"gradient_layers": "all", "alpha": 1e-2, "gradient_alpha": 1e-2, "max_iter": 200}
    return GradientFeatureClassifier(backbone, **{**default, **parameters})


def stages(model, X=X, y=Y, sample_weight=None, journal=None):
    problem = model._problem(y, sample_weight)
    prepared = model._prepare(X, problem.weights)
    if journal is not None:
        prepared = prepared._replace(journal=journal)
    return TwoStageFit(prepared, problem)


def relinearized(fits, alpha, gradient_alpha):
    """Iterate over the linear models and the moved networks, in turn."""
    run = Relinearization(fits, fits.fit_activation(alpha))
    moved = run
    while moved is not None:
        yield run.linear(gradient_alpha)
        moved = run.moved()
        if moved is not None:
            yield moved


def objective(model, X, y, weights=None):
    """Return the objective of a moved network and its gradients, by autograd."""
    module = copy.deepcopy(model.backbone)
    module.load_state_dict(model.fine_tuned_state_dict())
    coef, intercept = (
        torch.tensor(value, requires_grad=True) for value in (model.coef_, model.intercept_)
    )
    named = dict(module.named_parameters())
    logits = module(torch.from_numpy(X)) @ coef.T + intercept
    weights = torch.ones(len(X)).double() if weights is None else torch.from_numpy(weights)
    losses = nn.functional.cross_entropy(logits, torch.from_numpy(y), reduction="none")
    total = weights @ losses / weights.sum() + model.alpha_ / 2 * coef.square().sum()
    for name, value in named.items():
        scale = 1 / value.shape[0] if value.ndim > 1 else 0.1  # squared, of the NTK
        start = dict(model.backbone.named_parameters())[name].detach()
        total = total + model.gradient_alpha_ / 2 * (value - start).square().sum() / scale
    gradients = torch.autograd.grad(total, [coef, intercept, *named.values()])
    return total.item(), torch.cat([g.flatten() for g in gradients])


def test_objective_is_that_of_the_network():
    model = classifier(n_linearizations=3).fit(X, Y)
    value, _ = objective(model, X, Y)
    assert model.objective_path_[-1] == pytest.approx(value, rel=1e-10)
    assert len(model.objective_path_) == 4
    assert model.n_linearizations_ == 3


def test_first_linear_model_is_that_of_one_linearization():
    model = classifier(tol=0.3)
    results = relinearized(stages(model), 1e-2, 1e-2)
    first = next(results)
    expected = stages(model).fit(1e-2, 1e-2)
    for name in ("weights", "intercept", "omega"):
        assert torch.equal(getattr(first.model, name), getattr(expected.model, name))
    for name, move in expected.model.displacements.items():
        assert torch.equal(first.model.displacements[name], move)


def test_ends_at_a_stationary_point():
    model = classifier(n_linearizations=150, gradient_alpha=0.1, tol=1e-12).fit(X, Y)
    _, gradient = objective(model, X, Y)
    with pytest.warns(UserWarning, match="has a gradient term"):
        _, start = objective(clone(model).set_params(n_linearizations=1).fit(X, Y), X, Y)
    assert gradient.norm() < 1e-5 * start.norm()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    alpha=st.floats(1e-4, 1.0),
    gradient_alpha=st.floats(1e-6, 1.0),
    scale=st.floats(0.1, 30.0),
)
def test_objective_never_increases(seed, alpha, gradient_alpha, scale):
    rng = np.random.default_rng(seed)
    samples, y = scale * rng.normal(size=(20, 6)), rng.integers(0, 3, 20)
    y[:3] = range(3)
    fits = stages(classifier(network(seed)), samples, y)
    *_, last = itertools.islice(relinearized(fits, alpha, gradient_alpha), 8)
    assert (np.diff(last.network_path) <= 0).all()


class Wave(nn.Module):
    """A feature that is a sine of its parameter: a linear model overshoots."""

    def __init__(self):
        super().__init__()
        self.frequency = nn.Parameter(torch.tensor([[1.0]], dtype=torch.float64))

    def forward(self, x):
        return torch.sin(nn.functional.linear(x, self.frequency))


def waves(**options):
    """Return fits whose first move overshoots."""
    x = np.linspace(-3, 3, 40)[:, None]
    model = GradientFeatureRegressor(
        Wave(), gradient_layers="all", alpha=1e-6, gradient_alpha=1e-9, fit_intercept=False
    )
    return stages(model, x, np.sin(1.7 * x[:, 0]), **options)


def test_a_step_that_overshoots_is_shortened():
    fits = waves()
    points, moved = [], TwoStageFit.moved

    def noted(self, point):
        points.append(float(point["frequency"]))
        return moved(self, point)

    with mock.patch.object(TwoStageFit, "moved", noted):
        results = list(itertools.islice(relinearized(fits, 1e-6, 1e-9), 12))
    linear = float(results[0].model.displacements["frequency"])
    steps = [point / linear for point in points[:2]]
    assert steps[0] == pytest.approx(1)
    assert 0 < steps[1] < 0.6
    final = results[-1].model
    assert 1 + float(final.total["frequency"]) == pytest.approx(1.7, abs=1e-3)


def test_goes_on_from_a_journal_after_a_model_with_a_proximal_term():
    written = []
    journal = Journal(write=lambda contents: written.append(contents()))
    expected = fit_in_turn(waves(journal=journal), 1e-6, 1e-9, 6)
    for entries in written[::4]:
        journal = Journal(entries, write=lambda contents: contents())
        found = fit_in_turn(waves(journal=journal), 1e-6, 1e-9, 6)
        assert torch.equal(found.model.total["frequency"], expected.model.total["frequency"])
        assert torch.equal(found.model.weights, expected.model.weights)
        assert found.network_path == expected.network_path
        assert found.attributes()["n_passes_"] == expected.attributes()["n_passes_"]


def test_a_callback_stops_a_model_with_a_proximal_term():
    """There is no further linear model, also where others with weaker penalties would follow."""
    fitted, steps = Relinearization._fitted, []

    def interrupted(self, *start):
        step = fitted(self, *start)
        if start:
            step = step._replace(solution=replace(step.solution, status="interrupted"))
        steps.append(step)
        return step

    with mock.patch.object(Relinearization, "_fitted", interrupted):
        fit_in_turn(waves(), 1e-6, 1e-9, 6, stronger=(1e-8,))
    assert len(steps) == 2


def test_a_move_that_fails_does_not_shorten_those_with_another_penalty(monkeypatch):
    fits = stages(classifier())
    run, other = (Relinearization(fits, fits.fit_activation(1e-2)) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(_relinearization, "_SUFFICIENT", math.inf)
        run.linear(1e-1)
        assert run.moved() is None
    for each in (run, other):
        each.linear(1e-3)
    assert run.moved().network_path[-1] == pytest.approx(other.moved().network_path[-1], rel=0.05)


def test_the_last_penalty_is_that_of_the_result(monkeypatch):
    """Also where nothing moves with it, or with any penalty."""
    moved = Relinearization.moved
    for n_moves in (1, 0):

        def few(self, n_moves=n_moves):
            return moved(self) if len(self._solutions) <= n_moves else None

        monkeypatch.setattr(Relinearization, "moved", few)
        found = fit_in_turn(stages(classifier()), 1e-2, 1e-3, 4, stronger=(1e-1,))
        model = classifier().fit(X, Y)
        for name, value in found.attributes().items():
            setattr(model, name, value)
        assert model.gradient_alpha_ == 1e-3
        assert len(model.objective_path_) == n_moves + 1
        assert model.n_linearizations_ == 2
        if n_moves:
            value, _ = objective(model, X, Y)
            assert model.objective_path_[-1] == pytest.approx(value, rel=1e-10)


def test_gains_are_those_of_one_linearization_each():
    """The fall with stronger penalties is not the gain that the next one is compared with."""
    n_rounds, losses = [], iter([0.5, 0.9, 0.4, 0.35, 0.345, 0.345])
    network = np.ones(1)

    class Fold:
        def go_on(self, run, gradient_alpha):
            nonlocal network
            n_rounds.append(gradient_alpha)
            network = np.full(1, next(losses))
            return network + 0.2, network

    class Started:
        weights = np.ones(1)

        def start(self, alpha):
            run = mock.Mock()
            run.copy.return_value = run
            return Runs([(Fold(), run)])

        def losses(self, alpha, gradient_alpha):
            return np.full(1, 2.0)

    search = Relinearized(Started(), None, 1e-6, 1.0)
    for gradient_alpha in (1.0, 0.1):
        search.losses(1.0, gradient_alpha)
    # 0.5 before the chosen value, then 0.40, 0.35 and 0.345: gains of 0.1, 0.05 and 0.005
    assert search.n_models(1.0, 0.1) == 2 * 4
    assert n_rounds == [1.0, 0.1, 0.1, 0.1, 0.1]


class Unmoved(nn.Module):
    """A part without a gradient, and one without parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6).double()
        nn.init.constant_(self.layer.bias, -100)

    def forward(self, x):
        return torch.tanh(x) + torch.relu(self.layer(x))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("max_iter", [1, 200])
@pytest.mark.parametrize("gradient_alpha", [1e-2, 0.0])
def test_output_weights_alone_change(max_iter, gradient_alpha):
    """A move of length zero calls for no proximal term."""
    model = classifier(Unmoved(), n_linearizations=3, max_iter=max_iter)
    model.set_params(gradient_alpha=gradient_alpha).fit(X, Y)
    assert (np.diff(model.objective_path_) <= 0).all()
    assert np.isfinite(model.coef_).all()
    assert not any(move.any() for move in model.gradient_coef_.values())


def test_stages_keep_no_rows():
    """The gradient term of a point may hold explicit rows, and lives as long as its turn."""
    fits = stages(classifier())
    terms, choose = [], TwoStageFit._choose_term

    def noted(self, first):
        choose(self, first)
        if self.point:
            terms.append(weakref.ref(first.term))

    with mock.patch.object(TwoStageFit, "_choose_term", noted):
        run, kept = Relinearization(fits, fits.fit_activation(1e-2)), []
        for gradient_alpha in (1e-1, 1e-2, 1e-3):
            run.linear(gradient_alpha)
            run.moved()
            kept.append(run.stages)

    gc.collect()
    assert len(terms) >= 2
    assert not any(term() is not None for term in terms)


def test_copies_share_the_rows_of_a_point(monkeypatch):
    """Each has the linear model of a run of its own."""
    monkeypatch.setattr(_relinearization, "_TOL", 0.0)
    choose, n_terms = _two_stage_fit.with_rows_if_cheap, []

    def counted(*arguments):
        n_terms.append(1)
        return choose(*arguments)

    monkeypatch.setattr(_two_stage_fit, "with_rows_if_cheap", counted)

    def moved():
        fits = stages(classifier(tol=1e-12))
        run = Relinearization(fits, fits.fit_activation(1e-2))
        run.linear(1e-1)
        run.moved()
        return run

    point = moved()
    n_before = len(n_terms)
    found = [point.copy().linear(gradient_alpha).model for gradient_alpha in (1e-2, 1e-3)]
    assert len(n_terms) == n_before + 1
    for gradient_alpha, model in zip((1e-2, 1e-3), found, strict=True):
        expected = moved().linear(gradient_alpha).model
        for name, total in expected.total.items():
            assert torch.allclose(model.total[name], total, rtol=1e-4, atol=1e-6)


def test_linear_model_with_a_proximal_term(monkeypatch):
    """It is the minimum of the dense problem, which is also what a move promises."""
    monkeypatch.setattr(_relinearization, "_TOL", 0)
    fits = stages(classifier(tol=1e-14, device="cpu"))
    alpha, gradient_alpha, proximal = 1e-2, 1e-3, 0.3
    run = Relinearization(fits, fits.fit_activation(alpha))
    run.linear(gradient_alpha)
    run.moved()
    run._proximal = proximal
    run.linear(gradient_alpha)
    step = run._step
    pretrained = {name: value.detach() for name, value in NET.named_parameters()}
    scales = {name: 1 / len(v) if v.ndim > 1 else 0.1 for name, v in pretrained.items()}
    point = {name: value.detach() for name, value in step.model.point.items()}
    moves = {name: v.detach().requires_grad_() for name, v in step.model.displacements.items()}
    weights, intercept = (
        value.detach().requires_grad_() for value in (step.model.weights, step.model.intercept)
    )
    f, change = torch.func.jvp(
        lambda p: torch.func.functional_call(NET, p, torch.from_numpy(X)),
        ({name: value + point[name] for name, value in pretrained.items()},),
        (moves,),
    )
    logits = intercept + f.detach() @ weights.T + change @ step.model.omega.T
    value = nn.functional.cross_entropy(logits, torch.from_numpy(Y))
    value = value + alpha / 2 * weights.square().sum()
    for name, move in moves.items():
        total = move + point[name]
        value = value + gradient_alpha / 2 * total.square().sum() / scales[name]
    with_term = value + sum(
        proximal / 2 * move.square().sum() / scales[name] for name, move in moves.items()
    )
    gradients = torch.autograd.grad(with_term, [weights, intercept, *moves.values()])
    assert max(float(g.abs().max()) for g in gradients) < 1e-8
    assert step.promised == pytest.approx(run._path[-1] - value.item(), rel=1e-8)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("seed", [0, 9])
def test_few_iterations_of_fits_with_a_proximal_term(seed):
    """One that ends too early does not end the method."""
    model = classifier(network(seed), alpha=1e-4, gradient_alpha=1e-5, max_iter=1)
    model.set_params(n_linearizations=6).fit(10 * X, Y)
    assert model.n_linearizations_ == 6
    assert model.n_iter_ > 6
    assert (np.diff(model.objective_path_) < 0).all()


@pytest.mark.parametrize("seed", [2, 3])
def test_a_short_move_that_promises_little_is_not_the_end(seed):
    """After moves that overshoot, the linear model with a proximal term promises little."""
    rng = np.random.default_rng(seed)
    samples, y = rng.normal(size=(30, 6)), rng.integers(0, 3, 30)
    model = classifier(network(seed), gradient_alpha=1e-8, n_linearizations=15).fit(samples, y)
    assert model.n_linearizations_ == 15
    assert model.objective_path_[-1] < 0.8 * model.objective_path_[0]


def test_ends_where_nothing_falls():
    model = classifier(gradient_alpha=1e9, n_linearizations=5).fit(X, Y)
    assert model.n_linearizations_ < 5
    assert max(abs(move).max() for move in model.gradient_coef_.values()) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"n_linearizations": 3},
        {"n_linearizations": "auto", "gradient_alpha": "auto"},
        {"n_linearizations": 2, "activation_layer": ["1", "3"]},
    ],
)
def test_trunk_runs_once(options):
    """Also for folds and for the choice of the number; three rows are a check."""
    model = classifier(network(seed=2), gradient_layers=1, feature_store=None)
    passed, moved = Trunk._pass, TwoStageFit.moved
    with (
        mock.patch.object(Trunk, "_pass", autospec=True, side_effect=passed) as passes,
        mock.patch.object(TwoStageFit, "moved", autospec=True, side_effect=moved) as moves,
    ):
        model.set_params(**options).fit(X, Y)
    assert moves.call_count > 1
    assert sum(len(call.args[1]) for call in passes.call_args_list) == len(X) + 3


class Exponential(nn.Module):
    """Features that grow so fast that a whole step leaves the range of numbers."""

    def __init__(self, rate):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 4).double()
        self.rate = rate

    def forward(self, x):
        return torch.exp(self.rate * self.layer(x))


class Logarithm(nn.Module):
    """Features that are not defined for all parameters."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 4).double()
        nn.init.constant_(self.layer.bias, 8)

    def forward(self, x):
        return torch.log(self.layer(x))


@pytest.mark.parametrize(
    ("network", "gradient_alpha"),
    [(Exponential(1.0), 1e-6), (Exponential(5.0), 1e-3), (Logarithm(), 1e-3)],
)
def test_steps_out_of_range_are_shortened(network, gradient_alpha):
    samples = 0.5 * X
    y = 10 * samples[:, 0] * samples[:, 1]
    model = GradientFeatureRegressor(
        network, alpha=1e-3, gradient_alpha=gradient_alpha, n_linearizations=3
    ).fit(samples, y)
    loss = ((model.predict(samples) - y) ** 2).mean() / 2
    assert 0 <= loss <= model.objective_path_[-1] * (1 + 1e-6)
    assert model.objective_path_[-1] <= model.objective_path_[0]


def test_warm_start_that_is_worse_than_the_pretrained_network_is_dropped():
    model = classifier(n_linearizations=4, gradient_alpha=1e-6, warm_start=True).fit(X, Y)
    warm = model.set_params(gradient_alpha=1e2).fit(X, Y)
    cold = clone(warm).set_params(warm_start=False).fit(X, Y)
    assert warm.objective_path_[-1] == pytest.approx(cold.objective_path_[-1], rel=1e-6)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_model_of_a_number_is_the_one_that_held_out_samples_judge(number):
    fits = stages(classifier())
    *_, judged = itertools.islice(relinearized(fits, 1e-2, 1e-4), number)
    found = fit_in_turn(stages(classifier()), 1e-2, 1e-4, number)
    for name in ("weights", "intercept", "omega"):
        assert torch.equal(getattr(found.model, name), getattr(judged.model, name))
    assert all(
        torch.equal(found.model.total[name], judged.model.total[name]) for name in found.model.total
    )


def test_stronger_penalties_come_first():
    """The fit is that of moves with each penalty in turn, and the objective still falls."""
    fits = stages(classifier())
    run = Relinearization(fits, fits.fit_activation(1e-2))
    for gradient_alpha in (1e-1, 1e-2, 1e-3, 1e-3):
        run.linear(gradient_alpha)
        expected = run.moved()
    found = fit_in_turn(stages(classifier()), 1e-2, 1e-3, 8, stronger=(1e-1, 1e-2))
    for name, total in expected.model.total.items():
        assert torch.equal(found.model.total[name], total)
    assert len(found.linearizations) == 4
    assert (np.diff(found.network_path) < 0).all()
    at_once = fit_in_turn(stages(classifier()), 1e-2, 1e-3, 8)
    assert any(not at_once.model.total[name].equal(u) for name, u in found.model.total.items())


@pytest.mark.parametrize("n_linearizations", ["auto", 2])
def test_the_fit_repeats_what_held_out_samples_judged(n_linearizations):
    """A fit to the samples of the fold alone is the model of the fold."""
    model = classifier(n_linearizations=n_linearizations, alpha=1e-2, gradient_alpha="auto")
    model.fit(X, Y)
    scores = model.validation_scores_
    finite = np.isfinite(scores["gradient_alpha"])
    tried = scores["gradient_alpha"][finite]
    chosen = tried[scores["loss"][finite].argmin()]
    assert model.gradient_alpha_ == chosen
    if n_linearizations == "auto":
        assert model.n_linearizations_ >= 1 + (tried > chosen).sum()


def test_the_search_keeps_the_networks_of_the_best_penalty_alone():
    n_models, kept = Relinearized.n_models, []

    def noted(self, *pair):
        kept.append((pair, list(self._judged)))
        return n_models(self, *pair)

    with mock.patch.object(Relinearized, "n_models", noted):
        model = classifier(n_linearizations="auto", alpha=1e-2, gradient_alpha="auto").fit(X, Y)
    assert len(model.validation_scores_["loss"]) > 3
    assert kept == [
        ((model.alpha_, model.gradient_alpha_), [(model.alpha_, model.gradient_alpha_)])
    ]


def test_linear_models_in_the_coarse_space(monkeypatch):
    """They replace the fits, and the objective is still that of the network, which falls."""
    monkeypatch.setattr(coarse_space, "_MIN_COST", 1)
    module = tiny.tiny_net().double()
    model = classifier(module, n_linearizations=3, precision="float64")
    with mock.patch.object(TwoStageFit, "fit_gradient", side_effect=AssertionError):
        model.fit(tiny.X, tiny.Y)
    assert model.n_linearizations_ == 3
    assert (np.diff(model.objective_path_) < 0).all()
    value, _ = objective(model, tiny.X.astype(float), tiny.Y)
    assert model.objective_path_[-1] == pytest.approx(value, rel=1e-6)


def test_a_later_round_in_the_coarse_space_takes_two_passes(monkeypatch):
    """One for the linear model and one for the move; the factors are those of the first."""
    monkeypatch.setattr(coarse_space, "_MIN_COST", 1)
    fits = stages(classifier(tiny.tiny_net().double(), precision="float64"), tiny.X, tiny.Y)
    batches, factors = CachedSamples.batches, Inverses._factors
    with (
        mock.patch.object(CachedSamples, "batches", autospec=True, side_effect=batches) as n_passes,
        mock.patch.object(Inverses, "_factors", autospec=True, side_effect=factors) as n_factors,
    ):
        run = Relinearization(fits, fits.fit_activation(1e-2))
        run.linear(1e-3)
        run.moved()
        assert n_factors.call_count == 1
        for _ in range(3):
            counts = []
            for step in (lambda: run.linear(1e-3), run.moved):
                n_passes.reset_mock()
                assert step() is not None
                counts.append(n_passes.call_count)
            assert counts == [1, 1]
        assert n_factors.call_count == 1


def test_no_coarse_space_of_few_of_the_parameters(monkeypatch):
    """With many outputs, it has the last layer alone."""
    monkeypatch.setattr(coarse_space, "_MIN_COST", 1)
    layers = nn.Conv2d(1, 8, 5), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.ReLU()
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    found = []
    for many in (32, 0):
        monkeypatch.setattr(coarse_space, "_MAX_OUTPUTS", many)
        fits = stages(classifier(module, precision="float64"), tiny.X, tiny.Y)
        found.append(fits.has_coarse_space(fits.fit_activation(1e-2)))
    assert found == [True, False]
