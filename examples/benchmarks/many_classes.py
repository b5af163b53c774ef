"""Passes and time of fits with many classes, relative to the same images with ten.

Images get more classes in two ways. "240": every image is turned by a multiple of 90 degrees and
its channels are reordered, at random, and the class says how. "random": as many classes as there
are images, divided by five, and each has five images drawn at random. Time is that of the
processor, with one thread. The penalties are fixed, and every fit starts with an empty store.

    python examples/benchmarks/many_classes.py --data cifar10.zip --output many_classes.json
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from _datasets import need_data, read_images
from _setup import empty_store, random_images, save

from sklearn_gradfeat import GradientFeatureClassifier


def ten(X, y, rng):
    """Return the images with their ten classes."""
    return X, y


def turned(X, y, rng):
    """Return turned images with reordered channels, and 24 times as many classes."""
    orders = list(itertools.permutations(range(3)))
    turns, order = rng.integers(0, 4, len(X)), rng.integers(0, 6, len(X))
    images = [np.rot90(x, k)[..., orders[o]] for x, k, o in zip(X, turns, order, strict=True)]
    return np.stack(images), y * 24 + turns * 6 + order


def random_classes(X, y, rng):
    """Return the images, five of each random class."""
    return X, np.arange(len(X)) % (len(X) // 5)


CASES = {"10": ten, "240": turned, "random": random_classes}


def measure(name, X, y, arguments):
    """Return the figures of one fit."""
    X, y = CASES[name](X, y, np.random.default_rng(1))
    empty_store()
    model = GradientFeatureClassifier(
        arguments.network, alpha=arguments.alpha, gradient_alpha=arguments.gradient_alpha,
        gradient_layers=arguments.gradient_layers, max_iter=300, activation_layer=None,
    )  # fmt: skip
    start = time.process_time()
    model.fit(X, y)
    return {
        "case": name,
        "classes": len(model.classes_),
        "passes": model.n_passes_,
        "iterations": model.n_iter_,
        "seconds": time.process_time() - start,
        "objective": float(model.objective_path_[-1]),
    }


def table(rows):
    """Return the rows as a Markdown table."""
    lines = ["| images | classes | passes | CPU, s | ÷ 10 classes |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['classes']} | {row['passes']} | {row['seconds']:.0f} | "
            f"{row['seconds'] / rows[0]['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="zip file of train/ and test/<class>/*.jpg")
    add("--network", default="convnet-rotation")
    add("--n-train", type=int, default=5000)
    add("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    add("--gradient-layers", type=int, default=1)
    add("--alpha", type=float, default=1e-3)
    add("--gradient-alpha", type=float, default=1e-5)
    add("--output", type=Path, default=Path("many_classes.json"))
    arguments = parser.parse_args()
    need_data(arguments.data)
    torch.set_num_threads(1)
    X, names = read_images(arguments.data, "train", arguments.n_train)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = X[order], np.unique(names, return_inverse=True)[1][order]
    short = GradientFeatureClassifier(
        arguments.network, max_iter=1, alpha=1, gradient_alpha=1, activation_layer=None
    )
    short.fit(random_images(8), np.arange(8) % 2)  # loads libraries and captures the graph
    rows = []
    for case in arguments.cases:
        rows.append(measure(case, X, y, arguments))
        save(rows, arguments)
        print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
