"""Time and accuracy of a fit, of fine-tuning the same layers, and of logistic regression.

Every time starts with the images and ends with the trained model, and includes the frozen layers.
Fits start with an empty feature store. Fine-tuning trains on the output of the frozen layers, which
is computed once and counted. It starts from an "activation" model of nine tenths of the images,
which is not counted. It trains on those nine tenths by the published recipes [1], with early
stopping on the last tenth, in a plain loop, and in skorch's loop if that is installed. The logistic
regression is scikit-learn's, on standardised activations. No penalty or learning rate is tuned;
tuning would multiply the time of every model. Graphs are captured beforehand.

    python examples/benchmarks/fit_vs_finetune.py --data cifar10.zip --output fit_vs_finetune.json

[1] F. Mu, Y. Liang, Y. Li, Gradients as Features for Deep Representation Learning, ICLR 2020,
    arXiv:2004.05529.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
import time
import warnings
from pathlib import Path

import torch
from _datasets import Task, need_data
from _finetuning import (
    RECIPES,
    Head,
    accuracy,
    below,
    fine_tune,
    fine_tune_with_skorch,
    fitted_to_rows,
    take,
)
from _reference import convolutions
from _setup import empty_store, encoder, save, task_parser
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_gradfeat import GradientFeatureClassifier

SKORCH = importlib.util.find_spec("skorch") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(function, *arguments):
    """Return the result and the seconds of a call."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def linear_models(network, preprocess, names, arguments):
    """Return the two estimators to fit."""
    full = GradientFeatureClassifier(
        network, preprocess=preprocess, gradient_layers=names, max_iter=arguments.max_iter,
        alpha=arguments.alpha, gradient_alpha=arguments.gradient_alpha, activation_layer=None,
    )  # fmt: skip
    return {"full": full, "activation": clone(full).set_params(features="activation")}


def fitted(model, task):
    """Fit with an empty store; return the test accuracy and the seconds of the fit."""
    empty_store()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model, seconds = timed(model.fit, task.X, task.y)
    score = 100 * model.score(task.X_test, task.y_test)
    return {"accuracy": score, "seconds": seconds, "iterations": model.n_iter_}


def logistic_regression(network, preprocess, task, arguments):
    """Return accuracy and seconds of scikit-learn's logistic regression on the activations."""

    def activations(X):
        return convolutions(network, None, preprocess, X, DEVICE).mean((2, 3)).numpy()

    C = 1 / (arguments.logistic_alpha * len(task.y))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
    Z, seconds = timed(activations, task.X)
    model, fit_seconds = timed(model.fit, Z, task.y)
    score = model.score(activations(task.X_test), task.y_test)
    return {"accuracy": 100 * score, "seconds": seconds + fit_seconds}


def fine_tuning(start, task, arguments, seed):
    """Iterate over (name, figures) of both recipes, in every training loop."""
    z, seconds_below = timed(below, start, task.X, DEVICE)
    z_test = below(start, task.X_test, DEVICE)
    parts = [(take(z, rows), task.y[rows]) for rows in (task.rows, task.held_out)]
    loops = {"torch": fine_tune} | ({"skorch": fine_tune_with_skorch} if SKORCH else {})
    for (name, recipe), (loop, train) in itertools.product(RECIPES.items(), loops.items()):
        head = Head(start, DEVICE)
        rate = recipe.rate * arguments.rate_factor
        _, seconds = timed(train, head, *parts, recipe, rate, arguments.patience, seed)
        score = 100 * accuracy(head.logits(z_test), task.y_test)
        row = {"accuracy": score, "seconds": seconds_below + seconds}
        yield f"fine-tuning, {name}, {loop}", row


def repeat(network, preprocess, task, arguments, seed):
    """Return the figures of every model; they run one after the other."""
    bottom = len(list(network.children())) - arguments.n_layers
    names = [name for name, _ in network.named_children()][bottom:]
    models = linear_models(network, preprocess, names, arguments)
    runs = {name: fitted(model, task) for name, model in models.items()}
    runs["LogisticRegression"] = logistic_regression(network, preprocess, task, arguments)
    start = fitted_to_rows(models["activation"], task)
    tuned = fine_tuning(start, task, arguments, seed)
    return runs | dict(tuned)


def compare(name, task, arguments):
    """Return one row for each model, with medians over the repeats."""
    network, preprocess = encoder(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images and iterations do not converge
        few = slice(None, None, max(1, len(task.y) // 64))
        for model in linear_models(network, preprocess, arguments.n_layers, arguments).values():
            model.set_params(max_iter=1).fit(task.X[few], task.y[few])
    seeds = range(arguments.seed, arguments.seed + arguments.repeats)
    runs = [repeat(network, preprocess, task, arguments, seed) for seed in seeds]
    rows = []
    for kind in runs[0]:
        correct = statistics.median(run[kind]["accuracy"] for run in runs)
        row = {
            "encoder": name,
            "model": kind,
            "ratio": statistics.median(r[kind]["seconds"] / r["full"]["seconds"] for r in runs),
            "accuracy": correct,
            "error": math.sqrt(correct * (100 - correct) / len(task.y_test)),
            "seconds": statistics.median(run[kind]["seconds"] for run in runs),
        }
        rows.append({**row, "runs": [run[kind] for run in runs]})
    return rows


def table(rows):
    """Return the rows as a Markdown table."""
    lines = ["| ÷ full | encoder | model | accuracy, % | seconds |", "|---:|---|---|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {row['ratio']:.2f} | {row['encoder']} | {row['model']} | "
            f"{row['accuracy']:.1f} ± {row['error']:.1f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = task_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--n-layers", type=int, default=1, help="number of topmost convolutions in θ₂")
    add("--logistic-alpha", type=float, default=1e-3, help="1 / (C * number of images)")
    add("--rate-factor", type=float, default=1.0, help="factor on the published learning rates")
    add(
        "--patience",
        type=int,
        default=10,
        help="epochs without a better score after which fine-tuning stops",
    )
    add("--output", type=Path, default=Path("fit_vs_finetune.json"))
    arguments = parser.parse_args()
    need_data(arguments.data)
    if not SKORCH:
        print("skorch is not installed, so its rows are left out: pip install skorch\n")
    task = Task(arguments)
    rows = [row for name in arguments.encoders for row in compare(name, task, arguments)]
    save(rows, arguments)
    print(table(rows))


if __name__ == "__main__":
    main()
