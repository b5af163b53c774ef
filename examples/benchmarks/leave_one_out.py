"""Penalties selected by leave-one-out, against five folds and the best on test data.

The problems are regressions on tabular data with the random network. Both searches try the same
6 x 6 penalties. "best" is the highest score on the test samples over that grid. The time is that of
a search with its final fit. The searches of a repeat follow one another.

    python examples/benchmarks/leave_one_out.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from _setup import save
from sklearn.datasets import load_diabetes, make_friedman1, make_friedman2, make_friedman3
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from sklearn_gradfeat import GradientFeatureRegressor, GradientFeatureRegressorCV


def two_outputs():
    """Return Friedman's first function with its square as a second output."""
    X, y = make_friedman1(2000, noise=1, random_state=0)
    return X, np.column_stack([y, y**2 / 20])


PROBLEMS = {
    "diabetes": lambda: load_diabetes(return_X_y=True),
    "Friedman 1": lambda: make_friedman1(2000, noise=1, random_state=0),
    "Friedman 2": lambda: make_friedman2(2000, noise=100, random_state=0),
    "Friedman 3": lambda: make_friedman3(2000, noise=0.1, random_state=0),
    "two outputs": two_outputs,
}


def best_on_test(search, X, y, X_test, y_test):
    """Return the highest score on the test samples over the grid of a search."""
    scores = [
        GradientFeatureRegressor(alpha=a, gradient_alpha=g, random_state=0, activation_layer=None)
        .fit(X, y)
        .score(X_test, y_test)
        for a in search.alphas_
        for g in search.gradient_alphas_
    ]
    return max(scores)


def compare(name, repeats):
    """Return the row of a problem."""
    X, y = PROBLEMS[name]()
    X, X_test, y, y_test = train_test_split(X, y, train_size=300, random_state=0)
    scaler = StandardScaler().fit(X)
    X, X_test = scaler.transform(X), scaler.transform(X_test)
    seconds = {"loo": [], 5: []}
    models = {}
    for _ in range(repeats):
        for cv, times in seconds.items():
            model = GradientFeatureRegressorCV(
                alphas=6, gradient_alphas=6, cv=cv, random_state=0, activation_layer=None
            )
            start = time.perf_counter()
            models[cv] = model.fit(X, y)
            times.append(time.perf_counter() - start)
    best = best_on_test(models[5], X, y, X_test, y_test)
    ratios = [loo / folds for loo, folds in zip(seconds["loo"], seconds[5], strict=True)]
    return {
        "problem": name,
        "n_samples": len(X),
        "ratio": statistics.median(ratios),
        "seconds": statistics.median(seconds["loo"]),
        "leave-one-out": models["loo"].score(X_test, y_test),
        "five folds": models[5].score(X_test, y_test),
        "best": best,
    }


def table(rows):
    """Return the rows as a Markdown table."""
    lines = ["| time ÷ five folds | problem | samples | leave-one-out | five folds | best |"]
    lines[0] += " seconds |"
    lines.append("|---:|---|---:|---:|---:|---:|---:|")
    for row in rows:
        scores = " | ".join(f"{row[k]:.3f}" for k in ("leave-one-out", "five folds", "best"))
        lines.append(
            f"| {row['ratio']:.2f} | {row['problem']} | {row['n_samples']} | {scores} | "
            f"{row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("leave_one_out.json"))
    arguments = parser.parse_args()
    rows = [compare(name, arguments.repeats) for name in PROBLEMS]
    save(rows, arguments)
    print("R² on test samples with the selected penalties:\n")
    print(table(rows))


if __name__ == "__main__":
    main()
