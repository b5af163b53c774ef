"""Several linearisations of an estimator, merged models, and weights for the user's own module."""

import copy
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.datasets import make_classification, make_multilabel_classification, make_regression
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
    load,
)
from sklearn_gradfeat.inspection._attribution import logit_parts, relative_displacements
from sklearn_gradfeat.linearized import LinearizedHead
from tests.networks import build
from tests.tiny import NET
from tests.tiny import X as IMAGES
from tests.tiny import Y as CLASSES

X, Y = make_classification(80, 6, n_informative=4, n_classes=3, random_state=0)
NUMBERS = {"alpha": 1e-3, "gradient_alpha": 1e-3, "max_iter": 200, "gradient_layers": "all"}


def smooth_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh()).double()


SMOOTH = smooth_net()


def classifier(backbone=SMOOTH, **parameters):
    return GradientFeatureClassifier(backbone, **{**NUMBERS, **parameters})


def points(model):
    return model.gradient_coef_, model.linearization_point_


def is_merged(model):
    total, point = points(model)
    return bool(point) and all(np.array_equal(total[name], point[name]) for name in total)


def loaded(model, backbone):
    module = copy.deepcopy(backbone)
    module.load_state_dict(model.fine_tuned_state_dict())
    return module


def test_more_linearizations_fit_better_and_end_in_a_moved_network():
    losses = []
    for n in (1, 2, 4):
        model = classifier(n_linearizations=n).fit(X, Y)
        losses.append(model.objective_path_[-1])
        assert is_merged(model) == (n > 1)
        assert model.n_linearizations_ == n
    assert losses[2] < losses[1]


def test_predictions_are_those_of_the_module_with_the_moved_weights():
    model = classifier(n_linearizations=3).fit(X, Y)
    activation = loaded(model, SMOOTH)(torch.from_numpy(X)).detach().numpy()
    expected = activation @ model.coef_.T + model.intercept_
    assert_allclose(model.decision_function(X), expected, rtol=1e-10, atol=1e-10)
    assert_allclose(model.transform(X), activation, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_models", [3, 4])
def test_saved_pickled_and_exported_models_predict_the_same(n_models, tmp_path, monkeypatch):
    """An odd number ends with a linear model around a moved network."""
    model = classifier()
    if n_models == 3:  # what held-out samples may choose
        model = ended_with_a_linear_model(monkeypatch)
    else:
        model.set_params(n_linearizations=2).fit(X, Y)
    assert is_merged(model) == (n_models == 4)
    expected = model.predict_proba(X)
    path = tmp_path / "model.safetensors"
    model.save(path)
    assert_array_equal(load(path, backbone=SMOOTH).predict_proba(X), expected)
    assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), expected)
    assert_allclose(model.to_torch()(torch.from_numpy(X)).numpy(), expected, rtol=1e-9, atol=1e-12)
    extractor, linear = model._extractor_and_model()
    groups = {name: [name] for name in model.gradient_layers_}
    activation, parts = logit_parts(extractor, linear, X, 16, groups)
    total = activation + sum(parts.values()) + model.intercept_
    assert_allclose(model.decision_function(X), total, rtol=1e-9, atol=1e-9)
    assert all(ratio > 0 for ratio in relative_displacements(extractor, linear, groups).values())


def ended_with_a_linear_model(monkeypatch):
    """Return a model of two linearisations that keeps the gradient term of the second."""
    from sklearn_gradfeat.estimators import _base

    fit = _base.fit_in_turn

    def odd(stages, *penalties, n_models, **options):
        return fit(stages, *penalties, n_models=n_models - 1, **options)

    monkeypatch.setattr(_base, "fit_in_turn", odd)
    return classifier(n_linearizations=2).fit(X, Y)


def test_linear_model_around_a_moved_network_is_its_derivative(monkeypatch):
    """Against torch.func on the module with the weights of the linearization point."""
    model = ended_with_a_linear_model(monkeypatch)
    total, point = points(model)
    start = {name: value.detach() for name, value in SMOOTH.named_parameters()}
    at = {name: start[name] + torch.from_numpy(point[name]) for name in start}
    move = {name: torch.from_numpy(total[name] - point[name]) for name in start}

    def activation(parameters):
        return torch.func.functional_call(SMOOTH, parameters, (torch.from_numpy(X),))

    f, tangent = torch.func.jvp(activation, (at,), (move,))
    expected = f.numpy() @ model.coef_.T + tangent.numpy() @ model.omega_.T + model.intercept_
    assert_allclose(model.decision_function(X), expected, rtol=1e-9, atol=1e-9)


NORMS = {
    "affine": lambda: nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh()),
    "bias": lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh()),
    "plain": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3, affine=False), nn.Tanh()
    ),
    "plain with bias": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, affine=False), nn.Tanh()
    ),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dead", [False, True])
def test_moved_weights_load_into_a_module_with_batch_norms(kind, dead):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = NORMS[kind]().double()
        norm = module[1]
        norm.eps = 0.01
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.05, 0.2)
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            if dead:
                norm.weight.data[0] = 0
    module.eval()
    before = copy.deepcopy(module.state_dict())
    images = IMAGES.astype(np.float64)
    model = classifier(module, n_linearizations=2, precision="float64").fit(images, CLASSES)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert is_merged(model)
    with torch.no_grad():
        activation = loaded(model, module)(torch.from_numpy(images)).flatten(2).mean(2).numpy()
    expected = activation @ model.coef_.T + model.intercept_
    assert_allclose(model.decision_function(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("chosen", "names"),
    [("auto", ["stem", "block.0", ""]), (["block.1.conv1", ""], ["block.1.conv1", ""])],
)
def test_moved_weights_with_several_layers_and_batch_norms(chosen, names):
    """A batch norm is not folded into a layer whose output is read."""
    module, _ = build("residual")
    images = np.random.default_rng(0).normal(size=(30, 2, 5, 5))
    y = np.arange(30) % 3
    options = {"gradient_layers": "last", "n_linearizations": 2, "precision": "float64"}
    model = classifier(module, activation_layer=chosen, **options).fit(images, y)
    assert is_merged(model)

    def outputs(network):
        found = []
        hooks = [
            network.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output: found.append(output.flatten(2).mean(2).numpy())
            )
            for name in names[:-1]
        ]
        with torch.no_grad():
            top = network(torch.from_numpy(images))
        for hook in hooks:
            hook.remove()
        return [*found, top.numpy()]

    sizes = [np.sqrt((f**2).mean()) for f in outputs(module)]
    moved = outputs(loaded(model, module))
    expected = np.hstack([f / size for f, size in zip(moved, sizes, strict=True)])
    assert_allclose(model.transform(images), expected, rtol=1e-9, atol=1e-12)
    unmoved = np.hstack([f / size for f, size in zip(outputs(module), sizes, strict=True)])
    assert abs(expected - unmoved).max() > 1e-3
    logits = expected @ model.coef_.T + model.intercept_
    assert_allclose(model.decision_function(images), logits, rtol=1e-9, atol=1e-9)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    module = Tied().double()
    model = classifier(module, n_linearizations=2).fit(X, Y)
    state = model.fine_tuned_state_dict()
    assert torch.equal(state["first.weight"], state["second.weight"])
    activation = loaded(model, module)(torch.from_numpy(X)).detach().numpy()
    assert_allclose(model.transform(X), activation, rtol=1e-9, atol=1e-9)


def test_weights_of_parametrized_modules_are_refused():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)).double()
    model = classifier(nn.Sequential(layer)).fit(X, Y)
    with pytest.raises(ValueError, match="Remove the parametrizations"):
        model.fine_tuned_state_dict()


def test_weights_of_a_model_with_a_gradient_term_come_with_a_warning():
    model = classifier().fit(X, Y)
    with pytest.warns(UserWarning, match=r"Call merge\(X, y\) before fine_tuned_state_dict"):
        before = model.fine_tuned_state_dict()
    after = model.merge(X, Y).fine_tuned_state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_weights_with_a_negative_slope_are_refused():
    model = classifier(NET, negative_slope=0.1).fit(IMAGES, CLASSES)
    with pytest.raises(ValueError, match=r"negative_slope=0.1 is part of the fitted network"):
        model.fine_tuned_state_dict()


def test_merge_moves_the_network_and_fits_the_output_weights_again():
    model = classifier().fit(X, Y)
    expected = classifier(n_linearizations=2, tol=1e-10)
    moved = {name: value.copy() for name, value in model.gradient_coef_.items()}
    assert model.merge(X, Y) is model
    assert is_merged(model)
    assert all(np.array_equal(model.gradient_coef_[name], moved[name]) for name in moved)
    activation = loaded(model, SMOOTH)(torch.from_numpy(X)).detach().numpy()
    expected = activation @ model.coef_.T + model.intercept_
    assert_allclose(model.decision_function(X), expected, rtol=1e-9, atol=1e-9)
    # The gradient of the loss in the output weights vanishes.
    residual = model.predict_proba(X) - np.eye(3)[Y]
    gradient = residual.T @ activation / len(X) + model.alpha_ * model.coef_
    assert abs(gradient).max() < 1e-3
    before = model.coef_
    assert model.merge(X, Y).coef_ is before  # it has no gradient term any more


def test_merge_of_a_linear_model_around_a_moved_network(monkeypatch):
    """The network moves to the end of the linear model, not by its last move alone."""
    model = ended_with_a_linear_model(monkeypatch)
    total, point = points(model)
    assert not is_merged(model)
    assert all(abs(point[name]).max() > 0 for name in total)
    model.merge(X, Y)
    assert is_merged(model)
    for name, value in total.items():
        assert_array_equal(model.gradient_coef_[name], value)
    activation = loaded(model, SMOOTH)(torch.from_numpy(X)).detach().numpy()
    expected = activation @ model.coef_.T + model.intercept_
    assert_allclose(model.decision_function(X), expected, rtol=1e-9, atol=1e-9)


def test_merged_models_take_no_derivative(monkeypatch):
    model, merged = classifier(n_linearizations=2).fit(X, Y), classifier().fit(X, Y).merge(X, Y)
    heads = []
    activation = LinearizedHead.activation
    for name in ("jvp", "activation_and_jvp"):
        monkeypatch.setattr(LinearizedHead, name, mock.Mock(side_effect=AssertionError))
    monkeypatch.setattr(
        LinearizedHead, "activation", lambda *given: heads.append(1) or activation(*given)
    )
    for each in (model, merged):
        heads.clear()
        each.predict(X)
        assert len(heads) == 1
    with pytest.raises(AssertionError):
        classifier(n_linearizations=1).fit(X, Y).predict(X)


class Joined(nn.Module):
    """A network that joins the outputs of two layers itself."""

    def __init__(self, scales):
        super().__init__()
        self.below, self.above = copy.deepcopy(SMOOTH[:2]), copy.deepcopy(SMOOTH[2:])
        self.scales = scales

    def forward(self, x):
        below = self.below(x)
        return torch.cat([self.scales[0] * below, self.scales[1] * self.above(below)], 1)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("weights", [None, np.arange(len(X)) % 3 + 0.5])
def test_linearizations_of_several_layers(n, weights):
    """The scales are those of the pretrained network, wherever it is linearised."""
    with torch.no_grad():
        below = SMOOTH[:2](torch.from_numpy(X)).numpy()
        above = SMOOTH(torch.from_numpy(X)).numpy()
    sizes = [np.average((f**2).mean(1), weights=weights) ** 0.5 for f in (below, above)]
    own = Joined([1 / size for size in sizes])
    expected = classifier(own, activation_layer=None, n_linearizations=n).fit(X, Y, weights)
    model = classifier(activation_layer=["1", "3"], n_linearizations=n).fit(X, Y, weights)
    assert_allclose(model.objective_path_, expected.objective_path_, rtol=1e-7)
    assert_allclose(model.predict_proba(X), expected.predict_proba(X), rtol=1e-5)
    if n == 1:
        return
    module = loaded(model, SMOOTH)
    with torch.no_grad():
        below = module[:2](torch.from_numpy(X))
        parts = [
            part.numpy() / size
            for part, size in zip((below, module[2:](below)), sizes, strict=True)
        ]
    assert_allclose(model.transform(X), np.hstack(parts), rtol=1e-9, atol=1e-12)


def test_merge_needs_the_classes_of_the_fit():
    model = classifier().fit(X, Y)
    with pytest.raises(ValueError, match=r"y has the classes \[0 1\], but the estimator"):
        model.merge(X[Y < 2], Y[Y < 2])


def test_without_a_gradient_term_there_is_nothing_to_linearize():
    one = classifier(features="activation").fit(X, Y)
    three = classifier(features="activation", n_linearizations=3).fit(X, Y)
    assert_array_equal(one.coef_, three.coef_)
    assert three.n_linearizations_ == 0
    with pytest.raises(ValueError, match="features='gradient' leaves out the activations"):
        classifier(features="gradient", n_linearizations=2).fit(X, Y)


def test_weights_are_repetitions():
    weights = np.arange(len(X)) % 3 + 1.0
    rows = np.repeat(np.arange(len(X)), weights.astype(int))
    weighted = classifier(n_linearizations=3, tol=1e-9).fit(X, Y, sample_weight=weights)
    repeated = classifier(n_linearizations=3, tol=1e-9).fit(X[rows], Y[rows])
    assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), atol=1e-6)


@pytest.mark.parametrize("loss", ["squared_error", "huber"])
def test_regressors(loss):
    samples, y = make_regression(80, 6, n_targets=2, random_state=0, noise=1)
    y = y[:, 0] if loss == "huber" else y
    model = GradientFeatureRegressor(SMOOTH, **NUMBERS, loss=loss)
    fitted = [clone(model).set_params(n_linearizations=n).fit(samples, y) for n in (1, 4)]
    assert (np.diff(fitted[1].objective_path_) <= 0).all()
    assert fitted[1].score(samples, y) > fitted[0].merge(samples, y).score(samples, y)
    activation = loaded(fitted[1], SMOOTH)(torch.from_numpy(samples)).detach().numpy()
    expected = (activation @ fitted[1].coef_.T + fitted[1].intercept_).reshape(y.shape)
    assert_allclose(fitted[1].predict(samples), expected, rtol=1e-8, atol=1e-8)


def test_labels_and_squared_errors():
    samples, y = make_multilabel_classification(60, 6, n_classes=3, random_state=0)
    for loss in ("log_loss", "squared"):
        model = classifier(n_linearizations=3, loss=loss).fit(samples, y)
        assert is_merged(model)
        assert (np.diff(model.objective_path_) <= 0).all()
        assert model.predict(samples).shape == y.shape


def test_warm_start_goes_on_from_the_moved_network():
    model = classifier(n_linearizations=2, warm_start=True).fit(X, Y)
    former = model.objective_path_[-1]
    model.fit(X, Y)
    assert model.objective_path_[0] <= former * (1 + 1e-9)
    assert model.objective_path_[-1] < former


def test_grid_search_and_cross_validation():
    folds = [(np.arange(40), np.arange(40, 80))]
    search = GridSearchCV(
        classifier(), {"n_linearizations": [1, 3]}, cv=folds, scoring="neg_log_loss"
    ).fit(X, Y)
    expected = [
        -log_loss(Y[40:], classifier(n_linearizations=n).fit(X[:40], Y[:40]).predict_proba(X[40:]))
        for n in (1, 3)
    ]
    assert_allclose(search.cv_results_["mean_test_score"], expected, rtol=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-3
    assert search.best_params_["n_linearizations"] == (1, 3)[np.argmax(expected)]
    assert search.best_estimator_.n_linearizations_ == search.best_params_["n_linearizations"]
    model = GradientFeatureClassifierCV(
        SMOOTH, gradient_layers="all", alphas=[1e-2, 1e-3], gradient_alphas=[1e-2, np.inf], cv=3,
        n_linearizations=2,
    ).fit(X, Y)  # fmt: skip
    plain = classifier(
        alpha=model.alpha_, gradient_alpha=model.gradient_alpha_, n_linearizations=2, max_iter=100
    ).fit(X, Y)
    assert_array_equal(model.predict_proba(X), plain.predict_proba(X))


def test_leave_one_out_is_for_one_linearization():
    model = GradientFeatureRegressorCV(SMOOTH, cv="loo", n_linearizations=2)
    with pytest.raises(ValueError, match="closed form for one linearisation alone"):
        model.fit(X, Y)


def test_a_number_is_the_largest_one_if_held_out_samples_choose_the_penalty():
    rows, y = make_classification(
        80, 6, n_informative=3, n_redundant=0, n_classes=3, random_state=4
    )
    free = classifier(alpha="auto", gradient_alpha="auto", n_linearizations="auto").fit(rows, y)
    assert free.n_linearizations_ > 2
    enough = clone(free).set_params(n_linearizations=free.n_linearizations_ + 9).fit(rows, y)
    assert enough.n_linearizations_ == free.n_linearizations_
    assert_array_equal(enough.predict_proba(rows), free.predict_proba(rows))
    two = clone(free).set_params(n_linearizations=2).fit(rows, y)
    assert two.n_linearizations_ == 2


@pytest.mark.parametrize("n", [2, "auto"])
def test_penalties_and_number_are_chosen_on_held_out_samples(n):
    model = classifier(alpha="auto", gradient_alpha="auto", n_linearizations=n).fit(X, Y)
    if np.isfinite(model.gradient_alpha_):
        assert model.n_linearizations_ >= 1
        assert (np.diff(model.objective_path_) <= 0).all()
    tried = model.validation_scores_["gradient_alpha"]
    assert np.isfinite(tried).any()
    again = clone(model).fit(X[::-1], Y[::-1])
    assert again.n_linearizations_ == model.n_linearizations_
    assert_allclose(again.predict_proba(X), model.predict_proba(X), atol=1e-6)


def test_number_alone_is_chosen_on_held_out_samples():
    model = classifier(n_linearizations="auto").fit(X, Y)
    assert model.n_linearizations_ >= 1
    assert len(model.validation_scores_["loss"]) == 0


def test_merge_needs_targets_of_the_same_kind():
    samples, y = make_regression(40, 6, n_targets=2, random_state=0)
    model = GradientFeatureRegressor(SMOOTH, **NUMBERS)
    for fitted, other in ((y[:, 0], y), (y, y[:, 0])):
        with pytest.raises(ValueError, match="y has another shape than in fit"):
            clone(model).fit(samples, fitted).merge(samples, other)
    labels = np.eye(3, dtype=int)[Y]
    with pytest.raises(ValueError, match="y has another shape than in fit"):
        classifier().fit(X, Y).merge(X, labels)


def test_merge_keeps_the_names_of_columns():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(X, columns=list("abcdef"))
    model = classifier().fit(frame, Y)
    with pytest.raises(ValueError, match="y has the classes"):
        model.merge(frame[Y < 2], Y[Y < 2])
    model.merge(frame, Y)
    assert list(model.feature_names_in_) == list("abcdef")


def test_unfitted_estimators_have_nothing_to_merge():
    with pytest.raises(NotFittedError):
        classifier().merge(X, Y)
    with pytest.raises(NotFittedError):
        classifier().fine_tuned_state_dict()


class WithExtras(nn.Module):
    """A batch norm with statistics that are not in the state, and extra state."""

    def __init__(self, bias):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(1, 3, 3, bias=bias), nn.BatchNorm2d(3, affine=False)
        for name in ("running_mean", "running_var"):
            value = getattr(self.norm, name)
            delattr(self.norm, name)
            self.norm.register_buffer(name, value, persistent=False)

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        assert state == {"version": 1}

    def forward(self, x):
        return torch.tanh(self.norm(self.layer(x)))


def test_state_that_is_no_tensor_or_not_persistent():
    module = WithExtras(bias=True).eval()
    model = classifier(module, n_linearizations=2).fit(IMAGES, CLASSES)
    with torch.no_grad():
        activation = loaded(model, module)(torch.from_numpy(IMAGES)).flatten(2).mean(2).numpy()
    assert_allclose(model.transform(IMAGES), activation, rtol=1e-4, atol=1e-5)
    refused = classifier(WithExtras(bias=False).eval(), n_linearizations=2).fit(IMAGES, CLASSES)
    with pytest.raises(ValueError, match="not persistent"):
        refused.fine_tuned_state_dict()


@pytest.mark.parametrize("kind", [GradientFeatureClassifier, GradientFeatureRegressor])
def test_number_is_chosen_without_a_penalty_or_samples_to_hold_out(kind):
    y = Y if kind is GradientFeatureClassifier else X[:, 0]
    kind(SMOOTH, n_linearizations="auto", alpha=0.01, gradient_alpha=0.0).fit(X, y)
    few = kind(SMOOTH, n_linearizations="auto", alpha=0.01, gradient_alpha=0.1).fit(X[:2], [0, 1])
    assert few.n_linearizations_ == 1
    assert not few.linearization_point_ or kind is GradientFeatureRegressor
