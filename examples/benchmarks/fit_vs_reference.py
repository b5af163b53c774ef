"""Time to the same objective and test accuracy: a fit, and the training recipes of the paper.

The paper [1] and its code train the same linear model with Adam or SGD, and pass every minibatch
through the whole network, frozen layers included. The loops here were written from that
description. A convolution that covers its whole input runs as a matrix product, which is faster on
a CPU. Both sides minimise the same objective, with the penalties of the command line. The published
weight decays are penalties of 1e-6 (Adam) and 5e-5 (SGD) on all weights, also in the NTK
parametrization, and on the intercept, which has no penalty here. θ₂ is the topmost convolution.

A fit starts with an empty feature store. Its time starts with the images and includes the frozen
layers and the first stage. A recipe starts from the same weights as the second stage of the fit,
and its time starts at the time of that stage, so the first stage counts for both. The model is
evaluated every so many iterations, which is not counted. The targets are the final objective of
the fit, plus a share of the decrease in its second stage, and the test accuracy of the fit. A
recipe runs until it has reached both targets, or to the limit. The best of its evaluations is
reported, so its accuracy is selected on the test images, and that of the fit is not. Graph and
kernels are loaded beforehand.

    python examples/benchmarks/fit_vs_reference.py --data cifar10.zip --limit 20

[1] F. Mu, Y. Liang, Y. Li, Gradients as Features for Deep Representation Learning, ICLR 2020,
    arXiv:2004.05529.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import warnings
from pathlib import Path

import torch
from _datasets import Task, need_data
from _finetuning import RECIPES
from _reference import Evaluation, LinearModel, train
from _setup import empty_store, encoder, save, task_parser, timed_second_stage
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from sklearn_gradfeat import GradientFeatureClassifier

TARGETS = ("objective", "accuracy")


def fit(model, task):
    """Fit; return the seconds, those of the first stage, and the model of the first stage."""
    empty_store()
    with timed_second_stage() as second, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        start = time.perf_counter()
        model.fit(task.X, task.y)
        seconds = time.perf_counter() - start
    first = second["first"].model
    return {"seconds": seconds, "first_stage": second["start"] - start, "first": first}


def race(run, model, evaluate, ours, arguments):
    """Return the seconds of a training run to each target, None if it was not reached."""
    slack = arguments.slack * (ours["start"] - ours["objective"])
    to, best = dict.fromkeys(TARGETS), {"objective": math.inf, "accuracy": 0.0}
    for trained in itertools.chain([0.0], run):
        seconds, found = ours["first_stage"] + trained, evaluate(model)
        best["objective"] = min(best["objective"], found["objective"])
        best["accuracy"] = max(best["accuracy"], found["accuracy"])
        met = {
            "objective": found["objective"] <= ours["objective"] + slack,
            "accuracy": found["accuracy"] >= ours["accuracy"],
        }
        to = {t: seconds if to[t] is None and met[t] else to[t] for t in TARGETS}
        if None not in to.values() or seconds > arguments.limit * ours["seconds"]:
            break
    return {"to": to, "seconds": seconds, **best}


def repeat(model, network, preprocess, task, evaluate, arguments, seed):
    """Return the figures of the fit and of every recipe after it."""
    fitted = fit(model, task)
    first = fitted.pop("first")

    def start():
        return LinearModel(network, first.omega, first.intercept)

    ours = {
        "to": dict.fromkeys(TARGETS, fitted["seconds"]),
        **fitted,
        "start": float(model.objective_path_[0]),
        "objective": float(model.objective_path_[-1]),
        "objective_by_reference": evaluate(start().load(model))["objective"],
        "accuracy": 100 * model.score(task.X_test, task.y_test),
        "iterations": model.n_iter_,
        "passes": model.n_passes_,
    }
    runs = {"fit": ours}
    for name, recipe in RECIPES.items():
        reference = start()
        run = train(reference, recipe, preprocess, task, arguments, seed)
        runs[name] = race(run, reference, evaluate, ours, arguments)
    return runs


def summary(kind, runs):
    """Return the medians of one kind of training; a target out of reach has infinite time."""
    ratios, seconds = {}, {}
    for target in TARGETS:
        to = [math.inf if (s := r[kind]["to"][target]) is None else s for r in runs]
        shares = [s / r["fit"]["seconds"] for s, r in zip(to, runs, strict=True)]
        reached = math.isfinite(middle := statistics.median(to))
        seconds[target] = middle if reached else None
        ratios[target] = statistics.median(shares) if reached else None
    middle = {k: statistics.median(r[kind][k] for r in runs) for k in ("seconds", *TARGETS)}
    return {"ratios": ratios, "seconds_to": seconds, **middle, "runs": [r[kind] for r in runs]}


def compare(name, task, arguments):
    """Return one row for the fit and one for each recipe."""
    network, preprocess = encoder(name)
    model = GradientFeatureClassifier(
        network, preprocess=preprocess, gradient_layers="conv5", max_iter=arguments.max_iter,
        alpha=arguments.alpha, gradient_alpha=arguments.gradient_alpha, activation_layer=None,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluate = Evaluation(network, preprocess, task, arguments, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        few = slice(None, None, max(1, len(task.y) // 64))
        warm = clone(model).set_params(max_iter=1).fit(task.X[few], task.y[few])
        weights = (torch.from_numpy(a).to(device) for a in (warm.omega_, warm.intercept_))
        evaluate(LinearModel(network, *weights))
    runs = [
        repeat(clone(model), network, preprocess, task, evaluate, arguments, seed)
        for seed in range(arguments.seed, arguments.seed + arguments.repeats)
    ]
    return [{"encoder": name, "model": kind, **summary(kind, runs)} for kind in runs[0]]


def table(rows):
    """Return the rows as a Markdown table."""
    titles = "÷ fit, objective | ÷ fit, accuracy | encoder | model | objective | accuracy, %"
    lines = [f"| {titles} | s |", "|---:|---:|---|---|---:|---:|---:|"]
    for row in rows:
        whole = row["seconds"] / next(r for r in rows if r["encoder"] == row["encoder"])["seconds"]
        cells = [
            f"not in {row['seconds']:.1f} s ({whole:.1f})" if ratio is None else f"{ratio:.2f}"
            for ratio in row["ratios"].values()
        ]
        lines.append(
            f"| {' | '.join(cells)} | {row['encoder']} | {row['model']} | "
            f"{row['objective']:.4f} | {row['accuracy']:.2f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = task_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--slack",
        type=float,
        default=0.01,
        help="share of the decrease in the second stage of the fit",
    )
    add(
        "--limit",
        type=float,
        default=20,
        help="time limit of a recipe, in units of that of the fit",
    )
    add("--every", type=int, default=100, help="iterations between evaluations")
    add("--output", type=Path, default=Path("fit_vs_reference.json"))
    arguments = parser.parse_args()
    need_data(arguments.data)
    task = Task(arguments)
    rows = [row for name in arguments.encoders for row in compare(name, task, arguments)]
    save(rows, arguments)
    print("Seconds to the objective and accuracy of the fit, in units of its time; best values:\n")
    print(table(rows))


if __name__ == "__main__":
    main()
