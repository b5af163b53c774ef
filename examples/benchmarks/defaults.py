"""Estimators with default parameters, against scikit-learn's models of the same activations.

Every problem has three splits with disjoint test samples. The models:

* "LogisticRegression" and "LogisticRegressionCV", or "Ridge" and "RidgeCV": scikit-learn, on the
  output of the network;
* "activation" and "full": the estimator with default parameters, by ``features``;
* "search": the estimator that chooses its penalties by cross-validation, with its defaults;
* "oracle": the penalties of a grid, with the gradient term or without it, that have the smallest
  loss on the test samples. No method that selects penalties on the training data can be better.

The loss is the log loss, or the squared error in units of the variance of the test targets. Loss
and accuracy of multilabel targets are averages over labels. Regression targets are not scaled. The
seconds of a fit exclude the frozen layers: every image passes them once, before the first fit. The
table has the differences "full" minus "LogisticRegressionCV" or "RidgeCV", with the standard errors
of paired test samples.

``--cost`` measures another ratio instead: the time of a fit that chooses the penalties, in units of
that of a fit with the chosen ones, and the median over the problems. ``--tolerance`` measures the
loss of "full" in units of that of the same model with ``tol=1e-8``.

    python examples/benchmarks/defaults.py --data cifar10.zip --output defaults.json
    python examples/benchmarks/defaults.py --problems wine diabetes --splits 1
    python examples/benchmarks/defaults.py --table defaults.json
    python examples/benchmarks/defaults.py --cost --problems wine
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _datasets import read_images
from _setup import docstrings, empty_store, pretrained, save
from sklearn.base import clone
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_wine,
    make_friedman1,
    make_friedman2,
    make_friedman3,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge, RidgeCV
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler

from sklearn_gradfeat import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
)
from sklearn_gradfeat.cache import memory_store
from sklearn_gradfeat.data import BatchSize
from sklearn_gradfeat.linearized import LinearizedHead, to_numpy

N_POOL, N_TEST = 15_000, 1_000
BASELINES = ("LogisticRegressionCV", "RidgeCV")
EXACT = 1e-8


class Problem(NamedTuple):
    """All samples of a problem, and the parameters of an estimator that name its network.

    ``output`` is the layer whose output the models of scikit-learn receive.
    """

    network: dict[str, Any]
    X: np.ndarray
    y: np.ndarray
    n_train: int | None = None
    regression: bool = False
    output: str | None = None


class Split(NamedTuple):
    """Training and test samples."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray


# --- problems ----------------------------------------------------------------------------------


@functools.cache
def photographs(path):
    """Return the images that all problems of photographs share."""
    return read_images(path, "train", N_POOL)


def encoder(n_train):
    return lambda path: Problem({"backbone": "convnet-rotation"}, *photographs(path), n_train)


def efficientnet(n_train):
    def problem(path):
        network = pretrained("efficientnet")
        output = network.pop("activation_layer")
        return Problem(network, *photographs(path), n_train, output=output)

    return problem


def digit_images(n_train):
    """Return grey images of 32 x 32 pixels."""

    def problem(path):
        X, y = load_digits(return_X_y=True)
        pixels = np.kron(X.reshape(-1, 8, 8), np.ones((1, 4, 4))) * (255 / 16)
        return Problem({"backbone": "convnet-rotation"}, pixels.astype(np.uint8), y, n_train)

    return problem


@functools.cache
def texts():
    """Return the network and the texts that both problems of texts share."""
    model, X, y = docstrings(400)
    return {"backbone": model.backbone}, X, y


def sentences(n_train):
    return lambda path: Problem(*texts(), n_train)


def tabular(load, regression=False):
    """Return the function that loads a table for the random network."""
    return lambda path: Problem({"random_state": 0}, *load(), None, regression)


def digit_attributes():
    """Return the digits, and whether each is even, large, prime, and has a loop."""
    X, digit = load_digits(return_X_y=True)
    return X, np.column_stack(
        [digit % 2 == 0, digit >= 5, np.isin(digit, [2, 3, 5, 7]), np.isin(digit, [0, 6, 8, 9])]
    ).astype(int)


def rare_digit():
    """Return the digits, and whether each is an 8; there are twenty others for every 8."""
    X, digit = load_digits(return_X_y=True)
    others, eights = np.flatnonzero(digit != 8), np.flatnonzero(digit == 8)
    chosen = np.sort(np.concatenate([others, eights[: len(others) // 20]]))
    return X[chosen], (digit[chosen] == 8).astype(int)


PROBLEMS: dict[str, Callable[[Path | None], Problem]] = {
    "encoder 200": encoder(200),
    "encoder 600": encoder(600),
    "encoder 2000": encoder(2_000),
    "encoder 10000": encoder(10_000),
    "EfficientNet 200": efficientnet(200),
    "EfficientNet 600": efficientnet(600),
    "EfficientNet 2000": efficientnet(2_000),
    "digit images 400": digit_images(400),
    "digit images": digit_images(None),
    "docstrings 300": sentences(300),
    "docstrings 1500": sentences(1_500),
    "wine": tabular(lambda: load_wine(return_X_y=True)),
    "breast cancer": tabular(lambda: load_breast_cancer(return_X_y=True)),
    "digits": tabular(lambda: load_digits(return_X_y=True)),
    "digit attributes": tabular(digit_attributes),
    "rare digit": tabular(rare_digit),
    "diabetes": tabular(lambda: load_diabetes(return_X_y=True), True),
    "Friedman 1": tabular(lambda: make_friedman1(750, noise=1, random_state=0), True),
    "Friedman 2": tabular(lambda: make_friedman2(750, noise=100, random_state=0), True),
    "Friedman 3": tabular(lambda: make_friedman3(750, noise=0.1, random_state=0), True),
}
NEED_DATA = [name for name in PROBLEMS if name.startswith(("encoder", "EfficientNet"))]


def splits(problem, n_splits):
    """Iterate over splits; smaller problems of the same samples have a part of their training rows.

    Columns of tabular data are scaled as on the training samples.
    """
    kind = KFold if problem.regression or problem.y.ndim > 1 else StratifiedKFold
    folds = kind(max(n_splits, 3), shuffle=True, random_state=0).split(problem.X, problem.y)
    for seed, fold in zip(range(n_splits), folds, strict=False):
        order = np.random.default_rng(seed).permutation
        train, test = order(fold[0])[: problem.n_train], order(fold[1])[:N_TEST]
        X, X_test = problem.X[train], problem.X[test]
        if "backbone" not in problem.network:
            scaler = StandardScaler().fit(X)
            X, X_test = scaler.transform(X), scaler.transform(X_test)
        yield Split(X, problem.y[train], X_test, problem.y[test])


# --- models ------------------------------------------------------------------------------------


def activations(model, X):
    """Return the activations of the network of a fitted estimator."""
    extractor = model._extractor
    network, size = extractor.network([]), BatchSize(model.batch_size)
    head = LinearizedHead.from_network(network)
    batches = extractor.batches(X, network, size, False, memory_store())
    return np.concatenate([to_numpy(head.activation(boundary)) for _, boundary in batches])


def linear_models(problem):
    """Return the models of scikit-learn by name: one with its default penalty, one that chooses."""
    if problem.regression:
        return {"Ridge": Ridge(), "RidgeCV": RidgeCV()}
    plain = LogisticRegression(max_iter=1000)
    choosing = LogisticRegressionCV(
        Cs=10, cv=5, scoring="neg_log_loss", max_iter=1000, l1_ratios=(0,),
        use_legacy_attributes=False,
    )  # fmt: skip
    found = {"LogisticRegression": plain, "LogisticRegressionCV": choosing}
    if problem.y.ndim > 1:
        found = {name: OneVsRestClassifier(model) for name, model in found.items()}
    return found


def evaluate(model, X, y):
    """Return the loss and the accuracy of every sample, or the share of explained variance."""
    if not hasattr(model, "predict_proba"):
        losses = (y - model.predict(X)) ** 2 / y.var()
        return losses, 1 - losses
    p = model.predict_proba(X).astype(np.float64)
    if y.ndim > 1:
        chosen = np.where(y == 1, p, 1 - p)
        correct = (chosen > 0.5).mean(1)
    else:
        codes = np.searchsorted(model.classes_, y)
        chosen = p[np.arange(len(y)), codes]
        correct = (p.argmax(1) == codes).astype(float)
    losses = -np.log(chosen.clip(np.finfo(np.float32).tiny))
    return losses.mean(1) if y.ndim > 1 else losses, correct


def mean_score(model, X, y):
    """Return the negative mean loss, the score of the oracle."""
    return -float(evaluate(model, X, y)[0].mean())


def fitted(model, X, y):
    """Fit, and return the model and its wall-clock and processor seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    return model, (time.perf_counter() - start, time.process_time() - cpu)


def estimators(problem):
    """Return the class of estimators and that of searches."""
    if problem.regression:
        return GradientFeatureRegressor, GradientFeatureRegressorCV
    return GradientFeatureClassifier, GradientFeatureClassifierCV


def outputs(problem, split):
    """Return the outputs of the network for the training and the test samples."""
    model = estimators(problem)[0](
        **problem.network, features="activation", activation_layer=problem.output, alpha=1.0,
        max_iter=1,
    )  # fmt: skip
    fitted(model, split.X, split.y)
    return activations(model, split.X), activations(model, split.X_test)


def warm(problem, split):
    """Pass all samples through the frozen layers."""
    for features in ("full", "activation"):
        model = estimators(problem)[0](
            **problem.network, features=features, alpha=1.0, gradient_alpha=1.0, max_iter=1
        )
        fitted(model, split.X, split.y)[0].predict(split.X_test)


def oracle(problem, split, grid):
    """Return the model of the penalties with the smallest loss on the test samples."""
    kind, search = estimators(problem)
    X, y = np.concatenate([split.X, split.X_test]), np.concatenate([split.y, split.y_test])
    rows = np.arange(len(X))
    alphas, gradient_alphas = grid
    options = {
        "alphas": alphas,
        "gradient_alphas": gradient_alphas,
        "cv": [(rows[: len(split.X)], rows[len(split.X) :])],
        "scoring": mean_score,
        "refit": False,
    }
    candidates = [
        fitted(search(**problem.network, features=features, **options), X, y)[0]
        for features in ("activation", "full")
    ]
    best = max(candidates, key=lambda found: found.best_score_)
    chosen = {"alpha": best.alpha_, "features": best.features}
    if best.features == "full":
        chosen["gradient_alpha"] = best.gradient_alpha_
    return kind(**problem.network, **chosen)


def models(problem, split, arguments):
    """Iterate over (name, unfitted model, training inputs, test inputs)."""
    features = outputs(problem, split)
    warm(problem, split)
    for name, model in linear_models(problem).items():
        yield name, model, *features
    kind, search = estimators(problem)
    samples = split.X, split.X_test
    yield "activation", kind(**problem.network, features="activation"), *samples
    yield "full", kind(**problem.network), *samples
    if len(split.X) <= arguments.search_samples:
        yield "search", search(**problem.network), *samples
    if len(split.X) <= arguments.oracle_samples:
        yield "oracle", oracle(problem, split, arguments.grid), *samples


def penalties(model):
    """Return the penalties of a fitted model by name, where it has any."""
    names = ("alpha", "gradient_alpha", "C")
    found = {name: getattr(model, f"{name}_", getattr(model, name, None)) for name in names}
    return {name: np.ravel(value).tolist() for name, value in found.items() if value is not None}


def paired(values, others):
    """Return the mean difference of paired samples and its standard error."""
    difference = values - others
    return [float(difference.mean()), float(difference.std() / math.sqrt(len(difference)))]


def compare(name, problem, arguments):
    """Iterate over the rows of a problem, one for each split and model."""
    for number, split in enumerate(splits(problem, arguments.splits)):
        baseline = None
        for label, model, X, X_test in models(problem, split, arguments):
            _, seconds = fitted(model, X, split.y)
            losses, correct = evaluate(model, X_test, split.y_test)
            if label in BASELINES:
                baseline = losses, correct
            row = {
                "problem": name,
                "split": number,
                "n_train": len(X),
                "n_test": len(X_test),
                "model": label,
                "score": float(correct.mean()),
                "loss": float(losses.mean()),
                "seconds": seconds[0],
                "cpu_seconds": seconds[1],
                "penalties": penalties(model),
            }
            if label == "full":
                row |= {
                    "loss_difference": paired(losses, baseline[0]),
                    "score_difference": paired(correct, baseline[1]),
                }
            yield row


def tolerance(name, problem, arguments):
    """Iterate over the rows of a problem: the losses with the default ``tol`` and a small one."""
    for number, split in enumerate(splits(problem, arguments.splits)):
        model = fitted(estimators(problem)[0](**problem.network), split.X, split.y)[0]
        chosen = {key: value[0] for key, value in penalties(model).items()}
        losses = []
        for tol in (model.tol, EXACT):
            exact = clone(model).set_params(**chosen, tol=tol, max_iter=1000)
            fitted(exact, split.X, split.y)
            losses.append(float(evaluate(exact, split.X_test, split.y_test)[0].mean()))
        yield {
            "problem": name,
            "split": number,
            "n_train": len(split.X),
            "losses": losses,
            "loss_ratio": losses[0] / losses[1],
            "penalties": chosen,
        }


def cost(name, problem, arguments):
    """Iterate over the rows of a problem: without the frozen layers, and with them, if any."""
    split = next(splits(problem, 1))
    kind = estimators(problem)[0]
    warm(problem, split)
    for trunk in (False, True) if "backbone" in problem.network else (False,):
        store = None if trunk else "auto"
        automatic = kind(**problem.network, feature_store=store)
        times = []
        for _ in range(arguments.repeats):
            model, choosing = fitted(clone(automatic), split.X, split.y)
            chosen = {key: value[0] for key, value in penalties(model).items()}
            numbers = clone(automatic).set_params(**chosen)
            times.append((choosing, fitted(numbers, split.X, split.y)[1]))
        yield {
            "problem": name,
            "n_train": len(split.X),
            "trunk": trunk,
            "ratio": statistics.median(a[0] / b[0] for a, b in times),
            "ratio_cpu": statistics.median(a[1] / b[1] for a, b in times),
            "seconds": times,
            "penalties": chosen,
        }


# --- tables ------------------------------------------------------------------------------------


def pooled(differences):
    """Return the mean of independent differences and its standard error."""
    means, errors = zip(*differences, strict=True)
    return [statistics.fmean(means), math.hypot(*errors) / len(errors)]


def signed(difference, factor=1.0):
    """Return a difference and its standard error as text."""
    mean, error = (factor * value for value in difference)
    return f"{mean:+.3f} ± {error:.3f}" if factor == 1 else f"{mean:+.1f} ± {error:.1f}"


def table(rows):
    """Return two Markdown tables: all models by problem, and the differences to scikit-learn."""
    if "trunk" in rows[0]:
        return cost_table(rows)
    if "loss_ratio" in rows[0]:
        return tolerance_table(rows)
    lines = ["| problem | samples | model | accuracy or R², % | loss | seconds |"]
    lines.append("|---|---:|---|---:|---:|---:|")
    differences = {}
    for problem in dict.fromkeys(row["problem"] for row in rows):
        of_problem = [row for row in rows if row["problem"] == problem]
        for model in dict.fromkeys(row["model"] for row in of_problem):
            chosen = [row for row in of_problem if row["model"] == model]
            score, loss, seconds = (
                statistics.fmean(row[key] for row in chosen) for key in ("score", "loss", "seconds")
            )
            lines.append(
                f"| {problem} | {chosen[0]['n_train']} | {model} | {100 * score:.1f} | "
                f"{loss:.3f} | {seconds:.2f} |"
            )
            if model == "full":
                differences[problem] = [
                    pooled([row[key] for row in chosen])
                    for key in ("loss_difference", "score_difference")
                ]
    lines += ["", "| problem | loss, full − CV | accuracy or R², full − CV, % |", "|---|---:|---:|"]
    if differences:
        differences["mean"] = [pooled(found) for found in zip(*differences.values(), strict=True)]
    for problem, (loss, score) in differences.items():
        lines.append(f"| {problem} | {signed(loss)} | {signed(score, 100)} |")
    return "\n".join(lines)


def tolerance_table(rows):
    """Return the ratios of losses as a Markdown table."""
    lines = ["| problem | samples | loss ÷ loss with tol=1e-8, by split |", "|---|---:|---|"]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        chosen = [row for row in rows if row["problem"] == problem]
        ratios = ", ".join(f"{row['loss_ratio']:.4f}" for row in chosen)
        lines.append(f"| {problem} | {chosen[0]['n_train']} | {ratios} |")
    return "\n".join(lines)


def cost_table(rows):
    """Return the times of automatic penalties as a Markdown table."""
    lines = ["| problem | samples | frozen layers | choosing ÷ chosen | of CPU time | chosen, s |"]
    lines.append("|---|---:|---|---:|---:|---:|")
    for row in rows:
        seconds = statistics.median(chosen[0] for _, chosen in row["seconds"])
        lines.append(
            f"| {row['problem']} | {row['n_train']} | {'timed' if row['trunk'] else 'cached'} | "
            f"{row['ratio']:.2f} | {row['ratio_cpu']:.2f} | {seconds:.2f} |"
        )
    for trunk in sorted({row["trunk"] for row in rows}):
        wall, cpu = (
            statistics.median(row[key] for row in rows if row["trunk"] == trunk)
            for key in ("ratio", "ratio_cpu")
        )
        name = "timed" if trunk else "cached"
        lines.append(f"| median | | {name} | {wall:.2f} | {cpu:.2f} | |")
    return "\n".join(lines)


def load(name, path):
    """Return a problem, or None with a message where its files or packages are missing."""
    if name in NEED_DATA and (path is None or not path.exists()):
        return print(f"{name}: skipped, --data must name a zip file or folder of images.")
    try:
        return PROBLEMS[name](path)
    except ImportError as error:
        return print(f"{name}: skipped, {error}.")


def main(arguments=None):
    """Run the benchmark, write JSON after every row, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="zip file or folder of images, as for paper_tables.py")
    add("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS), metavar="NAME")
    add("--splits", type=int, default=3)
    add("--search-samples", type=int, default=500, help="most training samples of the search")
    add("--oracle-samples", type=int, default=2000, help="most training samples of the oracle")
    add("--grid", type=int, nargs=2, default=[5, 4], help="penalties of the oracle, by term")
    add("--cost", action="store_true", help="measure the time of automatic penalties")
    add("--tolerance", action="store_true", help="measure the effect of tol on the loss")
    add("--repeats", type=int, default=5, help="repeats of --cost")
    add("--output", type=Path, default=Path("defaults.json"))
    add("--table", type=Path, help="print the tables of this file, and fit nothing")
    arguments = parser.parse_args(arguments)
    if arguments.table is not None:
        return print(table(json.loads(arguments.table.read_text())["rows"]))
    rows = []
    measure = cost if arguments.cost else tolerance if arguments.tolerance else compare
    for name in arguments.problems:
        problem = load(name, arguments.data)
        empty_store()
        for row in measure(name, problem, arguments) if problem else ():
            rows.append(row)
            save(rows, arguments)
    return print(table(rows) if rows else "There is nothing to measure.")


if __name__ == "__main__":
    main()
