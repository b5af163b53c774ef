"""Time of a search over 5 folds × 8 penalties in units of one fit, by kind of feature store.

All runs of a repeat follow one another, so that the load of the machine is about the same for each.
The network is frozen before the time starts. The single fit runs without a store. Searches start
with an empty store, and a rerun with the store of the search before it. "CV" is the estimator with
the search built in, without a store. All others are GridSearchCV.

    python examples/benchmarks/grid_vs_fit.py --data cifar10.zip --output grid_vs_fit.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from _setup import digits, empty_store, images, save
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV

from sklearn_gradfeat import GradientFeatureClassifierCV

FOLDS = 5
ALPHAS = np.geomspace(1e-3, 10, 8)
STORES = ("CV", "None", '"auto"', '"auto", rerun', "path", "path, rerun")


def searching(model, parameter):
    """Return the estimator with the search built in, over the same penalties."""
    parameters = clone(model).get_params(deep=False)
    del parameters["warm_start"], parameters["checkpoint"]
    alpha, gradient_alpha = parameters.pop("alpha"), parameters.pop("gradient_alpha")
    fixed = {
        "alphas": [alpha],
        "gradient_alphas": [alpha if gradient_alpha is None else gradient_alpha],
    }
    grid = {**fixed, f"{parameter}s": ALPHAS, "cv": FOLDS, "feature_store": None}
    return GradientFeatureClassifierCV(**{**parameters, **grid})


def seconds(model, X, y):
    """Return the wall-clock and the processor seconds of a fit."""
    start, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    return {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def repeat(model, X, y, parameter):
    """Return the times of one fit and of every search."""
    alone = clone(model).set_params(feature_store=None)

    def search(store):
        return GridSearchCV(
            clone(model).set_params(feature_store=store), {parameter: ALPHAS}, cv=FOLDS
        )

    times = {"fit": seconds(alone, X, y), "CV": seconds(searching(model, parameter), X, y)}
    times["None"] = seconds(search(None), X, y)
    empty_store()
    with tempfile.TemporaryDirectory() as folder:
        for name, store in (('"auto"', "auto"), ("path", folder)):
            times[name] = seconds(search(store), X, y)
            times[f"{name}, rerun"] = seconds(search(store), X, y)
    return times


def compare(name, model, X, y, repeats, parameter):
    """Return one row for each kind of search."""
    few = slice(None, None, max(1, len(X) // 64))
    clone(model).set_params(max_iter=1).fit(X[few], y[few])
    runs = [repeat(model, X, y, parameter) for _ in range(repeats)]
    rows = []
    for store in STORES:
        ratios = {
            clock: [run[store][clock] / run["fit"][clock] for run in runs]
            for clock in ("wall", "cpu")
        }
        rows.append(
            {
                "data": name,
                "n_samples": len(X),
                "store": store,
                "ratio": statistics.median(ratios["wall"]),
                "ratio_cpu": statistics.median(ratios["cpu"]),
                "ratios": ratios["wall"],
                "seconds": statistics.median(run[store]["wall"] for run in runs),
                "seconds_of_fit": statistics.median(run["fit"]["wall"] for run in runs),
            }
        )
    return rows


def table(rows):
    """Return the rows as a Markdown table."""
    lines = ["| search ÷ fit | of CPU time | data | search | search, s | fit, s |"]
    lines.append("|---:|---:|---|---|---:|---:|")
    for row in rows:
        lines.append(
            f"| {row['ratio']:.1f} | {row['ratio_cpu']:.1f} | {row['data']} | {row['store']} | "
            f"{row['seconds']:.1f} | {row['seconds_of_fit']:.1f} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="zip file of train/<class>/*.jpg")
    parser.add_argument("--n-train", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--features", default="full", help="features= of the model for images")
    parser.add_argument("--output", type=Path, default=Path("grid_vs_fit.json"))
    arguments = parser.parse_args()
    if arguments.data is None:
        name, task = "digits, random network", digits()
    else:
        name = f"{arguments.data.stem}, EfficientNet-Lite0, {arguments.features}"
        task = images(arguments.data, arguments.n_train)
        task[0].set_params(features=arguments.features)
    parameter = "alpha" if arguments.features == "activation" else "gradient_alpha"
    rows = compare(name, *task, arguments.repeats, parameter)
    save(rows, arguments, folds=FOLDS, **{parameter: ALPHAS.tolist()})
    print(table(rows))


if __name__ == "__main__":
    main()
