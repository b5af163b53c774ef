"""Saliency of pixels: derivatives and occlusions."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    LayerContributionDisplay,
    SaliencyDisplay,
)
from tests import tiny
from tests.inspection.pictures import DOUBLE, gradient_term, two_channels
from tests.networks import build
from tests.tiny import X, Y

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


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
    samples = two_channels()
    model = GradientFeatureClassifier(
        module, gradient_layers=names, alpha=0.1, **DOUBLE, activation_layer=None
    )
    display = SaliencyDisplay.from_estimator(model.fit(samples, Y), samples[:2], target=1)
    for image, drawn in zip(torch.as_tensor(samples[:2]), display.saliency, strict=True):
        expected = by_differences(model, module, image, 1).norm(dim=0)
        np.testing.assert_allclose(drawn, expected, rtol=1e-4, atol=1e-6 * expected.max())
    assert display.images_[2].get_array().shape == (5, 5)


def test_attention_is_followed_by_derivatives():
    module, names = build("transformer")
    samples = two_channels()
    model = GradientFeatureClassifier(
        module, gradient_layers=names, alpha=0.1, **DOUBLE, activation_layer=None
    )
    model.set_params(max_iter=2).fit(samples, Y)
    display = SaliencyDisplay.from_estimator(model, samples[:1], target=1)
    eps = 1e-5
    for pixel in ((0, 0), (2, 3)):
        moved = np.repeat(samples[:1], 4, axis=0)
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


def test_the_picture_is_the_input_of_the_network():
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 1), dtype=np.uint8)
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


def test_channels_may_come_last():
    images = np.random.default_rng(0).normal(size=(12, 6, 7, 3))
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


def test_tabular_data_are_no_images():
    model = tiny.estimator(nn.Linear(64, 3), max_iter=2).fit(X.reshape(24, -1), Y)
    with pytest.raises(ValueError, match=r"draws images.*a sample has shape \(64,\)"):
        SaliencyDisplay.from_estimator(model, X.reshape(24, -1))


@pytest.mark.parametrize("n", [1, 2])
def test_a_network_that_moved_has_no_gradient_term(n):
    model = tiny.estimator(gradient_layers="all", n_linearizations=n, **DOUBLE).fit(X, Y)
    if n == 1:
        model.merge(X, Y)
    with pytest.raises(ValueError, match=r"the network moved, .* Pass term='activation'"):
        SaliencyDisplay.from_estimator(model, X[:2])
    maps = [SaliencyDisplay.from_estimator(model, X[:2], term=t) for t in ("activation", "full")]
    assert maps[0].saliency.max() > 0
    np.testing.assert_array_equal(maps[0].saliency, maps[1].saliency)
