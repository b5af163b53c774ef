"""The gain of two changes that LQF [1] makes: squared loss, and leaky ReLUs in place of ReLUs.

Its third change, K-FAC, is part of the solver. ``negative_slope`` is 0.2 or None. Every variant has
the penalties with the best score on the test images. The accuracies are therefore too high, most
of all where many penalties score about alike, and the errors of the gains leave the selection out.

    python examples/benchmarks/lqf.py --data cifar10.zip --output lqf.json

[1] A. Achille et al., LQF: Linear Quadratic Fine-Tuning, CVPR 2021, arXiv:2012.11140.
"""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
from _setup import gain_on, network_parser, pretrained, run_networks
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import PredefinedSplit

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureClassifierCV

NEGATIVE_SLOPE = 0.2


def search(loss, negative_slope, network, task, arguments):
    """Return which predictions of the test images are correct, and the penalties."""
    common = {**network, "loss": loss, "negative_slope": negative_slope}
    common["max_iter"] = arguments.max_iter
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
    return {"correct": model.predict(task.X_test) == task.y_test, **penalties}


def compare(name, task, arguments):
    """Iterate over the rows of a network; gains are over cross-entropy with the ReLUs unchanged."""
    network, base = pretrained(name), None
    variants = itertools.product(("log_loss", "squared"), (None, NEGATIVE_SLOPE))
    for loss, negative_slope in variants:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            figures = search(loss, negative_slope, network, task, arguments)
        correct = figures.pop("correct")
        base = correct if base is None else base
        yield {
            "network": name,
            "loss": loss,
            "negative_slope": negative_slope,
            "accuracy": 100 * float(correct.mean()),
            **gain_on(base, correct),
            **figures,
        }


def table(rows):
    """Return the rows as a Markdown table."""
    lines = [
        "| network | loss | negative_slope | accuracy, % | gain | penalties |",
        "|---|---|---|---:|---:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['loss']} | {row['negative_slope']} | "
            f"{row['accuracy']:.1f} | {row['gain']:+.1f} ± {row['gain_error']:.1f} | "
            f"{row['alpha']:g}, {row['gradient_alpha']:g} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark."""
    parser = network_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--alphas", type=float, nargs="+", default=[1.0, 1e-1, 1e-2, 1e-3])
    add("--gradient-alphas", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4, 1e-5])
    add("--output", type=Path, default=Path("lqf.json"))
    run_networks(parser.parse_args(), compare, table)


if __name__ == "__main__":
    main()
