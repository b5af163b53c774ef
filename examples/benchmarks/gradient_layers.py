"""Can a cheap score on the training images select the number of gradient layers?

For each network, models with one, two and three of the topmost layers are fitted. The penalty of
the gradient term is selected on a tenth of the training images. Two scores use a share of those
images alone:

alignment
    of the tangent kernel with the residual of the first stage [1]: with the gradient features ``G``
    and the residual ``r``, ``|Gᵀr|² / (|GGᵀ| |r|²)``.
validation
    the log loss on one half of that share of a fit to the other half.

    python examples/benchmarks/gradient_layers.py --data cifar10.zip --output gradient_layers.json

[1] N. Cristianini et al., On kernel-target alignment, NeurIPS 2001.
"""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from _setup import empty_store, gain_on, network_parser, pretrained, run_networks, two_stages
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold, train_test_split

from sklearn_gradfeat import GradientFeatureClassifier, GradientFeatureClassifierCV

DEPTHS = (1, 2, 3)
N_PROBES = 10


@torch.no_grad()
def alignment(model, X, y):
    """Return the alignment of the kernel, between 0 and 1.

    ``|GGᵀ|²`` is estimated by the mean of ``|GGᵀ s|²`` over random signs ``s``.
    """
    stages = two_stages(model, X, y)
    first = stages.fit_activation(model.alpha)
    activation = stages.objective(model.alpha, stages.samples.activation, None)
    residual = stages.loss.gradient(activation.forward(first.solution.x))
    objective = stages.objective(0.0, None, stages.tangent(first.model.omega, 0.0))
    intercept = stages.like.new_zeros(objective.sizes[1])

    def transposed(cotangent):
        return objective.split(objective.adjoint(cotangent)).u

    rng, squares = np.random.default_rng(0), []
    for _ in range(N_PROBES):
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=tuple(residual.shape)))
        product = objective.forward(torch.cat([intercept, transposed(signs)]))  # GGᵀ signs
        squares.append(float(product.square().sum()))
    norm = math.sqrt(np.mean(squares))
    explained = float(transposed(residual).double().square().sum())
    return explained / (norm * float(residual.square().sum()))


def timed(function, *arguments):
    """Return the result and the seconds of a call that starts with an empty feature store."""
    empty_store()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = function(*arguments)
    return result, time.perf_counter() - start


def compare(name, task, arguments):
    """Iterate over the rows of a network, one for each depth."""
    few, _ = train_test_split(
        np.arange(len(task.y)), train_size=arguments.share, stratify=task.y, random_state=0
    )
    X, y, base, shared = task.X[few], task.y[few], None, pretrained(name)
    halves = StratifiedKFold(2).split(few, y)
    (half,) = list(halves)[:1]
    for depth in DEPTHS:
        common = {**shared, "gradient_layers": depth, "max_iter": arguments.max_iter}
        grid = {"alphas": [arguments.alpha], "gradient_alphas": arguments.gradient_alphas}
        model = GradientFeatureClassifierCV(**common, **grid, cv=task.held_out_fold)
        _, seconds = timed(model.fit, task.X, task.y)
        aligned, aligned_seconds = timed(
            alignment, GradientFeatureClassifier(**common, alpha=arguments.alpha), X, y
        )
        small = GradientFeatureClassifierCV(
            **common, **grid, cv=[half], refit=False, scoring="neg_log_loss"
        )
        _, small_seconds = timed(small.fit, X, y)
        correct = model.predict(task.X_test) == task.y_test
        base = correct if base is None else base
        yield {
            "network": name,
            "depth": depth,
            "layers": model.gradient_layers_,
            "accuracy": 100 * float(correct.mean()),
            **gain_on(base, correct),
            "held_out": 100 * model.best_score_,
            "gradient_alpha": model.gradient_alpha_,
            "seconds": seconds,
            "alignment": aligned,
            "alignment_seconds": aligned_seconds,
            "validation": -small.best_score_,
            "validation_seconds": small_seconds,
        }


def table(rows):
    """Return the rows as a Markdown table."""
    lines = [
        "| network | layers | accuracy, % | gain | fit and search, s | alignment | s "
        "| validation | s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['depth']} | {row['accuracy']:.1f} | "
            f"{row['gain']:+.1f} ± {row['gain_error']:.1f} | {row['seconds']:.0f} | "
            f"{row['alignment']:.3f} | {row['alignment_seconds']:.0f} | "
            f"{row['validation']:.3f} | {row['validation_seconds']:.0f} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark."""
    parser = network_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--share", type=float, default=0.25, help="share of the training images that the scores use"
    )
    add("--alpha", type=float, default=1e-2)
    add("--gradient-alphas", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4])
    add("--output", type=Path, default=Path("gradient_layers.json"))
    parser.set_defaults(n_test=2000)
    run_networks(parser.parse_args(), compare, table)


if __name__ == "__main__":
    main()
