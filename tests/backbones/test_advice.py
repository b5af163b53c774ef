"""Advice on the layout of samples, and on networks that end in class scores."""

import re
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.backbones import warn_of_class_scores, warn_of_unscaled_images
from tests.tiny import Y

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def network(channels, n_axes=2):
    return nn.Sequential(CONVOLUTIONS[n_axes](channels, 4, 3), nn.ReLU(), nn.Flatten(2))


def samples(*shape):
    return np.random.default_rng(0).normal(size=(24, *shape)).astype(np.float32)


def fit(net, X, **parameters):
    return GradientFeatureClassifier(net, alpha=1.0, features="activation", **parameters).fit(X, Y)


@pytest.mark.parametrize(
    ("net", "X", "advice", "mend"),
    [
        (network(3), samples(8, 7, 3), "(n_samples, 3, height, width). The channels of X are last: "
         "pass X.transpose(0, 3, 1, 2), or permute", lambda X: X.transpose(0, 3, 1, 2)),
        (network(2, 1), samples(7, 2), "(n_samples, 2, length). The channels of X are last: "
         "pass X.transpose(0, 2, 1)", lambda X: X.transpose(0, 2, 1)),
        (network(1, 3), samples(5, 6, 7, 1), "pass X.transpose(0, 4, 1, 2, 3)",
         lambda X: X.transpose(0, 4, 1, 2, 3)),
        (network(3), samples(192), "X are flat: pass X in the shape that it had before, such as "
         "X.reshape(-1, 3, 8, 8).", lambda X: X.reshape(-1, 3, 8, 8)),
        (network(3), samples(100), "X are flat: pass X in the shape that it had before.\n", None),
        (network(1), samples(8, 8), "X has no axis of channels: pass X[:, None].",
         lambda X: X[:, None]),
        (network(3), samples(8, 8), "pass X[:, None], repeated to 3 channels.",
         lambda X: X[:, None].repeat(3, 1)),
        (network(3), samples(4, 8, 8), "takes batches of shape (n_samples, 3, height, width).\n",
         None),
    ],
)  # fmt: skip
def test_a_wrong_layout_is_named(net, X, advice, mend):
    with pytest.raises(ValueError, match=re.escape(advice)):
        fit(net, X)
    if mend:
        fit(net, mend(X))


@pytest.mark.parametrize("net", [network(3), nn.Linear(5, 2), nn.LazyConv2d(2, 3)])
def test_other_failures_have_no_advice(net):
    X = samples(3, 2, 2)  # smaller than the kernel
    with pytest.raises(ValueError, match="failed on a batch") as error:
        fit(net, X)
    assert "convolution of the backbone" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet18", "fc"), ("squeezenet1_1", None), ("mobilenet_v3_small", r"classifier\.3"),
     ("vit_b_32", r"heads\.head")],
)  # fmt: skip
def test_classifiers_of_torchvision(name, layer):
    with torch.device("meta"):
        net = torchvision.models.get_model(name, weights=None)
    if layer is None:  # its scores come from a convolution
        warn_of_class_scores(net)
        return
    with pytest.warns(UserWarning, match=f"ends in the layer '{layer}' with 1000 .*Identity"):
        warn_of_class_scores(net)
    with pytest.warns(UserWarning, match=f"'1.{layer}'"):
        warn_of_class_scores(nn.Sequential(nn.Identity(), net, nn.Softmax(1)))


def test_activations_that_are_no_class_scores():
    features = nn.Sequential()
    features.add_module("fc", nn.Linear(5, 512))
    scores = nn.Sequential()
    scores.add_module("fc", nn.Linear(5, 1000))
    with pytest.warns(UserWarning, match="class scores.*activation_layer='fc'"):
        fit(scores, samples(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(scores, samples(5), activation_layer="fc")
        warn_of_class_scores(features)
        warn_of_class_scores(nn.Sequential(nn.Linear(5, 1000)))
        warn_of_class_scores(nn.Flatten())


def pixels():
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 8, 8))
    return torch.from_numpy(images).float()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_images_that_nobody_scales(dtype):
    X = pixels().numpy().astype(dtype)
    with pytest.warns(UserWarning, match="values from 0 to 255, which the backbone does not scale"):
        fit(network(3), X)


def test_resized_images_that_nobody_scales():
    X = nn.functional.avg_pool2d(pixels() * 0.9, 2).numpy()
    assert (X % 1).any()
    with pytest.warns(UserWarning, match=r"values from .* to 1.*, which the backbone does not sca"):
        fit(network(3), X)


class Scaled(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return self.net(batch / 255)


@pytest.mark.parametrize(
    ("net", "batch"),
    [
        (Scaled(network(3)), pixels()),
        (nn.Sequential(nn.BatchNorm2d(3), network(3)), pixels()),
        (network(3), pixels() / 255),
        (network(3), pixels() - 128),
        (network(3), pixels() % 2),
        (network(3), pixels() / 2.5),
        (network(3), pixels() * 1.1),
        (network(3), torch.randn(2, 3, 8, 8)),
        (nn.Flatten(), pixels()),
        (network(3, 1), pixels()[:, 0]),
    ],
    ids=[
        "scales",
        "normalises",
        "unit",
        "centred",
        "masks",
        "counts",
        "large",
        "noise",
        "flat",
        "signals",
    ],
)
def test_images_that_are_scaled(net, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unscaled_images(net.eval(), batch)
