"""Pictures: the numbers in them, where they are drawn, and what is refused."""

import sys

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn
from torch.func import functional_call, jvp

from sklearn_gradfeat import (
    FeatureComparisonDisplay,
    GradientFeatureClassifier,
    LayerContributionDisplay,
    ObjectiveDisplay,
    SaliencyDisplay,
)
from tests import tiny
from tests.networks import build
from tests.tiny import NET, X, Y

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

DOUBLE = {"precision": "float64", "max_iter": 15, "gradient_alpha": 1e-3}
rng = np.random.default_rng(0)
X2 = rng.normal(size=(24, 2, 5, 5)) + Y[:, None, None, None]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def models():
    kinds = ("activation", "gradient", "full")
    return {
        kind: tiny.estimator(features=kind, gradient_layers="all", **DOUBLE).fit(X, Y)
        for kind in kinds
    }


def gradient_term(model, module, x):
    """``Ω J(x) w₂`` by torch's own forward mode through the module, without folding."""
    names = model.gradient_layers_
    values = {n: p.detach() for n, p in module.double().named_parameters() if n in names}
    moves = {n: torch.as_tensor(model.gradient_coef_[n]) for n in names}

    def activation(values):
        out = functional_call(module, values, (x,))
        return out.flatten(2).mean(2) if out.ndim > 2 else out

    with torch.no_grad():
        tangent = jvp(activation, (values,), (moves,))[1]
    return tangent @ torch.as_tensor(model.omega_).T


# --- the objective ------------------------------------------------------------------------


def test_the_gap_is_the_objective_less_its_last_value(models):
    display = ObjectiveDisplay.from_estimator(models)
    assert display.ax_.get_yscale() == "log"
    for line, (name, model) in zip(display.lines_, models.items(), strict=True):
        path = model.objective_path_
        gap = path[:-1] - path[-1]
        drawn = line.get_ydata()
        np.testing.assert_allclose(drawn[gap > 0], gap[gap > 0])
        assert np.isnan(drawn[gap <= 0]).all()
        assert line.get_label() == f"{name} ({model.n_passes_} passes)"


def test_the_objective_itself_is_drawn_over_what_is_there(models):
    first = ObjectiveDisplay.from_estimator(models["full"], quantity="objective")
    second = ObjectiveDisplay.from_estimator(
        models["gradient"], name="g", quantity="objective", ax=first.ax_, color="k"
    )
    assert second.ax_ is first.ax_
    assert second.figure_ is first.figure_
    assert len(first.ax_.lines) == 2
    np.testing.assert_array_equal(second.lines_[0].get_ydata(), models["gradient"].objective_path_)
    assert second.lines_[0].get_color() == "k"
    texts = [text.get_text() for text in first.ax_.get_legend().get_texts()]
    assert [text.split()[0] for text in texts] == ["full", "g"]


def test_a_fit_without_iterations_has_an_empty_curve():
    display = ObjectiveDisplay(objective_paths={"a": np.array([0.5])}, n_passes={"a": 1}).plot()
    assert len(display.lines_[0].get_ydata()) == 0
    display.figure_.canvas.draw()


# --- comparisons --------------------------------------------------------------------------


def test_accuracies_have_binomial_standard_errors():
    y = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    wrong = np.where(np.arange(8) < 2, -1, y)
    display = FeatureComparisonDisplay.from_predictions(y, {"a": y, "b": wrong})
    assert display.means_ == {"a": 1.0, "b": 0.75}
    np.testing.assert_allclose(display.errors_["b"], np.sqrt(0.75 * 0.25 / 7))
    assert display.errors_["a"] == 0
    assert [t.get_text() for t in display.ax_.get_yticklabels()] == ["a", "b"]
    assert display.ax_.get_xlabel() == "Accuracy (± standard error)"
    segments = display.errorbar_.lines[2][0].get_segments()
    np.testing.assert_allclose(segments[1][:, 0].mean(), 0.75)
    np.testing.assert_allclose(np.ptp(segments[1][:, 0]), 2 * display.errors_["b"])


def test_differences_are_paired():
    y = np.arange(10) % 2
    right = np.ones(10, int)
    right[:3] = 0
    better = right.copy()
    better[0] = 1
    predictions = {"a": np.where(right, y, 2), "b": np.where(better, y, 2)}
    display = FeatureComparisonDisplay.from_predictions(y, predictions, reference="a")
    gain = np.eye(10)[0]
    np.testing.assert_allclose(display.means_["b"], 0.1)
    np.testing.assert_allclose(display.errors_["b"], gain.std(ddof=1) / np.sqrt(10))
    assert list(display.means_) == ["b"]


def test_continuous_targets_and_several_labels():
    y = np.array([0.5, 1.5, 2.5])
    display = FeatureComparisonDisplay.from_predictions(y, {"a": y + np.array([1, -1, 2])})
    assert display.means_["a"] == 2
    assert display.score_name == "mean squared error"
    labels = np.array([[0, 1], [1, 1], [1, 0]])
    display = FeatureComparisonDisplay.from_predictions(labels, {"a": [[0, 1], [1, 0], [1, 0]]})
    np.testing.assert_allclose(display.means_["a"], 2 / 3)

    def absolute_error(y_true, y_pred):
        return np.abs(y_true - y_pred)

    display = FeatureComparisonDisplay.from_predictions(
        y, {"a": y + 1}, sample_score=absolute_error
    )
    assert (display.means_["a"], display.score_name) == (1, "absolute error")


def test_folds_are_corrected_for_the_training_sets_they_share():
    scores = {"a": [0.5, 0.7, 0.9], "published": 0.8}
    display = FeatureComparisonDisplay.from_scores(scores, test_train_ratio=0.5)
    np.testing.assert_allclose(display.errors_["a"], 0.2 * np.sqrt(1 / 3 + 1 / 2))
    assert np.isnan(display.errors_["published"])
    assert display.means_["published"] == 0.8


def flat(images):
    return images.reshape(len(images), -1)


def test_cross_validation_fits_clones_on_the_same_splits():
    model = tiny.estimator(max_iter=5)
    pipeline = make_pipeline(FunctionTransformer(), model)
    others = {"lr": make_pipeline(FunctionTransformer(flat), LogisticRegression())}
    cv = KFold(3, shuffle=True, random_state=0)
    _, ax = plt.subplots()
    display = FeatureComparisonDisplay.from_estimator(
        pipeline, X, Y, features=["activation", "full"], others=others, cv=cv, ax=ax
    )
    assert display.ax_ is ax
    assert not hasattr(model, "coef_")
    assert model.features == "full"
    np.testing.assert_allclose(display.test_train_ratio, 0.5)
    assert display.score_name == "accuracy"
    expected = {"lr": others["lr"], "activation": model.set_params(features="activation")}
    for name, each in expected.items():
        folds = [each.fit(X[a], Y[a]).score(X[b], Y[b]) for a, b in cv.split(X)]
        np.testing.assert_allclose(display.scores[name], folds)


def test_a_search_is_compared_with_its_own_choices():
    search = GridSearchCV(tiny.estimator(max_iter=3), {"alpha": [0.1, 1.0]}, cv=2)
    display = FeatureComparisonDisplay.from_estimator(
        search, X, Y, features=["activation"], cv=2, scoring="neg_log_loss"
    )
    assert display.score_name == "negative log loss"
    assert display.scores["activation"].shape == (2,)
    assert search.estimator.features == "full"


@pytest.mark.parametrize(
    ("scores", "reference", "message"),
    [
        ({"a": [1, 2]}, "b", "reference='b' is none of a"),
        ({"a": [1, 2], "b": [1]}, "a", "as many scores of 'b' as of 'a': they are 1 and 2"),
    ],
)
def test_differences_need_a_partner(scores, reference, message):
    with pytest.raises(ValueError, match=message):
        FeatureComparisonDisplay.from_scores(scores, reference=reference)


def test_predictions_of_another_shape_are_refused():
    y = np.array([0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"'column' have shape \(4, 1\), y_true has \(4,\)"):
        FeatureComparisonDisplay.from_predictions(y, {"column": y[:, None]})


def test_a_comparison_of_something_else_is_refused():
    with pytest.raises(TypeError, match=r"of sklearn_gradfeat.*got LogisticRegression"):
        FeatureComparisonDisplay.from_estimator(LogisticRegression(), X, Y)


# --- layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["layer", "parameter"])
@pytest.mark.parametrize("features", ["gradient", "full"])
def test_the_parts_add_up_to_the_logits(models, features, by):
    model = models[features]
    display = LayerContributionDisplay.from_estimator(model, X, by=by)
    names = {"layer": ["0", "2"], "parameter": ["0.weight", "0.bias", "2.weight", "2.bias"]}[by]
    assert sorted(display.parts) == sorted(names)
    total = sum(display.parts.values()) + display.activation + model.intercept_
    np.testing.assert_allclose(total, model.decision_function(X), atol=1e-10)
    term = gradient_term(model, tiny.tiny_net(), torch.as_tensor(X, dtype=torch.float64))
    np.testing.assert_allclose(sum(display.parts.values()), term, atol=1e-10)


def test_the_bars_are_spreads_and_shares(models):
    model = models["full"]
    display = LayerContributionDisplay.from_estimator(model, X)
    left = [bar.get_width() for bar in display.bars_[0]]
    expected = [*display.parts.values(), display.activation]
    np.testing.assert_allclose(left, [np.sqrt(p.var(0).mean()) for p in expected])
    labels = [t.get_text() for t in display.axes_[0].get_yticklabels()]
    assert labels == [*display.parts, "activation"]
    parameters = dict(NET.named_parameters())
    for bar, layer in zip(display.bars_[1], display.parts, strict=True):
        names = [f"{layer}.weight", f"{layer}.bias"]
        moved = np.concatenate([model.gradient_coef_[n].ravel() for n in names])
        size = torch.cat([parameters[n].detach().flatten() for n in names]).norm()
        np.testing.assert_allclose(bar.get_width(), np.linalg.norm(moved) / size, rtol=1e-5)


def test_displacements_are_relative_to_the_folded_weights():
    module, names = build("residual")
    model = GradientFeatureClassifier(module, gradient_layers=names, alpha=0.1, **DOUBLE)
    display = LayerContributionDisplay.from_estimator(model.fit(X2, Y), X2, by="parameter")
    for name in names:
        layer, norm = name.removesuffix(".weight"), name.replace("conv", "bn")
        weight = module.get_submodule(layer).weight.detach()
        batch_norm = module.get_submodule(norm.removesuffix(".weight"))
        scale = batch_norm.weight / torch.sqrt(batch_norm.running_var + batch_norm.eps)
        folded = (weight * scale.detach()[:, None, None, None]).norm()
        expected = np.linalg.norm(model.gradient_coef_[name]) / folded
        np.testing.assert_allclose(display.relative_displacements[name], expected)


def test_without_an_activation_term_there_is_no_bar_for_it(models):
    display = LayerContributionDisplay.from_estimator(models["gradient"], X)
    assert len(display.bars_[0]) == len(display.parts) == 2


def test_displaced_zeros_are_infinitely_far():
    display = LayerContributionDisplay(
        activation=np.zeros((2, 1)),
        parts={"a": np.ones((2, 1))},
        relative_displacements={"a": np.inf},
    ).plot()
    assert [text.get_text() for text in display.axes_[1].texts] == ["∞"]
    display.figure_.canvas.draw()


def test_axes_are_taken_or_divided(models):
    model = models["full"]
    _, given = plt.subplots(1, 2)
    display = LayerContributionDisplay.from_estimator(model, X, ax=given)
    assert display.axes_[0] is given[0]
    assert display.axes_[1] is given[1]
    figure, ax = plt.subplots()
    display.plot(ax)
    assert display.figure_ is figure
    assert len(figure.axes) == 3
    with pytest.raises(ValueError, match="draws on 1 x 2 axes, ax holds 3"):
        display.plot(plt.subplots(3)[1])
    with pytest.raises(ValueError, match="in no grid"):
        display.plot(plt.figure().add_axes((0, 0, 1, 1)))


def test_no_gradient_layers_no_picture(models):
    with pytest.raises(ValueError, match="features='activation', so it has no gradient layers"):
        LayerContributionDisplay.from_estimator(models["activation"], X)


# --- saliency -----------------------------------------------------------------------------


def by_differences(model, module, image, column):
    """The derivative of a gradient-term logit in one image, by central differences."""
    eps, flat = 1e-5, image.reshape(-1)
    steps = eps * torch.eye(len(flat), dtype=torch.float64)
    ahead, behind = (
        gradient_term(model, module, (flat + s * steps).reshape(-1, *image.shape))[:, column]
        for s in (1, -1)
    )
    return ((ahead - behind) / (2 * eps)).reshape(image.shape)


@pytest.mark.parametrize("kind", ["plain", "grouped"])
def test_saliency_is_the_derivative_through_the_whole_network(kind):
    module, names = build(kind)
    model = GradientFeatureClassifier(module, gradient_layers=names, alpha=0.1, **DOUBLE)
    display = SaliencyDisplay.from_estimator(model.fit(X2, Y), X2[:2], target=1)
    for image, drawn in zip(torch.as_tensor(X2[:2]), display.saliency, strict=True):
        expected = by_differences(model, module, image, 1).norm(dim=0)
        np.testing.assert_allclose(drawn, expected, rtol=1e-4, atol=1e-6 * expected.max())
    assert display.images_[2].get_array().shape == (5, 5)


def test_attention_is_followed_by_derivatives():
    module, names = build("transformer")
    model = GradientFeatureClassifier(module, gradient_layers=names, alpha=0.1, **DOUBLE)
    model.set_params(max_iter=2).fit(X2, Y)
    display = SaliencyDisplay.from_estimator(model, X2[:1], target=1)
    eps = 1e-5
    for pixel in ((0, 0), (2, 3)):
        moved = np.repeat(X2[:1], 4, axis=0)
        for channel in (0, 1):
            moved[2 * channel, channel, *pixel] += eps
            moved[2 * channel + 1, channel, *pixel] -= eps
        parts = LayerContributionDisplay.from_estimator(model, moved).parts
        term = sum(parts.values())[:, 1]
        expected = np.hypot(term[0] - term[1], term[2] - term[3]) / (2 * eps)
        np.testing.assert_allclose(display.saliency[0][pixel], expected, rtol=1e-4)


@pytest.mark.parametrize("term", ["gradient", "activation", "full"])
def test_occlusion_is_the_loss_of_a_patch(models, term):
    model = models["full"]
    options = {"target": 2, "term": term, "method": "occlusion"}
    display = SaliencyDisplay.from_estimator(model, X[:3], patch=3, **options)
    covered = X[:3].astype(float)
    covered[..., 3:6, 6:9] = covered.mean((2, 3), keepdims=True)
    both = np.concatenate([X[:3], covered])
    parts = LayerContributionDisplay.from_estimator(model, both)
    terms = {"gradient": sum(parts.parts.values()), "activation": parts.activation}
    terms["full"] = model.decision_function(both)
    effect = (terms[term][:3] - terms[term][3:])[:, 2, None, None]
    np.testing.assert_allclose(
        display.saliency[:, 3:6, 6:8], np.broadcast_to(effect, (3, 3, 2)), atol=1e-6
    )
    name = "logit" if term == "full" else f"{term} term"
    assert display.colorbar_.ax.get_ylabel() == f"effect on the\n{name}"


def test_every_image_gets_its_predicted_class(models):
    display = SaliencyDisplay.from_estimator(models["full"], X[:4])
    assert display.targets == list(models["full"].predict(X[:4]))
    titles = [axes.get_title() for axes in display.axes_[0]]
    assert titles == [str(target) for target in display.targets]
    largest = display.saliency.max()
    assert all(image.get_clim() == (0, largest) for image in display.images_[4:])


def test_of_two_classes_the_first_is_the_negative_second():
    y = np.where(Y > 0, "yes", "no")
    model = tiny.estimator(**DOUBLE).fit(X, y)
    options = {"method": "occlusion", "patch": 4}
    no = SaliencyDisplay.from_estimator(model, X[:2], target="no", **options)
    yes = SaliencyDisplay.from_estimator(model, X[:2], target="yes", **options)
    np.testing.assert_allclose(no.saliency, -yes.saliency)
    assert SaliencyDisplay.from_estimator(model, X).targets == list(model.predict(X))
    low, high = yes.images_[2].get_clim()
    assert -low == high == np.abs(yes.saliency).max()


def test_labels_are_targets():
    labels = np.stack([Y > 0, Y > 1], 1).astype(int)
    model = tiny.estimator(**DOUBLE).fit(X, labels)
    display = SaliencyDisplay.from_estimator(model, X[:1], target=1)
    assert display.targets == [1]
    assert display.saliency.any()


def shrink(batch):
    return nn.functional.avg_pool2d(batch.permute(0, 3, 1, 2).float(), 2) / 255


def test_the_picture_is_what_the_network_sees():
    images = rng.integers(0, 256, (12, 16, 16, 1), dtype=np.uint8)
    model = tiny.estimator(preprocess=shrink, **DOUBLE).fit(images, Y[:12])
    _, axes = plt.subplots(2, 2)
    display = SaliencyDisplay.from_estimator(model, images[:2], ax=axes)
    seen = images[:2, :, :, 0].reshape(2, 8, 2, 8, 2).mean((2, 4)) / 255
    np.testing.assert_allclose(display.images[..., 0], seen)
    assert display.saliency.shape == (2, 8, 8)
    assert display.axes_[1, 0] is axes[1, 0]


class Last(nn.Module):
    """A network that takes its channels last."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3))

    def forward(self, x):
        return self.net(x.permute(0, 3, 1, 2))


def test_channels_may_come_last_and_the_network_may_refuse_capture():
    images = rng.normal(size=(12, 6, 7, 3))
    model = tiny.estimator(Last(), **DOUBLE).fit(images, Y[:12])
    assert SaliencyDisplay.from_estimator(model, images[:2]).saliency.shape == (2, 6, 7)


class Branching(nn.Module):
    """A network that cannot be captured."""

    def __init__(self):
        super().__init__()
        self.net = tiny.tiny_net()

    def forward(self, x):
        return self.net(x) if float(x.detach().sum()) > -1e9 else self.net(-x)


@pytest.mark.filterwarnings("ignore:The backbone cannot be captured")
def test_networks_that_cannot_be_captured_are_drawn_the_same(models):
    layers = {"gradient_layers": ["net.0", "net.2"]}
    model = tiny.estimator(Branching(), **layers, **DOUBLE).fit(X, Y)
    eager = SaliencyDisplay.from_estimator(model, X[:2], target=0)
    captured = SaliencyDisplay.from_estimator(models["full"], X[:2], target=0)
    np.testing.assert_allclose(eager.saliency, captured.saliency, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"term": "other"}, "term must be"),
        ({"method": "other"}, "method must be"),
        ({"method": "occlusion", "patch": -1}, "patch must be None or a positive integer, got -1"),
        ({"target": 7}, r"target=7 is none of .*0.*1.*2"),
    ],
)
def test_options_of_saliency_are_checked(models, options, message):
    with pytest.raises(ValueError, match=message):
        SaliencyDisplay.from_estimator(models["full"], X[:1], **options)


def test_terms_that_the_model_lacks_are_refused(models):
    with pytest.raises(ValueError, match=r"not in a model .* Pass term='activation'"):
        SaliencyDisplay.from_estimator(models["activation"], X[:1])
    SaliencyDisplay.from_estimator(models["activation"], X[:1], term="activation")


def test_rows_are_no_images():
    model = tiny.estimator(nn.Linear(64, 3), max_iter=2).fit(flat(X), Y)
    with pytest.raises(ValueError, match=r"draws images.*a sample has shape \(64,\)"):
        SaliencyDisplay.from_estimator(model, flat(X))


# --- all of them --------------------------------------------------------------------------


def test_pipelines_and_searches_are_opened(models):
    double = FunctionTransformer(lambda x: 2 * x)
    pipeline = make_pipeline(double, tiny.estimator(**DOUBLE)).fit(X, Y)
    display = LayerContributionDisplay.from_estimator(pipeline, X)
    total = sum(display.parts.values()) + display.activation + pipeline[-1].intercept_
    np.testing.assert_allclose(total, pipeline.decision_function(X), atol=1e-10)
    search = GridSearchCV(tiny.estimator(max_iter=3), {"alpha": [0.1]}, cv=2).fit(X, Y)
    display = ObjectiveDisplay.from_estimator(search)
    assert list(display.objective_paths) == ["full"]


def test_pictures_may_be_drawn_under_inference_mode(models):
    with torch.inference_mode():
        SaliencyDisplay.from_estimator(models["full"], X[:1])
        LayerContributionDisplay.from_estimator(models["full"], X)


CALLS = {
    "ObjectiveDisplay": ObjectiveDisplay.from_estimator,
    "LayerContributionDisplay": lambda e: LayerContributionDisplay.from_estimator(e, X),
    "SaliencyDisplay": lambda e: SaliencyDisplay.from_estimator(e, X[:1]),
}


@pytest.mark.parametrize("name", CALLS)
def test_other_or_unfitted_estimators_are_refused(name):
    with pytest.raises(TypeError, match=r"of an estimator of sklearn_gradfeat.*got Logistic"):
        CALLS[name](LogisticRegression())
    with pytest.raises(ValueError, match="not fitted"):
        CALLS[name](tiny.estimator())


@pytest.mark.parametrize("name", CALLS)
def test_unknown_options_are_refused(models, name):
    with pytest.raises((ValueError, TypeError), match=r"must be|unexpected keyword"):
        {
            "ObjectiveDisplay": lambda: ObjectiveDisplay.from_estimator(
                models["full"], quantity="x"
            ),
            "LayerContributionDisplay": lambda: LayerContributionDisplay.from_estimator(
                models["full"], X, by="x"
            ),
            "SaliencyDisplay": lambda: SaliencyDisplay.from_estimator(models["full"], X, by="x"),
        }[name]()


@pytest.mark.parametrize("name", CALLS)
def test_without_matplotlib_the_error_says_what_to_install(models, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=rf"{name}.from_estimator requires matplotlib"):
        CALLS[name](models["full"])


def test_without_matplotlib_comparisons_fail_before_any_fit(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"from_estimator requires matplotlib"):
        FeatureComparisonDisplay.from_estimator(None, X, Y)
    with pytest.raises(ImportError, match=r"FeatureComparisonDisplay.plot requires matplotlib"):
        FeatureComparisonDisplay(scores={"a": np.ones(2)}).plot()
