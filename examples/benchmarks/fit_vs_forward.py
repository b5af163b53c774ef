"""Time of a fit, and of predictions, in units of one forward pass of the plain network.

The plain network runs in inference mode over the same samples in the same batches, images in the
default memory format and in channels last. The first is the unit. A cold fit starts with an empty
feature store, and a warm fit with that of the cold one. The graph of the network is captured
beforehand. ResNet18 has random weights, because nothing is downloaded. They change the number of
iterations but not their cost. Texts are docstrings of 32 tokens, shorter ones padded. Seconds are
those of the processor, of all threads.

    python examples/benchmarks/fit_vs_forward.py --data cifar10.zip --output fit_vs_forward.json
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from _datasets import need_data, read_images
from _setup import docstrings, efficientnet, empty_store, save, scaled_images
from sklearn.base import clone

from sklearn_gradfeat import GradientFeatureClassifier

NETWORKS = {
    "efficientnet": "EfficientNet-Lite0, head conv",
    "resnet18": "ResNet18, layer4.1",
    "minilm": "MiniLM, last layer",
}
RUNS = ("forward", "channels last", "cold fit", "warm fit", "predict_proba")


class Pooled(torch.nn.Module):
    """EfficientNet-Lite0 up to its pooling."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        x = self.network.extract_features(x)
        return self.network._avg_pooling(x).flatten(1)


def image_network(name):
    """Return a network for images and its gradient layers."""
    if name == "efficientnet":
        return Pooled(efficientnet()), "last"
    resnet = torchvision.models.resnet18()
    resnet.fc = torch.nn.Identity()
    return resnet, "layer4.1"


def problem(name, arguments):
    """Return a model, samples, targets and the transform of samples."""
    n = arguments.n_train
    if name == "minilm":
        model, X, y = docstrings(math.ceil(n / 6), arguments.tokens)
        rows = np.random.default_rng(0).permutation(len(X))[:n]
        return model.set_params(batch_size=64), X[rows], y[rows], torch.nn.Identity()
    need_data(arguments.data)
    network, layers = image_network(name)
    preprocess = scaled_images(arguments.size)
    model = GradientFeatureClassifier(
        network, preprocess=preprocess, gradient_layers=layers,
        alpha=0.1, gradient_alpha=1e-4, batch_size=64, activation_layer=None,
    )  # fmt: skip
    return model, *read_images(arguments.data, "train", n), preprocess


def forward(network, X, preprocess, layout):
    """Run the plain network over all images."""
    network = network.eval().to(memory_format=layout)
    with torch.inference_mode():
        for batch in torch.from_numpy(X).split(64):
            x = preprocess(batch)
            network(x.contiguous(memory_format=layout) if x.ndim == 4 else x)


def seconds(function, *arguments):
    """Return the processor seconds of a call."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def repeat(models, network, X, y, preprocess):
    """Return the seconds of every run by ``features``; the runs follow one another."""
    layouts = {"forward": torch.contiguous_format, "channels last": torch.channels_last}
    plain = {run: seconds(forward, network, X, preprocess, at) for run, at in layouts.items()}
    runs = {}
    for features, model in models.items():
        empty_store()
        fits = {run: seconds(model.fit, X, y) for run in ("cold fit", "warm fit")}
        model.set_params(feature_store=None)
        runs[features] = plain | fits | {"predict_proba": seconds(model.predict_proba, X)}
        model.set_params(feature_store="auto")
    return runs


def compare(name, arguments):
    """Return one row for each value of ``features``."""
    base, X, y, preprocess = problem(name, arguments)
    network, models = base.backbone, {}
    for features in arguments.features:
        models[features] = model = clone(base).set_params(features=features)
        few = slice(None, None, max(1, len(X) // 64))
        clone(model).set_params(max_iter=1, tol=1).fit(X[few], y[few])  # captures the graph
    repeats = [repeat(models, network, X, y, preprocess) for _ in range(arguments.repeats)]
    rows = []
    for features, model in models.items():
        runs = [one[features] for one in repeats]
        rows.append(
            {
                "network": NETWORKS[name],
                "features": features,
                "n_samples": len(X),
                "ratios": {k: statistics.median(r[k] / r["forward"] for r in runs) for k in RUNS},
                "n_passes": model.n_passes_,
                "seconds": {k: statistics.median(r[k] for r in runs) for k in RUNS},
            }
        )
    return rows


def table(rows):
    """Return the rows as a Markdown table."""
    lines = [f"| network | features | {' | '.join(RUNS[1:])} | passes | forward, s |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        cells = " | ".join(f"{row['ratios'][run]:.2f}" for run in RUNS[1:])
        lines.append(
            f"| {row['network']} | {row['features']} | {cells} | {row['n_passes']} | "
            f"{row['seconds']['forward']:.1f} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="zip file of train/<class>/*.jpg")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--features", nargs="+", default=["activation", "full"])
    parser.add_argument("--n-train", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("fit_vs_forward.json"))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.networks:
        rows += compare(name, arguments)
        save(rows, arguments)
    print("In units of the first run, one pass of the plain network:\n")
    print(table(rows))


if __name__ == "__main__":
    main()
