"""Effect of `tol` on the objective, the passes, and loss and accuracy on held-out images.

python examples/benchmarks/tolerance.py --data cifar10.zip --output tolerance.json
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

from _datasets import need_data, read_images
from _setup import images, save
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss

from sklearn_gradfeat import GradientFeatureClassifier

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def models(arguments):
    """Return a model for each network, with its penalties."""
    encoder = GradientFeatureClassifier("convnet-rotation", alpha=1e-3, gradient_alpha=1e-4)
    return {
        "rotation encoder, conv5": encoder,
        "EfficientNet-Lite0, head conv": images(arguments.data, 10)[0],
    }


def measure(model, train, test):
    """Fit, and return the figures of the fit and on held-out images."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(*train)
    seconds = time.perf_counter() - start
    probabilities = model.predict_proba(test[0])
    return {
        "tol": model.tol,
        "objective": float(model.objective_path_[-1]),
        "loss": log_loss(test[1], probabilities),
        "accuracy": 100 * float((model.classes_[probabilities.argmax(1)] == test[1]).mean()),
        "n_iter": model.n_iter_,
        "n_passes": model.n_passes_,
        "seconds": seconds,
    }


def table(rows):
    """Return the rows as a Markdown table."""
    lines = ["| network | tol | held-out loss | accuracy, % | objective | passes | seconds |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['tol']:.0e} | {row['loss']:.4f} | {row['accuracy']:.1f} | "
            f"{row['objective']:.5f} | {row['n_passes']} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="zip file of train/ and test/<class>/*.jpg")
    parser.add_argument("--n-train", type=int, default=2000)
    parser.add_argument("--n-test", type=int, default=1000)
    parser.add_argument("--max-iter", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("tolerance.json"))
    arguments = parser.parse_args()
    need_data(arguments.data)
    train = read_images(arguments.data, "train", arguments.n_train)
    test = read_images(arguments.data, "test", arguments.n_test)
    rows = []
    for name, model in models(arguments).items():
        measure(clone(model).set_params(tol=1.0), train, test)  # fills the store
        for tol in TOLERANCES:
            one = clone(model).set_params(tol=tol, max_iter=arguments.max_iter)
            rows.append({"network": name, **measure(one, train, test)})
        save(rows, arguments)
    print(table(rows))


if __name__ == "__main__":
    main()
