"""Time of a fit, and of predictions, in units of one forward pass of the plain network.

The plain network runs in inference mode over the same images in the same batches, in the default
memory format and in channels last. The first is the unit. A cold fit starts with an empty feature
store, and a warm fit with that of the cold one. The graph of the network is captured beforehand.
ResNet18 has random weights, because nothing is downloaded. They change the number of iterations but
not their cost.

    python examples/benchmarks/fit_vs_forward.py --data cifar10.zip --output fit_vs_forward.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torchvision
from _datasets import need_data
from _setup import empty_store, images, save, scaled_images
from sklearn.base import clone

from sklearn_gradfeat import GradientFeatureClassifier

RUNS = ("forward", "channels last", "cold fit", "warm fit", "predict_proba")


class Pooled(torch.nn.Module):
    """EfficientNet-Lite0 up to its pooling."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        x = self.network.extract_features(x)
        return self.network._avg_pooling(x).flatten(1)


def networks(efficientnet):
    """Return the networks with their gradient layers."""
    resnet = torchvision.models.resnet18()
    resnet.fc = torch.nn.Identity()
    return {
        "EfficientNet-Lite0, head conv": (Pooled(efficientnet), "last"),
        "ResNet18, layer4.1": (resnet, "layer4.1"),
    }


def forward(network, X, preprocess, layout):
    """Run the plain network over all images."""
    network = network.eval().to(memory_format=layout)
    with torch.inference_mode():
        for batch in torch.from_numpy(X).split(64):
            network(preprocess(batch).contiguous(memory_format=layout))


def seconds(function, *arguments):
    """Return the seconds of a call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


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


def compare(name, network, layers, X, y, arguments):
    """Return one row for each value of ``features``."""
    preprocess = scaled_images(arguments.size)
    models = {}
    for features in ("activation", "full"):
        models[features] = model = GradientFeatureClassifier(
            network, preprocess=preprocess, features=features, gradient_layers=layers,
            alpha=0.1, gradient_alpha=1e-4, batch_size=64,
        )  # fmt: skip
        few = slice(None, None, max(1, len(X) // 64))
        clone(model).set_params(max_iter=1, tol=1).fit(X[few], y[few])  # captures the graph
    repeats = [repeat(models, network, X, y, preprocess) for _ in range(arguments.repeats)]
    rows = []
    for features, model in models.items():
        runs = [one[features] for one in repeats]
        rows.append(
            {
                "network": name,
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
    parser.add_argument("--n-train", type=int, default=2000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("fit_vs_forward.json"))
    arguments = parser.parse_args()
    need_data(arguments.data)
    model, X, y = images(arguments.data, arguments.n_train)
    rows = []
    for name, (network, layers) in networks(model.backbone).items():
        rows += compare(name, network, layers, X, y, arguments)
        save(rows, arguments)
    print("In units of the first run, one pass of the plain network:\n")
    print(table(rows))


if __name__ == "__main__":
    main()
