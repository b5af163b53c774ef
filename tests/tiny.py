"""A tiny network, an estimator on it that is fast to fit, and images that it can learn."""

import numpy as np
import torch
from torch import nn

from sklearn_gradfeat import GradientFeatureClassifier


def tiny_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


NET = tiny_net()


def estimator(backbone=NET, **parameters):
    defaults = {"alpha": 0.1, "max_iter": 40, "tol": 1e-4}
    defaults["gradient_alpha"] = parameters.get("alpha", 0.1)
    return GradientFeatureClassifier(backbone, **{**defaults, **parameters})


def data(n=24):
    y = np.arange(n) % 3
    noise = np.random.default_rng(0).normal(size=(n, 1, 8, 8))
    return (noise + 0.5 * y[:, None, None, None]).astype(np.float32), y


X, Y = data()
