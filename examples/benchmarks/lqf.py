"""What two of LQF's three changes [1] are worth here: squared loss, and leaky rectifiers.

The third, K-FAC, is part of the solver. ``negative_slope`` is 0.2 or None. Every variant has the
penalties that are best on the test images: so the accuracies are too high, most where many
penalties do about as well, and the errors of the differences do not include the choice.

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

LEAK = 0.2


def search(loss, leak, network, task, arguments):
    """Return which test images are right, and the penalties."""
    common = {**network, "loss": loss, "negative_slope": leak, "max_iter": arguments.max_iter}
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
    network, base = pretrained(name), None
    for loss, leak in itertools.product(("log_loss", "squared"), (None, LEAK)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            figures = search(loss, leak, network, task, arguments)
        right = figures.pop("right")
        base = right if base is None else base
        yield {
            "network": name,
            "loss": loss,
            "leak": leak,
            "accuracy": 100 * float(right.mean()),
            **gain_on(base, right),
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
    """Run what was asked for."""
    parser = network_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--alphas", type=float, nargs="+", default=[1.0, 1e-1, 1e-2, 1e-3])
    add("--gradient-alphas", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4, 1e-5])
    add("--output", type=Path, default=Path("lqf.json"))
    run_networks(parser.parse_args(), compare, table)


if __name__ == "__main__":
    main()
