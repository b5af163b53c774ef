"""Time of a fit against explicit gradient features with scikit-learn's logistic regression.

The task has two classes, digits below five and the others. With more classes, the displacements are
shared between the classes, which scikit-learn does not support. The explicit features of a sample
are its activations, and the gradient of the output weights times the activation. The Jacobian
itself is not formed. Columns are scaled so that one C stands for both penalties. The output weights
are those of the fit, so the explicit side has no first stage. It is left out where its features are
larger than --limit-mib. Fits start without stored outputs and with a captured graph.

Each solver stops at its own tolerance. The disagreement is the largest difference between the
logits of the two, in standard deviations of the logits. The excess is the objective of the explicit
side relative to that of the fit, minus one; it tells which of them stopped early.

    python examples/benchmarks/vs_explicit.py --output vs_explicit.json
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from _setup import digits, save
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.func import functional_call, grad, vmap

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.backbones._builtin import load_shipped, random_mlp

ALPHA, GRADIENT_ALPHA = 1e-2, 1e-3
SIZES = (250, 500, 1000, 1797)
PROBLEMS = {
    "perceptron": "tabular, random network, top layer",
    "conv2": "images, convnet-rotation, conv2",
    "conv5": "images, convnet-rotation, conv5",
}
BATCH = 16  # samples whose gradients are computed at once


def problem(name):
    """Return network, transform, gradient layer and samples."""
    if name == "perceptron":
        return random_mlp(64, 0), None, "last", digits()[1]
    network, preprocess = load_shipped("convnet-rotation")
    return network, preprocess, name, load_digits().images / 16


def scale(parameter):
    """Return the scale of a parameter in the NTK parametrization."""
    return (1 / len(parameter) if parameter.ndim > 1 else 0.1) ** 0.5


def explicit(model, X):
    """Return activations and scaled gradients, one row for every sample."""
    network, names = model.backbone, model.gradient_layers_
    parameters = {name: dict(network.named_parameters())[name].detach() for name in names}
    omega = torch.from_numpy(model.omega_[0])

    def logit(values, sample):
        activation = functional_call(network, values, (sample[None],))[0]
        return activation @ omega.to(activation), activation

    per_sample = vmap(grad(logit, has_aux=True), in_dims=(None, 0))
    n_parameters = sum(p.numel() for p in parameters.values())
    rows = np.empty((len(X), len(omega) + n_parameters), model.coef_.dtype)
    unit = (model.alpha / model.gradient_alpha) ** 0.5
    for start in range(0, len(X), BATCH):
        batch = torch.from_numpy(X[start : start + BATCH])
        batch = batch if model.preprocess is None else model.preprocess(batch)
        gradients, activation = per_sample(parameters, batch)
        scaled = [unit * scale(parameters[n]) * g.flatten(1) for n, g in gradients.items()]
        rows[start : start + BATCH] = torch.cat([activation, *scaled], 1).detach()
    return rows


def timed(function, *arguments):
    """Return the result and the seconds of the processor of a call."""
    start = time.process_time()
    result = function(*arguments)
    return result, time.process_time() - start


def repeat(model, X, y, tol, with_explicit):
    """Return the seconds of both sides, one after the other, and the difference of the results."""
    model, seconds = timed(clone(model).fit, X, y)
    run = {"fit": seconds, "passes": model.n_passes_}
    if not with_explicit:
        return run
    rows, run["features"] = timed(explicit, model, X)
    other = LogisticRegression(C=1 / (model.alpha * len(X)), tol=tol, max_iter=10000)
    other, run["regression"] = timed(other.fit, rows, y)
    run["ratio"] = (run["features"] + run["regression"]) / run["fit"]
    run["iterations"] = int(other.n_iter_[0])
    logits = model.decision_function(X)
    apart = np.abs(other.decision_function(rows) - logits).max()
    run["disagreement"] = float(apart / logits.std())
    loss = log_loss(y, other.predict_proba(rows))
    objective = loss + model.alpha / 2 * float(np.square(other.coef_, dtype=float).sum())
    run["excess"] = objective / model.objective_path_[-1] - 1
    return run


def compare(name, arguments):
    """Return one row for each number of samples."""
    network, preprocess, layers, X = problem(name)
    y = load_digits().target >= 5
    model = GradientFeatureClassifier(
        network, preprocess=preprocess, gradient_layers=layers, alpha=ALPHA,
        gradient_alpha=GRADIENT_ALPHA, tol=arguments.tol, max_iter=1000, feature_store=None,
        device="cpu", activation_layer=None,
    )  # fmt: skip
    short = clone(model).set_params(max_iter=1).fit(X[:32], y[:32])  # captures the graph
    n_parameters = sum(v.size for v in short.gradient_coef_.values())
    result = []
    for n in arguments.sizes:
        n_bytes = n * (short.coef_.size + n_parameters) * short.coef_.itemsize
        fits_in = n_bytes / 2**20 <= arguments.limit_mib
        runs = [
            repeat(model, X[:n], y[:n], arguments.sklearn_tol, fits_in)
            for _ in range(arguments.repeats)
        ]
        row = {"problem": PROBLEMS[name], "n_samples": n, "theta": n_parameters}
        row |= {"mib": n_bytes / 2**20}
        result.append(row | {k: statistics.median(run[k] for run in runs) for k in runs[0]})
    return result


def table(rows):
    """Return the rows as a Markdown table."""
    lines = ["| explicit ÷ fit | problem | samples | θ₂ | explicit, MiB | disagreement | excess |"]
    lines[0] += " fit, s | features, s | regression, s |"
    lines.append("|---:|---|" + "---:|" * 8)
    formats = {"ratio": ".2f", "disagreement": ".1e", "excess": ".1e"}
    formats |= {"features": ".1f", "regression": ".1f"}
    for row in rows:
        cell = {key: format(row[key], kind) if key in row else "" for key, kind in formats.items()}
        lines.append(
            f"| {cell['ratio']} | {row['problem']} | {row['n_samples']} | {row['theta']} | "
            f"{row['mib']:.0f} | {cell['disagreement']} | {cell['excess']} | {row['fit']:.2f} | "
            f"{cell['features']} | {cell['regression']} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument(
        "--limit-mib", type=float, default=2048, help="largest size of the explicit features"
    )
    parser.add_argument("--tol", type=float, default=1e-6, help="tolerance of the fit")
    parser.add_argument("--sklearn-tol", type=float, default=1e-5, help="likewise of scikit-learn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("vs_explicit.json"))
    arguments = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        rows = [row for name in arguments.problems for row in compare(name, arguments)]
    save(rows, arguments, alpha=ALPHA, gradient_alpha=GRADIENT_ALPHA)
    print(table(rows))


if __name__ == "__main__":
    main()
