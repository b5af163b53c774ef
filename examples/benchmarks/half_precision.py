"""Time of bfloat16 in units of that of float32: in the frozen layers, and in a pass over the head.

A pass computes `J u` and `Jᵀ g` of all samples at the same point. The errors are those of the
change of the logits and of the gradient, relative to their norms. The runs of a repeat follow one
another.

    python examples/benchmarks/half_precision.py --data cifar10.zip --output half_precision.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from _datasets import need_data, read_images
from _setup import empty_store, save, scaled_images
from sklearn.base import clone
from solver import PROBLEMS, second_stage
from torchvision.models import resnet18

from sklearn_gradfeat import GradientFeatureClassifier


def resnet(path, n_train):
    """Return a model and data: ResNet18 with random weights."""
    network = resnet18()
    network.fc = torch.nn.Identity()
    X, y = read_images(path, "train", n_train)
    model = GradientFeatureClassifier(
        network, preprocess=scaled_images(224), gradient_layers="layer4.1", alpha=0.1,
        gradient_alpha=1e-4, batch_size=64,
    )  # fmt: skip
    return model, X, y


CHOICES = {name: PROBLEMS[name] for name in ("conv5", "conv4-5", "head", "text")}
CHOICES["resnet"] = ("ResNet18, layer4.1", resnet)


def seconds(run):
    """Return the seconds and the result of a call."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def compare(name, load, path, n_train, repeats):
    """Return the row of a problem."""
    model, X, y = load(path, n_train)
    objective, x = second_stage(model, X, y)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(len(x), generator=generator)
    logits = objective.forward(x)
    trunk, passes = [], []
    for _ in range(repeats):
        times = {}
        for precision in ("float32", "bfloat16"):
            empty_store()
            options = {"precision": precision, "features": "activation", "max_iter": 1, "tol": 1e9}
            times[precision] = seconds(lambda o=options: clone(model).set_params(**o).fit(X, y))[0]
        trunk.append(times["bfloat16"] / times["float32"])
        full, exact = seconds(lambda: objective.forward_adjoint(direction, logits))
        with torch.autocast("cpu", torch.bfloat16):
            half, rounded = seconds(lambda: objective.forward_adjoint(direction, logits))
        passes.append(half / full)
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(exact, rounded, strict=True)]
    ratios = {"frozen layers": statistics.median(trunk), "pass": statistics.median(passes)}
    return {"problem": name, "n_samples": len(X), **ratios, "errors": errors, "seconds": full}


def table(rows):
    """Return the rows as a Markdown table."""
    lines = ["| frozen layers | a pass | problem | samples | error of `J u` | of the gradient |"]
    lines.append("|---:|---:|---|---:|---:|---:|")
    for row in rows:
        errors = " | ".join(f"{error:.0e}" for error in row["errors"])
        lines.append(
            f"| {row['frozen layers']:.2f} | {row['pass']:.2f} | {row['problem']} | "
            f"{row['n_samples']} | {errors} |"
        )
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="zip file of train/<class>/*.jpg")
    parser.add_argument("--problems", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--n-train", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("half_precision.json"))
    arguments = parser.parse_args()
    need_data(arguments.data)
    chosen = [CHOICES[name] for name in arguments.problems]
    rows = [compare(*c, arguments.data, arguments.n_train, arguments.repeats) for c in chosen]
    save(rows, arguments)
    print("Time in bfloat16, in units of float32:\n")
    print(table(rows))


if __name__ == "__main__":
    main()
