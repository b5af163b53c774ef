"""Contributions of the layers, and how far they were moved."""

import numpy as np
import pytest
import torch

from sklearn_gradfeat import GradientFeatureClassifier, LayerContributionDisplay
from tests import tiny
from tests.inspection.pictures import DOUBLE, gradient_term, two_channels
from tests.networks import build
from tests.tiny import NET, X, Y

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


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
    samples = two_channels()
    model = GradientFeatureClassifier(module, gradient_layers=names, alpha=0.1, **DOUBLE)
    display = LayerContributionDisplay.from_estimator(
        model.fit(samples, Y), samples, by="parameter"
    )
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


def test_without_gradient_layers_there_is_no_picture(models):
    with pytest.raises(ValueError, match="features='activation', so it has no gradient layers"):
        LayerContributionDisplay.from_estimator(models["activation"], X)


def test_a_network_that_moved_has_displacements_and_no_gradient_term():
    model = tiny.estimator(gradient_layers="all", n_linearizations=2, **DOUBLE).fit(X, Y)
    display = LayerContributionDisplay.from_estimator(model, X)
    assert not any(part.any() for part in display.parts.values())
    total = display.activation + model.intercept_
    np.testing.assert_allclose(total, model.decision_function(X), atol=1e-10)
    moved, size = model.fine_tuned_state_dict(), NET.state_dict()
    for layer, share in display.relative_displacements.items():
        before, after = (
            torch.cat([state[f"{layer}.{n}"].double().flatten() for n in ("weight", "bias")])
            for state in (size, moved)
        )
        assert share == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
        assert share > 0
    display.figure_.canvas.draw()
