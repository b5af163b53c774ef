"""What two of LQF's three changes [1] are worth here: squared loss, and leaky rectifiers.

The third, K-FAC, is part of the solver. Squared errors are those of a regression on targets of
plus and minus one; the class with the largest prediction is chosen. The rectifier above the
gradient layer gets a slope of 0.2 below zero, in the activation and in the derivative. Every
variant has the penalties that are best on the test images: so the accuracies are too high, but the
choice adds no noise to the differences.

    python examples/benchmarks/lqf.py --data cifar10.zip --output lqf.json

[1] A. Achille et al., LQF: Linear Quadratic Fine-Tuning, CVPR 2021, arXiv:2012.11140.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import warnings
from pathlib import Path

import numpy as np
from _datasets import Task, need_data
from _setup import Preprocess, efficientnet, encoder, save
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import PredefinedSplit
from torch import nn
from torch.nn.functional import leaky_relu

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
)

LEAK = 0.2


class LeakyConvNet(nn.Module):
    """A ConvNet with another slope above its topmost convolution."""

    def __init__(self, network):
        super().__init__()
        self.network = copy.deepcopy(network)

    def forward(self, x):
        *below, top = self.network.children()
        for layer in below:
            x = leaky_relu(layer(x), self.network.slope)
        return leaky_relu(top(x), LEAK).mean((2, 3))


class Truncated(nn.Module):
    """EfficientNet-Lite0 up to its average pooling, with a slope in the topmost rectifier."""

    def __init__(self, network, slope):
        super().__init__()
        self.network, self.slope = network, slope

    def forward(self, x):
        network = self.network
        x = network._swish(network._bn0(network._conv_stem(x)))
        for block in network._blocks:
            x = block(x)
        x = network._bn1(network._conv_head(x))
        return leaky_relu(x, self.slope).clamp(max=6).mean((2, 3))


def networks(name):
    """Return a network, the same with the slope, and their transform."""
    if name == "efficientnet":
        network = efficientnet().eval()
        return Truncated(network, 0.0), Truncated(copy.deepcopy(network), LEAK), Preprocess()
    network, preprocess = encoder(name)
    return network, LeakyConvNet(network), preprocess


def largest(model, X, Y):
    """Return the share of samples with the largest prediction for the right class."""
    return float((model.predict(X).argmax(1) == Y.argmax(1)).mean())


def search(loss, backbone, preprocess, layer, task, arguments):
    """Return which test images are right, and the penalties."""
    X, y = np.concatenate([task.X, task.X_test]), np.concatenate([task.y, task.y_test])
    options = {
        "preprocess": preprocess,
        "gradient_layers": layer,
        "alphas": arguments.alphas,
        "gradient_alphas": arguments.gradient_alphas,
        "cv": PredefinedSplit(np.repeat([-1, 0], [len(task.y), len(task.y_test)])),
        "max_iter": arguments.max_iter,
        "refit": False,
    }
    squared = loss == "squared"
    Model = GradientFeatureRegressor if squared else GradientFeatureClassifier
    if squared:
        y = 2.0 * np.eye(y.max() + 1)[y] - 1
        searched = GradientFeatureRegressorCV(backbone, **options, scoring=largest).fit(X, y)
    else:
        searched = GradientFeatureClassifierCV(backbone, **options).fit(X, y)
    penalties = {"alpha": searched.alpha_, "gradient_alpha": searched.gradient_alpha_}
    kept = {name: options[name] for name in ("preprocess", "gradient_layers", "max_iter")}
    model = Model(backbone, **kept, **penalties).fit(X[: len(task.y)], y[: len(task.y)])
    found = model.predict(task.X_test)
    return {"right": (found.argmax(1) if squared else found) == task.y_test, **penalties}


def compare(name, task, arguments):
    """Iterate over the rows of a network; gains are those on cross-entropy without a leak."""
    *backbones, preprocess = networks(name)
    base, layer = None, "*conv_head" if name == "efficientnet" else "*conv5"
    for loss, leak in itertools.product(("cross-entropy", "squared"), (False, True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            figures = search(loss, backbones[leak], preprocess, layer, task, arguments)
        right = figures.pop("right")
        base = right if base is None else base
        difference = 100.0 * right - 100.0 * base
        yield {
            "network": name,
            "loss": loss,
            "leak": leak,
            "accuracy": 100 * float(right.mean()),
            "gain": float(difference.mean()),
            "gain_error": float(difference.std()) / math.sqrt(len(right)),
            **figures,
        }


def table(rows):
    """Return the rows as a Markdown table."""
    lines = [
        "| network | loss | leak | accuracy, % | gain | penalties |",
        "|---|---|---|---:|---:|---|",
    ]
    for row in rows:
        leak = LEAK if row["leak"] else "none"
        lines.append(
            f"| {row['network']} | {row['loss']} | {leak} | {row['accuracy']:.1f} | "
            f"{row['gain']:+.1f} ± {row['gain_error']:.1f} | "
            f"{row['alpha']:g}, {row['gradient_alpha']:g} |"
        )
    return "\n".join(lines)


def main():
    """Run what was asked for, write JSON after every row, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="files of images, as paper_tables.py takes them")
    known = ["convnet-rotation", "convnet-vae", "efficientnet"]
    add("--networks", nargs="+", default=known, choices=known)
    add("--n-train", type=int, default=2000)
    add("--n-test", type=int, help="default: all")
    add("--alphas", type=float, nargs="+", default=[1.0, 1e-1, 1e-2, 1e-3])
    add("--gradient-alphas", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4, 1e-5])
    add("--max-iter", type=int, default=100)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("lqf.json"))
    arguments = parser.parse_args()
    need_data(arguments.data)
    task, rows = Task(arguments), []
    for name in arguments.networks:
        for row in compare(name, task, arguments):
            rows.append(row)
            save(rows, arguments)
    print(table(rows))


if __name__ == "__main__":
    main()
